"""Distillation, and the same training without a teacher.

One step reads top to bottom: a batch goes to the teacher and to the student, the objective compares what they output,
and the student follows the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import evaluating, run_network
from kd_lightning.models.cohort import Cohort
from kd_lightning.models.features import FeatureTap
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.mixing import mixed_seed
from kd_lightning.tasks import Task
from kd_lightning.teachers import FrozenTeacher, Teacher
from kd_lightning.training.module import NetworkModule
from kd_lightning.training.objective import Objective
from kd_lightning.training.on_policy import Continued, OnPolicy
from kd_lightning.training.optim import OptimizerCallable, SchedulerCallable
from kd_lightning.types import Batch, ModelOutput


class DistillationModule(NetworkModule):
    r"""A trainable student learns from a teacher.

    With the reference objective (`conf/distillation/soft_target.yaml`) the loss is
    `(1 - alpha) * CE(z_s, y) + alpha * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))`, for logits z, temperature T
    and weight alpha (Hinton, Vinyals & Dean 2015, arXiv 1503.02531).

    The student and the objective's own parameters (projectors) are trained and checkpointed. The teacher stands
    outside the module tree: no optimizer, no `train()`, no DDP wrapper and no checkpoint ever sees it.

    Args:
        student: Any network; see `kd_lightning.models.adapt.run_network` for what it may take and return.
        teacher: Returns outputs without a gradient: `FrozenTeacher`, `CachedTeacher`, ...; None where the objective
            reads no teacher.
        objective: The loss: named terms and their weights.
        optimizer: Makes the optimizer from parameter groups, e.g. `partial(AdamW, lr=1e-3)`.
        scheduler: Makes the learning-rate schedule from the optimizer and the number of steps.
        task: What is predicted: `Classification(C)`, ...; it has the metrics of validation.
        seed: Seeds each step's dropout, so that a resumed run repeats an uninterrupted one.
        on_policy: Has the student continue a share of the texts; with data of ours and a running teacher.

    Raises:
        ConfigError: The objective reads a teacher, and there is none; or features that the teacher does not give.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        objective: Objective,
        optimizer: OptimizerCallable,
        scheduler: SchedulerCallable | None = None,
        *,
        task: Task,
        seed: int = 0,
        on_policy: OnPolicy | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, task=task, seed=seed, objective=objective)
        self.on_policy, self._compares = on_policy, False
        if teacher is None and objective.uses_teacher:
            raise ConfigError("the objective reads a teacher: give one, or only terms that need none")
        self.student = student
        self._tap = FeatureTap(student, objective.needs_student)
        self._outside = (teacher,)  # a tuple hides it from nn.Module's registration
        self.val_fidelity = self.task.fidelity()
        if not objective.planned and (teacher is None or hasattr(teacher, "network")):
            self.plan(getattr(teacher, "network", student))
            needs = list(objective.needs_teacher)
            if teacher is not None and (lacking := set(needs) - set(getattr(teacher, "features", ()))):
                lacks = ", ".join(sorted(lacking))
                raise ConfigError(f"the objective reads the teacher's {lacks}: give the teacher features={needs}")

    @property
    def teacher(self) -> Teacher | None:
        """The teacher."""
        return self._outside[0]

    @property
    def trained(self) -> nn.Module:
        """The student, without its peers."""
        return self.student.peers[0] if isinstance(self.student, Cohort) else self.student

    def configure_callbacks(self) -> Sequence[L.Callback]:
        """Let a teacher that follows the training (as `FinishedTeacher` does) follow it."""
        return [self.teacher] if isinstance(self.teacher, L.Callback) else []

    def plan(self, teacher: nn.Module) -> None:
        """Pair layers of the student with layers of the teacher's network, once."""
        if not self.objective.planned:
            self.objective.plan(self.student, teacher)
            self._tap = FeatureTap(self.student, self.objective.needs_student)

    def connect(self, batch: Batch, examples: int) -> None:
        """Build projectors and whatever else the objective sizes by what the networks output for a batch.

        Without a graph and in eval mode, so that no buffer (BatchNorm's statistics) changes.

        Args:
            batch: One batch of the data, on the student's device.
            examples: How many examples the data has.
        """
        with evaluating(self.student), torch.no_grad():
            self.objective.connect(*self.outputs(batch), examples)

    def setup(self, stage: str) -> None:
        """Move the teacher to the student's device, and connect the objective if necessary."""
        if stage == "fit" and self.objective.connects:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            if data is None:
                raise ConfigError(
                    "the objective has projectors to build: call module.connect(batch, examples) before fit"
                )
            torch.manual_seed(self.seed)
            batch = self.trainer.strategy.broadcast(connecting_batch(data))  # the same for all processes
            self.connect(batch, data.num_examples)
        super().setup(stage)
        if self.on_policy is not None and not hasattr(self.trainer.datamodule, "around"):  # type: ignore[attr-defined]
            raise ConfigError("on_policy continues texts of data modules of ours: give trainer.fit(datamodule=...)")
        if isinstance(self.teacher, FrozenTeacher) and self.teacher.sharded:
            if self.mesh is None:
                raise ConfigError("a sharded teacher needs a strategy that shards the student, too: trainer=fsdp2")
            self.teacher.shard(self.mesh)
        if self.teacher is not None:
            self.teacher.to(self.trainer.strategy.root_device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what only a training builds (projectors) where nothing is trained."""
        super().on_load_checkpoint(checkpoint)
        if self.objective.connects:
            state = checkpoint["state_dict"]
            for name in [name for name in state.keys() - self.state_dict().keys() if name.startswith("objective.")]:
                del state[name]

    @property
    def wraps(self) -> list[Callable[[Any], Any]]:
        """What the loader of training batches goes through: what continuations count is needed next."""
        if self.on_policy is None:
            return super().wraps
        return [lambda loader: Continued(loader, self._continued), *super().wraps]

    def _continued(self, batch: Batch) -> Batch:
        """Return a batch in which the student, as it is now, has continued some of the texts."""
        assert self.on_policy is not None
        seed = mixed_seed(self.seed, self.global_rank, self.trainer.global_step, int(batch["index"][0]))
        with self.trainer.precision_plugin.forward_context():
            return self.on_policy(batch, self.task.compared(batch)["keep"], self.student, seed)

    def outputs(self, batch: Batch) -> tuple[ModelOutput, ModelOutput]:
        """Return what student and teacher predict for a batch, as the objective compares them."""
        student = self._tap(batch)
        return student, self._expected(batch, student)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the objective's value for one batch."""
        loss: Tensor
        rows = self.task.compared(batch)
        mean, compared = self.step.mean(batch, batch_idx), self.compares_gradients(batch_idx)
        loss, parts = self.objective(*self.outputs(batch), rows, self.progress, mean, apart=compared)
        self.log_step(batch, loss, lambda: self.objective.account(parts, self.progress))
        if compared:
            self.log_gradients(self.objective.gradients(parts, self.progress))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the student against labels and against its teacher, if it has one."""
        student = run_network(self.student, batch).logits
        rows = self.task.compared(batch)
        self.score(student, rows)
        if self.teacher is None or "spans" in batch:  # of a teacher with other tokens no row can be compared
            return
        teacher, self._compares = self.teacher(batch), True
        against: Any = teacher.logits if teacher.sparse is None else teacher.sparse
        self.val_fidelity.update(student, against, rows)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of validation, and with a teacher how near the student is to it."""
        super().on_validation_epoch_end()
        if self._compares:
            self.log_scores(self.val_fidelity, "val")

    def _expected(self, batch: Batch, student: ModelOutput) -> ModelOutput:
        """Return the teacher's output; if the objective does not use it, the student's own output."""
        if self.teacher is None or not self.objective.uses_teacher:
            return student
        return self.teacher(batch)


def connecting_batch(data: Any) -> Batch:
    """Return the batch that projectors are built by: what the data choose, or the first of validation."""
    batch: Batch = data.connecting_batch() if hasattr(data, "connecting_batch") else next(iter(data.val_dataloader()))
    return batch


class SupervisedModule(NetworkModule):
    """Training from labels alone: for the teacher's fine-tuning and the baseline.

    Args:
        network: Any network.
        optimizer: As for `DistillationModule`.
        scheduler: As for `DistillationModule`.
        task: As for `DistillationModule`.
        seed: As for `DistillationModule`.

    >>> from functools import partial
    >>> from kd_lightning.tasks import Classification
    >>> examples = [{"pixel_values": torch.ones(1, 2, 2), "labels": torch.tensor(0)}] * 4
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> module = SupervisedModule(network, partial(torch.optim.AdamW, lr=1e-3), task=Classification(3))
    >>> off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    >>> trainer = L.Trainer(max_steps=2, accelerator="cpu", **dict.fromkeys(off, False))
    >>> trainer.fit(module, torch.utils.data.DataLoader(examples, batch_size=2))
    >>> trainer.global_step
    2
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: SchedulerCallable | None = None,
        *,
        task: Task,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, scheduler, task=task, seed=seed)
        self.network = network

    @property
    def trained(self) -> nn.Module:
        """The network."""
        return self.network

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch: the mean cross-entropy, or what the task learns by from its labels."""
        output = run_network(self.network, batch)
        loss: Tensor
        rows = self.task.compared(batch)
        loss, _ = self.objective(output, output, rows, self.progress, self.step.mean(batch, batch_idx))
        self.log_step(batch, loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the network against labels."""
        self.score(run_network(self.network, batch).logits, self.task.compared(batch))
