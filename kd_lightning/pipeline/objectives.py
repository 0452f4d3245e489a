"""The objective of a run: the task's own, or the weighted ones of several tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from kd_lightning.config.instantiate import build
from kd_lightning.losses.term import Scheduled, Term
from kd_lightning.teachers import EMATeacher
from kd_lightning.training.objective import Objective
from kd_lightning.training.schedules import Times

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run


def loss_settings(run: Run) -> dict[str, Any]:
    """Return the configuration of the loss; of several tasks theirs, by name."""
    found = {name: part.cfg.distillation for name, part in run.parts.items()}
    return found.get("", found)


def run_objective(run: Run, student: nn.Module, teacher: nn.Module | None) -> Objective:
    """Build the loss for two networks; without a teacher, for the student and itself."""
    if "" in run.parts:
        objective: Objective = build(run.cfg.distillation, balance=run.cfg.balance)
    else:
        objective = _of_tasks(run)
    objective.plan(student, student if teacher is None else teacher)
    return objective


def _of_tasks(run: Run) -> Objective:
    task: Any = run.task  # a `MultiTask`
    terms: dict[str, Term] = {}
    weights: dict[str, Scheduled] = {}
    for name, part in run.parts.items():
        own: Objective = build(part.cfg.distillation)
        for kind, term in own.terms.items():
            terms[f"{name}/{kind}"] = task.term(name, term)
            weights[f"{name}/{kind}"] = _times(task.weights[name], own.weights[kind])
    return Objective(terms, weights, run.cfg.balance)


def _times(weight: float, value: Scheduled) -> Scheduled:
    return Times(weight, value) if callable(value) else weight * value


def own_average(run: Run, student: nn.Module, objective: Objective) -> EMATeacher | None:
    """Return the mean teacher of `teacher.ema`."""
    decay = run.cfg.teacher.ema
    return None if decay is None else EMATeacher(student, decay, objective.needs_teacher)
