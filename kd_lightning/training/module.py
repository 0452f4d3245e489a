"""Base class of the Lightning modules: optimizer, progress, validation scores, seeding."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.optim import Optimizer

from kd_lightning.losses.term import at_least_float32
from kd_lightning.models.adapt import run_network
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.mixing import mixed_seed
from kd_lightning.runtime.sharding import shard
from kd_lightning.tasks import Scores, Task
from kd_lightning.training import lightning_patches
from kd_lightning.training.objective import Objective
from kd_lightning.training.optim import OptimizerCallable, SchedulerCallable, parameter_groups
from kd_lightning.training.step_counts import StepCounts
from kd_lightning.types import Batch, ModelOutput, is_labelled

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

GRADIENTS_EVERY = 50
"""Optimizer steps from one comparison of the terms' gradients to the next; each is a short backward pass a term."""


class NetworkModule(L.LightningModule):
    """Trains one network; subclasses define the loss."""

    def __init__(
        self,
        optimizer: OptimizerCallable,
        scheduler: SchedulerCallable | None,
        *,
        task: Task,
        seed: int,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.optimizer, self.scheduler, self.seed = optimizer, scheduler, seed
        self.task = task
        self.objective = objective or Objective(*self.task.terms())
        self.from_labels, self.val_scores = self.task.loss(), self.task.scores()
        self.skipped_steps = 0
        self.norm_watched: Callable[[Tensor], None] | None = None  # shown the gradients' norm before they are clipped
        self._whole: tuple[nn.Module, ...] = ()  # a tuple hides it from nn.Module's registration

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The network that the training is for."""

    @property
    def whole(self) -> nn.Module:
        """The network, or for sharded weights the first process's whole copy for saved weights."""
        return self._whole[0] if self._whole else self.trained

    def weights_of_trained(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a checkpoint's `state_dict` holds of that network, by its own names."""
        prefix = next(name for name, module in self.named_modules() if module is self.trained) + "."
        whole = self._with_unchanged(state)
        return {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}

    @property
    def _unchanged(self) -> list[str]:
        """Names of weights that no checkpoint holds: they are there again once the network is built."""
        return [
            f"{place}.{name}" for place, module in self.named_modules() for name in getattr(module, "unchanged", ())
        ]

    def _with_unchanged(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [name for name in self._unchanged if name not in state]
        own = self.state_dict() if names else {}
        return state | {name: own[name] for name in names}

    def setup(self, stage: str) -> None:
        """Set up means over whole steps (see `StepCounts`), and allow terms to skip steps."""
        trainer: Any = self.trainer
        if not self.task.complete:
            self.task = completed(self.task, trainer.datamodule)
            self.val_scores = self.task.scores()
        self.step = StepCounts(trainer, self._counts)
        if stage == "fit" and self.wraps and hasattr(trainer.datamodule, "around"):
            last = trainer.datamodule.around
            wraps = [*self.wraps, *([last] if last is not None else [])]
            trainer.datamodule.around = lambda loader: reduce(lambda inside, wrap: wrap(inside), wraps, loader)
        lightning_patches.keep_batches_wide(trainer)
        lightning_patches.share_objective(self, self.objective)

    @property
    def wraps(self) -> list[Callable[[Any], Any]]:
        """What the loader of training batches goes through, from the inside out."""
        return [self.step.around] if self.trainer.accumulate_grad_batches > 1 else []

    def _counts(self, batch: Batch) -> Tensor:
        return self.objective.counts(self.task.compared(batch))

    @property
    def mesh(self) -> DeviceMesh | None:
        """The processes to share all weights; None where the strategy has each process keep its own."""
        strategy = self.trainer.strategy
        return strategy.device_mesh["data_parallel"] if isinstance(strategy, ModelParallelStrategy) else None

    @property
    def _replicated(self) -> bool:
        """Whether each process holds all weights."""
        return isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy)

    def configure_model(self) -> None:
        """Shard the weights where the strategy leaves that to the module (`trainer=fsdp2`)."""
        if self.mesh is not None and not isinstance(self, FSDPModule):
            if self.global_rank == 0:
                self._whole = (self.trainer.precision_plugin.convert_module(copy.deepcopy(self.trained)),)
            shard(self.trained, self.mesh, together=True)
            shard(self.objective, self.mesh, together=True)  # apart: its weights may be wider than the network's
            shard(self, self.mesh)
            for method in ("training_step", "validation_step", "test_step", "predict_step"):
                register_fsdp_forward_method(self, method)

    @property
    def progress(self) -> float:
        """Share of the planned optimizer steps that is done, in [0, 1]."""
        return min(self.trainer.global_step / max(self.trainer.estimated_stepping_batches - 1, 1), 1.0)

    def on_train_start(self) -> None:
        """Count a resumed training's first epoch."""
        lightning_patches.count_begun_epoch(self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed torch from (seed, rank, batch number), so that a resumed run draws the same dropout."""
        seed = mixed_seed(self.seed, self.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed goes through every backend there is, each step
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def log_step(self, batch: Batch, loss: Tensor, parts: Callable[[], dict[str, Any]] = dict) -> None:
        """Log the loss and its parts in the first step and every `log_every_n_steps`.

        For each value that is logged Lightning goes through all it has logged so far: too much for every step.
        """
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == 0 or (every and (step + 1) % every == 0):  # 0: never
            size = len(batch["labels"])
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
            self.log_dict({f"train/{name}": value for name, value in parts().items()}, batch_size=size)
            if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
                self.log("train/skipped_steps", float(self.skipped_steps), batch_size=size)

    def compares_gradients(self, batch_idx: int) -> bool:
        """Return whether the terms' gradients are compared at this batch.

        They are in the first step and every 50th after it, on the step's first batch.
        Without loggers nothing is compared, nor where a process holds a shard of the network (FSDP).
        """
        trainer: Any = self.trainer
        due = batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step % GRADIENTS_EVERY == 0
        return bool(due and self._replicated and trainer.loggers and trainer.log_every_n_steps)

    def log_gradients(self, compared: Mapping[str, float]) -> None:
        """Log how the terms' gradients compare.

        Written straight to the loggers: what goes through `self.log` is written again until there is a new value.
        """
        values = {f"train/{name}": value for name, value in compared.items()}
        for logger in self.trainer.loggers if values else ():
            logger.log_metrics(values, step=self.trainer.global_step)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the network against labels."""
        self.score(run_network(self.trained, batch).logits, self.task.compared(batch), "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return `(B, C)` float32: the probabilities of classes, or scores; see `Task.predictions`."""
        return self.task.predictions(at_least_float32(run_network(self.trained, batch).logits))

    def score(self, logits: Tensor, batch: Batch, split: str = "val") -> None:
        """Update and log the scores of a split, of a batch as `Task.compared` returns it."""
        output = ModelOutput(at_least_float32(logits))
        counted = int(self.from_labels.counts(batch).sum())
        if counted and ("group" not in batch or is_labelled(batch["labels"]).any()):  # pairs of single texts: by chance
            self.log(f"{split}/loss", self.from_labels(output, output, batch), batch_size=counted, sync_dist=True)
        self.val_scores.update(logits, batch["labels"], batch)

    def log_scores(self, scores: Scores, split: str) -> None:
        """Log the scores of a split that has been gone through in all processes, and begin anew."""
        for name, value in scores.compute().items():
            self.log(f"{split}/{name}", value, prog_bar=name == self.task.monitor, batch_size=1, sync_dist=True)
        scores.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the scores of validation."""
        self.log_scores(self.val_scores, "val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test split."""
        self.log_scores(self.val_scores, "test")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and count the steps that a GradScaler (float16) leaves out for gradients that overflow.

        To Lightning they are steps: they count towards `max_steps`, and the learning rate moves on.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 0.0
        super().optimizer_step(*args, **kwargs)
        if scaler is not None and scaler.get_scale() < scale:
            self.skipped_steps += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of steps left out; leave out weights that no step changes."""
        checkpoint["skipped_steps"] = self.skipped_steps
        if self._replicated:
            for name in self._unchanged:
                checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting from it."""
        self.skipped_steps = checkpoint.get("skipped_steps", 0)
        if "state_dict" in checkpoint:  # a sharded one is restored by the strategy
            checkpoint["state_dict"] = self._with_unchanged(checkpoint["state_dict"])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer does, also around a fused optimizer."""
        given = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = lightning_patches.clip(self, given, gradient_clip_val, gradient_clip_algorithm)
        if norm is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self.norm_watched is not None:
            self.norm_watched(norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over decayed and undecayed parameters, and the schedule over all planned steps."""
        optimizer = self.optimizer(parameter_groups(self))
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def completed(task: Task, data: Any) -> Task:
    """Return the data's own task, which has all that the scores of a task read.

    Raises:
        ConfigError: The data have none, or another.
    """
    own: Task | None = getattr(data, "task", None)
    if own is None:
        raise ConfigError(
            f"scores of {task.description} read the data's texts: give data with a `task`, as trainer.fit(module, "
            "datamodule=...), or the module that task"
        )
    if own.settings != task.settings:
        raise ConfigError(f"the module's task is {task.description}, and the data's is {own.description}: give one")
    return own
