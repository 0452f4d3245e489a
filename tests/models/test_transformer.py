from __future__ import annotations

import pytest
import torch

from kd_lightning.models.adapt import run_network
from kd_lightning.models.transformer import transformer
from kd_lightning.runtime.errors import ConfigError


def small(**options: object):  # type: ignore[no-untyped-def]
    shape = {"hidden_size": 8, "num_layers": 3, "num_heads": 2, "intermediate_size": 12, "max_length": 16}
    return transformer(3, 40, 5, **(shape | options))  # type: ignore[arg-type]


def test_arguments_reach_the_config() -> None:
    network = small(dropout=0.25, hidden_act="relu")
    config = network.config
    assert (config.vocab_size, config.pad_token_id, config.num_labels, config.hidden_size) == (40, 5, 3, 8)
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (3, 2, 12)
    assert (config.max_position_embeddings, config.hidden_act, config._attn_implementation) == (16, "relu", "sdpa")
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.25
    assert network.training


def test_padding_changes_nothing() -> None:
    network = small().eval()
    input_ids = torch.tensor([[7, 8, 9, 5, 5]])
    padded = run_network(network, {"input_ids": input_ids, "attention_mask": input_ids.ne(5).long()}).logits
    plain = run_network(network, {"input_ids": input_ids[:, :3], "attention_mask": torch.ones(1, 3).long()}).logits
    torch.testing.assert_close(padded, plain)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"num_heads": 3}, "num_heads=3 does not divide hidden_size=8"), ({"num_heads": 0}, "num_heads=0"),
     ({"hidden_act": "rellu"}, "did you mean .*'relu'")],
)  # fmt: skip
def test_wrong_values_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        small(**options)
