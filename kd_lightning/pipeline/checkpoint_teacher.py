"""Finished teachers by their folder, for configurations that are built before data are loaded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import lightning as L
import torch
from rich.console import Console
from torch import nn

from kd_lightning.config.schema import Calibrate
from kd_lightning.data import IndexedData, MultiTaskData
from kd_lightning.pipeline.serving import Serving
from kd_lightning.pipeline.teacher_loading import load_teacher
from kd_lightning.pipeline.teacher_provider import TeacherProvider
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers import MultiTaskTeacher, SideBySide, Teacher
from kd_lightning.teachers.ensemble import Combine
from kd_lightning.teachers.frozen import Precision
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.run_folder import is_finished, load_run
from kd_lightning.types import Batch, ModelOutput


def finished_network(checkpoint: str, data: IndexedData | None = None) -> nn.Module:
    """Return a trained network, to be trained on or to make a student from; no random number is drawn.

    Args:
        checkpoint: A stage folder of ours (`RUN/teacher`), else a Hugging Face folder or name.
        data: What a network of Hugging Face is to predict, with which tokens.

    Raises:
        ConfigError: A Hugging Face name without data, or one that does not fit them.
    """
    with torch.random.fork_rng():
        if is_finished(Path(checkpoint)):
            return load_run(checkpoint).network.train()
        if data is None:
            raise ConfigError(f"checkpoint={checkpoint!r} is no finished stage of a run; Hugging Face's need data")
        data.prepare()
        return load_teacher(checkpoint, data, Console()).network


class _LateTeacher(L.Callback, Teacher):
    """A teacher that is loaded once a trainer has the data.

    As a callback, which `DistillationModule` hands to its trainer, it settles before the training which of its layers
    the objective reads, and stores its outputs before every checkpoint. Only `fit` and `validate` call it.
    """

    inner: Teacher | None = None

    @abstractmethod
    def load(self, data: IndexedData) -> nn.Module:
        """Read the teacher's network, which must fit the data."""

    @abstractmethod
    def provide(self, data: IndexedData, trainer: L.Trainer, needs: tuple[str, ...]) -> Teacher:
        """Return the loaded teacher as a training calls it.

        Args:
            data: What is learned from.
            trainer: Whose processes call it.
            needs: The features that are read.
        """

    @abstractmethod
    def complete(self) -> None:
        """Predict what is in no training batch, such as the test split."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the teacher for these data, and open its cache.

        Raises:
            ConfigError: The data or the module are not ours.
        """
        if stage not in ("fit", "validate"):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for given, expected in ((data, IndexedData), (pl_module, DistillationModule)):
            if not isinstance(given, expected):
                raise ConfigError(f"{type(self).__name__} needs a {expected.__name__}, not {type(given).__name__}")
        assert isinstance(pl_module, DistillationModule)
        pl_module.plan(self.load(data))
        self.inner = self.provide(data, trainer, pl_module.objective.needs_teacher)
        if pl_module.on_policy is not None:  # no batch is known ahead of its step
            data.around = None

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the teacher's output."""
        assert self.inner is not None
        return self.inner(batch)

    def to(self, device: torch.device) -> Self:
        """Move to a device."""
        if self.inner is not None:
            self.inner.to(device)
        return self

    def flush(self) -> None:
        """Write what is not written yet."""
        if self.inner is not None:
            self.inner.flush()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the outputs that this checkpoint's training has read."""
        self.flush()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the cache."""
        self.complete()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Store the last outputs."""
        self.flush()


class FinishedTeacher(_LateTeacher):
    """A finished teacher as `kd-train` has it: running, or from its cache.

    Args:
        checkpoint: A run or stage folder of ours, or a Hugging Face folder or name; a list: their ensemble.
        precision: As for `FrozenTeacher`.
        cache: auto, require, refresh, off or a path: see `teacher.cache` in `conf/config.yaml`.
        cache_dtype: How outputs are stored.
        cache_top_k: Store so many of an example's largest logits and the mass of the rest; None: all.
        cache_samples: Store so many drawn tokens and their weights instead.
        features: What is stored besides logits and what the objective reads.
        predict_batch_size: Examples in a batch when it predicts before a training.
        ahead: Predict every example before the training, as where several trainings or processes share the outputs.
        combine: What an ensemble averages.
        weights: An ensemble's: None (equal), one a member, `learned` (on validation) or `confidence`.
        device: A GPU of its own for it, when `cache=off`.
        compile: Whether to compile it.
        calibrate: Divide its logits by the temperature that fits them to the validation split; auto: where its
            probabilities are badly wrong.
    """

    def __init__(
        self,
        checkpoint: str | list[str],
        precision: Precision = "float32",
        cache: str = "auto",
        cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        cache_top_k: int | None = None,
        cache_samples: int | None = None,
        features: Sequence[str] = (),
        predict_batch_size: int = 128,
        ahead: bool = False,
        combine: Combine = "probabilities",
        weights: list[float] | Literal["learned", "confidence"] | None = None,
        device: str | None = None,
        compile: bool = False,
        calibrate: Calibrate = False,
    ) -> None:
        self.checkpoint, self.ahead = checkpoint, ahead
        self.serving = Serving(
            members=len(checkpoint) if isinstance(checkpoint, list) else 1, precision=precision, cache=cache,
            cache_dtype=cache_dtype, cache_top_k=cache_top_k, cache_samples=cache_samples, features=features,
            predict_batch_size=predict_batch_size, combine=combine, weights=weights, device=device, compile=compile,
            calibrate=calibrate,
        )  # fmt: skip

    def load(self, data: IndexedData) -> nn.Module:
        """Read the teacher's network."""
        self.loaded = load_teacher(self.checkpoint, data, Console())
        return self.loaded.network

    def provide(self, data: IndexedData, trainer: L.Trainer, needs: tuple[str, ...] = ()) -> Teacher:
        """Return the teacher as a training calls it."""
        device, own = trainer.strategy.root_device, data.select("teacher")
        self.provider = TeacherProvider(self.serving, own, lambda: self.loaded, device, Console(), needs)
        self.provider.check(self.loaded.network, self.loaded)
        self.ahead |= trainer.world_size > 1  # several processes cannot fill one cache
        if self.ahead:
            if trainer.is_global_zero:
                self.provider.complete()
            trainer.strategy.barrier()
        teacher = self.provider.teacher()
        data.around = teacher.around
        return teacher

    def complete(self) -> None:
        """Predict what is in no training batch."""
        if not self.ahead:
            self.provider.complete()


class FinishedTaskTeachers(_LateTeacher):
    """A finished teacher for each task of `MultiTaskData`, as `kd-train` has them.

    Args:
        teachers: By the names of the tasks.
    """

    def __init__(self, teachers: Mapping[str, FinishedTeacher]) -> None:
        self.teachers = dict(teachers)

    def load(self, data: IndexedData) -> nn.Module:
        """Read every teacher's network.

        Raises:
            ConfigError: The data are not of these tasks.
        """
        if not isinstance(data, MultiTaskData) or list(data.tasks) != list(self.teachers):
            raise ConfigError(f"teachers of the tasks {list(self.teachers)} need data of these tasks, in this order")
        return SideBySide([teacher.load(data.tasks[name]) for name, teacher in self.teachers.items()])

    def provide(self, data: IndexedData, trainer: L.Trainer, needs: tuple[str, ...]) -> Teacher:
        """Return the teachers, each for its own task."""
        assert isinstance(data, MultiTaskData)
        teachers = [teacher.provide(data.tasks[name], trainer) for name, teacher in self.teachers.items()]
        return MultiTaskTeacher(teachers, list(data.task.spans.values()), data.firsts)

    def complete(self) -> None:
        """Predict what is in no training batch."""
        for teacher in self.teachers.values():
            teacher.complete()
