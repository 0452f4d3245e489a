from __future__ import annotations

import unittest.mock

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor, nn

from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss, Term, chunked_linear
from kd_lightning.losses.sparse import SparseKDLoss
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.objective import Objective
from kd_lightning.training.schedules import Linear, OneMinus
from kd_lightning.types import IGNORE, Batch, ModelOutput

STUDENT = 2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TEACHER = 2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
BATCH = {"labels": torch.tensor([0, 3, IGNORE, 2, IGNORE, 1])}


def ce() -> float:
    known = BATCH["labels"] != IGNORE
    rows = log_softmax(STUDENT.numpy()[known.numpy()], axis=-1)
    return float(-rows[np.arange(len(rows)), BATCH["labels"][known].numpy()].mean())


def kd(temperature: float) -> float:
    p, q = (softmax(x.numpy() / temperature, axis=-1) for x in (TEACHER, STUDENT))
    return float(temperature**2 * entropy(p, q, axis=-1).mean())


class Hint(Term):
    """A term with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(4, 4)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        return (self.projector(student.logits.float()) - teacher.logits).square().mean()


@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 4.0), (0.5, 1.0), (0.0, 2.0), (1.0, 20.0)])
def test_reference_method(alpha: float, temperature: float) -> None:
    objective = Objective({"ce": CrossEntropyLoss(), "kd": SoftTargetLoss(temperature)}, {"ce": 1 - alpha, "kd": alpha})
    loss, parts = objective(ModelOutput(STUDENT), ModelOutput(TEACHER), BATCH)
    assert loss.item() == pytest.approx((1 - alpha) * ce() + alpha * kd(temperature), rel=1e-10)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx({"ce": ce(), "kd": kd(temperature)})


def test_the_loss_and_its_parts_have_graphs() -> None:
    student = STUDENT.clone().requires_grad_()
    objective = Objective({"ce": CrossEntropyLoss(), "kd": SoftTargetLoss()}, {"ce": 0.5, "kd": 0.5})
    loss, parts = objective(ModelOutput(student), ModelOutput(TEACHER), BATCH)
    assert loss.requires_grad
    assert loss.shape == ()
    assert all(part.requires_grad for part in parts.values())  # balance takes gradients of single terms


class TestCrossEntropyBesideASparseTeacher:
    """A student that leaves out its output layer goes through it once for both."""

    def steps(
        self, objective: Objective, labels: torch.Tensor, mean_counts: torch.Tensor | None, apart: bool
    ) -> tuple[dict[str, float], list[torch.Tensor], int]:
        """Return the loss and its parts, the gradients, and how often the output layer was gone through."""
        generator = torch.Generator().manual_seed(3)
        hidden, head = (torch.randn(*size, generator=generator).requires_grad_() for size in ((2, 4, 5), (11, 5)))
        student = ModelOutput(hidden[..., :0], {"last_hidden": hidden, "head": head})
        teacher = ModelOutput(torch.randn(2, 4, 11, generator=generator))
        keep = torch.tensor([[True, True, True, False], [True, True, False, False]])
        with unittest.mock.patch.object(chunked_linear, "_all_chunks", wraps=chunked_linear._all_chunks) as passes:
            loss, parts = objective(
                student, teacher, {"labels": labels, "keep": keep}, mean_counts=mean_counts, apart=apart
            )
        gradients = torch.autograd.grad(loss, [hidden, head])
        values = {name: part.item() for name, part in parts.items()} | {"loss": loss.item()}
        return values, list(gradients), passes.call_count

    @pytest.mark.parametrize(
        ("counts", "balance", "smoothing", "unlabelled", "weight", "passes"),
        [
            (None, "fixed", 0.0, [], 0.1, 1),
            ([5.0, 5.0], "fixed", 0.0, [], 0.1, 1),
            ([3.0, 6.0], "fixed", 0.0, [], 0.1, 1),  # other batches of the step have no labels
            (None, "fixed", 0.0, [(0, 1)], 0.1, 2),
            (None, "fixed", 0.0, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], 0.1, 2),
            (None, "fixed", 0.1, [], 0.1, 2),
            (None, "unit_initial", 0.0, [], 0.1, 2),
            (None, "fixed", 0.0, [], 0.0, 2),  # computed to be watched
        ],
    )
    def test_it_is_the_same_as_apart(
        self, counts: list[float] | None, balance: str, smoothing: float, unlabelled: list[tuple[int, int]],
        weight: float, passes: int,
    ) -> None:  # fmt: skip
        labels = torch.arange(8).view(2, 4)
        for place in unlabelled:
            labels[place] = IGNORE
        mean = None if counts is None else torch.tensor(counts)
        found = []
        for apart in (False, True):
            terms = {"ce": CrossEntropyLoss(smoothing), "kd": SparseKDLoss(top_k=3)}
            objective = Objective(terms, {"ce": weight, "kd": 0.9}, balance)
            found.append(self.steps(objective, labels, mean, apart))
        (values, gradients, together), (expected, expected_gradients, _) = found
        assert values == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(gradients, expected_gradients)
        assert together == passes
        assert found[1][2] == 2

    def test_nothing_that_counts(self) -> None:
        objective = Objective({"ce": CrossEntropyLoss(), "kd": SparseKDLoss(top_k=3)}, {"ce": 0.1, "kd": 0.9})
        hidden = torch.randn(1, 2, 5, requires_grad=True)
        student = ModelOutput(hidden[..., :0], {"last_hidden": hidden, "head": torch.randn(11, 5)})
        batch = {"labels": torch.full((1, 2), IGNORE), "keep": torch.zeros(1, 2, dtype=torch.bool)}
        loss, _ = objective(student, ModelOutput(torch.randn(1, 2, 11)), batch, mean_counts=torch.tensor([4.0, 4.0]))
        assert loss.item() == 0
        assert torch.equal(torch.autograd.grad(loss, hidden)[0], torch.zeros_like(hidden))


def test_weights_and_temperature_follow_progress() -> None:
    alpha = Linear(start=0.0, end=1.0)
    objective = Objective(
        {"ce": CrossEntropyLoss(), "kd": SoftTargetLoss(Linear(start=8.0, end=2.0))},
        {"ce": OneMinus(alpha), "kd": alpha},
    )
    for progress, temperature in [(0.0, 8.0), (0.25, 6.5), (1.0, 2.0)]:
        loss, _ = objective(ModelOutput(STUDENT), ModelOutput(TEACHER), BATCH, progress)
        assert loss.item() == pytest.approx((1 - progress) * ce() + progress * kd(temperature))
        assert objective.settings(progress) == pytest.approx(
            {"weight/ce": 1 - progress, "weight/kd": progress, "kd/temperature": temperature}
        )


def test_it_says_whether_a_teacher_is_needed() -> None:
    assert not Objective({"ce": CrossEntropyLoss()}, {"ce": 1.0}).uses_teacher
    assert Objective({"ce": CrossEntropyLoss(), "kd": SoftTargetLoss()}, {"ce": 1.0, "kd": 0.1}).uses_teacher


def test_parameters_of_terms_are_its_own() -> None:
    objective = Objective({"hint": Hint()}, {"hint": 1.0})
    assert [name for name, _ in objective.named_parameters()] == [
        "terms.hint.projector.weight",
        "terms.hint.projector.bias",
    ]


def test_refuses_no_terms() -> None:
    with pytest.raises(ConfigError, match=r"objective\.terms is empty"):
        Objective({}, {})


@pytest.mark.parametrize("weights", [{}, {"ce": 1.0, "kd": 1.0}, {"kd": 1.0}])
def test_refuses_names_that_do_not_pair_up(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"objective\.weights has .*objective\.terms has \['ce'\]"):
        Objective({"ce": CrossEntropyLoss()}, weights)


def test_refuses_a_negative_weight() -> None:
    with pytest.raises(ConfigError, match=r"objective\.weights\.ce must not be negative, got -0\.1"):
        Objective({"ce": CrossEntropyLoss()}, {"ce": -0.1})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), Linear(start=0.0, end=float("nan"))])
def test_refuses_a_weight_that_is_no_finite_number(weight: float | Linear) -> None:
    with pytest.raises(ConfigError, match=r"objective\.weights\.ce must be a finite number, got (nan|inf)"):
        Objective({"ce": CrossEntropyLoss()}, {"ce": weight})


def test_a_schedule_that_turns_negative_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights\.ce must not be negative, got -5"):
        Objective({"ce": CrossEntropyLoss()}, {"ce": Linear(start=0.0, end=-5.0)})


def test_its_own_parameters_stay_wide_where_a_trainer_makes_the_networks_narrow() -> None:
    objective = Objective({"ce": CrossEntropyLoss()}, {"ce": 1.0}, "uncertainty")
    assert {p.dtype for p in objective.to(torch.bfloat16).parameters()} == {torch.float32}
    assert {p.dtype for p in objective.to(torch.float64).parameters()} == {torch.float64}
