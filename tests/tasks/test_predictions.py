from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.tasks.predictions import answers, network_answers
from kd_lightning.types import Batch, ModelOutput

INPUTS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


def batches(order: list[int], size: int) -> list[Batch]:
    return [
        {"pixel_values": INPUTS[rows], "labels": rows * 10, "index": rows} for rows in torch.tensor(order).split(size)
    ]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.norm = nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.norm(self.dropout(self.linear(pixel_values)))
        return out


def test_in_the_order_of_index_whatever_the_order_of_the_batches() -> None:
    said = answers(lambda batch: ModelOutput(batch["pixel_values"] * 2), batches([4, 0, 6, 1, 5, 3, 2], 3))
    assert said.index.tolist() == list(range(7))
    assert torch.equal(said.logits, INPUTS * 2)
    assert said.labels.tolist() == [0, 10, 20, 30, 40, 50, 60]


def test_half_precision_answers_are_kept_in_float32() -> None:
    said = answers(lambda batch: ModelOutput(batch["pixel_values"].bfloat16()), batches(list(range(7)), 4))
    assert said.logits.dtype == torch.float32
    assert torch.equal(said.logits, INPUTS.bfloat16().float())


def test_a_network_answers_in_eval_mode_and_without_a_gradient() -> None:
    torch.manual_seed(0)
    network = Network()
    network(INPUTS)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    said = network_answers(network, batches(list(range(7)), 3))
    assert not said.logits.requires_grad
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(said.logits, network.eval()(INPUTS).detach())


@pytest.mark.parametrize("training", [True, False])
def test_the_network_gets_its_mode_back(training: bool) -> None:
    network = Network().train(training)
    network_answers(network, batches(list(range(7)), 3))
    assert {module.training for module in network.modules()} == {training}


def test_also_after_an_error() -> None:
    network = Network().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        network_answers(network, [{"pixel_values": torch.zeros(2, 5)}])
    assert network.dropout.training
