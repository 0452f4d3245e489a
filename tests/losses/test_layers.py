from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from kd_lightning.losses.layers import Kind, LayerwiseTerm, layer_pairs, transport
from kd_lightning.types import ModelOutput
from tests.losses.conformance import randn
from tests.losses.sequences import depths, said


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("uniform", 3, 4, [(0, 0), (1, 2), (2, 3)]),
        ("uniform", 1, 6, [(0, 5)]),
        ("last", 2, 6, [(0, 4), (1, 5)]),
        ("first", 2, 6, [(0, 0), (1, 1)]),
        ("emd", 2, 3, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
        ("emd", 2, 1, [(0, 0), (1, 0)]),
        ([[0, 2], [-1, -1]], 2, 6, [(0, 2), (1, 5)]),
        ([(1, 0)], 2, 1, [(1, 0)]),
    ],
)
def test_which_layers_meet(layers: Any, student: int, teacher: int, expected: list[tuple[int, int]]) -> None:
    assert layer_pairs(layers, student, teacher) == expected


def test_uniform_spreads_over_the_teacher() -> None:
    for teacher in range(1, 25):
        for student in range(1, teacher + 1):
            met = [t for _, t in layer_pairs("uniform", student, teacher)]
            assert len(met) == student
            assert met == sorted(set(met)), "each teacher layer at most once, in order"
            assert met[-1] == teacher - 1
            assert all(abs((t + 1) - (i + 1) * teacher / student) <= 0.5 for i, t in enumerate(met))


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "message"),
    [
        ("middle", 2, 6, "layers='middle': expected uniform, last, first, emd or a list of pairs"),
        ("middle", 6, 2, "layers='middle': expected uniform"),
        ("last", 6, 2, "layers=last: the student has 6 layers and the teacher 2; give the pairs"),
        ([], 2, 6, "the list of pairs is empty"),
        ([[0, 6]], 2, 6, r"layers: \[0, 6\] is not a pair of a student's layer \(it has 2\) and a teacher's \(6\)"),
        ([[-3, 0]], 2, 6, r"layers: \[-3, 0\] is not a pair"),
        ([[0, 1, 2]], 2, 6, r"layers: \[0, 1, 2\] is not a pair"),
        ([0, 1], 2, 6, "layers: 0 is not a pair"),
    ],
)
def test_maps_that_do_not_fit(layers: Any, student: int, teacher: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_pairs(layers, student, teacher)


def cheapest(costs: Tensor) -> float:
    """The least cost of moving equal masses, by linear programming."""
    rows, columns = costs.shape
    margins = np.concatenate([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    masses = [1 / rows] * rows + [1 / columns] * columns
    return float(linprog(costs.numpy().ravel(), A_eq=margins.reshape(rows + columns, -1), b_eq=masses).fun)


@pytest.mark.parametrize(("rows", "columns"), [(2, 6), (3, 4), (4, 12), (3, 2)])
def test_transport_nears_the_optimum(rows: int, columns: int) -> None:
    costs = randn(rows, columns, seed=rows).exp()
    plan = transport(costs, sharpness=300.0, iterations=5000)
    torch.testing.assert_close(plan.sum(0), torch.full((columns,), 1 / columns).double())
    torch.testing.assert_close(plan.sum(1), torch.full((rows,), 1 / rows).double(), rtol=1e-3, atol=0.0)
    best = cheapest(costs)
    assert (plan * costs).sum().item() == pytest.approx(best, rel=1e-3)
    assert best < costs.mean().item() * 0.95, "better than moving everything everywhere"


@pytest.mark.parametrize("seed", range(4))
def test_the_default_keeps_its_margins(seed: int) -> None:
    costs = randn(4, 12, seed=seed).exp().float()
    plan = transport(costs)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(0), torch.full((12,), 1 / 12))
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 1 / 4), rtol=0.01, atol=0.0)
    smooth = (plan * costs).sum().item()
    assert cheapest(costs.double()) * 0.99 <= smooth < costs.mean().item()
    torch.testing.assert_close(transport(5.0 * costs), plan)  # whatever the unit of the costs


def test_transport_of_equal_and_of_no_costs_is_uniform() -> None:
    for costs in (torch.zeros(2, 3), torch.full((2, 3), 7.0)):
        torch.testing.assert_close(transport(costs), torch.full((2, 3), 1 / 6))


def test_transport_has_no_graph() -> None:
    assert not transport(torch.rand(2, 3, requires_grad=True)).requires_grad


class Gap(LayerwiseTerm):
    """The mean absolute difference, and a record of the masks."""

    def __init__(self, *given: Any, kind: Kind = "hidden", **options: Any) -> None:
        super().__init__(*given, **options)
        self.kind = kind
        self.masks: list[Tensor | None] = []

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        self.masks.append(mask)
        return (student - teacher).abs().mean()


def states(layers: int, width: int, kind: str = "hidden") -> dict[str, Tensor]:
    """States after each layer, all of them the layer's number (from 1) times a power of ten."""
    return {f"{kind}[{i}]": torch.full((2, 3, width), 10.0**i) for i in range(1, layers + 1)}


def test_plan_names_the_features() -> None:
    term = Gap()
    term.plan(depths(2), depths(6))
    assert (term.needs_student, term.needs_teacher) == (("hidden[1]", "hidden[2]"), ("hidden[3]", "hidden[6]"))
    term = Gap([[0, 1], [0, 2]], kind="attention")
    term.plan(depths(2), depths(6))
    assert (term.needs_student, term.needs_teacher) == (("attention[0]",), ("attention[1]", "attention[2]"))


def test_a_map_that_does_not_fit_fails_at_planning() -> None:
    with pytest.raises(ValueError, match="the student has 6 layers and the teacher 2"):
        Gap().plan(depths(6), depths(2))


def test_without_a_plan() -> None:
    with pytest.raises(ValueError, match=r"Gap: no layers are paired; call Objective\.plan\(student, teacher\) first"):
        Gap()(said(states(2, 4)), said(states(2, 4)), {})


def test_it_is_the_mean_over_the_pairs() -> None:
    term = Gap("last")
    term.plan(depths(2), depths(3))
    assert term(said(states(2, 4)), said(states(3, 4)), {}).item() == pytest.approx((90 + 900) / 2)
    assert term.masks == [None, None]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    term(said(states(2, 4)), said(states(3, 4)), {"attention_mask": mask})
    assert term.masks[-1] is not None
    assert torch.equal(term.masks[-1], mask.bool())


def test_emd_weights_the_pairs_by_their_transport() -> None:
    term = Gap("emd")
    term.plan(depths(2), depths(3))
    student = {name: x.requires_grad_() for name, x in states(2, 4).items()}
    value = term(said(student), said(states(3, 4)), {})
    costs = torch.tensor([[abs(10.0**s - 10.0**t) for t in (1, 2, 3)] for s in (1, 2)])
    plan = transport(costs)
    assert value.item() == pytest.approx(float((plan * costs).sum()), rel=1e-5)
    value.backward()
    # The plan counts as a constant: each layer is drawn with the masses it sends, up or down.
    assert student["hidden[1]"].grad is not None
    signs = torch.sign(torch.tensor([10.0 - 10.0, 10.0 - 100.0, 10.0 - 1000.0]))
    assert student["hidden[1]"].grad.sum().item() == pytest.approx(float((plan[0] * signs).sum()), rel=1e-4)


def test_emd_of_a_network_with_itself_keeps_each_layer_in_its_place() -> None:
    term = Gap("emd")
    term.plan(depths(3), depths(3))
    assert term(said(states(3, 4)), said(states(3, 4)), {}).item() == pytest.approx(0.0, abs=2.0)  # of 333 on average


def test_connect_builds_a_projector_for_each_student_layer() -> None:
    torch.manual_seed(0)
    term = Gap([[0, 0], [0, 2], [1, 2]], projector="linear")
    term.plan(depths(2), depths(3))
    term.connect(said(states(2, 4)), said(states(3, 6)), 10)
    assert list(term.projectors) == ["0", "1"]
    assert {name: tuple(p.shape) for name, p in term.named_parameters()} == {
        "projectors.0.weight": (6, 4), "projectors.0.bias": (6,),
        "projectors.1.weight": (6, 4), "projectors.1.bias": (6,),
    }  # fmt: skip
    value = term(said(states(2, 4)), said(states(3, 6)), {})
    by_hand = [
        (term.projectors[str(s)](torch.full((4,), 10.0 ** (s + 1))) - 10.0 ** (t + 1)).abs().mean()
        for s, t in ((0, 0), (0, 2), (1, 2))
    ]
    torch.testing.assert_close(value, torch.stack(by_hand).mean())
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


def test_a_given_projector_is_shared() -> None:
    term = Gap(projector=nn.Linear(4, 6))
    term.plan(depths(2), depths(3))
    term.connect(said(states(2, 4)), said(states(3, 6)), 10)
    assert sum(p.numel() for p in term.parameters()) == 4 * 6 + 6
    assert term.projectors["0"] is term.projectors["1"]


def test_without_a_projector_nothing_is_built() -> None:
    term = Gap()
    term.plan(depths(2), depths(2))
    term.connect(said(states(2, 4)), said(states(2, 6)), 10)
    assert not list(term.parameters())


def test_connect_refuses_what_one_projector_cannot_reach() -> None:
    term = Gap("emd", projector="linear")
    term.plan(depths(1), depths(2))
    teacher = said({"hidden[1]": torch.zeros(2, 3, 6), "hidden[2]": torch.zeros(2, 3, 8)})
    with pytest.raises(ValueError, match=r"hidden\[1\] has one projector, but .* teacher layers of widths 6 and 8"):
        term.connect(said(states(1, 4)), teacher, 10)
    term = Gap(projector="none")
    term.plan(depths(1), depths(1))
    with pytest.raises(ValueError, match=r"hidden\[1\]: the student's width is 4 and the teacher's 6"):
        term.connect(said(states(1, 4)), said(states(1, 6)), 10)


@pytest.mark.parametrize("kind", ["attention", "qkv", "feature_maps"])
def test_features_of_four_axes_are_compared_as_they_are(kind: Kind) -> None:
    term = Gap(kind=kind)
    term.plan(depths(1), depths(1))
    pair = [said({f"{kind}[0]": torch.zeros(2, 4, 3, width)}) for width in (4, 8)]
    with pytest.raises(RuntimeError, match="size of tensor a"):  # of the comparison: nothing was pooled to fit
        term(*pair, {})


def test_half_precision_and_gradients() -> None:
    term = Gap()
    term.plan(depths(1), depths(1))
    student = torch.ones(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.zeros(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    value = term(said({"hidden[1]": student}), said({"hidden[1]": teacher}), {})
    assert value.dtype == torch.float32
    value.backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_tokens_that_differ() -> None:
    term = Gap(kind="attention")
    term.plan(depths(1), depths(1))
    pair = [ModelOutput(torch.zeros(1, 2), {"attention[0]": torch.zeros(1, 2, size, size)}) for size in (3, 4)]
    with pytest.raises(ValueError, match="the student's feature has 3 positions and the teacher's 4"):
        term(*pair, {"attention_mask": torch.ones(1, 3)})
