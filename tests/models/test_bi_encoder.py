from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from kd_lightning.data.text.tokens import encode_batch, load_tokenizer
from kd_lightning.models.adapt import run_network
from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.models.bi_encoder_from_checkpoint import bi_encoder
from kd_lightning.models.features import FeatureTap, depth
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.models.sentence_encoder import SentenceEncoder
from kd_lightning.models.static_embedding import StaticEmbedding
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch, ModelOutput
from tests.toy_pairs import pairs

TEXTS = pairs()
ROWS = [(TEXTS[n // 3][0], TEXTS[(n * 5) % 60][1]) for n in range(9)]
"""Three documents for each of three queries."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("wordpiece:120", [text for pair in TEXTS for text in pair])


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return str(folder)


def made(checkpoint: str, tokenizer: Any, **options: Any) -> BiEncoder:
    network = bi_encoder(
        checkpoint, len(tokenizer), tokenizer.pad_token_id, [tokenizer.cls_token_id, tokenizer.sep_token_id],
        [tokenizer.cls_token_id, -1, tokenizer.sep_token_id], **options,
    )  # fmt: skip
    return network.eval()


def batch_of(tokenizer: Any) -> Batch:
    return encode_batch(tokenizer, ROWS, 64)


@pytest.mark.parametrize("layers", [None, 2, 0])
def test_a_score_is_the_cosine_of_texts_embedded_alone(checkpoint: str, tokenizer: Any, layers: int | None) -> None:
    network = made(checkpoint, tokenizer, layers=layers, scale=7.0)
    embedded = [
        run_network(network.network, encode_batch(tokenizer, [(row[side],) for row in ROWS], 64)).logits
        for side in (0, 1)
    ]
    expected = 7 * nn.functional.cosine_similarity(*embedded)
    torch.testing.assert_close(run_network(network, batch_of(tokenizer)).logits, expected[:, None])


def test_texts_are_taken_apart_as_a_tokenizer_writes_them(checkpoint: str, tokenizer: Any) -> None:
    network, batch = made(checkpoint, tokenizer), batch_of(tokenizer)
    parts = network.apart(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"].bool())
    for side, (ids, mask) in enumerate(parts):
        alone = encode_batch(tokenizer, [(row[side],) for row in ROWS], 64)
        length = alone["input_ids"].shape[1]
        assert torch.equal(ids[:, :length], alone["input_ids"])
        assert torch.equal(mask[:, :length].long(), alone["attention_mask"])
        assert not mask[:, length:].any()


def test_a_query_is_embedded_once(checkpoint: str, tokenizer: Any) -> None:
    class Counts(nn.Module):
        sizes: list[int]

        def forward(self, input_ids: torch.Tensor) -> ModelOutput:
            self.sizes.append(len(input_ids))
            return ModelOutput(input_ids[:, :2].float())

    inside = Counts()
    inside.sizes = []
    run_network(BiEncoder(inside), batch_of(tokenizer))
    assert inside.sizes == [3, len({document for _, document in ROWS})]


def test_gradients_and_padding(checkpoint: str, tokenizer: Any) -> None:
    network, batch = made(checkpoint, tokenizer, layers=1), batch_of(tokenizer)
    scores = run_network(network, batch).logits
    scores.sum().backward()
    weights = [weight.grad for weight in network.parameters()]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in weights)
    longer = {
        name: nn.functional.pad(value, (0, 5), value=7 if name == "input_ids" else 0) for name, value in batch.items()
    }
    torch.testing.assert_close(run_network(network, longer).logits, scores)


@pytest.mark.parametrize("layers", [None, 0])
def test_it_is_rebuilt_from_its_description(checkpoint: str, tokenizer: Any, layers: int | None) -> None:
    network, batch = made(checkpoint, tokenizer, layers=layers, scale=3.0), batch_of(tokenizer)
    description = describe(network)
    assert description is not None
    again = from_description(description)
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(run_network(again.eval(), batch).logits, run_network(network, batch).logits)


def test_what_it_is_made_of(checkpoint: str, tokenizer: Any) -> None:
    network: Any = made(checkpoint, tokenizer, layers=0.5).network
    assert isinstance(network, SentenceEncoder)
    assert network.encoder.config.num_hidden_layers == 2
    assert isinstance(made(checkpoint, tokenizer, layers=0).network, StaticEmbedding)
    for scale in (0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"scale={scale}: expected a number above 0"):
            BiEncoder(network, scale=scale)
    single = encode_batch(tokenizer, [(text,) for text, _ in ROWS], 64)
    with pytest.raises(ConfigError, match="apart at their token types"):
        run_network(BiEncoder(network), single)


@pytest.mark.parametrize("name", ["hidden[-1]", "pooled", "embeddings", "network.encoder.pooler", "nothing"])
def test_it_has_no_features(checkpoint: str, tokenizer: Any, name: str) -> None:
    """What is inside sees each different text once, in an order of its own, queries apart from documents."""
    network = made(checkpoint, tokenizer)
    for whole in (network, nn.Sequential(network)):
        with pytest.raises(ConfigError, match=r"^BiEncoder has no features: .*; compare its output alone$"):
            FeatureTap(whole, [name])
        with pytest.raises(ConfigError, match="BiEncoder has no features"):
            depth(whole, "hidden")
    assert not FeatureTap(network)(batch_of(tokenizer)).features


def test_a_graph_scores_alike(checkpoint: str, tokenizer: Any, tmp_path: Path) -> None:
    from kd_lightning.export.graph import trace

    network, batch = made(checkpoint, tokenizer), batch_of(tokenizer)
    traced = trace(network, batch, 64, "none")
    assert traced.inputs == ["input_ids", "attention_mask", "token_type_ids"]
    given = {name: batch[name][:3] for name in traced.inputs}
    torch.testing.assert_close(traced.program.module()(**given), run_network(network, given).logits)
