"""Weights in 8 bits are near, each row by itself, and tables that are shared stay so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kd_lightning.export.int8 import Int8Embedding, Int8Linear, in_int8
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.runtime.errors import ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv, self.linear = nn.Embedding(7, 8), Conv1D(6, 8), nn.Linear(6, 5)
        with torch.no_grad():
            self.conv.weight.normal_()
            self.linear.weight[2] *= 1000  # a scale a row: the others do not suffer
            self.linear.weight[3] = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(self.conv(self.table(ids)))
        return found


def test_each_row_is_within_half_a_level() -> None:
    whole, network = Net(), in_int8(Net())
    for name, weight in (("table", whole.table.weight), ("conv", whole.conv.weight.T), ("linear", whole.linear.weight)):
        layer: Any = getattr(network, name)
        assert layer.levels.dtype == torch.int8
        assert ((layer.weight - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()
    ids = torch.arange(7)
    found, expected = network(ids), whole(ids)
    assert torch.equal(found[:, 3], expected[:, 3]), "a row of zeros"
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert whole.linear.weight.dtype == torch.float32


def test_a_table_that_is_the_output_layer_stays_one() -> None:
    network: Any = in_int8(causal_lm_small(20, 8, 16, 1, 2)).network
    assert isinstance(network.lm_head, Int8Linear)
    assert isinstance(network.model.embed_tokens, Int8Embedding)
    assert network.lm_head.levels is network.model.embed_tokens.levels
    assert network.model.norm.weight.dtype == torch.float32


def test_what_may_do_more_than_a_linear_layer_stays_as_it_is() -> None:
    class Scaled(nn.Embedding):
        pass

    network: Any = in_int8(nn.ModuleDict({"table": Scaled(3, 4), "linear": nn.Linear(4, 3)}))
    assert isinstance(network["table"], Scaled)
    with pytest.raises(ConfigError, match="ModuleDict has no linear layer or table to hold in 8 bits"):
        in_int8(nn.ModuleDict({"table": Scaled(3, 4)}))
