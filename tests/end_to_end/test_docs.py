"""The pages of docs/ are true: their commands are commands, the tutorial runs, and the site has every page."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

import build_docs
import docs_markup
import kd_lightning as kd
from kd_lightning.cli.__main__ import commands
from kd_lightning.config.schema import RunConfig
from tests import ROOT
from tests.conftest import write_toy_csv

Composed = Callable[..., DictConfig]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def shown(page: Path) -> list[str]:
    """Return the commands of a page's code, without what is said beside them."""
    blocks = re.findall(r"^```(?:bash|text)?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    plain = [re.split(r"\s{3,}(?=[^\s-])(?![\w.@/+~]+=)|\s+# ", line)[0] for line in lines]
    return [re.sub(r"^kd[- ]", "", line) for line in plain if re.match(r"kd[- ][a-z]", line)]


COMMANDS = sorted({(page.name, line) for page in [*PAGES, ROOT / "README.md"] for line in shown(page)})


class Parsed(Exception):
    """A command's arguments are known to it."""


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda text: text)
def test_every_command_is_one(
    page: str, line: str, composed: Composed, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is given composes, or are options that it has; nothing is trained."""
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(line.replace("NAME", "minilm").replace(" ...", ""))
    if name == "train" or (name == "cache" and arguments[0] == "build"):
        given = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
        if "experiment=minilm" in given or "--config-dir" in arguments:
            return  # stands for any of them; the README's own files are tested with it
        sweeps = "-m" in arguments
        overrides = [one.split(",")[0] if sweeps and "[" not in one else one for one in given]
        plain = [one for one in overrides if not one.startswith("hydra")]
        assert RunConfig.parse(composed(*plain)).name
        return
    module = importlib.import_module(commands()[name][0])
    if name in ("cli", "config", "slurm"):
        return  # a command line of Lightning's, and two whose arguments are those of kd-train

    for method in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, method)

        def parse(self: Any, given: Any = None, namespace: Any = None, original: Any = original) -> None:
            original(self, arguments, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    with pytest.raises(Parsed):
        module.main(arguments)


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) > 70
    assert {line.split()[0] for _, line in COMMANDS} >= {"train", "predict", "export", "benchmark", "cache", "report"}


def test_the_site_has_every_page() -> None:
    with (ROOT / "zensical.toml").open("rb") as file:
        nav = tomllib.load(file)["project"]["nav"]
    listed = re.findall(r"'([\w.]+\.md)'", str(nav))
    assert len(listed) == len(set(listed))
    made = {*build_docs.MADE.values(), "tutorial.md", "reference.md", "losses.md"}
    assert set(listed) == {page.name for page in PAGES} | made


@pytest.mark.parametrize(
    ("folder", "text", "made"),
    [
        ("", "[a](docs/export.md#tolerances)", "[a](export.md#tolerances)"),
        ("docs", "[a](../README.md#your-own-data)", "[a](index.md#your-own-data)"),
        ("docs", "![a](../results/lm.png)", "![a](results/lm.png)"),
        ("docs", "[b](export.md)", "[b](export.md)"),
        ("docs", "[here](#tolerances)", "[here](#tolerances)"),
        ("", "[kd_lightning/types.py](kd_lightning/types.py)", "`kd_lightning/types.py`"),
        ("", "[a](https://example.com/x)", "[a](https://example.com/x)"),
    ],
)
def test_links_of_the_repository_become_those_of_the_site(folder: str, text: str, made: str) -> None:
    assert build_docs.on_site(text, folder) == made


def test_links_of_the_pages_lead_to_pages() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), (page.name, target)


def test_the_reference_has_every_public_name() -> None:
    page = build_docs.reference()
    for name in kd.__all__:
        assert f".{name}" in page
    for name in kd.data.__all__:
        if isinstance(getattr(kd.data, name), type):
            assert re.search(rf"^::: [\w.]+\.{name}$", page, re.MULTILINE), name
    assert re.search(r"^::: kd_lightning.losses.dkd.dkd$", build_docs.methods(), re.MULTILINE)


def test_docstrings_are_read_as_markdown() -> None:
    text = "Gives :math:`x^2`.\n\n.. math:: \\frac{a}{b}\n\nMore.\n\n    >>> f(2)\n    4\n\nEnd."
    made = docs_markup.docstring(text)
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in made
    assert re.search(r'\n<div class="formula"><math[^>]*display="block".*<mfrac>.*</div>\n', made)
    assert "    ```pycon\n    >>> f(2)\n    4\n    ```\n\nEnd." in made


def test_cells_become_a_page() -> None:
    script = "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n\n# %%\ny = 2\n"
    assert build_docs.tutorial(script) == "# Title\n\nText.\n\n```python\nx = 1\n```\n\n```python\ny = 2\n```\n"


@pytest.mark.slow
def test_the_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    write_toy_csv(tmp_path / "my.csv")
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "tutorial.py")], cwd=tmp_path, capture_output=True, text=True,
        timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [alone, distilled] = map(float, re.findall(r"from labels ([\d.]+), distilled ([\d.]+)", done.stdout)[0])
    assert min(alone, distilled) > 0.5  # of three classes
    assert (tmp_path / "student.pt2").is_file()
    assert "science" in done.stdout.splitlines()[0]
