"""The checkpoints of a stage that trains: written whole, held against their sha256 before they are gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from kd_lightning.errors import KDError
from kd_lightning.files import replacing
from kd_lightning.seals import read_sealed, sha256, write_sealed

RESUME, BEST, SEALS = "resume.ckpt", "best.ckpt", "seals.json"
"""What to go on from, the best weights so far, and what is known of both."""


class SealedCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint in one step, and its sha256 to `seals.json` beside it.

    While a file is replaced both the old and the new one are known there, so that a kill at any moment leaves a folder
    that `problem` finds whole.

    Args:
        fingerprint: Of the stage, to which its checkpoints alone belong.
    """

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        path = Path(path)
        known = _known(path.parent, self.fingerprint)
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)
            written = sha256(temporary)
            before = known.get(path.name, []) if path.is_file() else [None]
            self._write(path.parent, {**known, path.name: [written, *before]})
        self._write(path.parent, {**known, path.name: [written]})

    def _write(self, folder: Path, files: dict[str, list[str | None]]) -> None:
        write_sealed(folder / SEALS, {"fingerprint": self.fingerprint, "files": files})


def problem(folder: Path, fingerprint: str) -> str | None:
    """Say why a stage's checkpoints cannot be gone on from; None where they can, and where there are none.

    Args:
        folder: Where they are.
        fingerprint: The stage's.
    """
    if not (folder / RESUME).is_file():
        return None
    try:
        seals = read_sealed(folder / SEALS, "what it tells of is not used")
    except KDError as error:
        return str(error)
    if seals["fingerprint"] != fingerprint:
        return f"{folder / RESUME} is another training's"
    if RESUME not in seals["files"]:
        return f"{folder / RESUME} is not known in {SEALS}"
    for name, known in seals["files"].items():
        path = folder / name
        if (sha256(path) if path.is_file() else None) not in known:
            return f"{path} is damaged or missing"
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove a stage's checkpoints, and nothing else that lies beside them."""
    for name in (RESUME, BEST, SEALS):
        (folder / name).unlink(missing_ok=True)


def _known(folder: Path, fingerprint: str) -> dict[str, list[str | None]]:
    try:
        seals = read_sealed(folder / SEALS, "")
    except KDError:
        return {}
    files: dict[str, list[str | None]] = seals["files"] if seals["fingerprint"] == fingerprint else {}
    return files
