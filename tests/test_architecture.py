"""The house stands as docs/architecture.md says: twelve rooms, imports go downward only, and in no circle.

Each rule is a function from a package's folder to what breaks it, and is shown to find that in a made-up package.
"""

from __future__ import annotations

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from draw_architecture import GROUND, LAYERS, PACKAGE, PICTURE, Import, between_rooms, draw, imports, room
from tests import ROOT

MOST_LINES = 400
FLOOR = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def ours(package: Path) -> list[Import]:
    """Return the imports of the package's own modules."""
    return [one for one in imports(package) if one.imported.split(".")[0] == package.name]


def upward(package: Path) -> list[str]:
    """Return the imports that do not go downward, and those of the package itself, which stands above all rooms."""
    found = []
    for one in ours(package):
        above, below = room(one.importer), room(one.imported)
        if above and above != below and not (below and FLOOR.get(below, -1) > FLOOR.get(above, -1)):
            found.append(f"{one.importer}:{one.line} imports {one.imported}")
    return found


def circle(found: list[Import]) -> list[str]:
    """Return modules that need each other, the first one again at the end, or none.

    Whoever imports `a.b.c` from elsewhere also imports `a.b`, whose `__init__` may import more.
    """
    graph: dict[str, set[str]] = {}
    for one in found:
        needed = graph.setdefault(one.importer, set())
        needed.add(one.imported)
        parts = one.imported.split(".")
        packages = {".".join(parts[:length]) for length in range(2, len(parts))}
        needed |= {name for name in packages if not f"{one.importer}.".startswith(f"{name}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def long_files(package: Path) -> list[str]:
    """Return the files that are to be split."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sorted(package.rglob("*.py"))}
    return [f"{path.relative_to(package)} has {count} lines" for path, count in lines.items() if count > MOST_LINES]


def entries(package: Path) -> list[str]:
    """Return what stands at the package's top level, but for conf/ of a wheel and the marker for type checkers."""
    return sorted(path.name for path in package.iterdir() if path.name not in ("__pycache__", "conf", "py.typed"))


def homeless(package: Path) -> list[str]:
    """Return modules that stand in no room, and folders with modules that Python does not take for packages."""
    top = [name for name in entries(package) if name != "__init__.py"]
    files = [path for path in package.rglob("*.py") if not (path.parent / "__init__.py").is_file()]
    return [name for name in top if name.removesuffix(".py") not in FLOOR] + [str(path) for path in files]


def needless(package: Path, floor: str, allowed: tuple[str, ...]) -> list[str]:
    """Return a room's imports of anything else than the standard library and what is allowed."""
    found = []
    for one in imports(package):
        known = one.imported.split(".")[0] in sys.stdlib_module_names
        if room(one.importer) == floor and not known and not f"{one.imported}.".startswith(allowed):
            found.append(f"{one.importer}:{one.line} imports {one.imported}")
    return found


def type_questions(package: Path) -> list[str]:
    """Return where somebody outside of tasks/ asks of which type a task is: that is the wall this house has no more."""
    kinds = {"Classification", "Regression", "MultiTask"}
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] == "tasks":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                names = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                names |= {name.attr for name in ast.walk(node.args[1]) if isinstance(name, ast.Attribute)}
                found += [f"{path.relative_to(package)}:{node.lineno}"] * bool(names & kinds)
    return found


def beside_a_task(package: Path) -> list[str]:
    """Return the functions that are given a number of classes beside the task that knows it."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
                found += [f"{path.relative_to(package)}:{node.name}"] * ({"task", "num_classes"} <= names)
    return found


LOSSES = ("torch.", "kd_lightning.losses.", "kd_lightning.types.")


def test_imports_go_downward() -> None:
    assert upward(PACKAGE) == []


def test_no_modules_need_each_other() -> None:
    assert circle(ours(PACKAGE)) == []


def test_the_top_level_has_few_entries_and_every_module_a_room() -> None:
    assert len(entries(PACKAGE)) <= 14
    assert homeless(PACKAGE) == []


def test_files_are_short(tmp_path: Path) -> None:
    assert long_files(PACKAGE) == []
    (tmp_path / "long.py").write_text("x = 1\n" * (MOST_LINES + 1))
    (tmp_path / "short.py").write_text("x = 1\n" * MOST_LINES)
    assert long_files(tmp_path) == [f"long.py has {MOST_LINES + 1} lines"]


def test_losses_need_torch_and_nothing_else() -> None:
    assert needless(PACKAGE, "losses", LOSSES) == []


def drawn(picture: Path) -> tuple[set[str], set[tuple[str, ...]]]:
    """Return the rooms and the arrows of a picture."""
    text = picture.read_text(encoding="utf-8")
    arrows = {tuple(pair) for pair in re.findall(r'id="imports-(\w+)-(\w+)"', text)}
    return set(re.findall(r'id="room-(\w+)"', text)), arrows


def test_the_picture_shows_the_imports() -> None:
    """Its numbers are of the day it was drawn, its arrows are today's: scripts/draw_architecture.py draws it again."""
    rooms, arrows = drawn(PICTURE)
    assert rooms == set(FLOOR)
    assert arrows == {pair for pair in between_rooms(PACKAGE) if pair[1] not in GROUND}


def test_the_page_names_every_room_and_no_file_that_is_not_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [name for name in FLOOR if f"\n**{name}** " not in page] == []
    files = set(re.findall(r"`([\w/]+\.(?:py|md|toml|yaml))`", page))
    places = [path.as_posix() for path in (*PACKAGE.rglob("*.py"), *ROOT.glob("*.*"), *(ROOT / "docs").glob("*"))]
    places += [path.as_posix() for path in (*(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").glob("*.py"))]
    places += [path.as_posix() for path in (ROOT / "conf").rglob("*.yaml")]
    lacking = [file for file in files if "NAME" not in file and not any(p.endswith(f"/{file}") for p in places)]
    assert lacking == []
    assert "(docs/architecture.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def made_up(folder: Path, **files: str) -> Path:
    """Write a package of the rooms' names; `pipeline__run` is pipeline/run.py."""
    package = folder / "kd_lightning"
    for name, text in {"__init__": "", **files}.items():
        path = package / f"{'/'.join(name.split('__')) if name != '__init__' else name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for parent in path.parents:
            if parent.is_relative_to(package):
                (parent / "__init__.py").touch()
    return package


UPWARD = {
    "from a module": "from kd_lightning.pipeline.run import train_all",
    "a module from its room": "from kd_lightning.pipeline import run",
    "beside others": "from kd_lightning.runtime import files, processes\nfrom kd_lightning.pipeline import other, run",
    "by its whole name": "import os, kd_lightning.pipeline.run",
    "under another name": "import kd_lightning.pipeline.run as run",
    "relative": "from ..pipeline import run",
    "relative, a name": "from ..pipeline.run import train_all",
    "inside a function": "def f():\n    from kd_lightning.pipeline import run\n    return run",
    "for type checkers": "import typing\nif typing.TYPE_CHECKING:\n    from kd_lightning.pipeline import run",
    "where it may be missing": "try:\n    import kd_lightning.pipeline.run\nexcept ImportError:\n    pass",
    "a public name": "from kd_lightning import Objective",
    "a room by its public name": "from kd_lightning import pipeline",
    "the package": "import kd_lightning as kd",
}


@pytest.mark.parametrize("text", UPWARD.values(), ids=UPWARD)
def test_an_import_upward_is_found_however_it_is_written(text: str, tmp_path: Path) -> None:
    fine = "from kd_lightning.types import Batch\nfrom kd_lightning.losses import dkd\n"
    package = made_up(tmp_path, training__fit=fine, losses__dkd="import torch", types="", pipeline__run="")
    assert upward(package) == []
    (package / "training" / "fit.py").write_text(text, encoding="utf-8")
    found = upward(package)
    assert found
    assert all(line.startswith("kd_lightning.training.fit:") for line in found)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("pipeline", "export"), ("export", "pipeline"), ("tasks", "teachers"), ("types", "runtime")],
)
def test_rooms_of_one_floor_do_not_import_each_other(importer: str, imported: str, tmp_path: Path) -> None:
    package = made_up(tmp_path, **{f"{importer}__a": f"from kd_lightning.{imported}.b import c", f"{imported}__b": ""})
    assert upward(package) == [f"kd_lightning.{importer}.a:1 imports kd_lightning.{imported}.b"]


def test_the_package_itself_may_import_every_room(tmp_path: Path) -> None:
    package = made_up(tmp_path, cli__train="", types="")
    (package / "__init__.py").write_text("from kd_lightning import cli\nfrom kd_lightning.cli.train import main")
    assert upward(package) == []
    assert circle(ours(package)) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = made_up(
        tmp_path, data__a="from kd_lightning.data.b import b", data__b="import kd_lightning.data.c",
        data__c="def f():\n    from kd_lightning.data import a", tasks__base="",
    )  # fmt: skip
    found = circle(ours(package))
    assert found[0] == found[-1]
    assert set(found) == {f"kd_lightning.data.{name}" for name in "abc"}


def test_a_circle_through_a_package_is_found(tmp_path: Path) -> None:
    """a needs only `teachers.cache.store`, but that comes with `teachers/__init__`, which needs a."""
    package = made_up(tmp_path, tasks__a="from kd_lightning.teachers.cache.store import x", teachers__cache__store="")
    assert circle(ours(package)) == []
    (package / "teachers" / "__init__.py").write_text("from kd_lightning.tasks.a import y", encoding="utf-8")
    assert set(circle(ours(package))) == {"kd_lightning.tasks.a", "kd_lightning.teachers"}


def test_a_package_that_imports_its_own_modules_is_no_circle(tmp_path: Path) -> None:
    package = made_up(tmp_path, tasks__a="from kd_lightning.tasks.b import x", tasks__b="")
    (package / "tasks" / "__init__.py").write_text("from kd_lightning.tasks.a import y", encoding="utf-8")
    assert circle(ours(package)) == []
    (package / "tasks" / "b.py").write_text("from kd_lightning.tasks import y", encoding="utf-8")
    assert set(circle(ours(package))) == {f"kd_lightning.tasks{name}" for name in ("", ".a", ".b")}


def test_a_module_outside_of_the_rooms_is_found(tmp_path: Path) -> None:
    package = made_up(tmp_path, helpers="", tasks__base="", attic__old="")
    (package / "models").mkdir()
    (package / "models" / "cnn.py").touch()
    (package / "conf").mkdir()
    assert entries(package) == ["__init__.py", "attic", "helpers.py", "models", "tasks"]
    assert homeless(package) == ["attic", "helpers.py", str(package / "models" / "cnn.py")]


@pytest.mark.parametrize(
    "text", ["import numpy as np", "from kd_lightning.runtime.files import x", "import torchvision"]
)
def test_a_loss_that_needs_more_is_found(text: str, tmp_path: Path) -> None:
    fine = "import math\nimport torch.nn.functional as F\nfrom torch import nn\nfrom kd_lightning.types import Batch\n"
    package = made_up(tmp_path, losses__a=f"{fine}from kd_lightning.losses.b import b", losses__b=fine, types="")
    assert needless(package, "losses", LOSSES) == []
    (package / "losses" / "b.py").write_text(f"def f():\n    {text}", encoding="utf-8")
    assert len(needless(package, "losses", LOSSES)) == 1


def test_nobody_outside_of_tasks_asks_for_a_tasks_type(tmp_path: Path) -> None:
    assert type_questions(PACKAGE) == []
    assert beside_a_task(PACKAGE) == []
    for name in ("tasks", "export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = isinstance(task, (tasks.Regression, int))\nisinstance(task, Task)\n")
    (tmp_path / "b.py").write_text("def module(task, *, num_classes): ...\ndef network(num_classes): ...\n")
    assert type_questions(tmp_path) == ["export/a.py:1"]
    assert beside_a_task(tmp_path) == ["b.py:module"]


def test_a_picture_of_other_imports_is_another_picture(tmp_path: Path) -> None:
    package = made_up(tmp_path, data__a="from kd_lightning.tasks import b", tasks__b="", types="")
    draw(package, tmp_path / "one.svg")
    assert drawn(tmp_path / "one.svg") == (set(FLOOR), {("data", "tasks")})
    (package / "data" / "a.py").write_text("from kd_lightning.config import c", encoding="utf-8")
    draw(package, tmp_path / "other.svg")
    assert drawn(tmp_path / "other.svg")[1] == {("data", "config")}
