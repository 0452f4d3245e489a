"""`import kd_lightning as kd`: quick, typed, with an example of every name, and named by configurations as well."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kd_lightning as kd
from kd_lightning.cli.lightning import parser
from kd_lightning.config import trust
from kd_lightning.config.instantiate import build, lookup
from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Each name is imported when it is first used: the package itself stays under a tenth of a second."""
    code = (
        "import sys; before = set(sys.modules); import kd_lightning as kd; dir(kd); print(*set(sys.modules) - before)\n"
        "kd.KDError; print(*(name for name in sys.modules if name.startswith('kd_lightning.')))\n"
        "kd.losses; print('torch' in sys.modules, 'lightning' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    first, second, third = done.stdout.splitlines()
    assert [name for name in first.split() if name.split(".")[0] not in sys.stdlib_module_names] == ["kd_lightning"]
    assert set(second.split()) == {"kd_lightning.runtime", "kd_lightning.runtime.errors"}
    assert third == "True False"


def test_the_public_names_are_those_of_the_table() -> None:
    assert sorted(kd.__all__) == list(kd.__all__) == sorted(kd._HOMES)
    assert dir(kd) == sorted([*kd.__all__, "__version__"])
    for name, home in kd._HOMES.items():
        found = getattr(kd, name)
        module = importlib.import_module(home)
        assert found is (module if isinstance(found, ModuleType) else getattr(module, name))


def test_there_are_no_other_names() -> None:
    with pytest.raises(AttributeError, match=r"module 'kd_lightning' has no attribute 'Distillation'"):
        kd.Distillation  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Distillation'"):
        exec("from kd_lightning import Distillation")


def test_type_checkers_see_the_names_of_the_table() -> None:
    """The imports under `TYPE_CHECKING` say the same as the table."""
    tree = ast.parse(Path(kd.__file__).read_text(encoding="utf-8"))
    told: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kd_lightning"):
            for alias in node.names:
                place = node.module if alias.name in vars(importlib.import_module(node.module)) else ""
                inner = f"{node.module}.{alias.name}"
                told[alias.name] = inner if kd._HOMES[alias.name] == inner else place
    assert told == kd._HOMES


@pytest.mark.slow
def test_the_names_pass_strict_type_checks(tmp_path: Path) -> None:
    uses = [f"reveal_type(kd.{name})" for name in kd.__all__]
    lines = [f"from kd_lightning import {', '.join(kd.__all__)}", "import kd_lightning as kd", *uses, "kd.Distillation"]
    (tmp_path / "mine.py").write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={ROOT}/.mypy_cache",
         "--config-file=/dev/null", "mine.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, env={"MYPYPATH": str(ROOT), "PATH": "/usr/bin"},
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith("mine.py")]
    assert len(said) == len(uses) + 1, done.stdout
    assert not [line for line in said if '"Any"' in line]
    assert 'Module has no attribute "Distillation"' in said[-1]
    assert (ROOT / "kd_lightning" / "py.typed").is_file()


def examples(name: str) -> list[str]:
    """Return what is shown of a public name: its own doctests, and the README's Python, both of which tests run."""
    thing = getattr(kd, name)
    shown = [one for one in doctest.DocTestFinder(recurse=False).find(thing, name) if one.examples]
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return [*(example.source for one in shown for example in one.examples), *blocks]


@pytest.mark.parametrize("name", kd.__all__)
def test_every_name_is_documented_and_shown_in_an_example(name: str) -> None:
    thing = getattr(kd, name)
    documented = inspect.getdoc(thing)
    assert documented
    assert len(documented.splitlines()[0]) <= 120
    others = [text for other in kd.__all__ for text in examples(other)]
    assert any(re.search(rf"\b{name}\b", text) for text in [*examples(name), *others])
    assert f"`{name}`" in README or f"kd.{name}" in README


def test_a_configuration_names_public_paths() -> None:
    line = build({"_target_": "kd_lightning.schedules.Linear", "start": 4.0, "end": 1.0})
    assert line(1.0) == 1.0
    assert type(line) is lookup("kd_lightning.training.schedules.Linear")
    for name, home in kd._HOMES.items():
        if not isinstance(getattr(kd, name), ModuleType):
            assert lookup(f"kd_lightning.{name}") is lookup(f"{home}.{name}")
    with pytest.raises(kd.KDError, match=r"did you mean 'DistillationModule'\?"):
        lookup("kd_lightning.DistilationModule")


def test_a_file_of_lightnings_command_line_names_public_paths() -> None:
    network: dict[str, Any] = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 3}}
    cooling = {"class_path": "kd_lightning.schedules.Linear", "init_args": {"start": 4.0, "end": 1.0}}
    terms = {"kd": {"class_path": "kd_lightning.losses.SoftTargetLoss", "init_args": {"temperature": cooling}}}
    arguments = {
        "student": network, "task": {"class_path": "kd_lightning.tasks.Classification", "init_args": {"classes": 3}},
        "teacher": {"class_path": "kd_lightning.FrozenTeacher", "init_args": {"network": network}},
        "objective": {"class_path": "kd_lightning.Objective", "init_args": {"terms": terms, "weights": {"kd": 1.0}}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    }  # fmt: skip
    file = {
        "model": {"class_path": "kd_lightning.DistillationModule", "init_args": arguments},
        "data": {"class_path": "kd_lightning.data.TextFiles", "init_args": {"train_file": "my.csv"}},
        "trainer": {"accelerator": "cpu", "callbacks": [{"class_path": "kd_lightning.callbacks.MeanTeacher"}]},
    }  # fmt: skip
    made = parser().instantiate_classes(parser().parse_object(file))
    assert type(made.model) is kd.DistillationModule
    assert type(made.model.teacher) is kd.FrozenTeacher
    assert type(made.data) is kd.data.TextFiles
    assert type(made.model.objective.terms["kd"].temperature) is kd.schedules.Linear


@pytest.mark.parametrize(
    ("public", "module"),
    [
        ("kd_lightning.data.TextFiles", "kd_lightning.data.sources.text_files.TextFiles"),
        ("kd_lightning.data.ImageFolder", "kd_lightning.data.sources.image_folder.ImageFolder"),
    ],
)
def test_files_of_a_run_may_name_data_by_either_path(public: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_own", set())
    for target in (public, module):
        trust.check_saved({"_target_": target}, Path("config.yaml"))


@pytest.mark.parametrize("name", [name for name in kd.__all__ if not isinstance(getattr(kd, name), ModuleType)])
def test_files_of_a_run_reach_by_a_public_path_no_more_than_by_the_modules(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_own", set())  # what runs of other tests name
    for target in (f"kd_lightning.{name}", f"{kd._HOMES[name]}.{name}"):
        with pytest.raises(kd.KDError, match="would run"):
            trust.check_saved({"_target_": target}, Path("model.json"))
