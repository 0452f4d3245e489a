from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers.cross_fitted import CrossFittedTeacher
from kd_lightning.teachers.ensemble import Combine, EnsembleNetwork, EnsembleTeacher, fit_weights
from kd_lightning.teachers.frozen import FrozenTeacher
from kd_lightning.types import Batch, ModelOutput


class Says:
    """A teacher that answers from a table."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, batch: Batch) -> ModelOutput:
        return ModelOutput(self.logits[batch["index"]], {"hidden": torch.ones(1)})

    def to(self, device: torch.device) -> Says:
        return Says(self.logits.to(device))  # another object, as a protocol allows

    def flush(self) -> None:
        self.flushed = True


def members(count: int = 3, classes: int = 4) -> list[Says]:
    torch.manual_seed(0)
    return [Says(3 * torch.randn(6, classes, dtype=torch.float64)) for _ in range(count)]


BATCH = {"index": torch.tensor([4, 0, 1])}


@pytest.mark.parametrize("weights", [None, [1, 2, 5], [0.0, 3.0, 1.0]])
def test_the_mean_of_probabilities(weights: list[float] | None) -> None:
    teachers = members()
    output = EnsembleTeacher(teachers, weights)(BATCH)
    shares = torch.tensor(weights or [1.0, 1.0, 1.0], dtype=torch.float64)
    expected = sum(
        share * teacher.logits[[4, 0, 1]].softmax(1) for share, teacher in zip(shares, teachers, strict=True)
    )
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits.softmax(1).double(), expected / shares.sum(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(output.logits.exp().sum(1), torch.ones(3))  # they are log-probabilities already
    assert output.features == {}


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_confident_members_weigh_more_example_by_example(combine: Combine) -> None:
    sure, unsure, clueless = (
        torch.tensor([[9.0, 0.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        torch.zeros(2, 2),
    )
    both = EnsembleTeacher([Says(sure), Says(unsure), Says(clueless)], "confidence", combine)
    output = both({"index": torch.arange(2)}).logits.double()
    probabilities = torch.stack([sure, unsure, clueless]).double().softmax(-1)
    certainty = 1 + (probabilities * probabilities.log()).sum(-1) / torch.tensor(2.0).double().log()
    weights = (certainty / certainty.sum(0)).unsqueeze(-1)
    assert weights[0, 0] > 0.8  # the first knows the first example,
    assert weights[1, 1] == pytest.approx(1.0)  # the second alone knows anything of the second
    mixed = (weights * probabilities).sum(0) if combine == "probabilities" else None
    if mixed is None:
        mixed = (weights * torch.stack([sure, unsure, clueless]).double()).sum(0).softmax(-1)
    torch.testing.assert_close(output.softmax(-1), mixed, rtol=1e-4, atol=1e-5)


def test_where_no_member_knows_anything_all_weigh_the_same() -> None:
    output = EnsembleTeacher([Says(torch.zeros(1, 3)), Says(torch.zeros(1, 3))], "confidence")(
        {"index": torch.tensor([0])}
    )
    torch.testing.assert_close(output.logits.softmax(-1), torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_learned_weights_are_the_best_of_a_fine_grid(combine: Combine) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (400,), generator=generator)
    one_hot = nn.functional.one_hot(labels, 3).double()
    good = 2 * one_hot + torch.randn(400, 3, generator=generator)
    poor = 0.7 * one_hot + torch.randn(400, 3, generator=generator)
    learned = fit_weights(torch.stack([good, poor]), labels, combine)
    assert sum(learned) == pytest.approx(1.0)

    def loss(weight: float) -> float:
        answer = EnsembleTeacher([Says(good), Says(poor)], [weight, 1 - weight], combine)({"index": torch.arange(400)})
        return float(nn.functional.cross_entropy(answer.logits.double(), labels))

    grid = [i / 200 for i in range(201)]
    assert learned[0] == pytest.approx(min(grid, key=loss), abs=0.006)
    assert 0.5 < learned[0] < 1.0


def test_a_member_that_only_guesses_learns_no_weight() -> None:
    labels = torch.arange(40) % 2
    right = 4.0 * nn.functional.one_hot(labels, 2)
    assert fit_weights(torch.stack([right, -right]), labels)[0] > 0.99


def test_the_mean_of_logits() -> None:
    first, second = members(2)
    output = EnsembleTeacher([first, second], [3, 1], combine="logits")(BATCH)
    expected = (0.75 * first.logits + 0.25 * second.logits)[[4, 0, 1]]
    torch.testing.assert_close(output.logits.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_one_member_says_what_it_says_alone(combine: Any) -> None:
    (alone,) = members(1)
    output = EnsembleTeacher([alone], combine=combine)(BATCH)
    torch.testing.assert_close(output.logits.softmax(1).double(), alone.logits[[4, 0, 1]].softmax(1), rtol=1e-5, atol=0)


def test_certain_members_and_bfloat16_stay_finite() -> None:
    sure, opposed = Says(torch.tensor([[1000.0, 0.0]])), Says(torch.tensor([[0.0, 1000.0]], dtype=torch.bfloat16))
    logits = EnsembleTeacher([sure, opposed])({"index": torch.tensor([0])}).logits
    torch.testing.assert_close(logits, torch.full((1, 2), 0.5).log())


def test_token_level_logits() -> None:
    tables = [Says(torch.randn(2, 5, 7)) for _ in range(2)]
    logits = EnsembleTeacher(tables, [1, 3])({"index": torch.tensor([1])}).logits
    expected = 0.25 * tables[0].logits[[1]].softmax(-1) + 0.75 * tables[1].logits[[1]].softmax(-1)
    torch.testing.assert_close(logits.softmax(-1), expected)


def test_running_members_each_in_its_own_precision() -> None:
    torch.manual_seed(0)
    networks = [nn.Linear(4, 3), nn.Linear(4, 3)]
    batch = {"pixel_values": torch.randn(5, 4)}
    teacher = EnsembleTeacher([FrozenTeacher(networks[0]), FrozenTeacher(networks[1], "bf16")], combine="logits")
    expected = (networks[0](batch["pixel_values"]) + networks[1](batch["pixel_values"])) / 2
    output = teacher(batch).logits
    torch.testing.assert_close(output, expected.detach(), rtol=0.02, atol=0.02)
    assert not output.requires_grad
    assert not output.is_inference()


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_networks_as_one_say_what_their_teachers_say(combine: Any) -> None:
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), nn.Linear(4, 3)]
    network = EnsembleNetwork(networks, [1, 2], combine)
    teacher = EnsembleTeacher([FrozenTeacher(member) for member in networks], [1, 2], combine)
    batch = {"pixel_values": torch.randn(5, 4), "labels": torch.zeros(5).long(), "index": torch.arange(5)}
    torch.testing.assert_close(run_network(network, batch).logits, teacher(batch).logits)
    assert len(list(network.parameters())) == 4  # they are counted and saved as one


def test_to_moves_every_member() -> None:
    teacher = EnsembleTeacher(members(2))
    assert teacher.to(torch.device("meta")) is teacher
    assert [member.logits.device.type for member in teacher.members] == ["meta", "meta"]  # type: ignore[attr-defined]


def test_flush_reaches_every_member() -> None:
    teachers = members(2)
    EnsembleTeacher(teachers).flush()
    assert all(teacher.flushed for teacher in teachers)


def test_members_of_other_classes_are_refused() -> None:
    teacher = EnsembleTeacher([*members(1, classes=4), *members(1, classes=5)])
    with pytest.raises(ConfigError, match=r"member 0 has 4 classes .*member 1 has 5"):
        teacher(BATCH)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"members": []}, "an ensemble needs at least one teacher"),
        ({"weights": [1.0]}, "weights has 1 numbers for 2 members"),
        ({"weights": [1.0, -1.0]}, "numbers of at least 0"),
        ({"weights": [0.0, 0.0]}, "not all of them 0"),
        ({"weights": [1.0, float("nan")]}, "numbers of at least 0"),
        ({"combine": "logit"}, "did you mean 'logits'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EnsembleTeacher(**{"members": members(2), **arguments})


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_starts_and_ends_of_spans_have_no_probabilities_of_classes(combine: Combine) -> None:
    own = [Says(torch.randn(6, 5, 2)) for _ in range(2)]
    batch = {**BATCH, "question": torch.tensor([0, 1, 1])}
    folds = torch.tensor([0, 0, 1, 1, -1, -1])
    for teacher in (EnsembleTeacher(own, combine=combine), CrossFittedTeacher(own, folds, combine)):
        if combine == "logits":
            assert teacher(batch).logits.shape == (3, 5, 2)
            continue
        with pytest.raises(ConfigError, match="starts and ends of spans, have none: use logits"):
            teacher(batch)
    with pytest.raises(ConfigError, match="weights=confidence needs probabilities"):
        EnsembleTeacher(own, "confidence", "logits")(batch)
