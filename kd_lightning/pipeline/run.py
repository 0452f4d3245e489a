"""The life of a run: teacher, assistants, baseline, distilled and fine-tuned student. Each reads files of the last."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from kd_lightning.config.instantiate import build, in_sweep, lookup, parameters, processes, to_dict
from kd_lightning.data.sources.places import absolute
from kd_lightning.data.text.tokens import tokenizer_fingerprint
from kd_lightning.models.cohort import joined
from kd_lightning.models.fits import check_length
from kd_lightning.models.from_teacher import embeddings_from_teacher, from_teacher
from kd_lightning.models.rebuild import describe
from kd_lightning.pipeline.from_run import from_run
from kd_lightning.pipeline.preflight import has_start, rehearse, source_of, takes_from_teacher
from kd_lightning.pipeline.sources import check_sources
from kd_lightning.pipeline.teacher_provider import (
    DECIDING,
    Answering,
    TeacherNetwork,
    ensemble,
    load_teacher,
    read_teacher,
)
from kd_lightning.pipeline.validation import check_folder, number_of_teachers, validate
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.files import remove_temporary
from kd_lightning.runtime.fingerprints import digest, file_digest, read_json
from kd_lightning.runtime.memoize import shared, stamps
from kd_lightning.runtime.processes import first, rank
from kd_lightning.tasks.predictions import answers, network_answers
from kd_lightning.teachers import (
    AheadTeacher,
    CachedTeacher,
    CalibratedTeacher,
    EMATeacher,
    EnsembleTeacher,
    FrozenTeacher,
    MultiTaskTeacher,
    Teacher,
)
from kd_lightning.training.callbacks import CacheFilling, MeanTeacher
from kd_lightning.training.distillation import DistillationModule, SupervisedModule
from kd_lightning.training.fit import train
from kd_lightning.training.links import check_links
from kd_lightning.training.objective import Objective
from kd_lightning.training.run_folder import (
    find_stage,
    is_finished,
    load_run,
    read_stage,
    validation_score,
    write_config,
)
from kd_lightning.training.stage import Stage, planned_steps

if TYPE_CHECKING:
    from kd_lightning.data import ClassificationData
    from kd_lightning.data.datamodule import Role
    from kd_lightning.tasks import Task

ASSISTANTS = 2000
"""Assistants' seeds begin so far above the students': alike in architecture, they start unlike."""


class Pipeline:
    """Runs the stages that a configuration asks for.

    Args:
        cfg: The composed configuration (conf/config.yaml).
        console: Where progress and the table are printed.
        data: The data that `cfg` describes, where they are read already.

    Raises:
        ConfigError: Before any work, for whatever is wrong with the configuration.
    """

    def __init__(self, cfg: DictConfig, console: Console | None = None, data: ClassificationData | None = None) -> None:
        run = validate(cfg)
        self.cfg: dict[str, Any] = to_dict(cfg)
        self.cfg["data"] = absolute(self.cfg["data"])
        self.console = console or Console()
        self.folder = Path(self.cfg["run_dir"])
        self.stages: list[str] = self.cfg["stages"]
        self.seeds = list(range(self.cfg["seed"], self.cfg["seed"] + self.cfg["seeds"]))
        if self.cfg["resume"] == "never" and any(self.folder.glob("**/settings.json")):
            raise ConfigError(f"{self.folder} holds a run already and resume=never: choose another name=...")
        check_links(self.folder, self.cfg["shared_dir"])
        check_folder(self.folder, replace(run, data=self.cfg["data"]))
        if rank() == 0:
            remove_temporary(self.folder)
        check_sources(self.cfg)
        self.data: ClassificationData = data or shared(
            "data", [digest(self.cfg["data"]), stamps(self.cfg["data"])], lambda: _prepared(self.cfg["data"])
        )
        self._assistants: dict[int, TeacherNetwork] = {}

    def run(self, begin: Callable[[], None] | None = None) -> None:
        """Train every stage that is asked for and not yet finished.

        Args:
            begin: Called once nothing is refused any more, and before anything is trained or written.
        """
        self._rehearse()
        if begin is not None:
            begin()
        if "teacher" in self.stages:
            _ = self.teacher
        for seed in self.seeds:
            if "baseline" in self.stages:
                self.baseline(seed, "baseline")
                if self.has_start:
                    self.baseline(seed, "baseline_initialised")
            if "distill" in self.stages:
                self.distill(seed)
            if "finetune" in self.stages:
                self.finetune(seed)
        if rank() == 0:
            kept = self.cfg | {"run_dir": str(self.folder.absolute())}
            write_config(self.folder, OmegaConf.to_yaml(OmegaConf.create(kept)))

    def _rehearse(self) -> None:
        """Refuse before any training what does not fit."""
        rehearse(self)

    def score(self) -> float:
        """Return the best validation score of the last stage, averaged over seeds: what a sweep maximises."""
        if self.stages == ["teacher"]:
            data = self.data.select(tokens="teacher")
            if self.teacher.members:
                said = answers(self.answering_teacher.to(self.device), data.val_dataloader(), self.device)
            else:
                said = network_answers(self.teacher.network, data.val_dataloader(), self.device)
            return self.task.evaluate(said)[self.task.main]
        records = [read_stage(self._folder(seed, self.stages[-1])) for seed in self.seeds]
        return sum(map(validation_score, records)) / len(records)

    # -- the stages ---------------------------------------------------------------------------------------------------

    @cached_property
    def teacher(self) -> TeacherNetwork:
        """Fine-tune the teacher, or several with different seeds, or load what `teacher.checkpoint` names."""
        settings = self.cfg["teacher"]
        if settings["checkpoint"] is not None:
            return load_teacher(settings["checkpoint"], self.data, self.console)
        members = [self._tuned(number) for number in range(number_of_teachers(settings))]
        return members[0] if len(members) == 1 else ensemble(members)

    def _tuned(self, number: int) -> TeacherNetwork:
        """Fine-tune a teacher; the first one's folder is `teacher`."""
        settings, name = self.cfg["teacher"], teacher_name(number)
        seed = settings["seed"] + number
        torch.manual_seed(seed)
        data = self.data.select(tokens="teacher", pool=False)
        data = data.with_batches(batch_size=settings["batch_size"], seed=seed)
        if settings["folds"] > 1:
            data = data.without_fold(number, settings["folds"])
        network, network_settings = self.build_network(settings["network"], "teacher")
        stage = self._stage(
            name, self.folder / name, data, network, network_settings, settings["optimizer"], settings["scheduler"],
            trainer={**self.cfg["trainer"], **settings["trainer"]}, validations=settings["validations"], seed=seed,
        )  # fmt: skip
        train(stage, self.console)
        return read_teacher(self.folder / name, self.data)

    def _is_tuned(self, number: int) -> bool:
        return is_finished(self.folder / teacher_name(number))

    def baseline(self, seed: int, name: str) -> None:
        """Train the student from labels alone, for as many steps as the distillation takes."""
        initialise = "teacher" if name == "baseline_initialised" else "random"
        network, network_settings = self._student(seed, initialise)
        more: dict[str, Any] = {}
        if self.takes_from_teacher:  # whose settings say neither its sizes nor its weights
            more = {"architecture": describe(network)}
        if initialise == "teacher":
            above = {"teacher": self.source.fingerprint} if self.takes_from_teacher else {}
            more |= above | self._start()
        stage = self._stage(
            f"{name}, seed {seed}", self._folder(seed, name), self._student_data(seed, pool=False), network,
            network_settings, self.cfg["optimizer"], self.cfg["scheduler"], steps=self.steps, seed=seed,
            more=more,
        )  # fmt: skip
        train(stage, self.console)

    def guide(self, number: int) -> TeacherNetwork:
        """Return the teacher (0), or an assistant, once it is distilled from the one before it."""
        if number == 0:
            return self.teacher
        if number not in self._assistants:
            self.guide(number - 1)  # its training draws random numbers too
            folder, seed = self.folder / f"assistant_{number}", self.seed_of_assistant(number)
            torch.manual_seed(seed)
            built = self.build_network(self.cfg["assistants"][number - 1], "student")
            self._distil(f"assistant {number}", folder, *built, seed, number - 1)
            self._assistants[number] = read_teacher(folder, self.data_of(number))
        return self._assistants[number]

    def seed_of_assistant(self, number: int) -> int:
        """Return the seed of assistant 1, 2, ..."""
        return int(self.cfg["seed"]) + ASSISTANTS + number - 1

    def distill(self, seed: int) -> None:
        """Train the student from the teacher, on the labelled split and on whatever only the teacher labels."""
        last = len(self.cfg["assistants"]) if self.has_teacher else None
        if last is not None:
            self.guide(last)
        network, settings = self._student(seed, "teacher")
        peers = [self.build_network(peer, "student")[0] for peer in self.cfg["peers"]]
        self._distil(f"distill, seed {seed}", self._folder(seed, "distill"), network, settings, seed, last, peers)

    def _distil(
        self, name: str, folder: Path, network: nn.Module, network_settings: dict[str, Any], seed: int,
        number: int | None, peers: Sequence[nn.Module] = (),
    ) -> None:  # fmt: skip
        """Train a network from guide `number`; without one, from the average of its own weights, or from no teacher."""
        teacher = None if number is None else self._asked(number)
        data = self._student_data(seed, pool=True, number=number or 0)
        asked = teacher.inner if isinstance(teacher, CalibratedTeacher) else teacher
        if isinstance(asked, AheadTeacher):
            data.around = asked.around
        stage = self._stage(
            name, folder, data, network, network_settings, self.cfg["optimizer"], self.cfg["scheduler"],
            steps=self.steps, seed=seed,
            more={
                "distillation": self.losses, "balance": self.cfg["balance"], "peers": self.cfg["peers"],
                "teacher": {"ema": self.cfg["teacher"]["ema"]} if number is None else self.guide(number).fingerprint,
                "answers": {
                    key: self.cfg["teacher"][key] for key in (*DECIDING, "combine", "weights", "folds", "calibrate")
                },
                **self._start(),
            },
        )  # fmt: skip
        if isinstance(teacher, CalibratedTeacher):
            stage.notes = {"teacher_temperature": teacher.temperature}
        keeping = asked if isinstance(asked, CachedTeacher | EnsembleTeacher | MultiTaskTeacher) else None
        if number is not None and keeping is not None and not self._shares(number):
            stage.more_callbacks = [CacheFilling(keeping.flush, partial(self._complete, number))]
        if self.cfg["teacher"]["ema"] is not None:
            stage.more_callbacks = [MeanTeacher()]
        above = None if number is None else self.guide(number).network
        stage.module = lambda network: self._distillation(joined(network, peers), above, teacher, data, seed)
        train(stage, self.console)
        if teacher is not None:
            teacher.flush()

    def _distillation(
        self, student: nn.Module, above: nn.Module | None, teacher: Teacher | None, data: ClassificationData, seed: int
    ) -> DistillationModule:
        """Put student, teacher (of the network `above`, if any) and objective together, with projectors that fit."""
        objective = self.objective(student, above)
        teacher = self.own_average(student, objective) if above is None else teacher
        module = DistillationModule(
            student, teacher, objective, build(self.cfg["optimizer"]), build(self.cfg["scheduler"]),
            task=self.task, seed=seed,
        )  # fmt: skip
        if objective.connects:
            torch.manual_seed(seed)
            if teacher is not None:
                teacher.to(torch.device("cpu"))  # where a new student is
            module.connect(next(iter(data.val_dataloader())), data.num_examples)
        return module

    def own_average(self, student: nn.Module, objective: Objective) -> EMATeacher | None:
        """Return the mean teacher that `teacher.ema` asks for."""
        decay = self.cfg["teacher"]["ema"]
        return None if decay is None else EMATeacher(student, decay, objective.needs_teacher)

    @property
    def losses(self) -> dict[str, Any]:
        """The configuration of the loss; of several tasks theirs, by name."""
        found: dict[str, Any] = self.cfg["distillation"]
        return found

    def objective(self, student: nn.Module, teacher: nn.Module | None) -> Objective:
        """Build the loss for two networks; without a teacher, for the student and itself."""
        objective: Objective = build(self.cfg["distillation"], balance=self.cfg["balance"])
        objective.plan(student, student if teacher is None else teacher)
        return objective

    def finetune(self, seed: int) -> None:
        """Train the distilled student on from labels, at its own learning rate."""
        start = self._folder(seed, "distill")
        network = load_run(start).network.train()
        optimizer, trainer = finetuning(self.cfg)
        stage = self._stage(
            f"finetune, seed {seed}", self._folder(seed, "finetune"), self._student_data(seed, pool=False), network,
            read_json(start / "model.json"), optimizer, self.cfg["scheduler"], trainer=trainer, seed=seed,
            more={"start": file_digest(start / "model.safetensors")},
        )  # fmt: skip
        train(stage, self.console)

    # -- what the stages share ----------------------------------------------------------------------------------------

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the distillation, and so of its baselines."""
        return planned_steps(self.cfg["trainer"], len(self._student_data(self.seeds[0], pool=True).train_dataloader()))

    @property
    def task(self) -> Task:
        """What the networks learn to predict."""
        return self.data.task

    @property
    def device(self) -> torch.device:
        """Where networks are asked outside of a training."""
        cuda = torch.cuda.is_available() and self.cfg["trainer"].get("accelerator") != "cpu"
        return torch.device("cuda" if cuda else "cpu")

    @property
    def has_teacher(self) -> bool:
        """True when this run trains, loads or holds a teacher."""
        return (
            "teacher" in self.stages
            or self.cfg["teacher"]["checkpoint"] is not None
            or (
                self.cfg["teacher"]["ema"] is None
                and all(map(self._is_tuned, range(number_of_teachers(self.cfg["teacher"]))))
            )
        )

    @property
    def reads_other_tokens(self) -> bool:
        """True for an ensemble of which no batch holds all members' tokens."""
        return self.answerings[0].reads_other_tokens(self.teacher)

    @property
    def source(self) -> TeacherNetwork:
        """The teacher that a student is made from: of several the first one."""
        found = self.teacher
        while found.members:
            found = found.members[0]
        return found

    @cached_property
    def takes_from_teacher(self) -> bool:
        """True when the student is made from the teacher."""
        return takes_from_teacher(self.cfg["student"])

    @cached_property
    def has_start(self) -> bool:
        """True when the student starts from trained weights: its teacher's, or those of another run."""
        return has_start(self.cfg["student"])

    def _start(self) -> dict[str, str]:
        """Return what names the weights of another run that the student starts from."""
        settings = self.cfg["student"]
        if lookup(settings["_target_"]) is not from_run or not self.has_start:
            return {}
        return {"start": file_digest(find_stage(Path(settings["checkpoint"])) / "model.safetensors")}

    @cached_property
    def answering_teacher(self) -> Teacher:
        """The teacher as those it teaches meet it: running, or answering from one pass over all examples."""
        if "distill" not in self.stages and not self.teacher.members:
            alone = FrozenTeacher(self.teacher.network, self.cfg["teacher"]["precision"])
            return self.answerings[0].calibrated(alone)
        return self._asked(0)

    def _asked(self, number: int) -> Teacher:
        """Return the teacher (0) or an assistant as the one below meets it."""
        if self._shares(number):
            self._complete(number)
        return self.answerings[number].teacher(self.guide(number))

    def _complete(self, number: int) -> None:
        """Have the teacher, or an assistant, answer whatever is not kept yet."""
        guide = self.guide(number)
        with first():
            self.answerings[number].complete(guide)

    def _shares(self, number: int) -> bool:
        """True when several trainings or processes read this guide's answers, which are then asked for beforehand."""
        seeds = len(self.seeds) if number == len(self.cfg["assistants"]) else 1
        return seeds > 1 or in_sweep() or processes(self.cfg["trainer"]) > 1

    def build_caches(self) -> list[Path]:
        """Have the teacher answer every example; return the folder of its cache, or of each member's of an ensemble."""
        if self.cfg["teacher"]["cache"] == "off" or self.cfg["teacher"]["ema"] is not None:
            raise ConfigError("teacher.cache=off, or teacher.ema, keeps no answers: there is nothing to build")
        self._rehearse()
        answering = self.answerings[0]
        answering.complete(self.teacher)
        return [answering.cache(teacher).folder for teacher in answering.asked_apart(self.teacher)]

    @cached_property
    def answerings(self) -> list[Answering]:
        """How the teacher and each assistant are asked; what the losses need of them is settled by the rehearsal."""
        settings = self.cfg["teacher"]
        own = {
            **settings, "checkpoint": None, "seeds": 1, "folds": 1, "features": [],
            "cache": cache_of_assistants(settings["cache"]),
        }  # fmt: skip
        return [
            Answering(
                own if number else settings, self.data_of(number).select(tokens="teacher", pool=True),
                self.device, self.console,
            )
            for number in range(len(self.cfg["assistants"]) + 1)
        ]  # fmt: skip

    def data_of(self, number: int) -> ClassificationData:
        """Return the data as a guide and those below it read them: an assistant reads what the students read."""
        return self.data.with_one_reader() if number else self.data

    def _student_data(self, seed: int, pool: bool, number: int = 0) -> ClassificationData:
        return self.data_of(number).select(tokens="both" if pool else "student", pool=pool).with_batches(seed=seed)

    def _folder(self, seed: int, stage: str) -> Path:
        return self.folder / f"seed_{seed}" / stage

    def _kept(self, folder: Path, settings: dict[str, Any]) -> Path:
        """Return where a stage's files go: for what `shared_dir` shares, a folder that the run's own is a link to."""
        shared_dir = self.cfg["shared_dir"]
        if shared_dir is None or folder.name in ("distill", "finetune"):
            return folder
        if not folder.exists():
            _linked(folder, Path(shared_dir).absolute() / f"{folder.name}-{digest(settings)}")
        return folder.resolve()

    def _student(self, seed: int, initialise: str) -> tuple[nn.Module, dict[str, Any]]:
        """Build the student, alike for every stage of a seed but for what `initialise` has it take from the teacher."""
        settings = self.cfg["student"]
        if self.has_start:
            settings = {**settings, "initialise": initialise}
        if self.takes_from_teacher:
            _ = self.teacher  # its training or loading draws random numbers too
        torch.manual_seed(seed)
        return self.build_network(settings, "student")

    def build_network(self, settings: dict[str, Any], role: Role, **given: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Build a network, and return with it the settings that rebuild it without the data."""
        sizes = self.data.model_arguments(role)
        if role == "student" and takes_from_teacher(settings):
            given = {"teacher": source_of(given["teacher"] if given else self.teacher.network)}
            if lookup(settings["_target_"]) in (from_teacher, embeddings_from_teacher):
                self._check_reading()
        takes = parameters(lookup(settings["_target_"]))
        known = {**settings, **sizes, **given}
        if lacking := [name for name, (_, required) in takes.items() if required and name not in known]:
            source = type(self.data).__name__
            raise ConfigError(
                f"{role}: {settings['_target_']} needs {', '.join(lacking)}; {source} gives {list(sizes)}"
            )
        if (classes := settings.get("num_classes")) not in (None, sizes["num_classes"]):
            raise ConfigError(f"{role}: num_classes={classes}, and the data have {sizes['num_classes']}: leave it out")
        try:
            network: nn.Module = build(settings, **sizes, **given)
        except KDError as error:  # a constructor does not know whose network it makes
            raise type(error)(f"{role}: {error}") from error
        if "teacher" in takes and describe(network) is None:
            raise ConfigError(
                f"{role}: {settings['_target_']} makes a {type(network).__name__} from the teacher, which could not be "
                "rebuilt without it: give it a constructor of plain values, and copy weights in a script of your own"
            )
        check_length(network, self.data.input_format.get("max_length"), role)
        return network, self.filled(settings, role)

    def _check_reading(self) -> None:
        """Refuse a student with the word embeddings of a teacher that reads other tokens."""
        readers = [self.data.tokenizer_of("student"), self.data.tokenizer_of("teacher")]
        prints = {tokenizer_fingerprint(reader) for reader in readers if reader is not None}
        if len(prints) > 1:
            raise ConfigError(
                "student: it has the teacher's word embeddings and would read other tokens: let both read with the "
                "teacher's tokenizer (data.tokenizer), or use a student that takes nothing from it"
            )

    def filled(self, settings: dict[str, Any], role: Role) -> dict[str, Any]:
        """Return a network's settings with what the data decide about it."""
        takes, sizes = parameters(lookup(settings["_target_"])), self.data.model_arguments(role)
        return settings | {key: size for key, size in sizes.items() if key in takes and settings.get(key) is None}

    def _stage(
        self, name: str, folder: Path, data: ClassificationData, network: nn.Module, network_settings: dict[str, Any],
        optimizer: dict[str, Any], scheduler: dict[str, Any], *, seed: int, trainer: dict[str, Any] | None = None,
        validations: int | None = None, steps: int | None = None, more: dict[str, Any] | None = None,
    ) -> Stage:  # fmt: skip
        """Describe a training from labels; `distill` puts its own module in."""
        trainer = trainer or self.cfg["trainer"]
        deciding = {key: value for key, value in trainer.items() if key != "log_every_n_steps"}
        if deciding.get("strategy") == "ddp_spawn":  # who starts the processes decides nothing
            deciding["strategy"] = "ddp"
        validations = validations or self.cfg["validations"]
        weights = {name: task["weight"] for name, task in self.cfg["tasks"].items() if "weight" in task}
        settings = {
            "network": network_settings, "optimizer": optimizer, "scheduler": scheduler, "trainer": deciding,
            "batch_size": data.batch_size, "validations": validations, "steps": steps, "seed": seed,
            "data": data.fingerprint, "callbacks": self.cfg["callbacks"], **(more or {}),
            **({"task_weights": weights} if weights else {}),
        }  # fmt: skip
        return Stage(
            name=name,
            folder=self._kept(folder, settings),
            settings=settings,
            network=network,
            network_settings=network_settings,
            module=lambda network: SupervisedModule(
                network, build(optimizer), build(scheduler), task=self.task, seed=seed,
            ),
            data=data,
            role="teacher" if name.startswith("teacher") else "student",
            trainer=trainer,
            validations=validations,
            checkpoint_every=self.cfg["checkpoint_every_n_steps"],
            callbacks=self.cfg["callbacks"],
            loggers=self.cfg["logger"],
            steps=steps,
            compile=self.cfg["compile"] and not name.startswith("teacher"),
            rate=rate_of(name),
        )  # fmt: skip


def _linked(folder: Path, place: Path) -> None:
    """Make a folder whose files are in another place, relative to it, so that both can be moved together."""
    place.mkdir(parents=True, exist_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process of this command was faster
        folder.symlink_to(os.path.relpath(place, folder.parent), target_is_directory=True)


def _prepared(settings: dict[str, Any]) -> ClassificationData:
    data: ClassificationData = build(settings)
    data.prepare()
    return data


def finetuning(cfg: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of optimizer and trainer for training the distilled student on."""
    own = cfg["finetune"]
    trainer = {**cfg["trainer"], "max_epochs": own["max_epochs"], "max_steps": -1}
    return {**cfg["optimizer"], "lr": own["lr"]}, trainer


def rate_of(stage: str) -> str:
    """Return the key of a stage's learning rate."""
    own = {"teacher": "teacher.optimizer.lr", "finetune": "finetune.lr"}
    return next((key for start, key in own.items() if stage.startswith(start)), "optimizer.lr")


def cache_of_assistants(cache: str) -> str:
    """Return how assistants are asked: their answers cannot be there before them."""
    return "auto" if cache == "require" else cache


def teacher_name(number: int) -> str:
    """Return the folder of a fine-tuned teacher, the first or another of an ensemble's."""
    return f"teacher_{number}" if number else "teacher"
