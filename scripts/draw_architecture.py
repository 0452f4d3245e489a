"""Read the package's imports, and draw the rooms with them: docs/architecture.svg.

python scripts/draw_architecture.py            draw it
python scripts/draw_architecture.py --list     print the imports between rooms instead, a line each
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
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


def between_rooms(package: Path) -> Counter[tuple[str, str]]:
    """Return how many imports go from one room of a package to another."""
    ours = [one for one in imports(package) if one.imported.split(".")[0] == package.name]
    pairs = Counter((room(one.importer), room(one.imported)) for one in ours)
    return Counter({pair: count for pair, count in pairs.items() if pair[0] and pair[0] != pair[1]})


def lines(package: Path) -> Counter[str]:
    """Return how many lines of Python each room has."""
    found: Counter[str] = Counter()
    for module, path in modules(package).items():
        found[room(module)] += len(path.read_text(encoding="utf-8").splitlines())
    return found


PLACES = {
    "cli": 5.0, "pipeline": 2.6, "export": 8.4, "evaluation": 6.2, "training": 3.6, "data": 8.0, "config": 0.9,
    "tasks": 6.2, "teachers": 2.2, "models": 4.2, "losses": 7.4,
}  # fmt: skip
"""Where the rooms stand on their floors, from left to right; the ground floors are as wide as the house."""
GROUND = ("runtime", "types")


def draw(package: Path, picture: Path) -> None:
    """Draw the rooms on their floors, and an arrow from each to those that it imports, with the number of imports.

    Each arrow's `id` in the file is `imports-FROM-TO`, so that a test can read what is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    settings = {"svg.fonttype": "none", "svg.hashsalt": "rooms", "font.family": "sans-serif"}
    counts, sizes = between_rooms(package), lines(package)
    heights = {name: 1.5 * (len(LAYERS) - 1 - floor) for floor, layer in enumerate(LAYERS) for name in layer}
    colours = dict(zip(PLACES, pyplot.get_cmap("tab20").colors[::2] * 2, strict=False))  # type: ignore[attr-defined]
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(11, 12))
        upper = {pair: count for pair, count in sorted(counts.items()) if pair[1] not in GROUND}
        for (above, below), count in upper.items():
            start = _spread(above, [other for one, other in upper if one == above], below), heights[above] - 0.33
            end = _spread(below, [one for one, other in upper if other == below], above), heights[below] + 0.33
            bend = 0.1 if start[0] >= end[0] else -0.1
            arrow = FancyArrowPatch(
                start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=10, shrinkA=0,
                shrinkB=1, linewidth=0.7 + 0.08 * count, color=colours[above], gid=f"imports-{above}-{below}",
            )  # fmt: skip
            axes.add_patch(arrow)
            axes.text(
                *_free(start, end, bend, heights), str(count), fontsize=8, ha="center", va="center", zorder=2.5,
                color=colours[above], fontweight="bold",
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.9},
            )  # fmt: skip
        for name, height in heights.items():
            width, place = (9.6, 5.0) if name in GROUND else (1.7, PLACES[name])
            box = FancyBboxPatch(
                (place - width / 2, height - 0.33), width, 0.66, boxstyle="round,pad=0,rounding_size=0.1", zorder=3,
                facecolor="white", edgecolor=colours.get(name, "#555555"), linewidth=2, gid=f"room-{name}",
            )  # fmt: skip
            axes.add_patch(box)
            said = f"{sizes[name]:,} lines"
            if name in GROUND:
                users = [count for (_, below), count in counts.items() if below == name]
                said += f", imported {sum(users)} times by {len(users)} rooms"
            axes.text(place, height + 0.1, name, ha="center", va="center", fontsize=12, fontweight="bold", zorder=4)
            axes.text(place, height - 0.17, said, ha="center", va="center", fontsize=8, color="#444444", zorder=4)
        axes.set(xlim=(-0.1, 10.1), ylim=(-0.6, max(heights.values()) + 0.5))
        axes.axis("off")
        figure.savefig(picture, bbox_inches="tight", metadata={"Date": None} if picture.suffix == ".svg" else None)
        pyplot.close(figure)


def _spread(name: str, others: list[str], other: str) -> float:
    """Return where on a room's edge the arrow from or to another room stands: in their order from left to right."""
    ordered = sorted(others, key=lambda one: PLACES[one])
    return PLACES[name] + 1.4 * ((ordered.index(other) + 1) / (len(ordered) + 1) - 0.5)


def _free(
    start: tuple[float, float], end: tuple[float, float], bend: float, heights: dict[str, float]
) -> tuple[float, float]:
    """Return a point of an arrow for its number, where no room covers it."""
    points = [_on_arc(start, end, bend, share) for share in (0.3, 0.7, 0.5, 0.2, 0.8)]
    clear = [
        (x, y) for x, y in points
        if not any(abs(x - PLACES[name]) < 1 and abs(y - heights[name]) < 0.45 for name in PLACES)
    ]  # fmt: skip
    return (clear or points)[0]


def _on_arc(start: tuple[float, float], end: tuple[float, float], bend: float, share: float) -> tuple[float, float]:
    """Return a point of matplotlib's `arc3`, a quadratic Bezier curve."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    control = ((start[0] + end[0]) / 2 + bend * dy, (start[1] + end[1]) / 2 - bend * dx)
    rest = 1 - share
    x, y = (
        rest * rest * one + 2 * rest * share * middle + share * share * other
        for one, middle, other in zip(start, control, end, strict=True)
    )
    return x, y


def main() -> None:
    """Draw, or print."""
    if sys.argv[1:] == ["--list"]:
        for (above, below), count in sorted(between_rooms(PACKAGE).items()):
            print(f"{above} -> {below}: {count}")
    else:
        draw(PACKAGE, PICTURE)


if __name__ == "__main__":
    main()
