"""The life of a run: teacher, baseline, distilled student, fine-tuned student. Each reads the files of the last."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from kd_lightning.callbacks import CacheFilling
from kd_lightning.checks import validate
from kd_lightning.config import build, in_sweep, lookup, parameters, processes, to_dict
from kd_lightning.errors import ConfigError
from kd_lightning.features import FeatureTap
from kd_lightning.files import write_file
from kd_lightning.models.adapt import evaluating
from kd_lightning.models.answers import network_answers
from kd_lightning.models.rebuild import describe
from kd_lightning.module import DistillationModule, SupervisedModule
from kd_lightning.objective import Objective
from kd_lightning.runs import differences, digest, file_digest, load_run, read_json
from kd_lightning.shared import shared, stamps
from kd_lightning.teachers import AheadTeacher, CachedTeacher, EnsembleTeacher, FrozenTeacher, Teacher
from kd_lightning.teaching import DECIDING, Answering, TeacherNetwork, load_teacher, read_teacher
from kd_lightning.training import Stage, planned_steps, train
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from kd_lightning.data import TextData
    from kd_lightning.data.text import Role


class Pipeline:
    """Runs the stages that a configuration asks for.

    Args:
        cfg: The composed configuration (conf/config.yaml).
        console: Where progress and the table are printed.

    Raises:
        ConfigError: Before any work, for whatever is wrong with the configuration.
    """

    def __init__(self, cfg: DictConfig, console: Console | None = None) -> None:
        validate(cfg)
        self.cfg: dict[str, Any] = to_dict(cfg)
        self.console = console or Console()
        self.folder = Path(self.cfg["run_dir"])
        self.stages: list[str] = self.cfg["stages"]
        self.seeds = list(range(self.cfg["seed"], self.cfg["seed"] + self.cfg["seeds"]))
        if self.cfg["resume"] == "never" and any(self.folder.glob("**/settings.json")):
            raise ConfigError(f"{self.folder} holds a run already and resume=never: choose another name=...")
        self._check_folder()
        self.data: TextData = shared(
            "data", [digest(self.cfg["data"]), stamps(self.cfg["data"])], lambda: _prepared(self.cfg["data"])
        )

    def run(self) -> None:
        """Train every stage that is asked for and not yet finished."""
        self._rehearse()
        if "teacher" in self.stages:
            _ = self.teacher
        for seed in self.seeds:
            if "baseline" in self.stages:
                self.baseline(seed, "baseline")
                if self.takes_from_teacher:
                    self.baseline(seed, "baseline_initialised")
            if "distill" in self.stages:
                self.distill(seed)
            if "finetune" in self.stages:
                self.finetune(seed)
        write_file(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.cfg)))

    def score(self) -> float:
        """Return the best validation accuracy of the last stage, averaged over seeds: what a sweep maximises."""
        if self.stages == ["teacher"]:
            data = self.data.select(tokens="teacher")
            said = network_answers(self.teacher.network, data.val_dataloader(), self.device)
            return float((said.logits.argmax(1) == said.labels).float().mean())
        records = [read_json(self._folder(seed, self.stages[-1]) / "stage.json") for seed in self.seeds]
        return sum(float(record["validation"]["accuracy"]) for record in records) / len(records)

    # -- the stages ---------------------------------------------------------------------------------------------------

    @cached_property
    def teacher(self) -> TeacherNetwork:
        """Fine-tune the teacher, or load the one that `teacher.checkpoint` names."""
        settings = self.cfg["teacher"]
        if settings["checkpoint"] is not None:
            return load_teacher(settings["checkpoint"], self.data, self.console)
        folder = self.folder / "teacher"
        torch.manual_seed(self.cfg["seed"])
        data = self.data.select(tokens="teacher", pool=False)
        data = data.with_batches(batch_size=settings["batch_size"], seed=self.cfg["seed"])
        network, network_settings = self._build(settings["network"], "teacher")
        stage = self._stage(
            "teacher", folder, data, network, network_settings, settings["optimizer"], settings["scheduler"],
            trainer={**self.cfg["trainer"], **settings["trainer"]}, validations=settings["validations"],
            seed=self.cfg["seed"],
        )  # fmt: skip
        train(stage, self.console)
        return read_teacher(folder, self.data)

    def baseline(self, seed: int, name: str) -> None:
        """Train the student from labels alone, for as many steps as the distillation takes."""
        initialise = "teacher" if name == "baseline_initialised" else "random"
        network, network_settings = self._student(seed, initialise)
        stage = self._stage(
            f"{name}, seed {seed}", self._folder(seed, name), self._student_data(seed, pool=False), network,
            network_settings, self.cfg["optimizer"], self.cfg["scheduler"], steps=self.steps, seed=seed,
            more={"teacher": self.teacher.fingerprint} if initialise == "teacher" else None,
        )  # fmt: skip
        train(stage, self.console)

    def distill(self, seed: int) -> None:
        """Train the student from the teacher, on the labelled split and on whatever only the teacher labels."""
        network, network_settings = self._student(seed, "teacher")
        teacher = self.answering_teacher
        data = self._student_data(seed, pool=True)
        if isinstance(teacher, AheadTeacher):
            data.around = teacher.around
        stage = self._stage(
            f"distill, seed {seed}", self._folder(seed, "distill"), data, network, network_settings,
            self.cfg["optimizer"], self.cfg["scheduler"], steps=self.steps, seed=seed,
            more={
                "distillation": self.cfg["distillation"], "teacher": self.teacher.fingerprint,
                "answers": {key: self.cfg["teacher"][key] for key in DECIDING},
            },
        )  # fmt: skip
        if isinstance(teacher, CachedTeacher | EnsembleTeacher) and not self._shares_answers:
            stage.more_callbacks = [CacheFilling(teacher.flush, lambda: self._answering.complete(self.teacher))]
        stage.module = lambda network: self._distillation(network, teacher, data, seed)
        train(stage, self.console)
        teacher.flush()

    def _distillation(self, student: nn.Module, teacher: Teacher, data: TextData, seed: int) -> DistillationModule:
        """Put student, teacher and objective together, with projectors that fit them."""
        objective = self._objective(student, self.teacher.network)
        module = DistillationModule(
            student, teacher, objective, build(self.cfg["optimizer"]), build(self.cfg["scheduler"]),
            num_classes=self.data.num_classes, seed=seed,
        )  # fmt: skip
        if objective.connects:
            torch.manual_seed(seed)
            teacher.to(torch.device("cpu"))  # where a new student is
            module.connect(next(iter(data.val_dataloader())), data.num_examples)
        return module

    def _objective(self, student: nn.Module, teacher: nn.Module) -> Objective:
        objective: Objective = build(self.cfg["distillation"])
        objective.plan(student, teacher)
        return objective

    def finetune(self, seed: int) -> None:
        """Train the distilled student on from labels, at its own learning rate."""
        settings = self.cfg["finetune"]
        start = self._folder(seed, "distill")
        network = load_run(start).network.train()
        optimizer = {**self.cfg["optimizer"], "lr": settings["lr"]}
        trainer = {**self.cfg["trainer"], "max_epochs": settings["max_epochs"], "max_steps": -1}
        stage = self._stage(
            f"finetune, seed {seed}", self._folder(seed, "finetune"), self._student_data(seed, pool=False), network,
            read_json(start / "model.json"), optimizer, self.cfg["scheduler"], trainer=trainer, seed=seed,
            more={"start": file_digest(start / "model.safetensors")},
        )  # fmt: skip
        train(stage, self.console)

    # -- before the first stage ---------------------------------------------------------------------------------------

    def _check_folder(self) -> None:
        """Refuse a folder whose finished students were trained with other settings: its report would mix the two."""
        known = self.folder / "config.yaml"
        if not known.is_file():
            return
        old, new = to_dict(OmegaConf.load(known)), dict(self.cfg)
        if not set(old["stages"]) - {"teacher"}:
            return
        for key in ("stages", "resume", "run_dir", "logger", "checkpoint_every_n_steps"):
            old[key] = new[key] = None
        for key in (
            "cache",
            "features",
            "answer_batch_size",
            "device",
            "compile",
        ):  # where answers come from, not what they are
            old["teacher"] = {**old["teacher"], key: None}
            new["teacher"] = {**new["teacher"], key: None}
        old["seeds"] = max(old["seeds"], new["seeds"])  # more seeds are welcome
        if changed := sorted(differences(old, new)):
            raise ConfigError(
                f"{self.folder} holds a finished run with other settings ({'; '.join(changed[:3])}): choose another "
                "name=... or remove it"
            )

    def _rehearse(self) -> None:
        """Build the networks and compare them on one batch: what does not fit is refused before any training."""
        data = self.data.select(tokens="both").with_batches(eval_batch_size=4)
        batch = next(iter(data.val_dataloader()))
        given = {}
        if self.has_teacher:
            trained = self.cfg["teacher"]["checkpoint"] is not None
            network = self.teacher.network if trained else self._build(self.cfg["teacher"]["network"], "teacher")[0]
            given["teacher"] = network
        elif "distill" in self.stages or self.takes_from_teacher:
            raise ConfigError("there is no teacher: add teacher to stages, or set teacher.checkpoint to a finished one")
        if self.stages == ["teacher"]:
            return
        student, _ = self._build(self.cfg["student"], "student", **given)
        if "distill" in self.stages:
            objective = self._objective(student, given["teacher"])
            self._answering.needs = objective.needs_teacher
            teacher = self._answering.check(given["teacher"], self.teacher if trained else None)
            _try(objective, student, teacher, batch, data.num_examples)

    # -- what the stages share ----------------------------------------------------------------------------------------

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the distillation, and so of its baselines."""
        return planned_steps(self.cfg["trainer"], len(self._student_data(self.seeds[0], pool=True).train_dataloader()))

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
            or (self.folder / "teacher" / "stage.json").is_file()
        )

    @cached_property
    def takes_from_teacher(self) -> bool:
        """True when the student is initialised from the teacher."""
        return "initialise" in parameters(lookup(self.cfg["student"]["_target_"]))

    @cached_property
    def answering_teacher(self) -> Teacher:
        """The teacher as the students meet it: running, or answering from one pass over all examples."""
        if "distill" not in self.stages:
            return FrozenTeacher(self.teacher.network, self.cfg["teacher"]["precision"])
        if self._shares_answers:
            self._answering.complete(self.teacher)
        return self._answering.teacher(self.teacher)

    @property
    def _shares_answers(self) -> bool:
        """True when several trainings or processes read the teacher's answers, which are then asked for beforehand."""
        return len(self.seeds) > 1 or in_sweep() or processes(self.cfg["trainer"]) > 1

    def build_caches(self) -> list[Path]:
        """Have the teacher answer every example; return the folder of its cache, or of each member's of an ensemble."""
        if self.cfg["teacher"]["cache"] == "off":
            raise ConfigError("teacher.cache=off keeps no answers: there is nothing to build")
        self._rehearse()
        self._answering.complete(self.teacher)
        return [self._answering.cache(teacher).folder for teacher in self.teacher.members or [self.teacher]]

    @cached_property
    def _answering(self) -> Answering:
        data = self.data.select(tokens="teacher", pool=True)
        return Answering(self.cfg["teacher"], data, self.device, self.console)

    def _student_data(self, seed: int, pool: bool) -> TextData:
        return self.data.select(tokens="both" if pool else "student", pool=pool).with_batches(seed=seed)

    def _folder(self, seed: int, stage: str) -> Path:
        return self.folder / f"seed_{seed}" / stage

    def _student(self, seed: int, initialise: str) -> tuple[nn.Module, dict[str, Any]]:
        """Build the student, alike for every stage of a seed but for what `initialise` has it take from the teacher."""
        settings, given = self.cfg["student"], {}
        if self.takes_from_teacher:
            settings, given = {**settings, "initialise": initialise}, {"teacher": self.teacher.network}
        torch.manual_seed(seed)  # after the teacher, whose training or loading draws numbers too
        return self._build(settings, "student", **given)

    def _build(self, settings: dict[str, Any], role: Role, **given: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Build a network, and return with it the settings that rebuild it without the data."""
        sizes = self.data.model_arguments(role)
        takes = parameters(lookup(settings["_target_"]))
        network: nn.Module = build(settings, **sizes, **given)
        if "teacher" in takes and describe(network) is None:
            raise ConfigError(
                f"{role}: {settings['_target_']} makes a {type(network).__name__} from the teacher, which could not be "
                "rebuilt without it: give it a constructor of plain values, and copy weights in a script of your own"
            )
        filled = {key: value for key, value in sizes.items() if key in takes and settings.get(key) is None}
        return network, {**settings, **filled}

    def _stage(
        self, name: str, folder: Path, data: TextData, network: nn.Module, network_settings: dict[str, Any],
        optimizer: dict[str, Any], scheduler: dict[str, Any], *, seed: int, trainer: dict[str, Any] | None = None,
        validations: int | None = None, steps: int | None = None, more: dict[str, Any] | None = None,
    ) -> Stage:  # fmt: skip
        """Describe a training from labels; `distill` puts its own module in."""
        trainer = trainer or self.cfg["trainer"]
        deciding = {key: value for key, value in trainer.items() if key != "log_every_n_steps"}
        validations = validations or self.cfg["validations"]
        return Stage(
            name=name,
            folder=folder,
            settings={
                "network": network_settings, "optimizer": optimizer, "scheduler": scheduler, "trainer": deciding,
                "batch_size": data.batch_size, "validations": validations, "steps": steps, "seed": seed,
                "data": data.fingerprint, "callbacks": self.cfg["callbacks"], **(more or {}),
            },
            network=network,
            network_settings=network_settings,
            module=lambda network: SupervisedModule(
                network, build(optimizer), build(scheduler), num_classes=self.data.num_classes, seed=seed
            ),
            data=data,
            role="teacher" if name == "teacher" else "student",
            trainer=trainer,
            validations=validations,
            checkpoint_every=self.cfg["checkpoint_every_n_steps"],
            callbacks=self.cfg["callbacks"],
            loggers=self.cfg["logger"],
            steps=steps,
            compile=self.cfg["compile"] and name != "teacher",
        )  # fmt: skip


def _prepared(settings: dict[str, Any]) -> TextData:
    data: TextData = build(settings)
    data.prepare()
    return data


def _try(objective: Objective, student: nn.Module, teacher: Teacher, batch: Batch, examples: int) -> None:
    """Compare the two on one batch before any training, so that models that do not fit are refused at once."""
    ask = FeatureTap(student, objective.needs_student)
    with evaluating(student), torch.no_grad():
        said, expected = ask(batch), teacher(batch)
        try:
            objective.connect(said, expected, examples)
            objective.eval()(said, expected, batch)
        except ValueError as error:
            raise ConfigError(f"distillation: {error}") from error
