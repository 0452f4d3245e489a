"""Files that are damaged: what reads them ends with the right result, or in one line."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from faults.events import ending
from faults.kills import TEXTS, prepared, require, told
from faults.process import Outcome, command
from faults.toy import SETTINGS, Place, contents, new_place, plain, write_sentences

KINDS = ("bit flipped", "cut short", "deleted", "emptied", "exchanged", "zeros")
READING: dict[str, tuple[str, ...]] = {
    "predict": ("kd-predict", "runs/run", *TEXTS, "--json"),
    "evaluate": ("kd-eval", "runs/run", "--json"),
    "teacher's words": ("kd-predict", "runs/run/teacher", *TEXTS, "--json"),
    "export": ("kd-export", "runs/run", "--format", "safetensors", "--out", "out"),
    "train again": ("kd-train", *SETTINGS, "data.train_file=DATA", "run_dir=runs/run"),
    "teach another": (
        "kd-train", *SETTINGS, "data.train_file=DATA", "run_dir=runs/new", "teacher.checkpoint=runs/run",
        "stages=[distill]",
    ),
    "verify the cache": ("kd-cache", "verify", "CACHE"),
    "predict with safetensors": ("kd-predict", "safetensors", *TEXTS, "--json"),
    "predict with huggingface": ("kd-predict", "huggingface", *TEXTS, "--json"),
    "predict with onnx": ("kd-predict", "onnx", *TEXTS, "--json"),
    "go on": ("kd-train", *SETTINGS, "data.train_file=DATA", "run_dir=runs/begun"),
}  # fmt: skip
"""What is done after the damage; `DATA` and `CACHE` stand for paths."""
IN_THE_RUN = ("predict", "evaluate", "teacher's words", "export", "train again", "teach another")
IN_THE_HOME = ("train again", "teach another", "evaluate", "verify the cache")
PRINTS = ("predict", "evaluate", "teacher's words")
DECIDING = (".safetensors", "model.json", "task.json", "stage.json", "report.json", "tokenizer.json", ".onnx")
"""Ends of the names of files in which a training's or an export's result is."""
ENCODER = (
    *(setting for setting in SETTINGS if "student" not in setting), "model@student=transformer",
    "student.hidden_size=16", "student.num_layers=1", "student.intermediate_size=16", "student.max_length=64",
    "teacher.checkpoint=runs/run",
)  # fmt: skip
"""Of a student that can be exported for transformers."""


@dataclass(frozen=True)
class Scene:
    """What there is to damage, and what commands do with it when it is whole.

    Attributes:
        place: A finished run, an interrupted one, exports and a cache.
        lines: What is done, by what it is called in the table.
        right: What each prints, or leaves in the files that decide.
    """

    place: Place
    lines: dict[str, tuple[str, ...]]
    right: dict[str, Any]


def scene(folder: Path, quick: bool) -> Scene:
    """Make all that is damaged (where there is little time one export), and have every command read it undamaged."""
    data = write_sentences(folder / "toy.csv")
    place = new_place(folder / "whole")
    train = ("kd-train", *SETTINGS, f"data.train_file={data}")
    require(place, *train, "run_dir=runs/run")
    require(place, *train, "run_dir=runs/other", "seed=7", "teacher.seed=7", "teacher.cache=off")
    exports = {"safetensors": "runs/run"}
    if not quick:
        require(place, "kd-train", *ENCODER, f"data.train_file={data}", "run_dir=runs/encoder", "stages=[distill]")
        exports |= {"onnx": "runs/run", "huggingface": "runs/encoder"}
    for name, run in exports.items():
        require(place, "kd-export", run, "--format", name, "--out", name)
    begun = (*train, "run_dir=runs/begun")
    stopped = ending(place.root, folder / "note", _step(folder, begun), "SIGKILL", 0)
    command(begun, place.work, place.home, prepare=lambda: (prepared(), stopped()))
    assert (place.work / "runs/begun/seed_0/distill/checkpoints/resume.ckpt").is_file()
    cache = next((place.home / "teacher_outputs").glob("*/manifest.json")).parent
    known = {"DATA": str(data), "CACHE": f"../home/teacher_outputs/{cache.name}"}
    lines = {
        name: tuple(next((w.replace(k, v) for k, v in known.items() if k in w), w) for w in line)
        for name, line in READING.items()
        if name.removeprefix("predict with ") in exports or not name.startswith("predict with ")
    }
    right = {}
    for name, line in lines.items():
        there = place.copied(folder / f"right-{name.replace(' ', '-')}")
        right[name] = _result(name, require(there, *line), there)
        shutil.rmtree(there.root)
    return Scene(place, lines, right)


def _step(folder: Path, line: tuple[str, ...]) -> int:
    """Return which event of a whole run is some steps into its distillation."""
    from faults.events import counting

    place = new_place(folder / "listed")
    note = folder / "listed-events"
    begin = counting(place.root, note)
    command(line, place.work, place.home, prepare=lambda: (prepared(), begin()))
    events = note.read_text(encoding="utf-8").splitlines()
    begun = next(n for n, event in enumerate(events) if "distill" in event and "resume.ckpt" in event)
    steps = [n for n, event in enumerate(events) if event == "step" and n > begun]
    return steps[3] + 1


def _result(name: str, ended: Outcome, place: Place) -> Any:
    if name.startswith("predict") or name in PRINTS:
        return told(ended, place)
    if name == "verify the cache":
        return ended.code
    run = {"train again": "runs/run", "teach another": "runs/new", "go on": "runs/begun", "export": "out"}[name]
    found = contents(place)
    return {file: found[file] for file in found if file.startswith(f"work/{run}/") and file.endswith(DECIDING)}


def trials(folder: Path, seed: int, count: int, quick: bool = False) -> list[Callable[[], dict[str, Any]]]:
    """Return so many damages, each of a file, in a way and before a command, all drawn by the seed."""
    whole = scene(folder / "scene", quick)
    draw = random.Random(f"{seed} damages")
    found: list[Callable[[], dict[str, Any]]] = []
    for number in range(count):
        area, names = draw.choice([area for area in _areas().items() if area[1][0] in whole.lines])
        file, reader = draw.choice(_files(whole.place, area)), draw.choice(names)
        found.append(
            partial(trial, whole, folder / f"damage-{number}", file, draw.choice(KINDS), reader, draw.randrange(2**32))
        )
    return found


def _areas() -> dict[str, tuple[str, ...]]:
    """Return the folders that are damaged, and what reads each."""
    return {
        "work/runs/run": IN_THE_RUN, "work/runs/run/": IN_THE_RUN, "work/runs/run/seed_0/distill": IN_THE_RUN,
        "home": IN_THE_HOME, "work/safetensors": ("predict with safetensors",),
        "work/huggingface": ("predict with huggingface",), "work/onnx": ("predict with onnx",),
        "work/runs/begun/seed_0/distill": ("go on",),
    }  # fmt: skip


def _files(place: Place, area: str) -> list[str]:
    files = [file for file in sorted((place.root / area).rglob("*")) if file.is_file() and file.suffix != ".lock"]
    return [str(file.relative_to(place.root)) for file in files if file.name != ".lock"]


def trial(whole: Scene, root: Path, file: str, kind: str, reader: str, seed: int) -> dict[str, Any]:
    """Damage a file, and see what a command makes of it."""
    place = whole.place.copied(root)
    detail = damage(place.root / file, kind, random.Random(seed), place)
    line = whole.lines[reader]
    ended = command(line, place.work, place.home, prepare=prepared)
    said = {
        "group": "damages", "what": reader, "how": f"{plain(file)} {kind}{detail}", "command": " ".join(line),
        "first": {"code": ended.code, "err": ended.err[-2000:]},
    }  # fmt: skip
    return said | judged(whole, reader, ended, place)


def judged(whole: Scene, reader: str, ended: Outcome, place: Place) -> dict[str, Any]:
    """Say how a command ended that read something damaged."""
    if ended.code is None:
        return {"outcome": "hung"}
    if ended.crashed or ended.code < 0:
        return {"outcome": "traceback", "detail": ended.last}
    if ended.code != 0:
        if reader == "verify the cache":
            return {"outcome": "refused in a line"}
        return {"outcome": "refused in a line" if ended.in_one_line else "at length", "detail": ended.last}
    result = _result(reader, ended, place)
    if result == whole.right[reader]:
        return {"outcome": "right"}
    if isinstance(result, dict):
        apart = sorted(
            k for k in result.keys() | whole.right[reader].keys() if result.get(k) != whole.right[reader].get(k)
        )
        return {"outcome": "silently wrong", "detail": str(apart)}
    return {"outcome": "silently wrong", "detail": str(result)[:1000]}


def damage(file: Path, kind: str, draw: random.Random, place: Place) -> str:
    """Damage a file; returns where."""
    content = bytearray(file.read_bytes())
    at = draw.randrange(max(len(content), 1))
    if kind == "deleted":
        file.unlink()
    elif kind == "emptied":
        file.write_bytes(b"")
    elif kind == "cut short":
        file.write_bytes(content[:at])
        return f" to {at} of {len(content)} bytes"
    elif kind == "bit flipped" and content:
        content[at] ^= 1 << (bit := draw.randrange(8))
        file.write_bytes(content)
        return f" ({bit} of byte {at})"
    elif kind == "zeros":
        file.write_bytes(bytes(len(content)))
    elif kind == "exchanged":
        other = place.root / str(file.relative_to(place.root)).replace("runs/run/", "runs/other/")
        if other == file or not other.is_file():
            other = draw.choice([one for one in sorted(file.parent.rglob("*")) if one.is_file()])
        shutil.copyfile(other, file) if other != file else file.write_bytes(b"\x00")
        return f" for {plain(str(other.relative_to(place.root)))}"
    return ""
