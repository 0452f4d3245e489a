from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kd_lightning.losses.cross_entropy import CrossEntropyLoss, cross_entropy
from kd_lightning.losses.pkt import PKTLoss
from kd_lightning.losses.regression import RegressionLoss
from kd_lightning.losses.soft_target import SoftTargetLoss, soft_target
from kd_lightning.losses.task_term import TaskTerm
from kd_lightning.losses.term import Depth, Term
from kd_lightning.training.schedules import Linear
from kd_lightning.types import Batch, ModelOutput
from tests.losses.conformance import randn

# Three tasks: two classes, three classes, one score.
TASK = torch.tensor([0, 1, 1, 2, 0, 2, 1, 2])
LABELS = torch.tensor([1.0, 2.0, 0.0, -1.5, -100.0, torch.nan, 1.0, 0.25])
BATCH: Batch = {"task": TASK, "labels": LABELS, "index": torch.arange(8)}
STUDENT, TEACHER = randn(8, 6, seed=1), randn(8, 6, seed=2)
FIRST, SECOND, THIRD = range(2), range(2, 5), range(5, 6)


def depth(_: str) -> int:
    return 0


def value(term: Term, student: Tensor = STUDENT, batch: Batch = BATCH) -> Tensor:
    result: Tensor = term(ModelOutput(student), ModelOutput(TEACHER[: len(student)]), batch)
    return result


def test_a_term_sees_the_rows_and_columns_of_its_task_only() -> None:
    rows = [1, 2, 6]
    ce = TaskTerm(CrossEntropyLoss(), "b", 1, SECOND)
    kd = TaskTerm(SoftTargetLoss(2.0), "b", 1, SECOND)
    expected = cross_entropy(STUDENT[rows, 2:5], torch.tensor([2, 0, 1])) * 3 / 8
    torch.testing.assert_close(value(ce), expected)
    torch.testing.assert_close(value(kd), soft_target(STUDENT[rows, 2:5], TEACHER[rows, 2:5], 2.0) * 3 / 8)
    assert (ce.uses_teacher, kd.uses_teacher) == (False, True)

    student = STUDENT.clone().requires_grad_()
    value(kd, student).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    touched = student.grad != 0
    assert touched[rows, 2:5].all()
    assert touched.sum() == 9


def test_scores_keep_their_labels_and_those_that_are_missing_do_not_count() -> None:
    term = TaskTerm(RegressionLoss(target="labels"), "c", 2, THIRD, scores=True)
    squares = (STUDENT[[3, 7], 5] - torch.tensor([-1.5, 0.25])) ** 2
    torch.testing.assert_close(value(term), squares.mean() * 3 / 8)


def test_the_tasks_together_are_a_mean_over_the_batch() -> None:
    terms = [
        TaskTerm(SoftTargetLoss(), name, k, span)
        for k, (name, span) in enumerate(zip("abc", [FIRST, SECOND, THIRD], strict=True))
    ]
    each = [
        soft_target(STUDENT[[row]][:, list(span)], TEACHER[[row]][:, list(span)])
        for row, span in ((int(row), [FIRST, SECOND, THIRD][task]) for row, task in enumerate(TASK.tolist()))
    ]
    torch.testing.assert_close(torch.stack([value(term) for term in terms]).sum(), torch.stack(each).mean())


def test_a_batch_without_the_task_gives_zero_with_a_graph() -> None:
    student = STUDENT[:3].clone().requires_grad_()
    batch = {name: entry[:3] for name, entry in BATCH.items()}
    result = value(TaskTerm(RegressionLoss(), "c", 2, THIRD, scores=True), student, batch)
    assert result.item() == 0
    result.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert not student.grad.any()


def test_schedules_and_sizes_reach_the_term() -> None:
    inner = SoftTargetLoss(Linear(4.0, 2.0))
    term = TaskTerm(inner, "a", 0, FIRST)
    term.progress = 0.5
    assert term.settings() == {"temperature": 3.0}
    torch.testing.assert_close(value(term), soft_target(STUDENT[[0, 4], :2], TEACHER[[0, 4], :2], 3.0) * 2 / 8)

    class Sized(SoftTargetLoss):
        def plan(self, student: Depth, teacher: Depth) -> None:
            self.planned = True

        def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
            self.sizes = student.logits.shape[1], teacher.logits.shape[1], examples

    sized = Sized()
    term = TaskTerm(sized, "b", 1, SECOND)
    term.plan(depth, depth)
    term.connect(ModelOutput(STUDENT), ModelOutput(TEACHER), 99)
    assert sized.planned
    assert sized.sizes == (3, 3, 99)


def test_what_cannot_be_told_apart_and_what_the_term_refuses_is_said_with_the_task() -> None:
    with pytest.raises(ValueError, match="reads pooled: with several tasks, only logits"):
        TaskTerm(PKTLoss(), "b", 1, SECOND).plan(depth, depth)
    with pytest.raises(ValueError, match=r"task c: labels are scores, and this loss needs classes"):
        value(TaskTerm(CrossEntropyLoss(), "c", 2, THIRD, scores=True))
