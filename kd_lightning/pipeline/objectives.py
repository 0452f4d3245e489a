"""The objective of a run: the task's own, or the weighted ones of several tasks."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from kd_lightning.config.instantiate import build
from kd_lightning.data.text.ends import text_ends
from kd_lightning.losses.term import Scheduled, Term
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers import EMATeacher
from kd_lightning.training.objective import Objective
from kd_lightning.training.on_policy import OnPolicy
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


def student_texts(run: Run) -> OnPolicy | None:
    """Return how the student continues texts (`on_policy`), if it does.

    Raises:
        ConfigError: The data are no texts for language models, or their blocks leave no room.
    """
    settings = run.cfg.on_policy
    if settings.share == 0:
        return None
    tokenizer, block_size = run.data.tokenizer_of("student"), run.data.model_arguments("student").get("block_size")
    if not run.task.generates or tokenizer is None or block_size is None:
        raise ConfigError(f"on_policy.share={settings.share:g}: only a language model continues texts; set it to 0")
    return OnPolicy(**asdict(settings), most_tokens=block_size, ends=text_ends(tokenizer))


def own_average(run: Run, student: nn.Module, objective: Objective) -> EMATeacher | None:
    """Return the mean teacher of `teacher.ema`."""
    decay = run.cfg.teacher.ema
    return None if decay is None else EMATeacher(student, decay, objective.needs_teacher)
