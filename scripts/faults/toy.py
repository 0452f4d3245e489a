"""A run of two seconds on sentences made here, and what of its files has to be the same however often it is made."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKERS = {"sport": ["goal", "match", "team"], "science": ["atom", "theory", "lab"], "food": ["soup", "bread", "cook"]}
FILLER = ["the", "a", "today", "very", "we", "saw", "it", "again", "and"]
SETTINGS = (
    "data=text_files", "data.tokenizer=wordpiece:200", "data.batch_size=16", "model@teacher.network=transformer",
    "teacher.network.hidden_size=16", "teacher.network.num_layers=1", "teacher.network.intermediate_size=16",
    "teacher.network.max_length=64", "model@student=bilstm", "student.embedding_size=8", "student.hidden_size=8",
    "teacher.trainer.max_epochs=6", "teacher.trainer.precision=32-true", "teacher.precision=float32",
    "teacher.optimizer.lr=0.02", "trainer.max_epochs=4", "optimizer.lr=0.05", "alpha=0.5", "teacher.validations=2",
    "validations=2", "checkpoint_every_n_steps=3",
)  # fmt: skip
TIMES = {
    "seconds", "training_seconds", "latency_ms", "latency", "throughput", "environment", "date", "created",
    "examples_per_second", "peak_memory_bytes", "times_faster", "command", "run", "stages",
    "checksum", "files", "teacher_seconds", "outputs_seconds", "estimated_seconds",
}  # fmt: skip
"""Keys of JSON files whose values are times, name the place, or are digests of what has times in it."""
LOGGED = (".csv", ".png", ".md", ".html", ".lock", ".log")


@dataclass(frozen=True)
class Place:
    """Where a trial happens.

    Attributes:
        root: Its folder, which holds the other two and nothing else that counts.
    """

    root: Path

    @property
    def work(self) -> Path:
        """Where its commands are started."""
        return self.root / "work"

    @property
    def home(self) -> Path:
        """Its `KD_LIGHTNING_HOME`."""
        return self.root / "home"

    def copied(self, root: Path) -> Place:
        """Return a copy of all of it."""
        shutil.copytree(self.root, root, symlinks=True)
        return Place(root)


def new_place(root: Path) -> Place:
    """Make an empty one."""
    place = Place(root)
    place.work.mkdir(parents=True)
    place.home.mkdir()
    return place


def write_sentences(path: Path, rows: int = 150, names: Sequence[str] = (), extra: Sequence[str] = ()) -> Path:
    """Write sentences of three classes that a small network learns, under these names, with words strewn in."""
    draw = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    called = dict(zip(MARKERS, names or MARKERS, strict=True))
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(rows):
            label = list(MARKERS)[row % 3]
            words = draw.choices(FILLER, k=draw.randint(2, 6)) + draw.choices(MARKERS[label], k=2)
            words += [extra[row % len(extra)]] if extra else []
            draw.shuffle(words)
            writer.writerow([" ".join(words), called[label]])
    return path


def contents(place: Place) -> dict[str, str]:
    """Return every file under a place by its name, with a digest of what of it has to be the same in every run.

    Numbers of loggers' versions, hashes in names, times, and what is drawn or logged do not; the outputs in a cache
    count by example, not by file.
    """
    found: dict[str, str] = {}
    for file in sorted(place.root.rglob("*")):
        if file.is_dir() and not file.is_symlink():
            continue
        inside = file.relative_to(place.root)
        if inside.parts[0] not in ("work", "home"):
            continue
        if "teacher_outputs" in inside.parts and file.suffix == ".safetensors":
            continue
        found[plain(str(inside))] = _digest(file, place)
    for manifest in place.root.rglob("teacher_outputs/*/manifest.json"):
        found[plain(str(manifest.relative_to(place.root).with_name("outputs")))] = _outputs(manifest.parent)
    return found


def plain(name: str) -> str:
    """Return a name without what differs from run to run.

    >>> plain("runs/a/csv/version_3/metrics.csv"), plain("tokens/0123456789abcdef.lock")
    ('runs/a/csv/version_N/metrics.csv', 'tokens/HASH.lock')
    """
    name = re.sub(r"version_\d+", "version_N", name)
    name = re.sub(r"events\.out\.tfevents\.[^/]*", "events", name)
    return re.sub(r"\b[0-9a-f]{16,64}\b", "HASH", name)


def _digest(file: Path, place: Place) -> str:
    if file.is_symlink():
        return "link"
    if file.name.endswith(LOGGED) or "events.out" in file.name:
        return "logged"
    if "teacher_outputs" in file.parts and file.suffix == ".json":
        return "logged"
    content = file.read_bytes()
    if file.suffix == ".json":
        try:
            content = json.dumps(timeless(json.loads(content)), sort_keys=True).encode()
        except ValueError:
            return "no JSON"
    content = content.replace(str(place.root).encode(), b"ROOT")
    if content.startswith(b"# sha256"):  # of what follows, which names the place
        content = content.partition(b"\n")[2]
    return hashlib.sha256(content).hexdigest()


def timeless(node: Any) -> Any:
    """Return plain values without times."""
    if isinstance(node, dict):
        return {key: timeless(value) for key, value in node.items() if key not in TIMES}
    return [timeless(value) for value in node] if isinstance(node, list) else node


def _outputs(cache: Path) -> str:
    """Return a digest of what a cache holds of each example, in whichever file."""
    from safetensors.numpy import load_file

    from kd_lightning.teachers.cache.manifest import Manifest

    rows: dict[int, str] = {}
    for record in Manifest.read(cache / "manifest.json").shards:
        tensors = load_file(cache / record.file)
        index = _indices(tensors)
        for row, number in enumerate(index):
            parts = [tensors[name][row].tobytes() for name in sorted(tensors) if len(tensors[name]) == len(index)]
            rows[number] = hashlib.sha256(b"".join(parts)).hexdigest()
    return hashlib.sha256(json.dumps(sorted(rows.items())).encode()).hexdigest()


def _indices(tensors: dict[str, Any]) -> list[int]:
    import numpy as np

    if "index" in tensors:
        return [int(number) for number in tensors.pop("index")]
    return [int(number) for number in np.flatnonzero(np.unpackbits(tensors.pop("members")))]


def differences(expected: dict[str, str], found: dict[str, str]) -> dict[str, list[str]]:
    """Say by name which files are more, which are missing and which are other than expected."""
    return {
        "left behind": sorted(found.keys() - expected.keys()),
        "missing": sorted(expected.keys() - found.keys()),
        "other": sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name]),
    }
