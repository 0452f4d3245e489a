from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LRScheduler

from kd_lightning.config.instantiate import build, conf_dir
from kd_lightning.training.optim import SchedulerCallable, constant, parameter_groups, warmup_cosine, warmup_linear


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.lstm = nn.LSTM(4, 3)
        self.batch_norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(4, 7)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))


def test_weights_are_decayed_and_biases_and_norms_are_not() -> None:
    network = Network()
    decayed, plain = parameter_groups(network)
    names = {parameter: name for name, parameter in network.named_parameters()}
    assert {names[p] for p in decayed["params"]} == {
        "embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight",
    }  # fmt: skip
    assert {names[p] for p in plain["params"]} == {
        "norm.weight", "norm.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0", "batch_norm.weight", "batch_norm.bias",
        "head.bias", "scale",
    }  # fmt: skip
    optimizer = AdamW([decayed, plain], lr=0.1, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(list(p for p in network.parameters() if p.requires_grad))  # a tied weight once


def test_only_decay_moves_weights_that_have_no_gradient_to_follow() -> None:
    network = nn.Linear(3, 3)
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = AdamW(parameter_groups(network), lr=0.1, weight_decay=0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(network.weight.detach(), before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(network.bias.detach(), before[1])


def test_no_group_is_empty() -> None:
    assert len(parameter_groups(nn.Linear(2, 2, bias=False))) == 1
    assert len(parameter_groups(nn.LayerNorm(2))) == 1
    assert parameter_groups(nn.Linear(2, 2).requires_grad_(False)) == []


def rates(schedule: SchedulerCallable, total: int) -> list[float]:
    """Learning rate of each of the steps, and the one after the last."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler: LRScheduler = schedule(optimizer, total)
    found = []
    for _ in range(total + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warmup_linear() -> None:
    found = rates(partial(warmup_linear, warmup=0.2), 20)  # 4 steps up, 16 down
    assert [found[i] for i in (0, 1, 4, 8, 12, 20)] == pytest.approx([0.0, 0.5, 2.0, 1.5, 1.0, 0.0])


def test_warmup_cosine() -> None:
    found = rates(partial(warmup_cosine, warmup=0.2), 20)
    wave = [1 + math.cos(math.pi * share) for share in (0, 0.25, 0.5, 1)]
    assert [found[i] for i in (4, 8, 12, 20)] == pytest.approx(wave)
    assert found[:4] == pytest.approx([0.0, 0.5, 1.0, 1.5])


def test_constant() -> None:
    assert rates(constant, 5) == [2.0] * 6
    assert rates(partial(constant, warmup=0.4), 5) == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0, 2.0])


def test_a_tenth_of_the_training_is_warm_up_unless_told() -> None:
    for schedule in (warmup_linear, warmup_cosine):
        found = rates(schedule, 50)
        assert max(found) == found[5] == pytest.approx(2.0)


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "optimizer").glob("*.yaml")))
def test_every_optimizer_trains_two_steps(name: str, composed: Callable[..., DictConfig]) -> None:
    torch.manual_seed(0)
    network, before = nn.Linear(4, 3), []
    optimizer = build(composed(f"optimizer={name}").optimizer)(parameter_groups(network))
    x, labels = torch.randn(16, 4), torch.randint(3, (16,))
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), labels)
        before.append(float(loss))
        loss.backward()
        optimizer.step()
    assert float(nn.functional.cross_entropy(network(x), labels)) < before[0]
