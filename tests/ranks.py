"""Small trainings for `tests/end_to_end/test_distributed.py`, each the same in one process and in two.

`python -m tests.ranks FOLDER` is one of the processes that a launcher would start: it runs all of them and leaves what
they came to in FOLDER/NAME.RANK.pt. `python -m tests.ranks FOLDER strategies` trains every strategy for two steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from kd_lightning.config.instantiate import build, conf_dir
from kd_lightning.data import MultiTaskData, TextFiles
from kd_lightning.data.classification import ClassificationData
from kd_lightning.data.sampler import rank_and_world
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss
from kd_lightning.losses.term import Scheduled, Term
from kd_lightning.models.transformer import transformer
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.tasks import Classification, MultiTask, Regression
from kd_lightning.tasks.rows import next_tokens
from kd_lightning.teachers import CachedTeacher, EMATeacher, FrozenTeacher, Teacher
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.training.callbacks import MeanTeacher, ResumeCheckpoint
from kd_lightning.training.distillation import DistillationModule, SupervisedModule
from kd_lightning.training.module import NetworkModule
from kd_lightning.training.objective import Objective
from kd_lightning.types import IGNORE, Batch
from tests.config.test_catalog import ALONE, STRATEGIES, made
from tests.conftest import write_toy_csv

GLOBAL_BATCH = 16
EACH = [(name, strategy.models[0]) for name, strategy in STRATEGIES.items() if strategy.models[0] not in ALONE]
"""Each strategy with its first kind of models."""
STOPPED = 7
"""Steps from one checkpoint to the next where a training is begun again; an epoch has 16 and more."""
CLASSES, WORDS = 3, 11
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
Watched = dict[str, Any]


def files(folder: Path) -> tuple[Path, Path]:
    """Write 240 labelled sentences, and 90 without labels, which are longer and so stand in batches of their own."""
    folder.mkdir(exist_ok=True)
    labelled, unlabelled = folder / "toy.csv", folder / "more.txt"
    if not labelled.exists():
        write_toy_csv(labelled)
        words = ["today we saw the very very long match again and again", "soup", "atom and theory", "a team"]
        unlabelled.write_text("\n".join(f"{words[i % 4]} {'and it ' * (i % 7)} {i}" for i in range(90)))
        load_tokenizer("wordpiece:300", [labelled.read_text()]).save_pretrained(str(folder / "tokenizer"))
    return labelled, unlabelled


def text(folder: Path, world: int, transfer: bool = True) -> TextFiles:
    labelled, unlabelled = files(folder)
    return TextFiles(
        str(labelled), transfer=[str(unlabelled)] if transfer else [], tokenizer=str(folder / "tokenizer"),
        batch_size=GLOBAL_BATCH // world, eval_batch_size=7, cache_dir=str(folder / "texts"),
    )  # fmt: skip


def network(data: ClassificationData, seed: int, width: int, layers: int) -> nn.Module:
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_layers": layers, "dropout": 0.0}
    return transformer(**data.model_arguments("student"), **shape)


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(overrides))


def objective(name: str, balance: str, *overrides: str) -> Objective:
    cfg = composed(f"distillation={name}", "data=text_files", "data.train_file=x", *overrides)
    built: Objective = build(cfg.distillation, balance=balance)
    return built


def distilled(
    folder: Path, world: int, name: str, *overrides: str, balance: str = "fixed", cached: bool = False,
    shared: bool = False,
) -> tuple[NetworkModule, Any]:  # fmt: skip
    data = text(folder, world)
    student, above = network(data, 0, 8, 2), network(data, 1, 12, 4)
    with torch.no_grad():
        for parameter in above.parameters():
            parameter.mul_(3)  # else it would have no opinion
    loss = objective(name, balance, *overrides)
    loss.plan(student, above)
    teacher: Teacher = FrozenTeacher(above, features=loss.needs_teacher, sharded=shared and world > 1)
    if cached:
        data.prepare()
        cache = TeacherCache.create(folder / f"outputs-{world}-{rank_and_world()[0]}", {}, data.num_examples)
        fill(cache, teacher, data.all_dataloader())
        teacher = CachedTeacher(cache)
    module = DistillationModule(student, teacher, loss, SGD, task=Classification(CLASSES))
    if name == "crd":  # as the pipeline does: its constants are estimated from one batch, which is the same for all
        module.connect(next(iter(data.val_dataloader())), data.num_examples)
    return module, data


def mean_teacher(folder: Path, world: int) -> tuple[NetworkModule, Any]:
    data = text(folder, world)
    student, loss = network(data, 0, 8, 2), objective("soft_target", "fixed")
    return DistillationModule(student, EMATeacher(student, 0.9), loss, SGD, task=Classification(CLASSES)), data


def supervised(folder: Path, world: int) -> tuple[NetworkModule, Any]:
    data = text(folder, world)
    return SupervisedModule(network(data, 0, 8, 2), SGD, task=Classification(CLASSES)), data


def several_tasks(folder: Path, world: int, taught: bool) -> tuple[NetworkModule, Any]:
    """Two tasks on one file; one has unlabelled sentences besides."""
    parts = {"more": text(folder, world), "less": text(folder, world, transfer=False)}
    both = MultiTaskData(parts, batch_size=GLOBAL_BATCH // world, eval_batch_size=7)
    both.prepare()
    task = MultiTask({name: own.task for name, own in both.tasks.items()}, {"more": 0.5, "less": 2.0})
    student, above = network(both, 0, 8, 2), network(both, 1, 12, 3)
    if not taught:
        return SupervisedModule(student, SGD, task=task), both
    terms: dict[str, Term] = {f"{name}/ce": task.term(name, CrossEntropyLoss()) for name in task.tasks}
    terms |= {f"{name}/kd": task.term(name, SoftTargetLoss(2.0)) for name in task.tasks}
    weights: dict[str, Scheduled] = dict.fromkeys(terms, 0.5)
    teacher = FrozenTeacher(above)
    return DistillationModule(student, teacher, Objective(terms, weights), SGD, task=task), both


class Tagger(nn.Module):
    """Logits for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(input_ids).tanh())
        return logits


class NextTokens(Classification):
    """Row t of the logits predicts token t + 1."""

    def compared(self, batch: Batch) -> Batch:
        return next_tokens(batch)


def sequences(folder: Path, world: int) -> tuple[NetworkModule, Any]:
    """Language modelling: between 0 and 5 positions of an example count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (96, 6), generator=generator)
    labels = ids.masked_fill(torch.arange(6) >= torch.arange(96).unsqueeze(1) // 4 % 7, IGNORE)
    rank, size = rank_and_world()[0], GLOBAL_BATCH // world
    rows = [range(start + rank * size, start + (rank + 1) * size) for start in range(0, 96, GLOBAL_BATCH)]
    batches = [{"input_ids": ids[list(own)], "labels": labels[list(own)]} for own in rows]
    torch.manual_seed(0)
    terms = {"ce": CrossEntropyLoss(), "kd": SoftTargetLoss(2.0)}
    loss = Objective(terms, {"ce": 0.5, "kd": 0.5})
    module = DistillationModule(Tagger(), FrozenTeacher(Tagger()), loss, SGD, task=NextTokens(WORDS))
    return module, DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def overflowing(folder: Path, world: int) -> tuple[NetworkModule, Any]:
    """A score to regress that is so far away that the scaled gradient overflows.

    The weight has one row: where it is sharded, the second process holds none of the gradient.
    """
    size = GLOBAL_BATCH // world
    batch = {"pixel_values": torch.ones(size, 2), "labels": torch.full((size,), 100.0)}
    module = SupervisedModule(nn.Linear(2, 1), SGD, task=Regression())
    return module, DataLoader([batch] * 4, batch_size=None)  # type: ignore[arg-type]


Make = Callable[[Path, int], tuple[NetworkModule, Any]]
SCENARIOS: dict[str, tuple[Make, dict[str, Any]]] = {
    "soft_target": (partial(distilled, name="soft_target"), {}),
    "cached": (partial(distilled, name="soft_target", cached=True), {}),
    "hint_hidden": (partial(distilled, name="hint_hidden"), {}),
    "crd": (lambda f, w: distilled(f, w, "crd", "distillation.terms.crd.negatives=16"), {}),
    "uncertainty": (partial(distilled, name="hint_hidden", balance="uncertainty"), {}),
    "unit_initial": (partial(distilled, name="hint_hidden", balance="unit_initial"), {}),
    "stages": (partial(distilled, name="tinybert"), {}),
    "accumulated": (partial(distilled, name="hint_hidden"), {"accumulate_grad_batches": 3}),
    "supervised": (supervised, {"accumulate_grad_batches": 2}),
    "several_tasks": (partial(several_tasks, taught=True), {}),
    "several_tasks_supervised": (partial(several_tasks, taught=False), {}),
    "sequences": (sequences, {}),
    "mean_teacher": (mean_teacher, {}),
    "overflowing": (overflowing, {"scale": 2.0**10}),
    "bf16_mixed": (partial(distilled, name="hint_hidden"), {"precision": "bf16-mixed"}),
    "bf16_true": (partial(distilled, name="hint_hidden"), {"precision": "bf16-true"}),
    "shared_teacher": (partial(distilled, name="hint_hidden", shared=True), {}),
}
SHARDED = (
    "soft_target", "cached", "hint_hidden", "crd", "uncertainty", "stages", "accumulated", "several_tasks",
    "mean_teacher", "overflowing", "bf16_mixed", "bf16_true", "shared_teacher",
)  # fmt: skip


def scaled(scale: float) -> MixedPrecision:
    """What `16-mixed` is on a GPU."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


class Watch(L.Callback):
    """Notes what the processes share, and what they saw."""

    def __init__(self) -> None:
        self.found: Watched = {"validated": 0, "teacher": {}}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        wrapped = trainer.strategy.model
        self.found["shared"] = [name for name, _ in wrapped.named_parameters()] if wrapped is not None else []
        self.found["sharded"] = [name for name, p in pl_module.named_parameters() if hasattr(p, "full_tensor")]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        teacher = getattr(pl_module, "teacher", None)
        for name, weight in teacher.named_parameters() if isinstance(teacher, FrozenTeacher) else ():
            here = weight.to_local() if isinstance(weight, DTensor) else weight
            self.found["teacher"][name] = (here.numel(), weight.numel())

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.found["validated"] += len(batch["labels"])


def train(name: str, folder: Path, strategy: Callable[[], Any] = lambda: "auto", resumes: bool = False) -> Watched:
    """Run one of them, perhaps with a break within the first epoch; return weights, scores and what was noted."""
    rank, world = rank_and_world()
    make, options = SCENARIOS[name]
    whole, resume = folder / f"{name}-{world}.ckpt", folder / "resume.ckpt"
    for epochs in (1, 2) if resumes else (2,):
        torch.manual_seed(0)
        module, data = make(folder, world)
        watch = Watch()
        callbacks: list[L.Callback] = [watch, ResumeCheckpoint(resume, STOPPED)] if resumes else [watch]
        if isinstance(getattr(module, "teacher", None), EMATeacher):
            callbacks.append(MeanTeacher())
        own = {**options, "plugins": [TorchElasticEnvironment()] if world > 1 else []}
        if scale := own.pop("scale", None):
            own["plugins"].append(scaled(scale))
        trainer = L.Trainer(
            accelerator="cpu", devices=world, strategy=strategy(), max_epochs=epochs, logger=False,
            enable_progress_bar=False, enable_checkpointing=resumes, enable_model_summary=False, num_sanity_val_steps=0,
            use_distributed_sampler=False, gradient_clip_val=1.0, callbacks=callbacks, default_root_dir=folder,
            **own,
        )  # fmt: skip
        given = {"train_dataloaders": data} if isinstance(data, DataLoader) else {"datamodule": data}
        trainer.fit(module, ckpt_path=resume if resumes and epochs == 2 else None, weights_only=True, **given)
    trainer.save_checkpoint(whole, weights_only=True)
    weights = torch.load(whole, weights_only=True)["state_dict"]
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    banks = {key: value.clone() for key, value in module.named_buffers() if "bank" in key}
    noted = {"metrics": metrics, "rank": rank, "banks": banks, "skipped": module.skipped_steps}
    return {"weights": weights, **noted, **watch.found}


def sharding() -> ModelParallelStrategy:
    """What `trainer=fsdp2` asks for."""
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)


def trainings() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield file, scenario and strategy of what two processes do."""
    for name in SCENARIOS:
        if name != "shared_teacher":
            yield name, name, lambda: "ddp"
    for name in SHARDED:
        yield f"{name}-sharded", name, sharding


def sharded_strategies(folder: Path) -> None:
    """Train every strategy with student and teacher sharded and with both whole; leave how far apart weights are."""
    apart = {}
    for name, kind in EACH:
        found: list[dict[str, Tensor]] = []
        for strategy in ("ddp", sharding()):
            module, data = made(name, kind, composed)
            teacher = module.teacher
            assert isinstance(teacher, FrozenTeacher)
            if strategy != "ddp":
                module._outside = (FrozenTeacher(teacher.network, features=teacher.features, sharded=True),)
            trainer = L.Trainer(
                accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False, gradient_clip_val=1.0,
                enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
                num_sanity_val_steps=0, use_distributed_sampler=False, plugins=[TorchElasticEnvironment()],
                default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(module, datamodule=data)
            trainer.save_checkpoint(folder / "strategy.ckpt", weights_only=True)
            found.append(torch.load(folder / "strategy.ckpt", weights_only=True)["state_dict"])
            trainer.strategy.barrier()
        apart[name, kind] = max(float((found[0][key].float() - x.float()).abs().max()) for key, x in found[1].items())
    torch.save(apart, folder / f"strategies.{rank_and_world()[0]}.pt")


def main(folder: Path, *what: str) -> None:
    """Run everything, or what is named, as one of two processes."""
    L.pytorch.utilities.rank_zero.rank_zero_only.rank = 0  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo")
    if what == ("strategies",):
        sharded_strategies(folder)
        return
    rank = rank_and_world()[0]
    if rank == 0:
        text(folder, 2).prepare()
    torch.distributed.barrier()
    for file, name, strategy in trainings():
        torch.save(train(name, folder, strategy), folder / f"{file}.{rank}.pt")
    torch.save(train("hint_hidden", folder, sharding, resumes=True), folder / f"resumed-sharded.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
