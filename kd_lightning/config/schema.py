"""The schema of a run's configuration: keys with docs and types.

The docstring under a field is the one place that tells what its key is for: the comments of conf/config.yaml and
`kd-train --help` come from it. conf/config.yaml has the defaults. What names a class (`Node`) stays a dictionary, since
its keys are the arguments of that class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.budget import Budget
from kd_lightning.config.instantiate import to_dict
from kd_lightning.config.numbers import check_numbers
from kd_lightning.config.parsing import read_group, refuse_missing, values_of
from kd_lightning.config.values import Range
from kd_lightning.runtime.errors import ConfigError, did_you_mean

Node = dict[str, Any]
"""A class and its arguments: `_target_` and what that takes."""
Schedule = Annotated[float | Node, "a number or a schedule of kd_lightning.schedules"]
"""A number, or one that changes in the course of a training."""
Count = Annotated[int, Range(1)]

StageName = Literal["teacher", "baseline", "distill", "finetune"]
Balance = Literal["fixed", "unit_initial", "gradnorm", "uncertainty"]
Goal = Literal["small", "fast", "accurate"]
Combine = Literal["probabilities", "logits"]
Calibrate = bool | Literal["auto"]
Dialect = Literal["vllm", "sglang", "llama.cpp"]
Precision = Literal["float32", "bf16", "float16", "8bit", "int8-dynamic"]
StoredDtype = Literal["float32", "float16", "bfloat16"]

STAGES: tuple[str, ...] = get_args(StageName)
"""All stages, in the order in which they run."""
CACHE_MODES = ("auto", "off", "require", "refresh")
"""Values of `teacher.cache` that are no path."""
CACHED = ("precision", "cache_dtype", "cache_top_k", "cache_samples")
"""The keys below `teacher` that decide what is stored of a teacher's outputs."""
OUTPUTS = (*CACHED, "combine", "weights", "folds", "calibrate")
"""The keys below `teacher` that decide which outputs a student learns from."""
ARRANGEMENT = ("stages", "resume", "run_dir", "shared_dir", "logger", "checkpoint_every_n_steps")
"""The keys of a run that decide no result: what runs, where its files go, and how often they are written."""
TEACHER_ARRANGEMENT = (
    "cache", "features", "predict_batch_size", "device", "compile", "sharded", "url", "dialect", "timeout", "retries",
    "parallel",
)  # fmt: skip
"""The keys below `teacher` that decide no result: where its outputs come from, not what they are."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher: how it is loaded or fine-tuned, and how its outputs reach the students."""

    checkpoint: str | list[str] | None
    """A finished teacher: a run folder of ours, a Hugging Face folder or name, or an ONNX file (FOLDER/model.onnx);
    a list: their ensemble. null: fine-tune `network`."""
    url: str | None
    """Of a language model that an inference server runs, such as http://localhost:8000, in place of a checkpoint; its
    teacher.cache_top_k likeliest tokens are stored. A key is read from KD_TEACHER_API_KEY."""
    model: str | None
    """The name of the served model, under which its outputs are stored; also that of its tokenizer, unless
    data.tokenizer is set."""
    dialect: Dialect
    """Of the server: vllm, sglang or llama.cpp."""
    timeout: Annotated[float, Range(0.001)]
    """Seconds for a request to the server."""
    retries: Annotated[int, Range(0)]
    """How often a request is repeated that fails for a reason that may pass."""
    parallel: Count
    """Requests to the server at the same time."""
    seed: int
    """Of the fine-tuning; the same for every `seed` of the students, and unlike theirs, lest networks alike start
    alike."""
    seeds: Count
    """So many teachers, fine-tuned with teacher.seed and those that follow, teach as an ensemble."""
    folds: Count
    """So many teachers, each fine-tuned without one fold of the training examples: the one that has not seen an example
    predicts it and its views, all of them together predict everything else; 1: one teacher of all examples."""
    combine: Combine
    """What an ensemble averages: probabilities or logits."""
    weights: list[float] | Literal["learned", "confidence"] | None
    """Of an ensemble's members: null (equal), one number each, learned (on the validation split) or confidence (each
    example's own, by how sure a member is)."""
    calibrate: Calibrate
    """Whether its logits are divided by the temperature that fits them to the validation split; of folds: to the
    training examples, each predicted by the teacher that has not seen it. auto: where its calibration error (ECE)
    is above 0.1, and the temperature lowers the cross-entropy by more than chance does."""
    ema: Annotated[float | None, Range(0, 1)]
    """Decay of a mean teacher, such as 0.99: the moving average of the student's own weights, and no other teacher is
    trained (experiment=mean_teacher); null: none."""
    cache: str
    """auto: the teacher's outputs are stored, while the first epoch trains or, where seeds or sweep points share them,
    before. require: they must be stored already (kd-cache build); refresh: compute them again; off: compute them in
    every step; a path: store them there."""
    cache_dtype: StoredDtype
    """How outputs are stored: float32, float16 or bfloat16."""
    cache_top_k: Annotated[int | None, Range(1)]
    """Store each example's K largest logits and the mass of the rest; null: all of them."""
    cache_samples: Annotated[int | None, Range(1)]
    """Of a language model, instead: store so many drawn tokens and their weights, for a forward KL without bias; with
    cache=off they are drawn in every step."""
    cache_views: Annotated[int | Literal["auto"], Range(1)]
    """Sets of views (data.views) that the epochs take turns with; auto: by `budget`."""
    precision: Precision
    """In what the teacher computes, whatever the student trains in: float32, bf16, float16 (GPU), 8bit (GPU, with
    bitsandbytes) or int8-dynamic (CPU). It is held against float32 on a few batches first, and refused where it differs
    by more than 0.1 nats a row or in more than a fifth of the likeliest classes."""
    features: list[str]
    """What it outputs besides logits, for losses that read it: ["hidden[-1]"], ["attention[0]"], [embeddings],
    [pooled]."""
    predict_batch_size: Count
    """Examples in a batch when its outputs are computed before a training."""
    device: str | None
    """A GPU of its own for it, such as cuda:1, when cache=off; null: where the student is. Not yet run on two GPUs."""
    compile: bool
    """Whether to torch.compile it."""
    sharded: bool
    """With trainer=fsdp or fsdp2 and cache=off: true shares its weights out to the processes, layer by layer, as the
    student's are; false: each has all of them."""
    batch_size: Count
    """Overrides `data.batch_size` while the teacher is fine-tuned."""
    trainer: Node
    """Overrides keys of `trainer` while the teacher is fine-tuned."""
    validations: Count
    """Overrides `validations` while the teacher is fine-tuned."""
    network: Node
    """The network to fine-tune: model@teacher.network=NAME chooses one."""
    optimizer: Node
    """The optimizer of the fine-tuning: optimizer@teacher.optimizer=NAME chooses one."""
    scheduler: Node
    """The learning rate's schedule of the fine-tuning: scheduler@teacher.scheduler=NAME chooses one."""

    @property
    def keeps_all(self) -> bool:
        """Whether all logits are kept."""
        return self.cache_top_k is None and self.cache_samples is None

    @property
    def number(self) -> int:
        """How many teachers predict together."""
        return len(self.checkpoint) if isinstance(self.checkpoint, list) else self.folds * self.seeds

    def chosen(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """Return some of its keys, such as `OUTPUTS`, with their values."""
        return {key: getattr(self, key) for key in keys}

    def overridden(self, given: Node) -> TeacherConfig:
        """Return it with the keys that one task gives its own teacher."""
        merged = dict(given)
        for key in ("network", "optimizer", "scheduler", "trainer"):
            if key in given and "_target_" not in given[key]:  # another class takes other arguments
                merged[key] = {**getattr(self, key), **given[key]}
        return replace(self, **merged)

    def of_assistant(self) -> TeacherConfig:
        """Return how an assistant teaches: one network, whose outputs cannot be stored before it is trained."""
        cache = "auto" if self.cache == "require" else self.cache
        return replace(self, checkpoint=None, seeds=1, folds=1, features=[], cache=cache)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Trains the distilled student on from labels, when it is among `stages`."""

    lr: float
    """The learning rate; all else is as in `optimizer` and `scheduler`."""
    max_epochs: Count
    """How often it goes through the training split."""


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """A language model that is distilled continues texts itself, and the teacher corrects it there."""

    share: Annotated[float, Range(0)]
    """Of each step's texts, the part that the student continues (lambda of Agarwal et al. 2023, arXiv 2306.13649), with
    teacher.cache=off; 0: none."""
    prompt_tokens: Count
    """The tokens at the beginning of a text that it continues; of conversations it is all before an assistant's
    turn."""
    new_tokens: Count
    """The most tokens that it writes; data.block_size bounds both together."""
    temperature: Annotated[float, Range(0)]
    """Of the draw of each token; 0 takes the likeliest."""


@dataclass(frozen=True, kw_only=True)
class GeneratedConfig:
    """Texts that the teacher, a language model, generates once and students learn from (sequence-level)."""

    texts: Annotated[int, Range(0)]
    """How many the teacher generates after each prompt; they are kept, and are what is distilled (Kim & Rush 2016,
    arXiv 1606.07947); 0: none."""
    prompt_tokens: Count
    """The tokens at the beginning of each text of a training block that are a prompt; of conversations it is all before
    an assistant's turn."""
    new_tokens: Count
    """The most tokens after a prompt; data.block_size bounds both together."""
    temperature: Annotated[float, Range(0)]
    """Of the draw of each token; 0 takes the likeliest."""
    seed: Annotated[int, Range(0)]
    """Of the draw; the same for every `seed` of the students."""
    originals: bool
    """true: students learn from the training text as well; false: from generated texts alone. The steps are as many."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is particular to one of several tasks."""

    weight: Annotated[float, Range(0)] = 1.0
    """Factor of its loss."""
    distillation: Node | None = None
    """Its loss, where it is not the one for all."""
    teacher: Node = field(default_factory=dict)
    """Keys that override those of `teacher`, for its own teacher."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run's configuration. Set any key on the command line: kd-train temperature=4."""

    name: str
    """Of the run, and of its folder inside runs/."""
    run_dir: str
    """Where the run's files go; a finished run there is reused, never overwritten."""
    shared_dir: str | None
    """Where teachers, assistants and baselines are kept that several runs have in common; null: in each run's own
    folder. In a sweep it is the folder `shared` beside the points."""
    budget: Budget
    """How much work is done where nothing else is set: quick, standard or best; about 5, 20 and 60 minutes for 10,000
    short texts on two cores. It decides what is auto: trainer.max_epochs, teacher.trainer.max_epochs, data.views and
    teacher.cache_views. The estimated time is printed before any training."""
    goal: Goal
    """What the student is for, where none is chosen: small (a BiLSTM, or a small CNN), fast (half of the teacher's
    layers) or accurate (two thirds of them)."""
    stages: list[StageName]
    """Which stages run, in this order: teacher, baseline, distill, finetune."""
    seed: int
    """The first seed of the students."""
    seeds: Count
    """How many seeds: everything but the teacher is repeated for seed, seed + 1, ..."""
    temperature: Schedule
    """T of the softened distributions; a number > 0 or a schedule (kd_lightning.schedules.Linear, Cosine, Step)."""
    alpha: Schedule
    """Weight of the teacher's term in (1 - alpha) CE + alpha T^2 KL; a number in [0, 1] or a schedule."""
    balance: Balance
    """How the loss's terms are brought to one scale before they are weighted: fixed (as they are), unit_initial (each
    starts at 1), gradnorm (alike in gradient, learned) or uncertainty (learned variances); see
    kd_lightning/training/loss_balancing.py."""
    resume: Literal["auto", "never"]
    """auto: finished stages are reused and a killed one continues where it was; never: the run folder must be new."""
    validations: Count
    """How often a training evaluates the validation split; the best weights are kept."""
    checkpoint_every_n_steps: Count
    """How much work a kill can lose."""
    compile: bool
    """Whether to torch.compile the students."""
    assistants: list[Node]
    """Networks between teacher and student, each distilled from the one before it, which then teaches the next:
    networks as `student` is one. A larger one is a teacher assistant; '[${student}]' is one generation of born-again
    networks more."""
    peers: list[Node]
    """Students that train beside the student and learn from it as it learns from them (distillation=deep_mutual); only
    the student is kept. Networks as `student` is one: '[${student}]' is a second one of its kind."""
    tasks: dict[str, TaskConfig]
    """Several tasks (data=multi_task, whose `tasks` are their data): what is particular to each, by its name. `weight`
    of its loss; `distillation`, where it is not the one for all; `teacher`: keys that override those of `teacher`."""
    teacher: TeacherConfig
    """How the teacher is loaded or fine-tuned, and how its outputs reach the students."""
    on_policy: OnPolicyConfig
    """A language model that is distilled continues texts itself, and the teacher corrects it there."""
    generated: GeneratedConfig
    """Texts that the teacher, a language model, generates once and students learn from (sequence-level)."""
    finetune: FinetuneConfig
    """Trains the distilled student on from labels, when it is among `stages`."""
    data: Node
    """The data: data=NAME chooses them."""
    student: Node
    """The network to train: model@student=NAME chooses one."""
    distillation: Node
    """The loss: distillation=NAME chooses a strategy."""
    optimizer: Node
    """The students' optimizer: optimizer=NAME chooses one."""
    scheduler: Node
    """The learning rate's schedule: scheduler=NAME chooses one."""
    trainer: Node
    """Arguments of lightning.Trainer: trainer=NAME chooses the hardware."""
    callbacks: Node
    """Lightning callbacks by name, beside the pipeline's own."""
    logger: Node
    """Lightning loggers by name: logger=NAME chooses one."""

    @classmethod
    def parse(cls, settings: DictConfig | Mapping[str, Any]) -> RunConfig:
        """Read a composed configuration, or what `as_dict` returned.

        Raises:
            ConfigError: A key is unknown, missing, of the wrong type or out of its range; it is named, with the nearest
                valid one.
        """
        plain: dict[str, Any] = to_dict(settings) if OmegaConf.is_config(settings) else dict(settings)
        if isinstance(settings, DictConfig):
            refuse_missing(settings, plain)
        cfg = read_group(cls, "", plain)
        check_numbers(cfg.as_dict())  # in the order of the fields: what others are made from comes first
        _check_stages(cfg.stages)
        _check_name(cfg.name)
        _check_teacher("teacher.", plain["teacher"])
        for name, task in cfg.tasks.items():
            prefix = f"tasks.{name}.teacher."
            values_of(TeacherConfig, prefix, task.teacher)
            _check_teacher(prefix, task.teacher)
        return cfg

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, which `parse` reads."""
        return asdict(self)

    def deciding(self) -> dict[str, Any]:
        """Return the keys that decide a run's results, with their values."""
        kept = {key: value for key, value in self.as_dict().items() if key not in ARRANGEMENT}
        teacher = {key: value for key, value in kept["teacher"].items() if key not in TEACHER_ARRANGEMENT}
        if self.teacher.url is not None:
            del teacher["checkpoint"]  # the same place
        return kept | {"teacher": teacher}

    @property
    def seed_list(self) -> list[int]:
        """The seeds of the students."""
        return list(range(self.seed, self.seed + self.seeds))

    @property
    def teacher_trainer(self) -> Node:
        """The trainer's settings while the teacher is fine-tuned."""
        return self.trainer | self.teacher.trainer

    @property
    def finetune_trainer(self) -> Node:
        """The trainer's settings while the distilled student is fine-tuned."""
        return self.trainer | {"max_epochs": self.finetune.max_epochs, "max_steps": -1}

    @property
    def finetune_optimizer(self) -> Node:
        """The optimizer's settings while the distilled student is fine-tuned."""
        return self.optimizer | {"lr": self.finetune.lr}

    @property
    def losses(self) -> dict[str, Node]:
        """The losses by the key that sets them: the one for all, and those of single tasks."""
        own = {name: task.distillation for name, task in self.tasks.items()}
        named = {f"tasks.{name}.distillation": node for name, node in own.items() if node is not None}
        return {"distillation": self.distillation, **named}

    def of_task(self, name: str) -> RunConfig:
        """Return the run that makes one task's teacher, in RUN_DIR/tasks/NAME."""
        own = self.tasks.get(name, TaskConfig())
        return replace(
            self,
            data=self.data["tasks"][name],
            run_dir=str(Path(self.run_dir, "tasks", name)),
            stages=["teacher"],
            tasks={},
            teacher=self.teacher.overridden(own.teacher),
            distillation=self.distillation if own.distillation is None else own.distillation,
        )


def _check_stages(stages: list[Any]) -> None:
    if stages != sorted(set(stages), key=STAGES.index) or not stages:
        raise ConfigError(f"stages={stages} must be some of {list(STAGES)}, in this order, each once")
    if "finetune" in stages and "distill" not in stages:
        raise ConfigError("stages: finetune goes on from the distilled student, so it needs distill before it")


def _check_name(name: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"name={name}: a name is that of a folder inside runs/; for another place set run_dir=FOLDER")


def _check_teacher(prefix: str, given: dict[str, Any]) -> None:
    """Check the texts below `teacher`, or those that a task gives its own."""
    mode = given.get("cache", "auto")
    if mode not in CACHE_MODES and ("/" not in mode or "://" in mode):
        raise ConfigError(
            f"{prefix}cache={mode!r} is neither a mode nor a path on this machine (which has a slash)"
            f"{did_you_mean(mode, CACHE_MODES)}"
        )
    if given.get("checkpoint") == []:
        raise ConfigError(f"{prefix}checkpoint=[] names no teacher: give one, a list of several, or null")
