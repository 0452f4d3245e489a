"""Commands that are killed, and begun again: they finish, to the same bits, and leave nothing behind."""

from __future__ import annotations

import random
import subprocess
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from faults.events import counting, ending
from faults.process import Outcome, command
from faults.toy import SETTINGS, Place, contents, differences, new_place, plain, write_sentences

TEXTS = ("goal the team", "an atom in the lab", "soup and bread", "it was very today", "match theory cook")
SHARES = {"SIGKILL": 6, "torn": 2, "SIGTERM": 1, "SIGINT": 1}
"""How many kills of ten come in which way."""


@dataclass(frozen=True)
class Scene:
    """A command, and what is there before it.

    Attributes:
        name: Of the command, as the table has it.
        line: It.
        place: What is there before it.
        events: How many events it has, see `events.py`.
        expected: What is there after it, see `toy.contents`.
        out: What it prints; None where that has times in it.
    """

    name: str
    line: tuple[str, ...]
    place: Place
    events: int
    expected: dict[str, str]
    out: str | None


LINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "kd-train": ("nothing", ("kd-train", *SETTINGS, "data.train_file=DATA", "run_dir=runs/run")),
    "kd-cache build": (
        "teacher",
        ("kd-cache", "build", *SETTINGS, "data.train_file=DATA", "teacher.checkpoint=runs/run", "run_dir=runs/new"),
    ),
    "kd-export safetensors": ("finished", ("kd-export", "runs/run", "--format", "safetensors", "--out", "out")),
    "kd-export onnx": ("finished", ("kd-export", "runs/run", "--format", "onnx", "--out", "out")),
    "kd-eval": ("finished", ("kd-eval", "runs/run", "--json")),
    "kd-predict": ("finished", ("kd-predict", "runs/run", "--file", "texts.txt", "--json")),
    "kd-report": ("sweep", ("kd-report", "runs/sweep")),
    "kd-benchmark": ("finished", ("kd-benchmark", "runs/run")),
}
"""Commands by name: what is there before, and what is typed."""

PRINTED = ("kd-eval", "kd-predict")
SLOW = ("kd-export onnx", "kd-eval", "kd-benchmark")
"""Left out where there is a minute for all."""


def places(folder: Path) -> dict[str, Place]:
    """Make what has to be there before the commands: a teacher, a finished run, a sweep."""
    data = write_sentences(folder / "toy.csv")
    train = ("kd-train", *SETTINGS, f"data.train_file={data}")
    found = {"nothing": new_place(folder / "nothing")}
    found["teacher"] = found["nothing"].copied(folder / "teacher")
    require(found["teacher"], *train, "run_dir=runs/run", "stages=[teacher]")
    found["finished"] = found["nothing"].copied(folder / "finished")
    (found["finished"].work / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    require(found["finished"], *train, "run_dir=runs/run")
    found["sweep"] = found["teacher"].copied(folder / "sweep")
    swept = (
        "stages=[baseline,distill]",
        "teacher.checkpoint=runs/run",
        "temperature=1,4",
        "hydra.sweep.dir=runs/sweep",
    )
    require(found["sweep"], train[0], "-m", *train[1:], *swept)
    return found


def require(place: Place, *line: str) -> Outcome:
    """Run a command that has to succeed."""
    ended = command(line, place.work, place.home, prepare=prepared)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(line)} ended with {ended.code}:\n{ended.err[-3000:]}")
    return ended


def scenes(folder: Path, names: list[str]) -> Iterator[Scene]:
    """Run every command twice undisturbed; what both leave is what killed ones have to leave."""
    there = places(folder)
    for number, name in enumerate(names):
        before, line = LINES[name]
        typed = tuple(word.replace("DATA", str(folder / "toy.csv")) for word in line)
        first, second = (there[before].copied(folder / f"{kind}-{number}") for kind in ("counted", "again"))
        note = folder / f"events-{number}"
        begin = counting(first.root, note)
        ended = command(typed, first.work, first.home, prepare=lambda begin=begin: (prepared(), begin()))
        if ended.code != 0:
            raise RuntimeError(f"{name} ended with {ended.code}:\n{ended.err[-3000:]}")
        again = require(second, *typed)
        expected = contents(first)
        if changed := [text for text in differences(expected, contents(second)).values() if text]:
            raise RuntimeError(f"{name}: two undisturbed runs differ in {changed}")
        out = None
        if name in PRINTED:
            out = told(ended, first)
            assert out == told(again, second)
        yield Scene(name, typed, there[before], len(note.read_text(encoding="utf-8").splitlines()), expected, out)


def told(ended: Outcome, place: Place) -> str:
    """Return what a command printed, whatever the place."""
    return ended.out.replace(str(place.root), "ROOT")


def trials(folder: Path, seed: int, count: int, quick: bool = False) -> list[Callable[[], dict[str, Any]]]:
    """Return so many kills of each command, drawn by the seed; the two exports share theirs."""
    found: list[Callable[[], dict[str, Any]]] = []
    for scene in scenes(folder / "scenes", [name for name in LINES if not quick or name not in SLOW]):
        draw = random.Random(f"{seed} {scene.name}")
        for number in range(-(-count // 2) if scene.name.startswith("kd-export") else count):
            [way] = draw.choices(list(SHARES), list(SHARES.values()))
            at, size = draw.randint(1, scene.events), draw.choice((0, 1, 100, 1000, 4096))
            root = folder / f"{scene.name.replace(' ', '-')}-{number}"
            found.append(partial(trial, scene, root, at, way, size))
    return found


def trial(scene: Scene, root: Path, at: int, way: str, size: int) -> dict[str, Any]:
    """Kill a command at an event, begin it again, and look at what it leaves."""
    place, note = scene.place.copied(root), root / "note"
    begin = ending(root, note, at, way, size)
    killed = command(scene.line, place.work, place.home, prepare=lambda: (prepared(), begin()))
    happened = plain(note.read_text(encoding="utf-8")) if note.exists() else "nothing"
    said = {
        "group": "kills", "what": scene.name, "how": f"{way} at event {at} of {scene.events} ({happened})",
        "command": " ".join(scene.line), "first": {"code": killed.code, "err": killed.err[-2000:]},
    }  # fmt: skip
    whole = contents(place) == scene.expected
    wrong = ill_ended(killed, way, whole)
    again = command(scene.line, place.work, place.home, prepare=prepared)
    said["second"] = {"code": again.code, "err": again.err[-2000:]}
    if whole and again.code == 2 and "is not empty" in again.last:
        return said | {"outcome": wrong or "finished"}  # it was finished when the kill came
    if again.code != 0:
        return said | {"outcome": "traceback" if again.crashed else "not finished", "detail": again.last}
    apart = {kind: names for kind, names in differences(scene.expected, contents(place)).items() if names}
    if apart:
        worst = "other result" if apart.keys() - {"left behind"} else "left behind"
        return said | {"outcome": worst, "detail": str(apart)}
    if scene.out is not None and told(again, place) != scene.out:
        return said | {"outcome": "other result", "detail": told(again, place)[-1000:]}
    return said | {"outcome": wrong or "finished"}


def ill_ended(killed: Outcome, way: str, whole: bool) -> str | None:
    """Say what is wrong with how a command took a signal; a kill leaves it no choice."""
    if killed.code is None:
        return "hung"
    if killed.crashed:
        return "traceback"
    if way in ("SIGTERM", "SIGINT") and killed.code == 0 and not whole:
        return "unfinished, exit 0"
    return None


def prepared() -> None:
    """Have a benchmark measure memory in forks, too, instead of in processes that import everything anew."""
    from kd_lightning.export import benchmark

    given = {"run": _measured, "TimeoutExpired": subprocess.TimeoutExpired}
    benchmark.subprocess = types.SimpleNamespace(**given)  # type: ignore[attr-defined]


def _measured(line: list[str], **_: Any) -> types.SimpleNamespace:
    import contextlib
    import io
    import sys

    from faults.process import forked
    from kd_lightning.export import peak

    def measure() -> str:
        sys.argv = line[line.index("-m") + 1 :]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            peak.main()
        return out.getvalue()

    return types.SimpleNamespace(returncode=0, stdout=forked(measure), stderr="")
