"""A run of several tasks: a teacher for each, and one student that learns from all of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from kd_lightning.config.instantiate import build, lookup
from kd_lightning.data.multi_task import MultiTaskData
from kd_lightning.losses.term import Scheduled, Term
from kd_lightning.models.fits import check_length
from kd_lightning.pipeline.preflight import check_batches, step_taught, step_teacher, try_out
from kd_lightning.pipeline.run import Pipeline
from kd_lightning.pipeline.teacher_provider import TeacherNetwork
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.tasks import MultiTask
from kd_lightning.teachers import MultiTaskTeacher, SideBySide, Teacher
from kd_lightning.training.objective import Objective
from kd_lightning.training.run_folder import is_finished
from kd_lightning.training.schedules import Times


def pipeline_of(cfg: DictConfig, console: Console | None = None) -> Pipeline:
    """Return the pipeline that a configuration asks for: of several tasks if its data are."""
    data = lookup(cfg.data._target_)
    several = isinstance(data, type) and issubclass(data, MultiTaskData)
    return (MultiTaskPipeline if several else Pipeline)(cfg, console)


class MultiTaskPipeline(Pipeline):
    """A teacher for each task, in RUN/tasks/NAME, and students that learn all tasks.

    A task's teacher is trained, asked and kept by a pipeline of its own. The student is an ordinary network with as
    many outputs as the tasks have together: a shared encoder, and in the rows of its last layer a linear head a task.

    Args:
        cfg: The composed configuration; `data` are a `MultiTaskData`.
        console: As for `Pipeline`.

    Raises:
        ConfigError: As `Pipeline`.
    """

    data: MultiTaskData

    def __init__(self, cfg: DictConfig, console: Console | None = None) -> None:
        super().__init__(cfg, console)
        self.parts = {name: Pipeline(self._own(name), self.console, data) for name, data in self.data.tasks.items()}

    def _own(self, name: str) -> DictConfig:
        """Return the configuration of one task's teacher: a run of its own."""
        given, whole = self.cfg["tasks"].get(name, {}).get("teacher", {}), self.cfg["teacher"]
        teacher = {**whole, **given}
        for key in ("network", "optimizer", "scheduler", "trainer"):
            if "_target_" not in given.get(key, {}):  # another class takes other arguments
                teacher[key] = {**whole[key], **given.get(key, {})}
        own = {
            "data": self.cfg["data"]["tasks"][name], "run_dir": str(self.folder / "tasks" / name), "tasks": {},
            "teacher": teacher, "stages": ["teacher"], "distillation": self.losses[name],
        }  # fmt: skip
        return OmegaConf.create({**self.cfg, **own})

    @cached_property
    def task(self) -> MultiTask:
        """All tasks, with their weights."""
        whole = self.data.task
        return MultiTask(whole.tasks, {name: float(task.get("weight", 1)) for name, task in self.cfg["tasks"].items()})

    @cached_property
    def teacher(self) -> TeacherNetwork:
        """Train every task's teacher, or load it; together they are one whose answers stand side by side."""
        for name, part in self.parts.items():
            say(self.console, f"task {name}")
            part.run()
        members = [part.teacher for part in self.parts.values()]
        title = ", ".join(f"{name} {member.title}" for name, member in zip(self.parts, members, strict=True))
        fingerprint = digest([member.fingerprint for member in members])
        return TeacherNetwork(SideBySide([member.network for member in members]), fingerprint, title, None, members)

    def score(self) -> float:
        """Return the average score: the last stage's on validation, or that of the teachers."""
        if self.stages == ["teacher"]:
            return sum(part.score() for part in self.parts.values()) / len(self.parts)
        return super().score()

    @property
    def losses(self) -> dict[str, Any]:
        """The configuration of each task's loss."""
        tasks, shared = self.cfg["tasks"], self.cfg["distillation"]
        return {name: tasks.get(name, {}).get("distillation", shared) for name in self.cfg["data"]["tasks"]}

    def objective(self, student: nn.Module, teacher: nn.Module | None) -> Objective:
        """Build the loss: every task's own, on its examples, times its weight."""
        terms: dict[str, Term] = {}
        weights: dict[str, Scheduled] = {}
        for name, losses in self.losses.items():
            own: Objective = build(losses)
            for part, term in own.terms.items():
                terms[f"{name}/{part}"] = self.task.term(name, term)  # type: ignore[arg-type]
                weights[f"{name}/{part}"] = _times(self.task.weights[name], own.weights[part])
        objective = Objective(terms, weights, self.cfg["balance"])
        objective.plan(student, student if teacher is None else teacher)
        return objective

    def _rehearse(self) -> None:
        with torch.random.fork_rng(devices=[]):
            self._compare()

    def _compare(self) -> None:
        """Build the networks and compare the student with all teachers on a batch of every task's examples."""
        if not self.has_teacher and self._needs_teachers:
            raise ConfigError("a task lacks its teacher: add teacher to stages, or set tasks.NAME.teacher.checkpoint")
        networks = [self._network(part) for part in self.parts.values()] if self.has_teacher else []
        for part, (network, finished) in zip(self.parts.values(), networks, strict=False):
            if "teacher" in self.stages and finished is None:
                step_teacher(part, network)
        if self.stages == ["teacher"]:
            return
        given = {"teacher": networks[0][0]} if networks else {}
        student, _ = self.build_network(self.cfg["student"], "student", **given)
        check_batches(self, student)
        if "distill" not in self.stages:
            return
        objective = self.objective(student, None)
        asked: list[Teacher] = []
        for part, (network, finished) in zip(self.parts.values(), networks, strict=False):
            asked.append(part.answerings[0].check(network, finished))
        teacher = self._joined(asked) if asked else None
        batch = self.data.select(tokens="both").one_of_each()
        try_out(objective, student, teacher, batch, self.task, self.data.num_examples)
        step_taught(objective, student, teacher, batch, self.cfg["optimizer"])

    def _network(self, part: Pipeline) -> tuple[nn.Module, TeacherNetwork | None]:
        """Return a task's teacher to rehearse with: untrained, unless a finished one is given."""
        if part.cfg["teacher"]["checkpoint"] is not None:
            check_length(part.teacher.network, part.data.input_format.get("max_length"), "teacher")
            return part.teacher.network, part.teacher
        return part.build_network(part.cfg["teacher"]["network"], "teacher")[0], None

    @property
    def _needs_teachers(self) -> bool:
        taught = "distill" in self.stages and any(build(node).uses_teacher for node in self.losses.values())
        return taught or self.takes_from_teacher

    @property
    def has_teacher(self) -> bool:
        """True when this run trains, loads or holds a teacher for every task."""
        return "teacher" in self.stages or all(
            part.cfg["teacher"]["checkpoint"] is not None or is_finished(part.folder / "teacher")
            for part in self.parts.values()
        )

    @property
    def reads_other_tokens(self) -> bool:
        """True where the teachers have different tokenizers, so that no batch holds what each of them reads."""
        return len({data.teacher_key.get("tokenizer") for data in self.data.tasks.values()}) > 1

    @cached_property
    def answering_teacher(self) -> Teacher:
        """All teachers, each asked about its own task."""
        return self._asked(0)

    def _asked(self, number: int) -> Teacher:
        _ = self.teacher
        return self._joined([part._asked(0) for part in self.parts.values()])

    def _joined(self, teachers: list[Teacher]) -> MultiTaskTeacher:
        return MultiTaskTeacher(teachers, list(self.task.spans.values()), self.data.firsts)

    def _complete(self, number: int) -> None:
        for part in self.parts.values():
            part._complete(0)

    def build_caches(self) -> list[Path]:
        """Have every teacher answer every example of its task; return the folders of their caches."""
        return [folder for part in self.parts.values() for folder in part.build_caches()]


def _times(weight: float, value: Scheduled) -> Scheduled:
    return Times(weight, value) if callable(value) else weight * value
