"""The examples of docs/export.md, run as they stand in processes that cannot import what they should not need."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import ROOT

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"), re.DOTALL)

OURS = ("kd_lightning", "lightning", "lightning_utilities", "hydra", "torchmetrics")
"""What nobody who deploys a student has."""

WITHOUT = """
import runpy, sys

sys.modules.update(dict.fromkeys({names!r}))  # None: as if they were not installed
script, folders, sentences = sys.argv[1], sys.argv[2].split(":"), sys.argv[3:]
for folder in folders:
    sys.argv = [script, folder, *sentences]
    runpy.run_path(script, run_name="__main__")
"""


def example(word: str) -> str:
    """Return the example that imports a package."""
    return next(text for text in EXAMPLES if f"import {word}" in text or f"from {word}" in text)


def predictions(
    script: str, folders: Sequence[Path], sentences: Sequence[str], without: Sequence[str], work: Path
) -> list[list[Any]]:
    """Run an example on export folders, in one process, and return what it prints on each, read."""
    (work / "predict.py").write_text(script, encoding="utf-8")
    places = ":".join(map(str, folders))
    command = [sys.executable, "-c", WITHOUT.format(names=set(without)), "predict.py", places, *sentences]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(work), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(folders) * len(sentences)
    return [lines[start : start + len(sentences)] for start in range(0, len(lines), len(sentences))]
