"""Links in a run's folder: what they lead to is not the run's, and is neither written nor removed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kd_lightning.runtime.errors import ConfigError

WRITTEN = (".lock", "checkpoints", "csv", "tokenizer")
"""What a training writes into piece by piece; its other files are replaced whole, and a link with them."""


def check_links(folder: Path, shared_dir: str | None) -> None:
    """Refuse a run whose stages are links, but for those that a sweep's points make to what they share.

    Raises:
        ConfigError: Names the link.
    """
    for pattern in (".lock", "slurm", "tasks", "tasks/*", "seed_*"):
        _refuse(folder.glob(pattern))
    shared = None if shared_dir is None else Path(shared_dir).resolve()
    for pattern in ("teacher*", "assistant_*", "seed_*/*"):
        for stage in sorted(folder.glob(pattern)):
            if stage.name in ("distill", "finetune") or stage.resolve().parent != shared:
                _refuse([stage])
            check_stage_links(stage)
            _refuse(stage.glob("further_*"))


def check_stage_links(stage: Path) -> None:
    """Refuse a stage that would be written elsewhere.

    Raises:
        ConfigError: Names the link.
    """
    for name in WRITTEN:
        _refuse([stage / name])
        _refuse((stage / name).glob("*"))
    for pattern in ("csv/*/*", "diverged*"):
        _refuse(stage.glob(pattern))


def _refuse(places: Iterable[Path]) -> None:
    for place in places:
        if place.is_symlink():
            raise ConfigError(
                f"{place} is a link: what it leads to would be written or removed; put a folder or file of its own "
                "there, or choose another name=..."
            )
