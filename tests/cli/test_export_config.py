"""Every experiment as Lightning CLI files: Hydra's objects, trained to the same weights. Offline and small."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from kd_lightning.cli.export_config import write
from kd_lightning.cli.lightning import command_line
from kd_lightning.config.instantiate import conf_dir
from kd_lightning.data.sources.personal_data import TYPES
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import read_json
from kd_lightning.training.distillation import DistillationModule
from tests.conftest import tiny_overrides, write_toy_csv
from tests.data.corpus.texts import made
from tests.data.images import write_fashion
from tests.end_to_end.test_lm_experiments import SHRUNK, language_model, shrunk, small
from tests.end_to_end.test_multi_task import NETWORKS, TASKS
from tests.models.onnx_files import write_tagger
from tests.toy_pairs import pairs
from tests.toy_reviews import write_archive, write_tokenizer

__all__ = ["shrunk"]  # a fixture
Composed = Callable[..., DictConfig]
QUICK = {"mean_teacher", "reviews_bilstm", "lm_sotu", "lm_on_policy", "lm_sequence"}
"""No trained teacher; views, and a teacher's embeddings; of language models two and a refusal.

Several tasks: the last test of this file.
"""
EXPERIMENTS = [
    pytest.param(path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
    for path in sorted((conf_dir() / "experiment").glob("*.yaml"))
    if not path.stem.startswith("lm_")
]
PACKAGES = ["data.index_file=${oc.env:PACKAGES}", "data.train_examples=30", "data.validation_fraction=0.1"]
QUESTIONS = ["data.index_file=${oc.env:PACKAGES}", "data.questions=30", "data.held_out_questions=20", "data.packages=2"]
TEMPLATES = ["data.texts=30", "data.transfer_texts=20", "data.held_out_texts=20"]
MORE = {
    "embed_debian": [*PACKAGES, "data.transfer_examples=10"],
    "general_tiny": PACKAGES,
    # A teacher of fresh weights scores all documents nearly alike: in bf16 their order is chance.
    "rank_debian": [*PACKAGES, "data.hard_negatives=2", "teacher.precision=float32"],
    "ner_pii": TEMPLATES, "qa_debian": QUESTIONS, "masked_general": [PACKAGES[0], "data.validation_fraction=0.1"],
}  # fmt: skip
CAPTURE = "+callbacks.capture={_target_: tests.cli.test_export_config.Capture}"


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
            "compiled": sum(part._compiled_call_impl is not None for part in module.modules()),
        }  # fmt: skip
        if isinstance(module, DistillationModule):
            objective = module.objective
            output = None if module.teacher is None else module._expected(batch, module._tap(batch))
            found |= {
                "terms": str(objective),
                "balance": type(objective.balance).__name__,
                "needs": (objective.needs_student, objective.needs_teacher),
                "settings": [objective.settings(progress) for progress in (0.0, 0.3, 0.8, 1.0)],
                "attributes": [_plain(term) for term in objective.modules()],
                "teacher": None if output is None else {"logits": output.logits, **output.features},
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
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=path)
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, value in enumerate(one):
            assert_same(value, other[number], f"{path}[{number}]")
    else:
        assert one == other, path


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the experiments fetch, in small: sentences, pictures, and a pretrained encoder with a MiniLM's layers."""
    folder = tmp_path_factory.mktemp("fetched")
    write_fashion(folder / "fashion_mnist", train=60, test=20)
    tokenizer = load_tokenizer(str(write_tokenizer(folder / "minilm")), [])
    torch.manual_seed(0)
    size = {"hidden_size": 144, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 12}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder / "minilm")
    write_archive(folder / "reviews", movies=30, others=10)
    packages = [f"p{n}\t{n}\t{query}\t{text}" for n, (query, text) in enumerate(pairs())]
    (folder / "packages.tsv").write_text("\n".join(["name\tsource\tsummary\ttext", *packages]) + "\n")
    language_model(folder / "smollm2", 280, made(20), positions=128)
    write_tokenizer(folder / "rampart")
    tags = ["O", *(f"{begin}-{kind}" for kind in TYPES for begin in "BI")]
    (folder / "rampart" / "config.json").write_text(json.dumps({"id2label": dict(enumerate(tags))}))
    table = np.random.default_rng(0).normal(size=(len(tokenizer), len(tags))).astype(np.float32)
    write_tagger(folder / "rampart" / "model.onnx", table)
    books = {"wordnet/data.noun": "1 | a thing", "moby_dick/chapter_1.txt": "One.", "sotu/1790_x_n.txt": "The law."}
    for name, text in {**books, **{f"wordnet/data.{part}": "2 | a way" for part in ("verb", "adj", "adv")}}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    texts = ("wordnet", "moby_dick", "sotu")
    names = ("reviews", "fashion_mnist", "minilm", "smollm2", "rampart", "packages.tsv", *texts)
    return {name: folder / name for name in names}


@pytest.fixture
def offline(fetched: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKAGES", str(fetched["packages.tsv"]))
    for module in (
        "data.sources.reviews",
        "data.sources.fashion_mnist",
        "data.sources.general_text",
        "data.sources.sotu",
        "data.text.substitutes",
        "data.text.tokens",
        "models.hf",
        "runtime.onnx_files",
    ):
        monkeypatch.setattr(f"kd_lightning.{module}.fetch", fetched.__getitem__)


def brief(experiment: str, steps: int) -> list[str]:
    """An experiment as it stands, with all its classes and their sizes, for fewer steps."""
    more = [f"tasks.{task}.teacher.trainer.max_steps={steps}" for task in TASKS[1:]] if "multi" in experiment else []
    budget = ["data.batch_size=16", f"trainer.max_steps={steps}", f"teacher.trainer.max_steps={steps}", "validations=2"]
    more += MORE.get(experiment, [])
    return [f"experiment={experiment}", *budget, CAPTURE, *more]


def toy(folder: Path, steps: int) -> list[str]:
    """The quickstart with tiny networks on toy data."""
    small = [one for one in tiny_overrides(write_toy_csv(folder / "toy.csv", rows=120), folder) if "run_dir" not in one]
    budget = ["data.batch_size=16", f"trainer.max_steps={steps}", f"teacher.trainer.max_steps={steps}"]
    budget.append("stages=[teacher,distill]")
    return ["experiment=quickstart", *budget, CAPTURE, *small, "~teacher.network.frozen_layers", "data.transfer=[]"]


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["kd-cli", *arguments])
    command_line()


def both_ways(overrides: list[str], composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train with the pipeline and with the CLI, each in a home of its own, and compare; return the stages."""
    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path / "home"))
    Capture.found = {}
    train_all(Run(composed(*overrides, f"run_dir={tmp_path / 'hydra/run'}")))
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
        for key in ("steps", "best_step", "validation", "monitor", "mode"):
            assert records[0][key] == records[1][key], (name, key)
    return names


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_to_the_same_weights_both_ways(
    experiment: str, composed: Composed, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more than two epochs: the first one fills the cache of the teacher's outputs."""
    both_ways(brief(experiment, 12), composed, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "experiment", [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in SHRUNK]
)
def test_every_experiment_of_language_models_trains_to_the_same_weights_or_says_why_not(
    experiment: str, shrunk: list[str], composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiny networks, of which the teacher is Hugging Face's."""
    given = small(experiment, shrunk, composed, tmp_path)
    if experiment == "lm_sequence":
        with pytest.raises(ConfigError, match=r"generated\.texts=1: kd-cli generates no texts; use kd-train"):
            write(composed(*given), tmp_path / "files", "kd-config ...")
        assert not (tmp_path / "files").exists()
        return
    names = both_ways([*given, CAPTURE, "~logger.tensorboard"], composed, tmp_path, monkeypatch)
    assert names[-1] == "seed_0/distill"


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
        ["distillation=label_trust", "teacher.calibrate=true"],
        ["teacher.cache=off", "trainer.accumulate_grad_batches=2"],
        ["teacher.cache_dtype=float16", "teacher.cache_top_k=2", f"alpha={RISING}"],
        ["stages=[teacher,baseline,distill,finetune]", "scheduler=warmup_cosine"],
        ["assistants=['${student}']", "data.teacher_tokenizer=wordpiece:90"],
        ["model@student=custom", "student._target_=tests.cli.test_export_config.Own", "+student.width=5"],
        ["model@student=simkd", "distillation=simkd", "student.backbone.hidden_size=8"],
        ["teacher.seeds=2", "model@student=embeddings_from_teacher", "student.network.embedding_size=8"],
        ["compile=true", "peers=['${student}']", "distillation=deep_mutual", "stages=[distill]"],
        ["~logger.csv", "~logger.tensorboard", "~callbacks.learning_rate"],
    ],
    ids=lambda more: more[0].partition("=")[0],
)  # fmt: skip
def test_other_compositions_train_the_same_both_ways(
    more: list[str], composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = toy(tmp_path, 8)
    if any(one.startswith("model@student") for one in more):
        small = [one for one in small if not one.startswith(("model@student", "student."))]
    both_ways([*small, *more], composed, tmp_path, monkeypatch)


def test_weights_of_tasks_multiply_schedules_both_ways(
    composed: Composed, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["stages=[teacher,distill]", f"alpha={RISING}", "+tasks.domain.weight=3", "+tasks.rating.weight=0.5"]
    both_ways([*brief("multi_task", 2), *NETWORKS, *more], composed, tmp_path, monkeypatch)
