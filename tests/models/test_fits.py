"""Networks that could not read or learn from the batches they would get are refused before any training."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import nn
from transformers import BartConfig, BartForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.fits import check_length, check_single, most_positions
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.errors import ConfigError
from tests.conftest import tiny_overrides, write_toy_csv
from tests.models.tiny import tiny


def gpt2() -> nn.Module:
    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=30, n_positions=20, n_embd=8, n_layer=1, n_head=2, pad_token_id=0)
    )


def bart() -> nn.Module:
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForSequenceClassification(BartConfig(vocab_size=30, max_position_embeddings=20, **sizes, **heads))


@pytest.mark.parametrize(
    "make", [gpt2, bart, *(lambda kind=kind: tiny(kind, layers=1) for kind in ("bert", "roberta"))]
)
def test_the_table_of_positions_ends_where_the_network_fails(make: Callable[[], nn.Module]) -> None:
    network = make().eval()
    limit = most_positions(network)
    assert limit is not None
    tokens = torch.full((1, limit), 5)
    tokens[0, -1] = 2  # BART looks for the end of the text
    network(input_ids=tokens)
    with pytest.raises((IndexError, RuntimeError)):
        network(input_ids=torch.cat([torch.full((1, 1), 5), tokens], 1))
    check_length(network, limit, "student")
    with pytest.raises(
        ConfigError, match=rf"data\.max_length={limit + 1}: the student has positions .* {limit} tokens"
    ):
        check_length(network, limit + 1, "student")


def test_networks_without_positions_read_anything() -> None:
    check_length(BiLSTM(2, 30, embedding_size=4, hidden_size=4), 10**6, "student")
    check_length(tiny("bert"), None, "student")


def test_batchnorm_needs_more_than_a_value() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    batch = {"pixel_values": torch.randn(3, 3, 2, 2), "labels": torch.tensor([0, 1, 1])}
    before = flat[2].running_mean.clone()
    check_single(flat, batch, 2, 8, "data.batch_size")
    with pytest.raises(ConfigError, match=r"data\.batch_size=8: a batch is a single example"):
        check_single(flat, batch, 1, 8, "data.batch_size")
    assert flat.training
    assert torch.equal(flat[2].running_mean, before)
    check_single(nn.Sequential(nn.BatchNorm2d(3)), batch, 1, 8, "data.batch_size")  # each channel has four values


class Normed(nn.Module):
    """A student with a BatchNorm."""

    def __init__(self, vocab_size: int, num_classes: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(vocab_size, 8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, num_classes))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.bag(input_ids))
        return logits


@pytest.fixture
def started(composed: Callable[..., DictConfig], own_home: Path, tmp_path: Path) -> Callable[..., Run]:
    """Return a function that begins a tiny run and returns its pipeline."""

    def run(rows: int, *overrides: str) -> Run:
        files = [
            f"data.{part}_file={write_toy_csv(tmp_path / f'{part}.csv', rows, seed)}"
            for seed, part in enumerate(("train", "validation", "test"))
        ]
        tiny_run = tiny_overrides(tmp_path / "train.csv", tmp_path / "run")
        if any(override.startswith("model@student") for override in overrides):
            tiny_run = [override for override in tiny_run if not override.startswith(("student.", "model@student"))]
        cfg = composed(*tiny_run, *files, "stages=[baseline]", "trainer.max_epochs=1", *overrides)
        pipeline = Run(cfg, Console(file=StringIO()))
        train_all(pipeline)
        return pipeline

    return run


NORMED = ["~student", "+student._target_=tests.models.test_fits.Normed"]


def test_an_epoch_that_would_end_with_a_single_example_trains(started: Callable[..., Run]) -> None:
    pipeline = started(33, *NORMED, "data.batch_size=16", "trainer.max_epochs=2")
    assert (pipeline.folder / "seed_0" / "baseline" / "stage.json").is_file()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_single_examples_that_cannot_be_helped_are_refused(
    started: Callable[..., Run], tmp_path: Path, batch_size: int
) -> None:
    with pytest.raises(ConfigError, match=rf"data\.batch_size={batch_size}: a batch is a single example"):
        started(33, *NORMED, f"data.batch_size={batch_size}")
    assert not list(tmp_path.glob("run/**/*.json"))


def test_a_student_without_so_many_positions_is_refused(started: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length=64: the student has positions for at most 16 tokens"):
        started(30, "model@student=transformer", "student.max_length=16", "data.max_length=64")
    assert not list(tmp_path.glob("run/**/*.json"))
