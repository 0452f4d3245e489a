"""What holds for every loss, of those from hidden states: the matrices here are such that these are the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.losses.fused_linear import chunked_soft_target, fused_linear_kd
from tests.losses.conformance import Case, Conformance, randn, title


def of_logits(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    matrix = torch.eye(student.shape[-1], dtype=student.dtype, device=student.device)
    return chunked_soft_target(student, teacher, matrix, matrix, **options)


def with_labels(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
    matrix = torch.eye(student.shape[-1], dtype=student.dtype, device=student.device)
    return fused_linear_kd(student, teacher, matrix, matrix, labels, **options).loss


# it is a graph break, and its products are done in the inputs' precision
APART: dict[str, Any] = {"compiled": False, "narrow": False}
MASK, LABELS = torch.arange(6) % 2 == 0, torch.arange(6) % 4
ROWS = randn(6, 4, seed=1), randn(6, 4, seed=2)
CASES = [
    *(
        Case(divergence, of_logits, ROWS, {"divergence": divergence, "temperature": 2.0}, MASK, **APART)
        for divergence in ("forward_kl", "reverse_kl", "jsd")
    ),
    Case("labels", with_labels, (*ROWS, LABELS), {"label_smoothing": 0.1}, MASK, zero=False, **APART),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    def test_autocast_does_not_reach_it(self, case: Case) -> None:
        pytest.skip("its products are done in autocast's precision")
