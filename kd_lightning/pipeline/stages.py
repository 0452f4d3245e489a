"""The stages of a run: what is trained, in which order, from what; and how each becomes a training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kd_lightning.config.instantiate import processes
from kd_lightning.config.schema import Node
from kd_lightning.pipeline.context import Part, Run, teacher_name
from kd_lightning.pipeline.networks import has_start

if TYPE_CHECKING:
    from kd_lightning.data.datamodule import Role

Kind = Literal["teacher", "assistant", "baseline", "distill", "finetune"]
SHORT = "_short"
"""Ends the name of a baseline that is trained for a quarter of the steps."""
LONG = 8
"""Epochs of the labelled examples from which labels alone may overfit."""
ASSISTANTS = 2000
"""Assistants' seeds begin so far above the students': alike in architecture, they start unlike."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of a run, as data: nothing is built yet.

    Attributes:
        kind: What it is for.
        path: Its folder inside the run's, such as `seed_0/distill`.
        name: What it is called on the screen.
        seed: Seeds its weights, its batches and its steps.
        network: The settings of what is trained.
        optimizer: Those of its optimizer.
        scheduler: Those of its learning-rate schedule.
        trainer: Those of `lightning.Trainer`.
        validations: How many looks at the validation split.
        steps: Optimizer steps.
        part: The name of the task whose teacher it is; empty for all else.
        member: Which of an ensemble's teachers it is, from 0; with folds, the fold that it does not see.
        teacher: Which of the run's teachers it learns from: 0 the teacher, 1 the first assistant, ...; None: from none,
            or from the average of its own weights.
        peers: The settings of the networks that it trains with.
        start: The path of the training that it goes on from; None: from none.
    """

    kind: Kind
    path: str
    name: str
    seed: int
    network: Node
    optimizer: Node
    scheduler: Node
    trainer: Node
    validations: int
    steps: int
    part: str = ""
    member: int = 0
    teacher: int | None = None
    peers: tuple[Node, ...] = ()
    start: str | None = None

    @property
    def role(self) -> Role:
        """Whose inputs its network reads."""
        return "teacher" if self.kind == "teacher" else "student"

    @property
    def distils(self) -> bool:
        """True where it learns from a teacher, on the transfer set too."""
        return self.kind in ("assistant", "distill")

    @property
    def rate(self) -> str:
        """The key of its learning rate."""
        return {"teacher": "teacher.optimizer.lr", "finetune": "finetune.lr"}.get(self.kind, "optimizer.lr")


def plan(run: Run) -> list[Stage]:
    """Return the stages of a run, in the order in which they are trained."""
    cfg = run.cfg
    found: list[Stage] = []
    if run.has_teacher:
        for part in run.parts.values():
            found += _teachers(part)
    for seed in run.seeds:
        if "baseline" in cfg.stages:
            found += _baselines(run, seed)
        if "distill" in cfg.stages:
            found += _assistants(run) if run.has_teacher and seed == run.seeds[0] else []
            found.append(_distillation(run, seed))
        if "finetune" in cfg.stages:
            own: dict[str, Any] = {
                "optimizer": cfg.finetune_optimizer,
                "trainer": cfg.finetune_trainer,
                "steps": run.finetune_steps,
            }
            found.append(_student(run, "finetune", seed, start=f"seed_{seed}/distill", **own))
    return found


def _teachers(part: Part) -> Iterator[Stage]:
    """Give the fine-tuning of a task's teacher, or of each member of an ensemble."""
    teacher = part.cfg.teacher
    for number in range(teacher.number if teacher.checkpoint is None else 0):
        name = teacher_name(number)
        yield Stage(
            kind="teacher", path=f"tasks/{part.name}/{name}" if part.name else name,
            name=f"{part.name}: {name}" if part.name else name, seed=teacher.seed + number,
            network=teacher.network, optimizer=teacher.optimizer, scheduler=teacher.scheduler,
            trainer=part.cfg.teacher_trainer, validations=teacher.validations, steps=part.teacher_steps(number),
            part=part.name, member=number,
        )  # fmt: skip


def _student(run: Run, kind: Kind, seed: int, **other: Any) -> Stage:
    """Return a stage of a student: `other` is where it differs from the run's settings."""
    cfg, label = run.cfg, other.pop("label", kind)
    given: dict[str, Any] = {
        "path": f"seed_{seed}/{label}", "name": f"{label}, seed {seed}", "network": cfg.student,
        "optimizer": cfg.optimizer, "scheduler": cfg.scheduler, "trainer": cfg.trainer,
        "validations": cfg.validations, "steps": run.steps,
    }  # fmt: skip
    return Stage(kind=kind, seed=seed, **(given | other))


def _baselines(run: Run, seed: int) -> Iterator[Stage]:
    """Return the baselines from labels: as many steps as the distillation, also from the trained start.

    Labels alone overfit where steps are many, and a distillation is not to be credited with what stopping early gives.
    Beyond `LONG` epochs each baseline is trained once more for a quarter of the steps, with its learning rate decayed
    by their end; the report has the one that is better on validation.
    """
    starts = (
        {"baseline": "random", "baseline_initialised": "teacher"} if has_start(run.cfg.student) else {"baseline": ""}
    )
    long = run.steps * run.data.batch_size * processes(run.cfg.trainer) > LONG * run.data.labelled_examples
    for name, initialise in starts.items():
        network = {**run.cfg.student, "initialise": initialise} if initialise else run.cfg.student
        yield _student(run, "baseline", seed, label=name, network=network)
        if long:
            label, steps = f"{name}{SHORT}", math.ceil(run.steps / 4)
            yield _student(run, "baseline", seed, label=label, network=network, steps=steps)


def _assistants(run: Run) -> Iterator[Stage]:
    """Give the distillation of each assistant from the one before it."""
    for number, network in enumerate(run.cfg.assistants, 1):
        seed = run.cfg.seed + ASSISTANTS + number - 1
        yield _student(
            run, "assistant", seed, path=f"assistant_{number}", name=f"assistant {number}", network=network,
            teacher=number - 1,
        )  # fmt: skip


def _distillation(run: Run, seed: int) -> Stage:
    """Return the distillation of the student, on labelled examples, views and the transfer set."""
    last, peers = len(run.cfg.assistants) if run.has_teacher else None, tuple(run.cfg.peers)
    return _student(run, "distill", seed, teacher=last, peers=peers)
