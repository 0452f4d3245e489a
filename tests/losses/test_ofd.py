from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from kd_lightning.losses.ofd import OFDLoss, batchnorm_margin, ofd, response_margin
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

MAPS = randn(4, 3, 2, 2, seed=1), randn(4, 3, 2, 2, seed=2)
MARGIN = torch.tensor([-0.2, -0.5, 0.0])
CASES = [Case("ofd", ofd, MAPS, {"margin": MARGIN})]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_loops() -> None:
    expected = np.zeros(4)
    for b, c, h, w in np.ndindex(4, 3, 2, 2):
        s, t = (float(x[b, c, h, w]) for x in MAPS)
        target = max(t, float(MARGIN[c]))
        expected[b] += 0.0 if s <= target <= 0 else (s - target) ** 2
    np.testing.assert_allclose(ofd(*MAPS, MARGIN, "none").numpy(), expected / 12, rtol=1e-6)


def test_where_the_relu_closes_the_student_only_has_to_be_below() -> None:
    teacher = torch.tensor([[-3.0, -0.1, 2.0]])
    margin = torch.full((3,), -1.0)
    assert ofd(torch.tensor([[-9.0, -5.0, 2.0]]), teacher, margin).item() == 0.0
    assert ofd(torch.tensor([[-9.0, -5.0, -4.0]]), teacher, margin).item() == pytest.approx(36 / 3)
    assert ofd(torch.tensor([[0.5, -5.0, 2.0]]), teacher, margin).item() == pytest.approx(1.5**2 / 3)


def test_margins_of_a_batchnorm_by_scipy() -> None:
    batchnorm = nn.BatchNorm1d(7).double()
    scale = [1.0, -2.0, 0.5, 1.0, 1.0, 0.0, 1.0]
    shift = [0.0, 0.3, -1.0, 5.0, 20.0, -0.7, 100.0]
    with torch.no_grad():
        batchnorm.weight.copy_(torch.tensor(scale))
        batchnorm.bias.copy_(torch.tensor(shift))
    margin = batchnorm_margin(batchnorm)
    for value, gamma, beta in zip(margin.tolist()[:4], scale, shift, strict=False):
        sigma = abs(gamma)
        assert value == pytest.approx(norm.expect(lambda x: x, loc=beta, scale=sigma, ub=0, conditional=True), rel=1e-5)
    assert -0.06 < margin[4] < 0  # about -sigma / (beta / sigma)
    assert margin[5] == pytest.approx(-0.7)  # a constant
    assert margin[6] == 0
    with pytest.raises(ValueError, match="ReLU is no BatchNorm"):
        batchnorm_margin(nn.ReLU())
    with pytest.raises(ValueError, match="BatchNorm1d is no BatchNorm with a scale"):
        batchnorm_margin(nn.BatchNorm1d(3, affine=False))


def test_a_batchs_margins_tend_to_those_of_its_batchnorm() -> None:
    batchnorm = nn.BatchNorm2d(3)
    with torch.no_grad():
        batchnorm.weight.copy_(torch.tensor([1.0, 0.5, 2.0]))
        batchnorm.bias.copy_(torch.tensor([0.3, -0.2, 0.0]))
    feature = batchnorm(randn(400, 3, 5, 5).float())
    torch.testing.assert_close(response_margin(feature), batchnorm_margin(batchnorm), rtol=0.05, atol=0.0)
    assert response_margin(feature.relu()).tolist() == [0.0, 0.0, 0.0]


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"student feature \(2, 3, 1, 1\) and teacher feature \(2, 4, 1, 1\)"):
        ofd(torch.zeros(2, 3, 1, 1), torch.zeros(2, 4, 1, 1), torch.zeros(4))
    with pytest.raises(ValueError, match=r"margin \(2,\) must have one entry for each channel"):
        ofd(*MAPS, torch.zeros(2))
    with pytest.raises(ValueError, match=r"go together, but there are \(2, 1, 1\)"):
        OFDLoss(["a", "b"], ["a"])
    with pytest.raises(ValueError, match=r"go together, but there are \(1, 1, 2\)"):
        OFDLoss(["a"], ["a"], [nn.BatchNorm2d(1), nn.BatchNorm2d(1)])


def outputs() -> tuple[ModelOutput, ModelOutput]:
    student = {"a": randn(4, 2, 4, 4).float(), "b": randn(4, 5, 2, 2, seed=1).float()}
    teacher = {"x": randn(4, 3, 4, 4, seed=2).float(), "y": randn(4, 6, 1, 1, seed=3).float()}
    return ModelOutput(torch.zeros(4, 2), student), ModelOutput(torch.zeros(4, 2), teacher)


def test_the_term_sums_over_pairs() -> None:
    torch.manual_seed(0)
    student, teacher = outputs()
    term = OFDLoss(["a", "b"], ["x", "y"])
    with pytest.raises(ValueError, match="OFDLoss: the projectors are not built"):
        term(student, teacher, {})
    term.connect(student, teacher, 10)
    assert set(dict(term.named_buffers())) >= {"margin_0", "margin_1"}
    torch.testing.assert_close(term.get_buffer("margin_0"), response_margin(teacher.features["x"]))
    value = term(student, teacher, {})
    pooled = term.projectors[1](student.features["b"]).mean((2, 3), keepdim=True)
    expected = ofd(term.projectors[0](student.features["a"]), teacher.features["x"], term.get_buffer("margin_0"))
    torch.testing.assert_close(value, expected + ofd(pooled, teacher.features["y"], term.get_buffer("margin_1")))
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


def test_a_teachers_maps_from_after_a_relu_are_refused() -> None:
    # A hook on a BatchNorm keeps the tensor that it puts out, and a ReLU in place then overwrites it.
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    kept = []
    network[0].register_forward_hook(lambda module, args, made: kept.append(made))
    with torch.no_grad():
        network(randn(4, 3, 2, 2).float())
    student = ModelOutput(torch.zeros(4, 2), {"a": MAPS[0].float()})
    says = r"the teacher's 0 has no negative entry.*give maps from before the ReLU.*preactivations\[i\]"
    for margins in (None, [nn.BatchNorm2d(3)]):
        with pytest.raises(ValueError, match=says):
            OFDLoss(["a"], ["0"], margins).connect(student, ModelOutput(torch.zeros(4, 2), {"0": kept[0]}), 10)


def test_the_term_takes_margins_from_batchnorms() -> None:
    student, teacher = outputs()
    batchnorms = [nn.BatchNorm2d(3), nn.BatchNorm2d(6)]
    term = OFDLoss(["a", "b"], ["x", "y"], batchnorms)
    term.connect(student, teacher, 10)
    torch.testing.assert_close(term.get_buffer("margin_1"), batchnorm_margin(batchnorms[1]))
    assert not [name for name, _ in term.named_parameters() if "batchnorms" in name]
