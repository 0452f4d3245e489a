"""What a folder of embeddings holds beside its weights, where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd_lightning.export.formats import huggingface
from kd_lightning.export.formats.sentence_transformers import OF_PAIRS, check, load, write
from kd_lightning.models.adapt import run_network
from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.models.bi_encoder_from_checkpoint import bi_encoder
from kd_lightning.models.transformer import transformer
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.tasks import SentenceEmbedding
from tests.models.tiny import batch, tiny


@pytest.mark.parametrize(
    "content",
    [
        "{", "[1]", "3", '{"pad_token_id": 0, "scale": "20"}', '{"pad_token_id": 0, "scale": 0}', '{"scale": 1}',
        '{"pad_token_id": 0, "scale": NaN}', '{"pad_token_id": "a", "scale": 1}', '{"pad_token_id": -1, "scale": 1}',
    ],
)  # fmt: skip
def test_settings_of_a_bi_encoder_that_are_none_are_one_line(tmp_path: Path, content: str) -> None:
    unused: Any = None
    tiny("bert").bert.save_pretrained(tmp_path)
    (tmp_path / OF_PAIRS).write_text(json.dumps({"pad_token_id": 1, "scale": 5.0}))
    network = load(tmp_path, unused)
    assert isinstance(network, BiEncoder)
    assert network.arguments == {"pad_token_id": 1, "scale": 5.0}
    (tmp_path / OF_PAIRS).write_text(content)
    with pytest.raises(KDError, match=rf"^{tmp_path / OF_PAIRS}") as error:
        load(tmp_path, unused)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_pooled_transformer_that_embeds_is_written_and_becomes_a_bi_encoder(tmp_path: Path, pooling: Any) -> None:
    """The way from a student that knows the language (general_tiny) to one that ranks."""
    given = batch()
    network = transformer(5, 30, 0, 8, 1, 2, 12, 16, pooling=pooling).eval()
    model: Any = SimpleNamespace(network=network, task=SentenceEmbedding(5), max_length=16)
    source: Any = SimpleNamespace(network=network, model=model, held_out=[given])
    check(model)
    with pytest.raises(ConfigError, match="use --format sentence_transformers"):
        huggingface.check(model)
    write(source, "none", tmp_path)
    unused: Any = None
    expected = run_network(network, given).logits
    torch.testing.assert_close(run_network(load(tmp_path, unused), given).logits, expected)
    ranks = bi_encoder(str(tmp_path), 30).eval()
    torch.testing.assert_close(run_network(ranks.network, given).logits, expected)
