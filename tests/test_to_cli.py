"""Every experiment as Lightning CLI files: Hydra's objects, trained to the same weights. Offline and small."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from kd_lightning import cli
from kd_lightning.config import conf_dir
from kd_lightning.module import DistillationModule
from kd_lightning.multitask import pipeline_of
from kd_lightning.runs import read_json
from kd_lightning.to_cli import write
from tests.conftest import tiny_overrides, write_toy_csv
from tests.data.images import write_fashion
from tests.test_multitask import NETWORKS as TASK_NETWORKS
from tests.test_multitask import TASKS
from tests.test_schemes import SHRUNK, TINY_TRANSFORMER
from tests.toy_reviews import write_archive, write_tokenizer

Composed = Callable[..., DictConfig]
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
CAPTURE = "+callbacks.capture={_target_: tests.test_to_cli.Capture}"
FROM_TEACHER = [
    "~teacher.network.frozen_layers", "model@teacher.network=transformer", "teacher.network.num_layers=4",
    *(f"teacher.network.{size}" for size in TINY_TRANSFORMER),
]  # fmt: skip
SHRINK = {
    **SHRUNK,
    "quickstart": ["~teacher.network.frozen_layers"],
    "reviews": [
        *FROM_TEACHER[1:],
        "model@student=bilstm_from_teacher",
        "seeds=2",
        "student.hidden_size=8",
        "student.embedding_size=8",
        "student.dropout=0.2",
    ],
}


class Capture(L.Callback):
    """What a training begins with, by the name of its folder."""

    found: ClassVar[dict[str, dict[str, Any]]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        data, module = trainer.datamodule, pl_module
        batch = next(iter(data.train_dataloader()))
        found: dict[str, Any] = {
            "module": type(module).__name__,
            "network": str(module.trained),
            "weights": copy.deepcopy(module.state_dict()),
            "optimizer": [
                {key: len(value) if key == "params" else value for key, value in group.items()}
                for group in module.optimizers().param_groups
            ],
            "rates": [module.lr_schedulers().lr_lambdas[0](step) for step in range(5)],
            "task": module.task.description,
            "data": (data.fingerprint, data.batch_size, data.seed, data._tokens, data._pool),
            "batch": batch,
            "trainer": [
                trainer.max_steps, trainer.max_epochs, trainer.val_check_batch, trainer.gradient_clip_val,
                trainer.accumulate_grad_batches, trainer.precision, trainer.log_every_n_steps,
            ],
            "seed": module.seed,
        }  # fmt: skip
        if isinstance(module, DistillationModule):
            objective = module.objective
            answer = None if module.teacher is None else module._expected(batch, module._ask(batch))
            found |= {
                "terms": str(objective),
                "balance": type(objective.balance).__name__,
                "needs": (objective.needs_student, objective.needs_teacher),
                "settings": [objective.settings(progress) for progress in (0.0, 0.3, 0.8, 1.0)],
                "attributes": [_plain(term) for term in objective.modules()],
                "answer": None if answer is None else {"logits": answer.logits, **answer.features},
            }
        folder = Path(trainer.default_root_dir)
        stage = "/".join(folder.parts[folder.parts.index("run") + 1 :])
        Capture.found[stage] = found


def _plain(module: torch.nn.Module) -> dict[str, Any]:
    """The settings of a loss term."""
    kinds = (int, float, str, bool, tuple, list, slice)
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds)}


def assert_same(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name, value in one.items():
            assert_same(value, other[name], f"{path}.{name}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, value in enumerate(one):
            assert_same(value, other[number], f"{path}[{number}]")
    else:
        assert one == other, path


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_archive(tmp_path / "archive")
    monkeypatch.setattr("kd_lightning.data.reviews.fetch", lambda name: folder)
    return folder


def tiny(experiment: str, folder: Path, steps: int) -> list[str]:
    """An experiment's own stages, losses and schedules with tiny networks on toy data."""
    budget = [f"experiment={experiment}", "data.batch_size=16", f"trainer.max_steps={steps}", CAPTURE]
    if experiment == "multi_task":
        tokenizer = folder / "tokenizer" if (folder / "tokenizer").exists() else write_tokenizer(folder / "tokenizer")
        return [
            *budget, *TASK_NETWORKS, *(f"++tasks.{task}.teacher.trainer.max_steps={steps}" for task in TASKS),
            *(f"data.tasks.{task}.{key}={tokenizer}" for task in TASKS for key in ("tokenizer", "teacher_tokenizer")),
        ]  # fmt: skip
    budget.append(f"teacher.trainer.max_steps={steps}")
    if experiment == "fashion_mnist":
        write_fashion(folder / "fashion", train=200, test=40)
        data = [f"data.folder={folder / 'fashion'}", "data.train_examples=null", "data.views=1"]
        precise = ["teacher.trainer.precision=32-true", "teacher.precision=float32", "validations=2"]
        return [*budget, *data, *precise, "teacher.network.width=0.5", "student.widths=[8,16]", "teacher.validations=2"]
    small = tiny_overrides(write_toy_csv(folder / "toy.csv", rows=120), folder)
    shrunk = SHRINK[experiment]
    for role in ("model@student", "model@teacher.network"):
        if any(override.startswith(f"{role}=") for override in shrunk):
            small = [one for one in small if not one.startswith((f"{role}=", f"{role.partition('@')[2]}."))]
    small = [one for one in small if not one.startswith("run_dir")]
    return [*budget, *small, *shrunk, "data.transfer=[]"]


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["kd-cli", *arguments])
    cli.command_line()


def both_ways(overrides: list[str], composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train with the pipeline and with the CLI, each in a home of its own, and compare; return the stages."""
    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path / "home"))
    Capture.found = {}
    pipeline_of(composed(*overrides, f"run_dir={tmp_path / 'hydra/run'}")).run()
    expected, Capture.found = Capture.found, {}

    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path / "other home"))
    cfg = composed(*overrides, f"run_dir={tmp_path / 'cli/run'}")
    files = write(cfg, tmp_path / "files", "kd-config ...")
    for file in files:
        run_cli(monkeypatch, "fit", "--config", str(file), "--trainer.enable_progress_bar=false")
    names = [str(file.relative_to(tmp_path / "files").with_suffix("")) for file in files]
    assert names == list(expected) == list(Capture.found), "the stages, in their order"
    for name in names:
        assert_same(Capture.found[name], expected[name], name)
        one, other = (load_file(tmp_path / way / "run" / name / "model.safetensors") for way in ("hydra", "cli"))
        assert_same(one, other, f"{name} after training")
        records = [read_json(tmp_path / way / "run" / name / "stage.json") for way in ("hydra", "cli")]
        for key in ("steps", "best_step", "validation", "selected_by"):
            assert records[0][key] == records[1][key], (name, key)
    return names


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds_the_same_objects_both_ways(
    experiment: str, composed: Composed, tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_ways(tiny(experiment, tmp_path, 2), composed, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_to_the_same_weights_both_ways(
    experiment: str, composed: Composed, tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more than two epochs: the first one fills the cache of the teacher's answers."""
    both_ways(tiny(experiment, tmp_path, 40), composed, tmp_path, monkeypatch)


RISING = "{_target_: kd_lightning.schedules.Linear, start: 0.2, end: 0.9}"


class Own(torch.nn.Module):
    """A network that the package does not know."""

    def __init__(self, num_classes: int, vocab_size: int, width: int = 4) -> None:
        super().__init__()
        self.words, self.out = torch.nn.EmbeddingBag(vocab_size, width), torch.nn.Linear(width, num_classes)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.words(input_ids))
        return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["distillation=hint"],
        ["distillation=crd", "balance=gradnorm"],
        ["teacher.cache=off", "trainer.accumulate_grad_batches=2"],
        ["teacher.cache_dtype=float16", "teacher.cache_top_k=2", f"alpha={RISING}"],
        ["stages=[teacher,baseline,distill,finetune]", "scheduler=warmup_cosine"],
        ["assistants=['${student}']", "data.teacher_tokenizer=wordpiece:90"],
        ["model@student=custom", "student._target_=tests.test_to_cli.Own", "+student.width=5"],
        ["model@student=simkd", "distillation=simkd", "student.backbone.hidden_size=8"],
        ["~logger.csv", "~logger.tensorboard", "~callbacks.learning_rate"],
    ],
    ids=lambda more: more[0].partition("=")[0],
)  # fmt: skip
def test_other_compositions_train_the_same_both_ways(
    more: list[str], composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tiny("quickstart", tmp_path, 8)
    if any(one.startswith("model@student") for one in more):
        small = [one for one in small if not one.startswith(("model@student", "student."))]
    both_ways([*small, *more], composed, tmp_path, monkeypatch)
