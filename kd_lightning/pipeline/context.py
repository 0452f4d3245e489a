"""A run: its configuration, data, folders, seeds and teachers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.config.budget import student_examples, teacher_epochs
from kd_lightning.config.instantiate import build, in_sweep, processes
from kd_lightning.config.schema import RunConfig
from kd_lightning.data import MultiTaskData
from kd_lightning.data.sources.places import absolute
from kd_lightning.pipeline.joint_provider import JointProvider
from kd_lightning.pipeline.networks import starts_trained
from kd_lightning.pipeline.serving import Serving
from kd_lightning.pipeline.sources import check_sources
from kd_lightning.pipeline.teacher_loading import LoadedTeacher, load_teacher, read_teachers, served_teacher
from kd_lightning.pipeline.teacher_provider import TeacherProvider
from kd_lightning.pipeline.validation import check_folder, validate
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.files import remove_temporary
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.runtime.memoize import shared, stamps
from kd_lightning.runtime.processes import first, rank
from kd_lightning.tasks import MultiTask
from kd_lightning.teachers import FrozenTeacher, Teacher
from kd_lightning.training.links import check_links
from kd_lightning.training.run_folder import is_finished
from kd_lightning.training.stage import planned_steps

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData
    from kd_lightning.runtime.clock import Clock
    from kd_lightning.tasks import Task

Provider = TeacherProvider | JointProvider


@dataclass(frozen=True)
class Part:
    """What of a run is one task's own. A run of one task has one part, without a name.

    Attributes:
        name: The task's.
        cfg: The run's configuration with the task's own data, teacher and loss.
        data: The task's data.
        folder: Where its teacher is trained.
    """

    name: str
    cfg: RunConfig
    data: IndexedData
    folder: Path

    @property
    def teacher_folders(self) -> list[Path]:
        """The folders of the teacher that is fine-tuned, or of an ensemble's members."""
        return [self.folder / teacher_name(number) for number in range(self.cfg.teacher.number)]

    def teacher_data(self, number: int) -> IndexedData:
        """Return the training data of the teacher, or of an ensemble's member `number`."""
        teacher = self.cfg.teacher
        data = self.data.select(tokens="teacher", pool=False).with_batches(
            teacher.batch_size, seed=teacher.seed + number
        )
        return data.without_fold(number, teacher.folds) if teacher.folds > 1 else data

    def teacher_steps(self, number: int) -> int:
        """Return the optimizer steps of the fine-tuning of teacher `number`."""
        labelled, trainer = self.teacher_data(number).labelled_examples, self.cfg.teacher_trainer
        if trainer["max_epochs"] == "auto":
            epochs = teacher_epochs(self.cfg.budget, self.data.modality, labelled, self.data.worth)
            trainer = trainer | {"max_epochs": epochs}
        return planned_steps(trainer, labelled, self.cfg.teacher.batch_size)

    @property
    def has_teacher(self) -> bool:
        """True where a teacher is given, or was trained before."""
        teacher = self.cfg.teacher
        return teacher.checkpoint is not None or (teacher.ema is None and all(map(is_finished, self.teacher_folders)))

    def load(self, console: Console) -> LoadedTeacher:
        """Load the teacher that `teacher.checkpoint` names, or the one that this run has trained."""
        if self.cfg.teacher.url is not None:
            return served_teacher(self.cfg.teacher, self.data)
        if self.cfg.teacher.checkpoint is not None:
            return load_teacher(self.cfg.teacher.checkpoint, self.data, console)
        return read_teachers(self.teacher_folders, self.data)


class Run:
    """What all stages of a run read; nothing in it is trained.

    Args:
        cfg: The composed configuration (conf/config.yaml), or what `validate` made of it.
        console: Where progress and the table are printed.
        data: The data that `cfg` describes, where they are read already.

    Attributes:
        cfg: The configuration, checked.
        folder: The run's folder.
        seeds: The students' seeds.
        data: The data of all tasks.
        clock: The time it is expected to take, once that is estimated.
        parts: What each task has of its own, by its name; of one task one part, under the empty name.

    Raises:
        ConfigError: Before any work, for whatever is wrong with the configuration.
    """

    def __init__(
        self, cfg: DictConfig | RunConfig, console: Console | None = None, data: IndexedData | None = None
    ) -> None:
        checked = cfg if isinstance(cfg, RunConfig) else validate(cfg)
        self.cfg = replace(checked, data=absolute(checked.data))
        self.console = console or Console()
        self.folder = Path(self.cfg.run_dir)
        self.seeds = self.cfg.seed_list
        if self.cfg.resume == "never" and any(self.folder.glob("**/settings.json")):
            raise ConfigError(f"{self.folder} holds a run already and resume=never: choose another name=...")
        check_links(self.folder, self.cfg.shared_dir)
        check_folder(self.folder, self.cfg)
        if rank() == 0:
            remove_temporary(self.folder)
        check_sources(self.cfg)
        key = [digest(self.cfg.data), stamps(self.cfg.data)]
        self.data: IndexedData = data or shared("data", key, lambda: _prepared(self.cfg.data))
        self.clock: Clock | None = None
        self.parts = {"": Part("", self.cfg, self.data, self.folder)}
        if isinstance(self.data, MultiTaskData):
            self.parts = {name: self._part(name, own) for name, own in self.data.tasks.items()}

    def _part(self, name: str, data: IndexedData) -> Part:
        cfg = self.cfg.of_task(name)
        return Part(name, cfg, data, Path(cfg.run_dir))

    # -- the data -----------------------------------------------------------------------------------------------------

    @cached_property
    def task(self) -> Task:
        """What the networks learn to predict; of several tasks all of them, with their weights."""
        task = self.data.task
        if not isinstance(self.data, MultiTaskData):
            return task
        return MultiTask(task.tasks, {name: own.weight for name, own in self.cfg.tasks.items()})

    def data_of(self, teacher: int) -> IndexedData:
        """Return the data for teacher 0, 1, ... and its students; assistants use the students' inputs."""
        return self.data.with_one_reader() if teacher else self.data

    def student_data(self, seed: int, transfer: bool, teacher: int = 0) -> IndexedData:
        """Return a student's training data: the labelled examples, or with `transfer` the transfer set too."""
        data = self.data_of(teacher).select(tokens="both" if transfer else "student", pool=transfer)
        return data.with_batches(seed=seed)

    def learn_from(self, data: IndexedData) -> None:
        """Have what is distilled learn from these data: the run's own, with other training examples besides."""
        self.data = data
        self.parts = {name: replace(part, data=data) for name, part in self.parts.items()}
        for number, provider in enumerate(self.providers):
            provider.data = self.data_of(number).select(tokens="teacher", pool=True)

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the distillation, and so of its baselines."""
        labelled, started = self.data.labelled_examples, starts_trained(self.cfg.student)
        examples = student_examples(self.cfg.budget, self.data.modality, labelled, started, self.data.worth)
        return planned_steps(self.cfg.trainer, labelled, self.data.batch_size, examples)

    @property
    def finetune_steps(self) -> int:
        """Optimizer steps of a distilled student's fine-tuning."""
        return planned_steps(self.cfg.finetune_trainer, self.data.labelled_examples, self.data.batch_size)

    @property
    def device(self) -> torch.device:
        """Where networks predict outside of a training."""
        cuda = torch.cuda.is_available() and self.cfg.trainer.get("accelerator") != "cpu"
        return torch.device("cuda" if cuda else "cpu")

    # -- the teachers -------------------------------------------------------------------------------------------------

    @property
    def has_teacher(self) -> bool:
        """True when this run trains, loads or holds a teacher for every task."""
        return "teacher" in self.cfg.stages or all(part.has_teacher for part in self.parts.values())

    @property
    def compares(self) -> bool:
        """Whether there is a teacher whose predictions are for the students' tokens, and have been learned."""
        return self.has_teacher and not self.data.other_tokens and not self.has_fresh_head

    @property
    def has_fresh_head(self) -> bool:
        """Whether a finished teacher's head is new, so that its predictions are no better than chance."""
        if "teacher" in self.cfg.stages or not self.has_teacher:
            return False
        return any(getattr(one.network, "fresh_head", False) for one in (self.teacher, *self.teacher.members))

    @cached_property
    def providers(self) -> list[Provider]:
        """The providers of the teacher and of each assistant, in training order."""
        own = [
            TeacherProvider(
                Serving.of(part.cfg.teacher), part.data.select(tokens="teacher", pool=True),
                partial(part.load, self.console), self.device, self.console, run=self._name,
            )
            for part in self.parts.values()
        ]  # fmt: skip
        teacher: Provider = own[0]
        if isinstance(self.data, MultiTaskData):
            teacher = JointProvider(dict(zip(self.parts, own, strict=True)), self.data)
        return [teacher, *(self._assistant(number) for number in range(1, len(self.cfg.assistants) + 1))]

    @property
    def _name(self) -> str:
        return str(self.folder.absolute())

    def provider_of(self, part: Part) -> TeacherProvider:
        """Return what gives the outputs of one task's own teacher."""
        teacher = self.providers[0]
        return teacher.providers[part.name] if isinstance(teacher, JointProvider) else teacher

    def _assistant(self, number: int) -> TeacherProvider:
        data = self.data_of(number)
        return TeacherProvider(
            Serving.of(self.cfg.teacher.of_assistant()), data.select(tokens="teacher", pool=True),
            lambda: read_teachers([self.folder / f"assistant_{number}"], data), self.device, self.console,
            run=self._name,
        )  # fmt: skip

    @property
    def teacher(self) -> LoadedTeacher:
        """The teacher, trained or loaded; of several tasks theirs side by side."""
        return self.providers[0].loaded

    def forget_teachers(self) -> None:
        """Read the teachers again when they are needed next."""
        for provider in vars(self).get("providers", []):
            provider.forget()
        for name in ("source", "predicting_teacher"):
            vars(self).pop(name, None)

    @cached_property
    def source(self) -> LoadedTeacher:
        """The teacher that a student is made from: of several the first one."""
        found = self.teacher
        while found.members:
            found = found.members[0]
        return found

    def shares(self, number: int) -> bool:
        """Return whether several trainings or processes use this teacher, so that its cache is filled first."""
        seeds = len(self.seeds) if number == len(self.cfg.assistants) else 1
        return seeds > 1 or in_sweep() or processes(self.cfg.trainer) > 1

    def teacher_for_training(self, number: int) -> Teacher:
        """Return teacher 0, 1, ... as a training calls it."""
        provider = self.providers[number]
        if self.shares(number):
            with first():
                provider.complete()
        return provider.teacher()

    @cached_property
    def predicting_teacher(self) -> Teacher:
        """The teacher for evaluation: as its students use it, but with all logits, unless it is served."""
        provider, taught = self.providers[0], "distill" in self.cfg.stages and self.cfg.teacher.keeps_all
        served = self.cfg.teacher.url is not None
        if isinstance(provider, JointProvider) or taught or served or self.teacher.members:
            return self.teacher_for_training(0)
        return provider.calibrated(FrozenTeacher(self.teacher.network, self.cfg.teacher.precision))


def _prepared(settings: dict[str, Any]) -> IndexedData:
    data: IndexedData = build(settings)
    data.prepare()
    return data


def teacher_name(number: int) -> str:
    """Return the folder of a fine-tuned teacher, the first or another of an ensemble's."""
    return f"teacher_{number}" if number else "teacher"
