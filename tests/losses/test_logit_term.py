"""What every term on softened logits does with the batch, and the helpers its function is written with."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd_lightning.losses.adaptive_kl import AdaptiveKLLoss, adaptive_kl
from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.dist import DISTLoss, dist
from kd_lightning.losses.dkd import DKDLoss, dkd
from kd_lightning.losses.generalized_jsd import GeneralizedJSDLoss, generalized_jsd
from kd_lightning.losses.label_trust import label_trust
from kd_lightning.losses.logit_term import LogitTerm, labelled, log_mixture
from kd_lightning.losses.multi_label import MultiLabelLoss, multi_label
from kd_lightning.losses.nkd import NKDLoss, nkd
from kd_lightning.losses.reverse_kl import ReverseKLLoss, reverse_kl
from kd_lightning.losses.skew_kl import SkewKLLoss, skew_kl
from kd_lightning.losses.teacher_free import teacher_free
from kd_lightning.losses.total_variation import TotalVariationLoss, total_variation
from kd_lightning.losses.wsld import WSLDLoss, wsld
from kd_lightning.training.schedules import Linear
from kd_lightning.types import IGNORE, Batch, ModelOutput
from tests.losses.conformance import randn

UNLABELLED: list[tuple[type[LogitTerm], Callable[..., Tensor]]] = [
    (AdaptiveKLLoss, adaptive_kl),
    (DISTLoss, dist),
    (GeneralizedJSDLoss, generalized_jsd),
    (MultiLabelLoss, multi_label),
    (ReverseKLLoss, reverse_kl),
    (SkewKLLoss, skew_kl),
    (TotalVariationLoss, total_variation),
]
KEEP = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
LABELLED: list[tuple[type[LogitTerm], Callable[..., Tensor]]] = [(DKDLoss, dkd), (NKDLoss, nkd), (WSLDLoss, wsld)]


def call(term: LogitTerm, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    value: Tensor = term(ModelOutput(student), ModelOutput(teacher), batch)
    return value


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of 3 sequences of 5 tokens over 6 and 7 words, and labels; -100 where there is none."""
    labels = torch.tensor([[0, 1, 2, 3, 4], [3, IGNORE, 1, 2, IGNORE], [IGNORE, 2, 2, IGNORE, IGNORE]])
    return randn(3, 5, 6, seed=1, scale=2.0), randn(3, 5, 7, seed=2, scale=2.0), labels


@pytest.mark.parametrize(("term", "function"), UNLABELLED)
def test_examples_without_a_label_count_where_none_is_read(
    term: type[LogitTerm], function: Callable[..., Tensor]
) -> None:
    student, teacher = randn(4, 5, seed=1), randn(4, 5, seed=2)
    expected = function(student, teacher, 3.0)
    torch.testing.assert_close(call(term(temperature=3.0), student, teacher, {}), expected)
    torch.testing.assert_close(
        call(term(temperature=3.0), student, teacher, {"labels": torch.full((4,), IGNORE)}), expected
    )
    assert abs(function(student, teacher, 1.0).item() - expected.item()) > 1e-3


@pytest.mark.parametrize(("term", "function"), LABELLED)
def test_only_labelled_examples_count_where_labels_are_read(
    term: type[LogitTerm], function: Callable[..., Tensor]
) -> None:
    student, teacher = randn(4, 5, seed=1), randn(4, 5, seed=2)
    labels = torch.tensor([1, IGNORE, 4, 0])
    known = labels != IGNORE
    value = call(term(temperature=3.0), student, teacher, {"labels": labels})
    torch.testing.assert_close(value, function(student[known], teacher[known], labels[known], 3.0))
    torch.testing.assert_close(value, function(student, teacher, labels.clamp(min=0), 3.0, mask=known))
    student.requires_grad_()
    nothing = call(term(), student, teacher, {"labels": torch.full((4,), IGNORE)})
    nothing.backward()
    assert nothing.item() == 0.0
    assert student.grad is not None
    assert (student.grad == 0).all()


@pytest.mark.parametrize(("term", "function"), UNLABELLED)
def test_kept_rows_and_classes(term: type[LogitTerm], function: Callable[..., Tensor]) -> None:
    student, teacher, labels = tokens()
    batch = {"keep": KEEP, "labels": labels}
    with pytest.raises(ValueError, match="the student has 6 classes and the teacher 7"):
        call(term(), student, teacher, batch)
    value = call(term(classes=5), student, teacher, batch)
    torch.testing.assert_close(value, function(student[..., :5], teacher[..., :5], mask=KEEP))
    torch.testing.assert_close(value, function(student[KEEP, :5], teacher[KEEP, :5]))
    with pytest.raises(ValueError, match=r"logits \(3, 5, 6\) have a row for each position.*no `keep`"):
        call(term(classes=5), student, teacher, {"labels": labels, "attention_mask": KEEP.long()})


@pytest.mark.parametrize(("term", "function"), LABELLED)
def test_kept_rows_and_classes_with_labels(term: type[LogitTerm], function: Callable[..., Tensor]) -> None:
    student, teacher, labels = tokens()
    value = call(term(classes=5), student, teacher, {"keep": KEEP, "labels": labels})
    counts = KEEP & (labels != IGNORE)
    assert 0 < counts.sum() < KEEP.sum()
    torch.testing.assert_close(value, function(student[counts, :5], teacher[counts, :5], labels[counts]))


@pytest.mark.parametrize(("term", "function"), UNLABELLED)
def test_padding_changes_nothing(term: type[LogitTerm], function: Callable[..., Tensor]) -> None:
    student, teacher = randn(2, 3, 5, seed=1), randn(2, 3, 5, seed=2)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    value = call(term(), student, teacher, {"keep": mask})
    longer = [torch.cat([x, torch.full((2, 2, 5), 9.0).double()], 1) for x in (student, teacher)]
    padded = call(term(), *longer, {"keep": torch.cat([mask, torch.zeros(2, 2, dtype=torch.bool)], 1)})
    torch.testing.assert_close(padded, value)


@pytest.mark.parametrize(("term", "function"), UNLABELLED)
def test_the_temperature_follows_its_schedule(term: type[LogitTerm], function: Callable[..., Tensor]) -> None:
    student, teacher = randn(4, 5, seed=1), randn(4, 5, seed=2)
    scheduled = term(temperature=Linear(start=8.0, end=2.0))
    scheduled.progress = 0.5
    assert scheduled.settings() == {"temperature": 5.0}
    torch.testing.assert_close(call(scheduled, student, teacher, {}), function(student, teacher, 5.0))


@pytest.mark.parametrize(("_term", "function"), UNLABELLED)
def test_errors(_term: type[LogitTerm], function: Callable[..., Tensor]) -> None:
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"student logits \(2, 3\) and teacher logits \(2, 4\)"):
        function(z, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"mask \(3,\) must have the shape \(2,\)"):
        function(z, z, mask=torch.ones(3, dtype=torch.bool))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            function(z, z, temperature)


@pytest.mark.parametrize(("_term", "function"), LABELLED)
def test_errors_of_labels(_term: type[LogitTerm], function: Callable[..., Tensor]) -> None:
    z, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"student logits \(2, 3\) and teacher logits \(2, 4\)"):
        function(z, torch.zeros(2, 4), labels)
    with pytest.raises(ValueError, match=r"mask \(3,\) must have the shape \(2,\)"):
        function(z, z, labels, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        function(z, z, labels, 0.0)
    with pytest.raises(ValueError, match=r"labels \(3,\) must have the shape \(2,\) of the logits"):
        function(z, z, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logits \(2, 1\): a label's class and others need two classes or more"):
        function(torch.zeros(2, 1), torch.zeros(2, 1), labels)


def test_labelled() -> None:
    labels, counts = labelled(torch.tensor([2, IGNORE, 1]), torch.zeros(3, 4), torch.tensor([True, True, False]))
    assert labels.tolist() == [2, 0, 1]
    assert counts.tolist() == [True, False, False]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_log_mixture(share: float) -> None:
    p, q = randn(4, 3, seed=1).softmax(-1), randn(4, 3, seed=2).softmax(-1)
    torch.testing.assert_close(log_mixture(p.log(), q.log(), share), (share * p + (1 - share) * q).log())


def of_labels(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of student, teacher and labels, for those that have no teacher."""
    return lambda student, teacher, labels: function(student, labels)


OF_LABELS = [dkd, nkd, wsld, of_labels(cross_entropy), of_labels(teacher_free)]


@pytest.mark.parametrize("loss", OF_LABELS)
def test_nan_in_a_row_without_a_label_reaches_neither_value_nor_gradient(loss: Callable[..., Tensor]) -> None:
    student, teacher, labels = randn(6, 4, seed=1), randn(6, 4, seed=2), torch.tensor([0, 3, IGNORE, 2, IGNORE, 1])
    value = loss(student, teacher, labels)
    missing = (labels == IGNORE).unsqueeze(1)
    holed = student.masked_fill(missing, torch.nan).requires_grad_()
    again = loss(holed, teacher.masked_fill(missing, torch.nan), labels)
    torch.testing.assert_close(again, value)
    again.backward()
    assert holed.grad is not None
    assert (holed.grad.masked_select(missing) == 0).all()
    assert torch.isfinite(holed.grad).all()


@pytest.mark.parametrize("wrong", [4, 99, -1, -5])
@pytest.mark.parametrize("loss", [*OF_LABELS, label_trust])
def test_a_label_that_does_not_exist_is_refused(loss: Callable[..., Tensor], wrong: int) -> None:
    labels = torch.tensor([0, wrong, IGNORE, 2, 0, 1])
    with pytest.raises(ValueError, match=rf"label {wrong} does not exist: the logits have 4 classes, labelled 0 to 3"):
        loss(randn(6, 4, seed=1), randn(6, 4, seed=2), labels)
