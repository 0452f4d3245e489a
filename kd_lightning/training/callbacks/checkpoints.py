"""Checkpoints of a training stage, written atomically and verified by sha256 before resuming.

The log of Lightning's `CSVLogger` up to a checkpoint is saved with it: the learning curves are read from those files,
and a resumed training does not log these rows again.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.files import replacing, write_file
from kd_lightning.runtime.seals import read_sealed, sha256, write_sealed

RESUME, BEST, SEALS = "resume.ckpt", "best.ckpt", "seals.json"
"""The files for resuming, the best weights so far, and the checksums of both."""
_LOG = re.compile(r"csv/version_\d+/metrics\.csv")


class SealedCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint in one step, and its sha256 to `seals.json` beside it.

    While a file is replaced, the seals of both the old and the new one are stored, so that a kill at any moment leaves
    a valid folder.

    Args:
        fingerprint: The stage's.
    """

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        path = Path(path)
        seals = self._seals(path.parent)
        known = seals["files"]
        if path.name == RESUME:  # Lightning logs a step's row after the callbacks that save it
            seals["logs"] = {name: _text(log) for name, log in _logs(path.parent.parent).items()}
            seals["step"] = checkpoint["global_step"]
            seals["pending"] = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)
            written = sha256(temporary)
            before = known.get(path.name, []) if path.is_file() else [None]
            write_sealed(path.parent / SEALS, {**seals, "files": {**known, path.name: [written, *before]}})
        write_sealed(path.parent / SEALS, {**seals, "files": {**known, path.name: [written]}})

    def keep_logs(self, folder: Path) -> None:
        """Save the current log with the last checkpoint; call it after that step's row is written."""
        logs = {name: _text(log) for name, log in _logs(folder.parent).items()}
        write_sealed(folder / SEALS, {**self._seals(folder), "logs": logs, "pending": None})

    def _seals(self, folder: Path) -> dict[str, Any]:
        try:
            seals = read_sealed(folder / SEALS, "")
        except KDError:
            seals = {}
        none: dict[str, Any] = {"fingerprint": self.fingerprint, "files": {}, "logs": {}, "pending": None}
        return seals if seals.get("fingerprint") == self.fingerprint else none


def problem(folder: Path, fingerprint: str) -> str | None:
    """Return why a stage's checkpoints cannot be used, None if they can or there are none.

    Args:
        folder: Their folder.
        fingerprint: The stage's.
    """
    if not (folder / RESUME).is_file():
        return None
    try:
        seals = read_sealed(folder / SEALS, "its checkpoints are not used")
    except KDError as error:
        return str(error)
    if seals["fingerprint"] != fingerprint:
        return f"{folder / RESUME} belongs to another training"
    if RESUME not in seals["files"]:
        return f"{folder / RESUME} is not in {SEALS}"
    for name, known in seals["files"].items():
        path = folder / name
        if (sha256(path) if path.is_file() else None) not in known:
            return f"{path} is damaged or missing"
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove a stage's checkpoints and no other files."""
    for name in (RESUME, BEST, SEALS):
        (folder / name).unlink(missing_ok=True)


def restore_logs(stage: Path) -> list[Path]:
    """Restore a stage's logs to the state of its checkpoint; without one, remove them.

    Rows after the checkpoint are removed: they are logged again.

    Args:
        stage: Its folder, whose checkpoints have no `problem`.

    Returns:
        The logs whose earlier rows differed and were restored.
    """
    folder = stage / "checkpoints"
    seals = read_sealed(folder / SEALS, "") if (folder / RESUME).is_file() else {"logs": {}, "pending": None}
    kept = {name: text for name, text in seals["logs"].items() if _LOG.fullmatch(name)}
    damaged = []
    for name in sorted(kept.keys() | _logs(stage).keys()):
        path = stage / name
        found = _text(path) if path.is_file() else ""
        due = _up_to_checkpoint(kept.get(name, ""), found, seals["pending"])
        if due is None:
            damaged.append(path)
            due = kept[name]
        if not due:
            path.unlink()
        elif due != found:
            write_file(path, due.encode("latin-1"))
    return damaged


def _up_to_checkpoint(kept: str, found: str, pending: int | None) -> str | None:
    """Return a log without the rows after a checkpoint, or None if earlier rows differ.

    Lightning rewrites a log where it has new columns: its rows are compared, not its bytes.

    Args:
        kept: The log at the checkpoint.
        found: The log.
        pending: The step whose row may have come after the checkpoint and is not logged again.
    """
    before, rows = _rows(kept), _rows(found)
    if rows[: len(before)] != before:
        return None
    count = len(before)
    while pending is not None and count < len(rows) and rows[count].get("step") == str(pending):
        count += 1
    return "".join(found.splitlines(keepends=True)[: count + 1]) if count else ""


def _rows(text: str) -> list[dict[str, Any]]:
    """Return the filled cells of each whole row."""
    whole = text[: text.rfind("\n") + 1]
    return [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(io.StringIO(whole, newline=""))]


def _logs(stage: Path) -> dict[str, Path]:
    found = {path.relative_to(stage).as_posix(): path for path in stage.glob("csv/version_*/metrics.csv")}
    return {name: path for name, path in found.items() if _LOG.fullmatch(name)}


def _text(path: Path) -> str:
    """Return a file's bytes, one character each."""
    return path.read_bytes().decode("latin-1")
