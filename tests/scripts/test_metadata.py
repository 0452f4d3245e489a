"""What stands around the package is true of it: version, licence, the changelog, the page for contributors."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import kd_lightning
from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_and_licence_are_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == kd_lightning.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["authors"] == PROJECT["authors"]
    assert f"\n## {kd_lightning.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_the_page_for_contributors_names_what_is_there() -> None:
    page, targets = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "Makefile").read_text()
    made = {
        target for line in re.findall(r"^make ([a-z -]+?)\s*(?:#|$)", page, re.MULTILINE) for target in line.split()
    }
    assert made == {"install", "lint", "type", "test", "test-all"}
    assert all(f"\n{target}: " in targets for target in made)
    named = re.findall(r"`((?:kd_lightning|conf|scripts|tests|docs|results)/[\w./]*)`|\]\(([\w./]+)\)", page)
    named += [(name, "") for name in re.findall(r"pytest -q (\S+)", page)]
    assert len(named) > 12
    assert [one or other for one, other in named if not (ROOT / (one or other)).exists()] == []
    assert len(page.splitlines()) <= 60, "one page"


@pytest.mark.slow
def test_wheel_and_sdist_are_whole_and_their_page_renders(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    [sdist], [wheel] = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "README.md", "PKG-INFO"} <= names
    with zipfile.ZipFile(wheel) as files:
        packed = set(files.namelist())
        [metadata] = [name for name in packed if name.endswith("/METADATA")]
        text = files.read(metadata).decode()
    assert {"kd_lightning/evaluation/report/run.html", "kd_lightning/evaluation/report/style.css"} <= packed
    assert "License-Expression: Apache-2.0\nLicense-File: LICENSE\n" in text
    pytest.importorskip("twine", reason="twine is not installed: pip install twine")
    check = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
