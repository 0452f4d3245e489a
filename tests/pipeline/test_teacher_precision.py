"""A teacher's reduced precision is measured before anything learns from it, and refused by what it does."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from kd_lightning.data import QuestionFiles
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.models.causal_lm import CausalLM, causal_lm_small
from kd_lightning.models.transformer import transformer
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import build_caches, train_all
from kd_lightning.pipeline.teacher_precision import check_precision
from kd_lightning.runtime import memoize
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import CausalLanguageModeling, Classification, Ranking, Regression, SentenceEmbedding, Task
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.teachers.cache import outputs
from kd_lightning.types import Batch, ModelOutput
from tests.data.corpus.texts import WORDS
from tests.toy_questions import write_jsonl

CPU = torch.device("cpu")


def data_of(task: Task, batches: list[Batch], longest: int = 1) -> Any:
    loader = SimpleNamespace(sampler=range(len(batches)), dataset=batches)
    view = SimpleNamespace(val_dataloader=lambda: loader)
    return SimpleNamespace(task=task, lengths=torch.tensor([longest]), with_batches=lambda eval_batch_size: view)


def with_outliers(vocabulary: int) -> CausalLM:
    """A language model with what large ones have: a few hidden numbers far beyond the others."""
    torch.manual_seed(0)
    network = causal_lm_small(vocabulary, 32, hidden_size=32, num_layers=1, num_heads=2, tie_embeddings=False)
    inner: Any = network.network
    with torch.no_grad():
        inner.model.norm.weight[3] = 300.0
        inner.lm_head.weight.mul_(20.0)
        inner.lm_head.weight[:, 3] = 0.0
    return network


def blocks(vocabulary: int, count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, vocabulary, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids]


def test_it_decides_by_what_a_precision_does_and_not_by_its_name() -> None:
    network, data = with_outliers(60), data_of(CausalLanguageModeling(60), blocks(60), 12)
    said = check_precision(network, FrozenTeacher(network, "bf16"), data, CPU)
    found = re.fullmatch(r"bf16 against float32: KL (\S+) nats.*top-1 equal (\S+) .*, over 88 rows", said)
    assert found is not None  # the last token of each block predicts none
    assert 0 < float(found[1]) < 1e-3
    assert float(found[2]) > 0.95
    with pytest.raises(ConfigError, match=r"teacher\.precision=int8-dynamic against float32: KL [\d.]+ nats a row \(at "
                       r"most 0\.1\), top-1 equal 0\.\d+ \(at least 0\.8\), over 88 rows: set "
                       r"teacher\.precision=bf16, or float32"):  # fmt: skip
        check_precision(network, FrozenTeacher(network, "int8-dynamic"), data, CPU)
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5))
    images = [{"pixel_values": torch.randn(16, 32), "labels": torch.zeros(16, dtype=torch.long)} for _ in range(4)]
    quantised = FrozenTeacher(classifier, "int8-dynamic")
    assert "int8-dynamic against float32: KL" in check_precision(
        classifier, quantised, data_of(Classification(5), images), CPU
    )


def test_nothing_else_notices_it() -> None:
    network, data = with_outliers(60), data_of(CausalLanguageModeling(60), blocks(60), 12)
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    check_precision(network, FrozenTeacher(network, "bf16"), data, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(weight.requires_grad for weight in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network(blocks(60)[0]["input_ids"]).logits.sum().backward()  # keeps nothing of inference


def test_it_reads_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_lightning.pipeline.teacher_precision.ROWS", 40)
    network, data = with_outliers(60), data_of(CausalLanguageModeling(60), blocks(60, 30), 12)
    assert check_precision(network, FrozenTeacher(network, "bf16"), data, CPU).endswith("over 44 rows")


@pytest.mark.parametrize(("factor", "fits"), [(1.01, True), (1.5, False), (float("nan"), False)])
def test_scores_are_held_against_the_spread_of_labels(factor: float, fits: bool) -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 1)
    batches = [{"pixel_values": torch.randn(16, 3), "labels": torch.randn(16)} for _ in range(2)]

    class Off(FrozenTeacher):
        def forward(self, batch: Batch) -> ModelOutput:
            return ModelOutput(super().forward(batch).logits * factor)

    teacher = Off(network, "bf16")
    if fits:
        assert "scores differ by 0.0" in check_precision(network, teacher, data_of(Regression(), batches), CPU)
        return
    with pytest.raises(ConfigError, match=r"standard deviations \(at most 0\.1\), over 32 rows: set .*=float32"):
        check_precision(network, teacher, data_of(Regression(), batches), CPU)


def test_a_teacher_that_is_broken_in_float32_is_not_measured() -> None:
    network = nn.Linear(3, 2)
    nn.init.constant_(network.weight, float("nan"))
    batches: list[Batch] = [{"pixel_values": torch.ones(4, 3), "labels": torch.zeros(4, dtype=torch.long)}]
    said = check_precision(network, FrozenTeacher(network, "bf16"), data_of(Classification(2), batches), CPU)
    assert said == "bf16 against float32: not compared, over 0 rows"


@pytest.fixture
def overrides(tmp_path: Path, own_home: Path) -> list[str]:
    """A language model of Hugging Face's that 8 bits ruin, and a text to learn."""
    memoize._KEPT.clear()
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(25)) for i in range(30)]
    for number, text in enumerate(texts):
        (tmp_path / f"texts_{number}.txt").write_text(text)
    (tmp_path / "texts").mkdir()
    for path in tmp_path.glob("texts_*.txt"):
        path.rename(tmp_path / "texts" / path.name)
    tokenizer = load_tokenizer("bpe:280", texts)
    with_outliers(len(tokenizer)).network.save_pretrained(tmp_path / "llama")
    write_tokenizer(tokenizer, tmp_path / "llama")
    return [
        "data=lm_text", f"data.train_file={tmp_path / 'texts'}", "data.block_size=32", "data.batch_size=4",
        "model@student=causal_lm_small", "student.hidden_size=16", "student.num_layers=1", "student.num_heads=2",
        "trainer.max_steps=2", "validations=1", "temperature=1", f"run_dir={tmp_path / 'run'}",
        f"teacher.checkpoint={tmp_path / 'llama'}", "distillation=sparse_kd", "stages=[distill]",
        "trainer.precision=32-true", "teacher.cache_top_k=8",
    ]  # fmt: skip


def test_a_loss_on_all_logits_is_refused_where_some_are_kept_and_not_in_its_first_step(
    composed: Callable[..., DictConfig], overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "MOST_DENSE", 8)
    more = ["distillation=soft_target", "teacher.precision=float32"]
    with pytest.raises(ConfigError, match=r"it compares all logits, and the teacher gives only some of them"):
        train_all(Run(composed(*overrides, *more), Console(file=StringIO())))
    assert not (tmp_path / "run").exists()
    train_all(Run(composed(*overrides, *more, "teacher.cache=off"), Console(file=StringIO())))


@pytest.mark.parametrize("cache", ["off", "auto", "build"])
def test_a_run_is_refused_before_anything_is_trained_or_kept(
    cache: str, composed: Callable[..., DictConfig], overrides: list[str], tmp_path: Path
) -> None:
    mode = [] if cache == "build" else [f"teacher.cache={cache}"]
    for precision in ("int8-dynamic", "bf16"):
        said = StringIO()
        run = Run(composed(*overrides, *mode, f"teacher.precision={precision}"), Console(file=said, width=300))
        start: Callable[[Run], Any] = build_caches if cache == "build" else train_all
        if precision == "int8-dynamic":
            with pytest.raises(ConfigError, match=r"teacher\.precision=int8-dynamic against float32: KL"):
                start(run)
            assert not (tmp_path / "run").exists()
            assert not (tmp_path / "home" / "teacher_outputs").exists()
        else:
            start(run)
            assert said.getvalue().count("bf16 against float32: KL") == 1  # whoever asks


class Embeds(nn.Module):
    """A vector for each text, of which 16 bits keep little where a common part is large."""

    def __init__(self, common: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(60, 8)
        self.down = nn.Linear(8, 8)
        with torch.no_grad():
            self.table.weight.add_(common)
            self.down.bias.copy_(-common * self.down.weight.sum(1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.down(self.table(input_ids).mean(1))  # type: ignore[no-any-return]


def test_embeddings_are_compared_by_their_cosines() -> None:
    batches = [{**one, "labels": torch.full((2,), torch.nan), "index": torch.arange(2)} for one in blocks(60)]
    data, fine, coarse = data_of(SentenceEmbedding(8), batches, 12), Embeds(0.0), Embeds(3000.0)
    line = check_precision(fine, FrozenTeacher(fine, "bf16"), data, CPU)
    assert re.fullmatch(r"bf16 against float32: mean cosine (1\.0|0\.99)\d+ \(at least 0\.99\), over 8 rows", line)
    with pytest.raises(ConfigError, match=r"teacher\.precision=bf16 against float32: mean cosine"):
        check_precision(coarse, FrozenTeacher(coarse, "bf16"), data, CPU)


def test_starts_and_ends_are_compared_by_windows(tmp_path: Path, own_home: Path) -> None:
    data = QuestionFiles(
        train_file=str(write_jsonl(tmp_path / "qa.jsonl")), validation_fraction=0.4, tokenizer="wordpiece:120",
        max_length=40, stride=8, max_question_length=12,
    )  # fmt: skip
    data.prepare()
    torch.manual_seed(0)
    network = transformer(
        hidden_size=16, num_layers=1, intermediate_size=16, max_length=40, **data.model_arguments("teacher")
    ).eval()
    line = check_precision(network, FrozenTeacher(copy.deepcopy(network), "bf16"), data, CPU)
    found = re.search(r"KL [\d.e-]+ nats a row .* over (\d+) rows", line)
    assert found is not None
    assert 24 < int(found[1]) <= 32  # four batches of windows, and not of tokens


class Rates(Embeds):
    """A score for each text."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids).sum(1, keepdim=True)


def test_rankings_are_compared_by_query() -> None:
    grades = torch.tensor([1.0, 0.0])
    batches = [
        {**one, "labels": grades, "group": torch.full((2,), n), "index": torch.arange(2) + 2 * n}
        for n, one in enumerate(blocks(60))
    ]
    data, fine, coarse = data_of(Ranking(), batches, 12), Rates(0.0), Rates(3000.0)
    line = check_precision(fine, FrozenTeacher(fine, "bf16"), data, CPU)
    assert line == "bf16 against float32: rank correlation 1.0000 by query (at least 0.95), over 8 rows"
    with pytest.raises(ConfigError, match=r"teacher\.precision=bf16 against float32: rank correlation"):
        check_precision(coarse, FrozenTeacher(coarse, "bf16"), data, CPU)
