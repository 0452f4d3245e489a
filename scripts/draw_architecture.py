"""Read the package's imports, and draw the rooms with them: docs/architecture.svg.

python scripts/draw_architecture.py            draw it
python scripts/draw_architecture.py --list     print the imports between rooms instead, a line each
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kd_lightning"
PICTURE = ROOT / "docs" / "architecture.svg"
LAYERS = (
    ("cli",),
    ("pipeline", "export"),
    ("evaluation",),
    ("training",),
    ("data",),
    ("config",),
    ("tasks", "teachers"),
    ("models",),
    ("losses",),
    ("runtime",),
    ("types",),
)
"""The rooms from the top floor to the bottom. A room imports from floors below its own, never from one beside it."""


@dataclass(frozen=True)
class Import:
    """One import statement's module.

    Attributes:
        importer: The module that imports, such as `kd_lightning.training.fit`.
        imported: The module that is imported; of another package its name as it stands in the statement.
        line: Where.
    """

    importer: str
    imported: str
    line: int


def modules(package: Path) -> dict[str, Path]:
    """Return the files of a package by the names of their modules."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(package: Path) -> list[Import]:
    """Return every import of a package's modules: also those inside functions and under `TYPE_CHECKING`."""
    known, found = modules(package), []
    for module, path in known.items():
        home = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _named(node, home, known):
                if name != module:
                    found.append(Import(module, name, node.lineno))  # type: ignore[attr-defined]
    return found


def _named(node: ast.AST, home: str, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules that a statement imports: `from package import module` is an import of that module.

    Where what is imported is a name of the top package it is an import of that package, which looks it up.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = home.split(".")[: len(home.split(".")) - node.level + 1] if node.level else []
        origin = ".".join([*above, *([node.module] if node.module else [])])
        inside = {f"{origin}.{alias.name}" for alias in node.names} & known.keys()
        if len(inside) < len(node.names) or "." not in origin:
            yield origin
        yield from sorted(inside)


def room(module: str) -> str:
    """Return the room that a module stands in; of the package itself "".

    >>> room("kd_lightning.export.formats.onnx")
    'export'
    """
    return ([*module.split("."), ""])[1]


def between_rooms(found: list[Import]) -> dict[tuple[str, str], int]:
    """Return how many imports go from one room to another."""
    counts: dict[tuple[str, str], int] = {}
    for one in found:
        if one.imported.split(".")[0] != one.importer.split(".")[0]:
            continue
        pair = room(one.importer), room(one.imported)
        if pair[0] and pair[0] != pair[1]:
            counts[pair] = counts.get(pair, 0) + 1
    return counts
