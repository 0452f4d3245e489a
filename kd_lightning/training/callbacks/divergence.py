"""Ends a training whose loss, gradient or validation score is NaN or infinite."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from kd_lightning.runtime.errors import Diverged
from kd_lightning.runtime.files import replacing
from kd_lightning.runtime.fingerprints import write_json
from kd_lightning.runtime.processes import rank
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.module import NetworkModule
from kd_lightning.types import Batch

WHY = "why.json"
EVERY = 10
"""Optimizer steps between checks of a GPU's losses, since each check synchronises."""


class Divergence(L.Callback):
    """Ends a training within `EVERY` steps of a loss that is NaN or infinite.

    On a CPU the loss is checked before each backward pass, and the gradients' norm before each optimizer step, so that
    the weights are the last good ones. On a GPU, and with several processes, a flag on the device is checked every
    `EVERY` steps, and before a checkpoint is written. Under a GradScaler (`16-mixed`) an overflowing step is skipped;
    there only `EVERY` such losses in a row end the training.

    The batch, and the weights if they are finite, are saved to `FOLDER/diverged`. The next training in the folder moves
    everything else there too (`put_away`) and starts again, perhaps with other settings.

    Args:
        folder: The stage's.
        stage: The stage's name, for messages.
        key: The learning rate's key.
    """

    def __init__(self, folder: Path, stage: str, key: str = "optimizer.lr") -> None:
        self.folder, self.stage, self.key = folder, stage, key
        self._batch: Batch = {}
        self._row: Tensor | None = None  # non-finite losses in a row, and their maximum
        self._most: Tensor | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Check the loss, or update the flag on the device."""
        loss = loss.detach()
        if self._at_once(trainer):
            if not math.isfinite(value := float(loss)):
                self._end(trainer, pl_module, f"the loss is {value}")
            return
        if self._row is None or self._most is None:
            self._row = self._most = torch.zeros((), dtype=torch.int64, device=loss.device)
        self._row = (self._row + 1) * ~loss.isfinite()
        self._most = torch.maximum(self._most, self._row)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Check the gradients: a non-finite one ruins every weight, even with a finite loss.

        If the module clips gradients it computes their norm itself, which `on_train_start` hooks.
        """
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if self._at_once(trainer) and not trainer.gradient_clip_val and gradients:
            self._look_at_norm(trainer, pl_module, torch.nn.utils.get_total_norm(gradients))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hook the norm that the module clips by."""
        assert isinstance(pl_module, NetworkModule)
        if self._at_once(trainer):
            pl_module.norm_watched = partial(self._look_at_norm, trainer, pl_module)

    def _look_at_norm(self, trainer: L.Trainer, pl_module: L.LightningModule, norm: Tensor) -> None:
        if not math.isfinite(value := float(norm)):
            self._end(trainer, pl_module, f"the gradient's norm is {value}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Check the flag on the device every few steps."""
        if trainer.global_step % EVERY == 0:
            self._look(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep non-finite weights out of checkpoints."""
        self._look(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the validation loss; scores may be undefined, such as the correlation of a constant."""
        loss = float(trainer.callback_metrics.get("val/loss", 0.0))
        if not trainer.sanity_checking and math.isnan(loss):
            self._end(trainer, pl_module, "the validation loss is nan")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the last steps."""
        self._look(trainer, pl_module)

    def _at_once(self, trainer: L.Trainer) -> bool:
        """Return whether a check is free and local to this process."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return trainer.strategy.root_device.type == "cpu" and trainer.world_size == 1 and scaler is None

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._most is None:
            return
        worst = self._most.clone()
        if trainer.world_size > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)  # so that all end together
        allowed = 0 if getattr(trainer.precision_plugin, "scaler", None) is None else EVERY - 1
        if int(worst) > allowed:
            self._end(trainer, pl_module, f"the loss of {int(worst)} steps was not finite")

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule, what: str) -> None:
        """Save the batch and the weights, and raise."""
        assert isinstance(pl_module, NetworkModule)
        why = _cause(pl_module, self._batch, self.key, str(trainer.precision))
        place = next(place for place in _places(self.folder) if not place.exists())
        if rank() == 0:
            weights = {name: x.detach().cpu().contiguous() for name, x in pl_module.trained.state_dict().items()}
            finite = all(x.isfinite().all() for x in weights.values() if x.is_floating_point())
            for name, tensors in {"batch": self._batch, **({"weights": weights} if finite else {})}.items():
                kept = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
                with replacing(place / f"{name}.safetensors") as temporary:
                    save_file(kept, temporary)
            write_json(place / WHY, {"stage": self.stage, "step": trainer.global_step, "what": what, "why": why})
        raise Diverged(
            f"{self.stage} diverged at step {trainer.global_step}: {what}; {why}. Its batch, and its weights if they "
            f"are finite, are in {place}; the next run restarts the stage"
        )


def put_away(folder: Path) -> None:
    """Move the files of a diverged training to the folder of its batch, if there is one."""
    for place in _places(folder):
        if not place.exists():
            return
        if (place / WHY).is_file() and (folder / "settings.json").is_file() and not (place / "settings.json").exists():
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "settings.json"):  # that one last
                if not path.name.startswith(("diverged", ".lock")):
                    os.replace(path, place / path.name)


def _places(folder: Path) -> Iterator[Path]:
    """Yield `diverged`, `diverged_2`, ... in a folder."""
    yield folder / "diverged"
    yield from (folder / f"diverged_{number}" for number in count(2))


def _cause(module: NetworkModule, batch: Batch, key: str, precision: str) -> str:
    """Return the likeliest cause of a non-finite loss, and the key to change."""
    scores = [
        name for name, x in batch.items() if x.is_floating_point() and name != "labels" and not x.isfinite().all()
    ]
    if scores:
        return f"the batch's {', '.join(scores)} have non-finite numbers: check the data"
    if isinstance(module, DistillationModule) and module.teacher is not None and module.objective.uses_teacher:
        with torch.no_grad():
            outputs = module.teacher(batch)
        if not all(x.isfinite().all() for x in (outputs.logits, *outputs.features.values())):
            return (
                "the teacher's outputs for this batch are not finite: use another teacher, or teacher.precision=float32"
            )
    if terms := _broken_terms(module, batch):
        return f"distillation's {', '.join(terms)} alone is not finite, for finite outputs: check that loss"
    if precision.startswith("16"):
        return f"16 bits may be too narrow: set trainer.precision=bf16-mixed, or lower {key}"
    return f"lower {key}{_weights(module)}"


def _broken_terms(module: NetworkModule, batch: Batch) -> list[str]:
    """Return the terms with non-finite values, if the networks' outputs and other terms are finite."""
    if not isinstance(module, DistillationModule):
        return []
    with torch.no_grad():
        student, expected = module.outputs(batch)
        _, parts = module.objective(student, expected, module.task.compared(batch), module.progress)
    broken = [name for name, part in parts.items() if not part.isfinite()]
    whole = all(x.isfinite().all() for x in (student.logits, *student.features.values()))
    return broken if whole and len(broken) < len(parts) else []


def _weights(module: NetworkModule) -> str:
    """Return the weights of the loss that are large enough to be the cause."""
    large = [name for name, weight in module.objective.weights.items() if not callable(weight) and weight > 10]
    return f", or distillation.weights of {', '.join(large)}" if large else ""
