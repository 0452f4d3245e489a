from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd_lightning.losses.cross_tokenizer import CrossTokenizerLoss, next_log_probs, sorted_distance, span_kl
from kd_lightning.training.objective import Objective
from kd_lightning.types import NEXT_LOG_PROB, Batch, ModelOutput, SparseLogits

V, W = 11, 17


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 3


def batch(spans: list[list[list[int]]]) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.randint(0, V, (2, 6), generator=generator),
        "teacher_input_ids": torch.randint(0, W, (2, 8), generator=generator), "spans": torch.tensor(spans),
    }  # fmt: skip


def above(values: Tensor, given: Batch, k: int | None = None) -> ModelOutput:
    """Return what a teacher of these logits gives, or its cache of the K likeliest."""
    features = {NEXT_LOG_PROB: next_log_probs(values, given["teacher_input_ids"])}
    if k is None:
        return ModelOutput(values, features)
    return ModelOutput(values[..., :0], features, SparseLogits.of(values, k))


SPANS = [[[1, 2, 1, 3], [2, 5, 3, 4], [0, 0, 0, 0]], [[1, 3, 2, 4], [3, 4, 4, 5], [4, 6, 6, 8]]]


def test_against_a_derivation_by_hand() -> None:
    student, teacher, given = logits(2, 6, V), logits(2, 8, W, seed=1), batch(SPANS)
    values = []
    for row in range(2):
        for begin, stop, t_begin, t_stop in (span for span in SPANS[row] if span[1]):
            q, p = (x.softmax(-1).tolist() for x in (student[row, begin - 1], teacher[row, t_begin - 1]))
            pairs = zip(sorted(p, reverse=True), sorted(q, reverse=True) + [0.0] * (W - V), strict=True)
            own = math.prod(
                float(student[row, i - 1].softmax(-1)[given["input_ids"][row, i]]) for i in range(begin, stop)
            )
            other = math.prod(
                float(teacher[row, i - 1].softmax(-1)[given["teacher_input_ids"][row, i]])
                for i in range(t_begin, t_stop)
            )
            kl = other * math.log(other / own) + (1 - other) * math.log((1 - other) / (1 - own))
            values.append(2.0 * sum(abs(a - b) for a, b in pairs) + 0.5 * kl)
    loss = CrossTokenizerLoss(2.0, 0.5)(ModelOutput(student), above(teacher, given), given)
    assert float(loss) == pytest.approx(sum(values) / len(values), rel=1e-6)
    assert float(CrossTokenizerLoss().counts(given)) == len(values) == 5


def test_of_the_same_model_with_the_same_tokens_it_is_zero_and_so_is_its_gradient() -> None:
    student = logits(2, 6, V).requires_grad_()
    spans = [[[1, 2, 1, 2], [2, 5, 2, 5]], [[1, 3, 1, 3], [3, 4, 3, 4]]]
    given = batch(spans)
    given["teacher_input_ids"] = given["input_ids"]
    loss = CrossTokenizerLoss(0.0)(ModelOutput(student), above(student.detach().clone(), given), given)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss) == pytest.approx(0.0, abs=1e-12)
    assert float(gradient.abs().max()) < 1e-12
    whole = CrossTokenizerLoss()(ModelOutput(student), above(student.detach().clone(), given), given)
    assert float(whole) == pytest.approx(0.0, abs=1e-12)


def test_gradients_and_what_is_in_no_span() -> None:
    student, teacher, given = logits(2, 6, V).requires_grad_(), logits(2, 8, W, seed=1), batch(SPANS)
    term = CrossTokenizerLoss(most=None)
    assert torch.autograd.gradcheck(lambda x: term(ModelOutput(x), above(teacher, given), given), student)
    outside = student.detach().clone()
    outside[0, 4:], outside[:, 5] = math.nan, math.inf  # rows that predict nothing of a span
    outside.requires_grad_()
    loss = term(ModelOutput(outside), above(teacher, given), given)
    (gradient,) = torch.autograd.grad(loss, outside)
    assert float(loss) == pytest.approx(float(term(ModelOutput(student), above(teacher, given), given)))
    assert gradient.isfinite().all()
    assert not gradient[0, 4:].any()
    inside = student.detach().clone()
    inside[1, 0] = math.nan
    assert term(ModelOutput(inside), above(teacher, given), given).isnan()


def test_a_batch_without_spans_is_zero_with_a_graph() -> None:
    student = logits(2, 6, V).requires_grad_()
    given = batch([[[0, 0, 0, 0]], [[0, 0, 0, 0]]])
    loss = CrossTokenizerLoss()(ModelOutput(student), above(logits(2, 8, W), given), given)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss) == 0
    assert not gradient.any()
    with pytest.raises(ValueError, match=r"no spans of the same text: set data\.cross_tokenizer=true"):
        CrossTokenizerLoss().counts({"input_ids": given["input_ids"]})


@pytest.mark.parametrize("most", [1, 3, V, W, 40])
def test_few_of_the_likeliest_are_never_more(most: int) -> None:
    student, teacher = logits(5, V), logits(5, W, seed=1)
    whole, some = sorted_distance(student, teacher), sorted_distance(student, teacher, most)
    assert (some <= whole + 1e-12).all()
    if most >= W:
        assert torch.equal(some, whole)
    assert (whole <= 2 + 1e-12).all()


@pytest.mark.parametrize("k", [1, 4, W])
@pytest.mark.parametrize("most", [None, 2])
def test_a_stored_teacher_is_compared_over_its_likeliest_tokens_and_all_others(k: int, most: int | None) -> None:
    """By hand; with K = W it is the dense loss, and a smaller K is never more."""
    student, teacher, given = logits(2, 6, V).requires_grad_(), logits(2, 8, W, seed=1), batch(SPANS)
    term = CrossTokenizerLoss(most=most)
    found = term(ModelOutput(student), above(teacher, given, k), given)
    dense = term(ModelOutput(student), above(teacher, given), given)
    kl = CrossTokenizerLoss(0.0)(ModelOutput(student), above(teacher, given), given)
    known, distances = min(k, most or W), []
    for row in range(2):
        for begin, _, t_begin, _ in (span for span in SPANS[row] if span[1]):
            q, p = (
                sorted(x.softmax(-1).tolist(), reverse=True) + [0.0] * (W - x.shape[-1])
                for x in (student[row, begin - 1], teacher[row, t_begin - 1])
            )
            pairs = list(zip(p, q, strict=True))
            distances.append(sum(abs(a - b) for a, b in pairs[:known]) + abs(sum(a - b for a, b in pairs[known:])))
    assert float(found - kl) == pytest.approx(sum(distances) / len(distances), rel=1e-9)
    assert torch.autograd.grad(found, student)[0].isfinite().all()
    assert found <= dense + 1e-12
    if k == W:
        torch.testing.assert_close(found, dense, rtol=1e-12, atol=0)


@pytest.mark.parametrize("at_once", [1, 40, 2**22])
def test_the_next_tokens_log_probabilities_are_those_one_by_one(at_once: int) -> None:
    values, ids = logits(2, 8, W), batch(SPANS)["teacher_input_ids"]
    found = next_log_probs(values, ids, at_once)
    expected = [[math.log(float(values[b, i].softmax(-1)[ids[b, i + 1]])) for i in range(7)] + [0.0] for b in range(2)]
    torch.testing.assert_close(found[..., 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_values_have_finite_gradients(dtype: torch.dtype) -> None:
    for student, teacher in ((200.0, -200.0), (-200.0, 200.0), (200.0, 200.0), (1e-30, 0.0)):
        one = torch.zeros(1, 3, V, dtype=dtype)
        one[..., 0] = student
        one.requires_grad_()
        other = torch.zeros(1, 3, W, dtype=dtype)
        other[..., 0] = teacher
        given = {name: torch.zeros(1, 3, dtype=torch.long) for name in ("input_ids", "teacher_input_ids")}
        loss = CrossTokenizerLoss()(
            ModelOutput(one), above(other.float(), given), {**given, "spans": torch.tensor([[[1, 3, 1, 2]]])}
        )
        (gradient,) = torch.autograd.grad(loss, one)
        assert loss.isfinite()
        assert loss.dtype == torch.float32
        assert gradient.isfinite().all()


def test_the_likelihood_of_a_span_pulls_the_student_up_and_down() -> None:
    student = torch.tensor([0.5, 0.5]).log().requires_grad_()
    (gradient,) = torch.autograd.grad(span_kl(student, torch.tensor([0.9, 0.1]).log()).sum(), student)
    assert gradient[0] < 0 < gradient[1]


@pytest.mark.parametrize("weights", [{"uld_weight": -1.0}, {"likelihood_weight": -0.1}, {"most": 0}])
def test_what_cannot_be_is_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CrossTokenizerLoss(**weights)  # type: ignore[arg-type]
    hidden = ModelOutput(torch.zeros(2, 6, 0))
    given = batch(SPANS)
    with pytest.raises(ValueError, match="logits_in_training=true"):
        CrossTokenizerLoss()(hidden, above(logits(2, 8, W), given), given)
    with pytest.raises(ValueError, match="the teacher's output lacks next_log_prob"):
        CrossTokenizerLoss()(ModelOutput(logits(2, 6, V)), ModelOutput(logits(2, 8, W)), given)
    drawn = above(logits(2, 8, W), given, 4)
    assert drawn.sparse is not None
    drawn.sparse = drawn.sparse._replace(drawn=True)
    with pytest.raises(ValueError, match="drawn tokens are not the likeliest"):
        CrossTokenizerLoss()(ModelOutput(logits(2, 6, V)), drawn, given)


def test_uneven_batches_average_to_the_whole() -> None:
    student, teacher, given = logits(2, 6, V), logits(2, 8, W, seed=1), batch(SPANS)
    objective = Objective({"term": CrossTokenizerLoss()}, {"term": 1.0}).double()
    whole, _ = objective(ModelOutput(student), above(teacher, given), given)
    rows = [{name: value[row : row + 1] for name, value in given.items()} for row in range(2)]
    mean = torch.stack([objective.counts(one) for one in rows]).mean(0)
    found = [
        objective(ModelOutput(student[i : i + 1]), above(teacher[i : i + 1], one), one, 0.0, mean)[0]
        for i, one in enumerate(rows)
    ]
    assert [float(objective.counts(one)) for one in rows] == [2, 3]
    assert float(torch.stack(found).mean()) == pytest.approx(float(whole), rel=1e-6)
