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
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def example(word: str) -> str:
    """Return the example that imports a package."""
    return next(text for text in EXAMPLES if f"import {word}" in text or f"from {word}" in text)


def answers(script: str, folder: Path, sentences: Sequence[str], without: Sequence[str], work: Path) -> list[Any]:
    """Run an example on an export folder and return what it prints, read."""
    (work / "answer.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-c", WITHOUT.format(names=set(without)), "answer.py", str(folder), *sentences]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(work), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
