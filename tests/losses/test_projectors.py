from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.losses.projectors import Projection, projector, same_size
from tests.losses.conformance import randn

VECTORS = torch.zeros(2, 3), torch.zeros(2, 5)
TOKENS = torch.zeros(2, 4, 3), torch.zeros(2, 7, 5)
MAPS = torch.zeros(2, 3, 6, 6), torch.zeros(2, 5, 4, 4)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("pair", [VECTORS, TOKENS, MAPS], ids=["vectors", "tokens", "maps"])
def test_it_takes_the_students_width_to_the_teachers(kind: Projection, pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    projected = projector(kind, student, teacher)(student)
    channels = 1 if student.ndim == 4 else -1
    assert projected.shape[channels] == 5
    assert projected.shape[0] == 2
    assert projected.numel() == student.numel() // 3 * 5  # positions stay as they are


def test_linear_is_the_same_map_at_every_position() -> None:
    maps = randn(2, 3, 4, 4).float()
    module = projector("linear", maps, torch.zeros(2, 5, 4, 4))
    assert isinstance(module, nn.Conv2d)
    assert module.bias is not None
    expected = torch.einsum("oc,bchw->bohw", module.weight[:, :, 0, 0], maps) + module.bias[:, None, None]
    torch.testing.assert_close(module(maps), expected)
    assert sum(p.numel() for p in projector("linear", *TOKENS).parameters()) == 3 * 5 + 5


def test_conv1x1_has_a_batchnorm_and_no_bias() -> None:
    convolution, norm = projector("conv1x1", *MAPS)  # type: ignore[misc]
    assert (convolution.kernel_size, convolution.bias) == ((1, 1), None)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == 5


def test_mlp_is_as_wide_as_the_teacher_inside() -> None:
    first, activation, second = projector("mlp", *VECTORS)  # type: ignore[misc]
    assert (first.in_features, first.out_features, second.in_features, second.out_features) == (3, 5, 5, 5)
    assert isinstance(activation, nn.ReLU)


def test_none_and_a_module_of_ones_own() -> None:
    x = torch.randn(2, 3)
    assert projector("none", x, torch.zeros(2, 3))(x) is x
    own = nn.Linear(3, 5)
    assert projector(own, *VECTORS) is own


@pytest.mark.parametrize(
    ("kind", "pair", "message"),
    [
        ("lineer", VECTORS, "projector='lineer': expected one of linear, conv1x1, mlp, none, or a module"),
        ("none", TOKENS, r"hidden\[1\]: the student's width is 3 and the teacher's 5, and projector=none: use linear"),
        ("conv1x1", TOKENS, r"hidden\[1\] is \(2, 4, 3\), not a map \(B, C, H, W\), and projector=conv1x1: use linear"),
        ("linear", (VECTORS[0], MAPS[1]), r"the student's is \(2, 3\) and the teacher's \(2, 5, 4, 4\)"),
        ("linear", (torch.zeros(2), torch.zeros(2)), r"the student's is \(2,\) and the teacher's \(2,\)"),
    ],
)
def test_what_does_not_fit(kind: Any, pair: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projector(kind, *pair, "hidden[1]")


def test_maps_are_pooled_to_the_smaller_of_each_side() -> None:
    student, teacher = same_size(randn(1, 2, 4, 2), randn(1, 3, 2, 6, seed=1))
    assert student.shape == (1, 2, 2, 2)
    assert teacher.shape == (1, 3, 2, 2)
    torch.testing.assert_close(student, randn(1, 2, 4, 2).view(1, 2, 2, 2, 2).mean(3))
    tokens = randn(1, 4, 2), randn(1, 6, 2)
    assert all(a is b for a, b in zip(same_size(*tokens), tokens, strict=True))
    assert same_size(*MAPS)[0].shape == (2, 3, 4, 4)
