"""The stages of a run as configurations of Lightning's command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from kd_lightning.config.instantiate import lookup, parameters
from kd_lightning.config.schema import CACHED, Node
from kd_lightning.data import IndexedData
from kd_lightning.pipeline.context import Part, Run
from kd_lightning.pipeline.networks import check_vocabulary, filled, takes_from_teacher
from kd_lightning.pipeline.objectives import run_objective, student_texts
from kd_lightning.pipeline.prepare import data_read_by, new_networks, task_of_stage, training_data
from kd_lightning.pipeline.stages import Stage, plan
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.run_folder import is_finished, teacher_stage
from kd_lightning.training.stage import averages, validate_every


def class_path(name: str, /, **arguments: Any) -> Node:
    """Return how a configuration of Lightning's CLI names an object."""
    return {"class_path": name, "init_args": arguments}


def converted(value: Any) -> Any:
    """Return plain settings with every `_target_` node as `class_path` and `init_args`.

    >>> converted({"rate": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}})
    {'rate': {'class_path': 'torch.optim.SGD', 'init_args': {'lr': 0.1}}}
    """
    if isinstance(value, list):
        return [converted(one) for one in value]
    if not isinstance(value, dict):
        return value
    plain = {key: converted(one) for key, one in value.items() if key not in ("_target_", "_partial_", "_convert_")}
    if "_target_" not in value:
        return plain
    if value.get("_partial_") and not _is_optimizer(value["_target_"]):
        return class_path("kd_lightning.cli.lightning.partially", function=value["_target_"], arguments=plain)
    return class_path(value["_target_"], **plain)


def _is_optimizer(target: str) -> bool:
    """Return whether the parser itself makes a partial function of this: it knows what comes first."""
    found = lookup(target)
    return isinstance(found, type) and issubclass(found, Optimizer)


_TEACHER_KEYS = (*CACHED, "cache", "predict_batch_size", "compile", "calibrate")
"""The keys below `teacher` that `FinishedTeacher` takes, of an assistant too."""


def files(run: Run) -> Iterator[tuple[str, Node]]:
    """Yield the name and content of a file for each stage, in the order in which they are to be run.

    Args:
        run: Of the composed configuration; nothing is trained.

    Raises:
        ConfigError: A setting that `kd-cli` has no counterpart for.
    """
    teacher, trainer = run.cfg.teacher, run.cfg.trainer["_target_"]
    if teacher.url is not None:
        raise ConfigError("teacher.url: kd-cli reads teachers from files; use kd-train")
    if teacher.sharded:
        raise ConfigError("teacher.sharded=true: kd-cli loads whole teachers; set teacher.sharded=false")
    if teacher.folds > 1:
        raise ConfigError(f"teacher.folds={teacher.folds}: kd-cli trains no teachers on folds; use kd-train")
    if run.cfg.generated.texts:
        raise ConfigError(f"generated.texts={run.cfg.generated.texts}: kd-cli generates no texts; use kd-train")
    if trainer not in ("lightning.Trainer", "lightning.pytorch.Trainer"):
        raise ConfigError(f"trainer: kd-cli uses lightning.Trainer, not {trainer}")
    converter = _Converter(run)
    for stage in plan(run):
        if stage.kind != "teacher" or "teacher" in run.cfg.stages:
            yield stage.path, converter.file(stage)


class _Converter:
    """Turns the stages of a run into files."""

    def __init__(self, run: Run) -> None:
        self.run, self.cfg = run, run.cfg

    def file(self, stage: Stage) -> Node:
        """Return a stage's file."""
        model, callbacks = self.distilled(stage) if stage.distils else (self.supervised(stage), [])
        data = training_data(self.run, stage)
        batches = len(data.train_dataloader())
        trainer = {
            **{key: _of_cli(value) for key, value in stage.trainer.items() if key != "_target_"},
            "max_steps": stage.steps, "max_epochs": -1, "check_val_every_n_epoch": None,
            "val_check_interval": validate_every(batches, stage.steps, stage.validations, stage.trainer),
            "num_sanity_val_steps": 0, "use_distributed_sampler": False, "default_root_dir": self.folder(stage.path),
            **self.callbacks(stage, callbacks),
        }  # fmt: skip
        return {"seed_everything": stage.seed, "model": model, "data": self.data(stage, data), "trainer": trainer}

    def folder(self, path: str) -> str:
        """Return a stage's folder."""
        return str(self.run.folder / path)

    # -- the modules --------------------------------------------------------------------------------------------------

    def learning(self, stage: Stage) -> Node:
        """Return the arguments that both kinds of training have."""
        task = task_of_stage(self.run, stage)
        return {
            "optimizer": converted(stage.optimizer), "scheduler": converted(stage.scheduler),
            "task": converted(task.settings), "seed": stage.seed,
        }  # fmt: skip

    def supervised(self, stage: Stage) -> Node:
        """Return a training from labels."""
        if stage.start is not None:
            start = self.folder(stage.start)
            network = class_path("kd_lightning.pipeline.checkpoint_teacher.finished_network", checkpoint=start)
        else:
            network = self.network(stage, stage.network)
        return class_path("kd_lightning.SupervisedModule", network=network, **self.learning(stage))

    def distilled(self, stage: Stage) -> tuple[Node, list[Node]]:
        """Return a training with a teacher, its own average, or none, and its callbacks."""
        student, callbacks, decay = self.network(stage, stage.network), [], self.cfg.teacher.ema
        if stage.peers:
            others = [self.network(stage, peer) for peer in stage.peers]
            student = class_path("kd_lightning.models.cohort.Cohort", networks=[student, *others])
        teacher = None if stage.teacher is None else self.teacher(stage.teacher)
        if stage.teacher is None and decay is not None:
            network, _, _ = new_networks(self.run, stage)
            features = list(run_objective(self.run, network, None).needs_teacher)
            path = "kd_lightning.teachers.EMATeacher"
            teacher = class_path(path, student=student, decay=decay, features=features)
            callbacks = [class_path("kd_lightning.callbacks.MeanTeacher")]
        texts = student_texts(self.run)
        on_policy = None if texts is None else class_path(
            "kd_lightning.training.on_policy.OnPolicy", **asdict(self.cfg.on_policy), most_tokens=texts.most_tokens,
            ends=list(texts.ends),
        )  # fmt: skip
        model = class_path(
            "kd_lightning.DistillationModule", student=student, teacher=teacher, objective=self.objective(),
            on_policy=on_policy, **self.learning(stage),
        )  # fmt: skip
        return model, callbacks

    def network(self, stage: Stage, settings: Node) -> Node:
        """Return a network, and in it the teacher's where it starts from that."""
        data = data_read_by(self.run, stage)
        check_vocabulary(settings, data, stage.role)
        node: Node = converted(filled(settings, data, stage.role))
        if stage.role == "student" and takes_from_teacher(settings):
            source = next(iter(self.run.parts.values()))  # of several the first one
            given, reads = self.checkpoint(source), converted(source.cfg.data)
            start = given[0] if isinstance(given, list) else given
            ours = source.cfg.teacher.checkpoint is None or is_finished(Path(start))
            path = "kd_lightning.pipeline.checkpoint_teacher.finished_network"
            node["init_args"]["teacher"] = class_path(path, checkpoint=start, **({} if ours else {"data": reads}))
        return node

    # -- the teachers -------------------------------------------------------------------------------------------------

    def checkpoint(self, part: Part) -> str | list[str]:
        """Return where a task's teacher is, or will be."""
        given = part.cfg.teacher.checkpoint
        if given is None:
            own = [str(folder) for folder in part.teacher_folders]
            return own[0] if len(own) == 1 else own
        return [_stage_of(one) for one in given] if isinstance(given, list) else _stage_of(given)

    def teacher(self, number: int) -> Node:
        """Return the teacher (0), or an assistant, for those that learn from it."""
        ahead = len(self.run.seeds) > 1 and number == len(self.cfg.assistants)
        if number:
            own = self.cfg.teacher.of_assistant().chosen(_TEACHER_KEYS)
            return self.finished(self.folder(f"assistant_{number}"), ahead=ahead, **own)
        parts = {}
        for name, part in self.run.parts.items():
            checkpoint, teacher = self.checkpoint(part), part.cfg.teacher
            several = ("combine", "weights") if isinstance(checkpoint, list) else ()
            own = teacher.chosen((*_TEACHER_KEYS, "features", "device", *several))
            parts[name] = self.finished(checkpoint, ahead=ahead, **own)
        path = "kd_lightning.pipeline.checkpoint_teacher.FinishedTaskTeachers"
        return parts[""] if "" in parts else class_path(path, teachers=parts)

    def finished(self, checkpoint: str | list[str], **own: Any) -> Node:
        """Return a finished teacher."""
        return class_path("kd_lightning.pipeline.checkpoint_teacher.FinishedTeacher", checkpoint=checkpoint, **own)

    # -- the loss -----------------------------------------------------------------------------------------------------

    def objective(self) -> Node:
        """Return the loss."""
        if "" not in self.run.parts:
            return self.objective_of_tasks()
        node = self.cfg.distillation
        if "balance" in parameters(lookup(node["_target_"])) and node.get("balance") is None:
            node = {**node, "balance": self.cfg.balance}
        found: Node = converted(node)
        return found

    def objective_of_tasks(self) -> Node:
        """Return every task's own loss, on its examples, times its weight."""
        task: Any = self.run.task  # a `MultiTask`
        terms, weights = {}, {}
        for number, (name, one) in enumerate(task.tasks.items()):
            own, span, factor = self.run.parts[name].cfg.distillation, task.spans[name], task.weights[name]
            for kind, term in own["terms"].items():
                weight = converted(own["weights"][kind])
                terms[f"{name}/{kind}"] = class_path(
                    "kd_lightning.losses.task_term.TaskTerm", term=converted(term), name=name, number=number,
                    columns=f"range({span.start}, {span.stop})", scores=one.classes is None,
                )  # fmt: skip
                weights[f"{name}/{kind}"] = (
                    class_path("kd_lightning.schedules.Times", factor=factor, value=weight)
                    if isinstance(weight, dict) else factor * weight
                )  # fmt: skip
        return class_path("kd_lightning.Objective", terms=terms, weights=weights, balance=self.cfg.balance)

    # -- the data and the trainer -------------------------------------------------------------------------------------

    def data(self, stage: Stage, data: IndexedData) -> Node:
        """Return the data: with the transfer set for distillation, else the labelled examples."""
        node: Node = converted(self.run.parts[stage.part].cfg.data if stage.kind == "teacher" else self.cfg.data)
        node["init_args"] |= {"seed": stage.seed, "batch_size": data.batch_size}
        if stage.distils and not stage.teacher:
            return node
        tokens = "both" if stage.distils else stage.role
        path, one_reader = "kd_lightning.data.selected", bool(stage.teacher)
        return class_path(path, data=node, tokens=tokens, pool=stage.distils, one_reader=one_reader)

    def callbacks(self, stage: Stage, own: list[Node]) -> Node:
        """Return the trainer's callbacks and loggers: those that a stage needs, then the user's."""
        folder = self.folder(stage.path)
        is_ours = stage.network["_target_"].startswith("kd_lightning.")
        rebuilt = None if is_ours else filled(stage.network, data_read_by(self.run, stage), stage.role)
        compiled, task = self.cfg.compile and stage.role == "student", data_read_by(self.run, stage).task
        ours = [
            class_path(
                "lightning.pytorch.callbacks.ModelCheckpoint", dirpath=f"{folder}/lightning", filename="best",
                monitor=f"val/{task.monitor}", mode=task.mode, enable_version_counter=False,
                save_weights_only=not averages(self.cfg.callbacks),
            ),
            *([class_path("kd_lightning.callbacks.Compilation")] if compiled else []),
            *own,
            class_path(
                "kd_lightning.callbacks.ResumeCheckpoint", path=f"{folder}/lightning/resume.ckpt",
                every_n_steps=self.cfg.checkpoint_every_n_steps,
            ),
            class_path("kd_lightning.callbacks.StageFolder", folder=folder, role=stage.role, network=rebuilt),
            class_path("kd_lightning.callbacks.PredictionWriter", file=f"{folder}/predictions.jsonl"),
        ]  # fmt: skip
        loggers = [converted({**node, "save_dir": folder}) for node in self.cfg.logger.values()]
        users = [converted(node) for node in self.cfg.callbacks.values()]
        return {"logger": loggers or False, "callbacks": [*ours, *users]}


def _of_cli(value: Any) -> Any:
    """Return a trainer's setting; unlike a sweep, the command may be started again per process."""
    return value.replace("ddp_spawn", "ddp") if isinstance(value, str) else converted(value)


def _stage_of(checkpoint: str) -> str:
    """Return the stage of a run that its teacher is; other checkpoints as they are."""
    return str(teacher_stage(Path(checkpoint)) or checkpoint)
