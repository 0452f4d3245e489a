"""A composed configuration's stages as configurations of Lightning's command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

from kd_lightning.config.instantiate import lookup, parameters
from kd_lightning.data.datamodule import Role
from kd_lightning.pipeline.multi_task import MultiTaskPipeline
from kd_lightning.pipeline.preflight import takes_from_teacher
from kd_lightning.pipeline.run import Pipeline, cache_of_assistants, finetuning, teacher_name
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.run_folder import teacher_stage
from kd_lightning.training.stage import averages, planned_steps, validate_every

Node = dict[str, Any]


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


class Converter:
    """Turns the stages of a pipeline into files.

    Args:
        pipeline: Of the composed configuration; nothing is trained.

    Raises:
        ConfigError: A setting that `kd-cli` has no counterpart for.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.cfg, self.data = pipeline, pipeline.cfg, pipeline.data
        self.parts: dict[str, Converter] = {}
        if isinstance(pipeline, MultiTaskPipeline):
            self.parts = {name: Converter(part) for name, part in pipeline.parts.items()}
        if self.cfg["teacher"]["sharded"]:
            raise ConfigError("teacher.sharded=true: kd-cli asks whole teachers; set teacher.sharded=false")
        if (folds := self.cfg["teacher"]["folds"]) > 1:
            raise ConfigError(f"teacher.folds={folds}: kd-cli trains no teachers on folds; use kd-train")
        if self.cfg["trainer"]["_target_"] not in ("lightning.Trainer", "lightning.pytorch.Trainer"):
            raise ConfigError(f"trainer: kd-cli uses lightning.Trainer, not {self.cfg['trainer']['_target_']}")

    def files(self) -> Iterator[tuple[str, Node]]:
        """Yield the name and content of each file, in the order in which they are to be run."""
        stages, assistants = self.cfg["stages"], len(self.cfg["assistants"])
        if "teacher" in stages:
            for name, part in self.parts.items():
                yield from ((f"tasks/{name}/{file}", content) for file, content in part.teachers())
            if not self.parts:
                yield from self.teachers()
        for seed in self.pipeline.seeds:
            if "baseline" in stages:
                yield f"seed_{seed}/baseline", self.baseline(seed, "baseline")
                if self.pipeline.has_start:
                    yield f"seed_{seed}/baseline_initialised", self.baseline(seed, "baseline_initialised")
            if "distill" in stages:
                last = assistants if self.pipeline.has_teacher else None
                for number in range(1, assistants + 1) if seed == self.pipeline.seeds[0] else ():
                    yield f"assistant_{number}", self.assistant(number)
                name, student = f"seed_{seed}/distill", self.student("teacher")
                yield name, self.distill(name, student, seed, last, self.cfg["peers"])
            if "finetune" in stages:
                yield f"seed_{seed}/finetune", self.finetune(seed)

    # -- the stages ---------------------------------------------------------------------------------------------------

    def teachers(self) -> Iterator[tuple[str, Node]]:
        """Yield the files that fine-tune the teacher, or an ensemble's members."""
        settings = self.cfg["teacher"]
        for number, name in enumerate(self.teacher_names() if settings["checkpoint"] is None else []):
            seed = settings["seed"] + number
            data = self.data.select("teacher", pool=False).with_batches(settings["batch_size"], seed=seed)
            network = self.network(settings["network"], "teacher")
            model = self.supervised(network, settings["optimizer"], settings["scheduler"], seed)
            trainer, batches = {**self.cfg["trainer"], **settings["trainer"]}, len(data.train_dataloader())
            yield name, self.stage(
                name, model, self.batches("teacher", seed, data.batch_size), seed, settings["network"], batches,
                trainer=trainer, steps=planned_steps(trainer, batches), validations=settings["validations"],
                role="teacher",
            )  # fmt: skip

    def baseline(self, seed: int, name: str) -> Node:
        """Return the file that trains the student from labels."""
        student = self.student("teacher" if name == "baseline_initialised" else "random")
        network = self.network(student, "student")
        model = self.supervised(network, self.cfg["optimizer"], self.cfg["scheduler"], seed)
        data, batches = self.batches("student", seed), self.count_batches("student", pool=False)
        return self.stage(f"seed_{seed}/{name}", model, data, seed, student, batches)

    def assistant(self, number: int) -> Node:
        """Return the file that distils an assistant from the guide before it."""
        seed = self.pipeline.seed_of_assistant(number)
        return self.distill(f"assistant_{number}", self.cfg["assistants"][number - 1], seed, number - 1, [])

    def distill(self, name: str, settings: Node, seed: int, number: int | None, peers: list[Node]) -> Node:
        """Return the file that distils a network from guide `number`; None: from itself, or from nobody."""
        student, callbacks = self.network(settings, "student"), []
        if peers:
            others = [self.network(peer, "student") for peer in peers]
            student = class_path("kd_lightning.models.cohort.Cohort", networks=[student, *others])
        teacher: Node | None = None if number is None else self.guide(number)
        decay = self.cfg["teacher"]["ema"]
        if number is None and decay is not None:
            network, _ = self.pipeline.build_network(settings, "student")
            features = list(self.pipeline.objective(network, None).needs_teacher)
            path = "kd_lightning.teachers.EMATeacher"
            teacher = class_path(path, student=student, decay=decay, features=features)
            callbacks = [class_path("kd_lightning.callbacks.MeanTeacher")]
        model = class_path(
            "kd_lightning.DistillationModule", student=student, teacher=teacher, objective=self.objective(),
            **self.learning(self.cfg["optimizer"], self.cfg["scheduler"], seed),
        )  # fmt: skip
        data = self.batches("both", seed, one_reader=bool(number))
        batches = self.count_batches("both", pool=True)
        return self.stage(name, model, data, seed, settings, batches, callbacks=callbacks)

    def finetune(self, seed: int) -> Node:
        """Return the file that trains the distilled student on from labels."""
        optimizer, trainer = finetuning(self.cfg)
        start = class_path(
            "kd_lightning.pipeline.checkpoint_teacher.finished_network", checkpoint=self.folder(f"seed_{seed}/distill")
        )
        model = self.supervised(start, optimizer, self.cfg["scheduler"], seed)
        batches = self.count_batches("student", pool=False)
        return self.stage(
            f"seed_{seed}/finetune", model, self.batches("student", seed), seed, self.cfg["student"], batches,
            trainer=trainer, steps=planned_steps(trainer, batches),
        )  # fmt: skip

    # -- their parts --------------------------------------------------------------------------------------------------

    def folder(self, stage: str) -> str:
        """Return a stage's folder."""
        return str(self.pipeline.folder / stage)

    def teacher_names(self) -> list[str]:
        """Return the stages of the teacher, or of the members of an ensemble."""
        return [teacher_name(number) for number in range(self.cfg["teacher"]["seeds"])]

    def student(self, initialise: str) -> Node:
        """Return the student's settings, told what to take from the teacher where it can take anything."""
        more = {"initialise": initialise} if self.pipeline.has_start else {}
        return {**self.cfg["student"], **more}

    def network(self, settings: Node, role: Role) -> Node:
        """Return a network, and in it the teacher's where it starts from that."""
        node: Node = converted(self.pipeline.filled(settings, role))
        if role == "student" and takes_from_teacher(settings):
            source = next(iter(self.parts.values()), self)  # of several the first one
            start, sizes = source.checkpoint(), source.data.model_arguments("teacher")
            node["init_args"]["teacher"] = class_path(
                "kd_lightning.pipeline.checkpoint_teacher.finished_network",
                checkpoint=start[0] if isinstance(start, list) else start,
                **{name: sizes[name] for name in ("num_classes", "pad_token_id") if name in sizes},
            )  # fmt: skip
        return node

    def learning(self, optimizer: Node, scheduler: Node, seed: int) -> Node:
        """Return the arguments that both kinds of training have."""
        return {
            "optimizer": converted(optimizer), "scheduler": converted(scheduler),
            "task": converted(self.pipeline.task.settings), "seed": seed,
        }  # fmt: skip

    def supervised(self, network: Node, optimizer: Node, scheduler: Node, seed: int) -> Node:
        """Return a training from labels."""
        learning = self.learning(optimizer, scheduler, seed)
        return class_path("kd_lightning.SupervisedModule", network=network, **learning)

    def checkpoint(self) -> str | list[str]:
        """Return where the teacher is, or will be."""
        given: str | list[str] | None = self.cfg["teacher"]["checkpoint"]
        if given is None:
            given = [self.folder(name) for name in self.teacher_names()]
            return given[0] if len(given) == 1 else given
        return [_stage_of(one) for one in given] if isinstance(given, list) else _stage_of(given)

    def guide(self, number: int) -> Node:
        """Return the teacher (0), or an assistant, as those it teaches ask it."""
        if self.parts:
            teachers = {name: part.guide(0) for name, part in self.parts.items()}
            return class_path("kd_lightning.pipeline.checkpoint_teacher.FinishedTaskTeachers", teachers=teachers)
        keys = ["precision", "cache", "cache_dtype", "cache_top_k", "answer_batch_size", "compile", "calibrate"]
        if number == 0:
            keys += ["features", "device"]
        own = {key: self.cfg["teacher"][key] for key in keys}
        checkpoint = self.checkpoint()
        if number:
            checkpoint, own["cache"] = self.folder(f"assistant_{number}"), cache_of_assistants(own["cache"])
        if isinstance(checkpoint, list):
            own |= {key: self.cfg["teacher"][key] for key in ("combine", "weights")}
        ahead = len(self.pipeline.seeds) > 1 and number == len(self.cfg["assistants"])
        return class_path(
            "kd_lightning.pipeline.checkpoint_teacher.FinishedTeacher", checkpoint=checkpoint, ahead=ahead, **own
        )

    def objective(self) -> Node:
        """Return the loss."""
        node, balance = self.cfg["distillation"], self.cfg["balance"]
        if self.parts:
            return self.objective_of_tasks()
        if "balance" in parameters(lookup(node["_target_"])) and node.get("balance") is None:
            node = {**node, "balance": balance}
        found: Node = converted(node)
        return found

    def objective_of_tasks(self) -> Node:
        """Return every task's own loss, on its examples, times its weight."""
        assert isinstance(self.pipeline, MultiTaskPipeline)
        task, terms, weights = self.pipeline.task, {}, {}
        for number, (name, one) in enumerate(task.tasks.items()):
            own = self.cfg["tasks"].get(name, {}).get("distillation", self.cfg["distillation"])
            span, factor = task.spans[name], task.weights[name]
            for part, term in own["terms"].items():
                weight = converted(own["weights"][part])
                terms[f"{name}/{part}"] = class_path(
                    "kd_lightning.losses.task_term.TaskTerm", term=converted(term), name=name, number=number,
                    columns=f"range({span.start}, {span.stop})", scores=one.classes is None,
                )  # fmt: skip
                weights[f"{name}/{part}"] = (
                    class_path("kd_lightning.schedules.Times", factor=factor, value=weight)
                    if isinstance(weight, dict) else factor * weight
                )  # fmt: skip
        path = "kd_lightning.Objective"
        return class_path(path, terms=terms, weights=weights, balance=self.cfg["balance"])

    def batches(self, tokens: str, seed: int, batch_size: int | None = None, one_reader: bool = False) -> Node:
        """Return the data: with the pool for `both`, else the labelled examples as student or teacher reads them."""
        node: Node = converted(self.cfg["data"])
        node["init_args"] |= {"seed": seed, "batch_size": batch_size or self.data.batch_size}
        if tokens == "both" and not one_reader:
            return node
        pool = tokens == "both"
        return class_path("kd_lightning.data.selected", data=node, tokens=tokens, pool=pool, one_reader=one_reader)

    def count_batches(self, tokens: Literal["student", "both"], pool: bool) -> int:
        """Return how many batches an epoch has, over all processes."""
        return len(self.data.select(tokens, pool=pool).train_dataloader())

    def stage(
        self, name: str, model: Node, data: Node, seed: int, network: Node, batches: int, *,
        trainer: Node | None = None, steps: int | None = None, validations: int | None = None, role: Role = "student",
        callbacks: Sequence[Node] = (),
    ) -> Node:  # fmt: skip
        """Return a whole file; `network` are the settings of what is trained, `batches` those of an epoch."""
        folder, trainer = self.folder(name), trainer or self.cfg["trainer"]
        steps, validations = steps or self.pipeline.steps, validations or self.cfg["validations"]
        every = validate_every(batches, steps, validations, trainer)
        is_ours = network["_target_"].startswith("kd_lightning.")
        ours = [
            class_path(
                "lightning.pytorch.callbacks.ModelCheckpoint", dirpath=f"{folder}/lightning", filename="best",
                monitor=f"val/{self.pipeline.task.main}", mode="max", enable_version_counter=False,
                save_weights_only=not averages(self.cfg["callbacks"]),
            ),
            *([class_path("kd_lightning.callbacks.Compilation")] if self.cfg["compile"] and role == "student" else []),
            *callbacks,
            class_path(
                "kd_lightning.callbacks.ResumeCheckpoint", path=f"{folder}/lightning/resume.ckpt",
                every_n_steps=self.cfg["checkpoint_every_n_steps"],
            ),
            class_path(
                "kd_lightning.callbacks.StageFolder", folder=folder, role=role,
                network=None if is_ours else self.pipeline.filled(network, role),
            ),
            class_path("kd_lightning.callbacks.PredictionWriter", file=f"{folder}/predictions.jsonl"),
        ]  # fmt: skip
        users = [converted(node) for node in self.cfg["callbacks"].values()]
        loggers = [converted({**node, "save_dir": folder}) for node in self.cfg["logger"].values()]
        return {
            "seed_everything": seed,
            "model": model,
            "data": data,
            "trainer": {
                **{key: _of_cli(value) for key, value in trainer.items() if key != "_target_"},
                "max_steps": steps, "max_epochs": -1, "val_check_interval": every, "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0, "use_distributed_sampler": False, "default_root_dir": folder,
                "logger": loggers or False, "callbacks": [*ours, *users],
            },
        }  # fmt: skip


def _of_cli(value: Any) -> Any:
    """Return a trainer's setting; the command line can be started again for each process, which a sweep cannot."""
    return value.replace("ddp_spawn", "ddp") if isinstance(value, str) else converted(value)


def _stage_of(checkpoint: str) -> str:
    """Return the stage of a run that its teacher is; other checkpoints as they are."""
    return str(teacher_stage(Path(checkpoint)) or checkpoint)
