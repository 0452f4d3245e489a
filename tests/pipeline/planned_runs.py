"""Run folders as trainings leave them, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_lightning.pipeline.run_records import PLAN
from kd_lightning.runtime.seals import write_sealed
from kd_lightning.training.callbacks.checkpoints import SealedCheckpoints

STAGES = ("teacher", "seed_0/baseline", "seed_0/distill")


def planned(folder: Path, seconds: dict[str, float] | None = None) -> Path:
    """A run of three stages of 100 steps each, of which none has begun."""
    kinds = ("teacher", "baseline", "distill")
    listed = [
        {"path": path, "name": name, "kind": kind, "steps": 100}
        for path, name, kind in zip(STAGES, ("teacher", "baseline, seed 0", "distill, seed 0"), kinds, strict=True)
    ]
    folder.mkdir(parents=True)
    write_sealed(folder / PLAN, {
        "command": "kd-train name=a", "stages": listed, "seconds": seconds or {}, "reported": "",
    })  # fmt: skip
    return folder


def finish(run: Path, stage: str, seconds: float = 10.0, **other: Any) -> None:
    record = {
        "steps": 100, "seconds": seconds, "validation": {"accuracy": 0.75}, "monitor": "accuracy", "fingerprint": stage,
        "files": {"model.safetensors": "0"},
    }  # fmt: skip
    write_sealed(run / stage / "stage.json", record | other)


def stop(run: Path, stage: str, step: int) -> None:
    """Leave a stage as a kill does: settings, and a checkpoint of some step."""
    write_sealed(run / stage / "settings.json", {})
    loops = {"fit_loop": {"epoch_loop.state_dict": {"_batches_that_stepped": step}}}
    folder = run / stage / "checkpoints"
    folder.mkdir()
    SealedCheckpoints("f").save_checkpoint({"global_step": step, "loops": loops}, folder / "resume.ckpt")
    SealedCheckpoints("f").keep_logs(folder)
