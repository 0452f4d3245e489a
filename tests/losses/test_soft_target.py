from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor

from kd_lightning.losses.soft_target import SoftTargetLoss, soft_target
from kd_lightning.tasks.rows import next_tokens
from kd_lightning.training.schedules import Linear
from kd_lightning.types import IGNORE, Batch, ModelOutput
from tests.losses import conformance
from tests.losses.conformance import Case, Conformance, title

NO_BATCH: Batch = {}
CASES = [
    Case("soft_target", soft_target, (conformance.randn(6, 4, seed=1), conformance.randn(6, 4, seed=2)),
         {"temperature": 2.0}, mask=torch.arange(6) % 2 == 0),
    Case("tokens", soft_target, (conformance.randn(4, 3, 5, seed=1), conformance.randn(4, 3, 5, seed=2)), {},
         mask=torch.arange(12).view(4, 3) % 5 != 1),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def randn(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    return randn(16, 5, seed=1), randn(16, 5, seed=2)


def by_scipy(student: Tensor, teacher: Tensor, temperature: float) -> np.ndarray:
    """T^2 KL(teacher || student) of every row: scipy's relative entropy of probabilities."""
    p, q = softmax(teacher.numpy() / temperature, axis=-1), softmax(student.numpy() / temperature, axis=-1)
    return np.asarray(temperature**2 * entropy(p, q, axis=-1))


def loss(student: Tensor, teacher: Tensor, batch: Batch | None = None, *, temperature: float = 2.0) -> Tensor:
    value: Tensor = SoftTargetLoss(temperature)(ModelOutput(student), ModelOutput(teacher), batch or NO_BATCH)
    return value


# -- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_value_is_scipys_relative_entropy_times_t_squared(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    expected = by_scipy(*logits, temperature)
    assert soft_target(*logits, temperature).item() == pytest.approx(expected.mean(), rel=1e-10)
    assert soft_target(*logits, temperature, reduction="sum").item() == pytest.approx(expected.sum(), rel=1e-10)
    np.testing.assert_allclose(soft_target(*logits, temperature, reduction="none").numpy(), expected, rtol=1e-10)


def test_a_closed_form() -> None:
    # teacher (1/2, 1/2), student (1/4, 3/4) at T = 1: KL = log 2 - log(3)/2
    student, teacher = torch.tensor([[0.0, np.log(3.0)]]), torch.tensor([[7.0, 7.0]])
    assert soft_target(student, teacher).item() == pytest.approx(np.log(2) - np.log(3) / 2, abs=1e-7)


def test_zero_where_student_and_teacher_agree_and_positive_elsewhere(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    assert soft_target(teacher, teacher, 3.0).item() == 0.0
    assert soft_target(teacher + 5.0, teacher, 3.0).item() == pytest.approx(0.0, abs=1e-12)  # softmax knows no offset
    assert (soft_target(student, teacher, 3.0, reduction="none") > 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_the_students_gradient_is_t_times_the_difference_of_probabilities(
    logits: tuple[Tensor, Tensor], temperature: float
) -> None:
    student, teacher = (x.clone().requires_grad_() for x in logits)
    soft_target(student, teacher, temperature).backward()
    p_s, p_t = (softmax(x.numpy() / temperature, axis=-1) for x in logits)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), temperature * (p_s - p_t) / len(p_s), rtol=1e-9, atol=1e-15)
    assert teacher.grad is None


def test_the_gradient_keeps_its_scale_at_high_temperature(logits: tuple[Tensor, Tensor]) -> None:
    # Hinton et al. 2015, section 2.1: as T grows it tends to (z_s - z_t) / (C B), for logits of mean zero
    student, teacher = (x - x.mean(-1, keepdim=True) for x in logits)
    student.requires_grad_()
    soft_target(student, teacher, 1e4).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (student - teacher).detach() / student.numel(), rtol=1e-2, atol=1e-5)


def test_gradcheck(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits[0][:4].requires_grad_(), logits[1][:4]
    mask = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda z: soft_target(z, teacher, 3.0), (student,))
    assert torch.autograd.gradcheck(lambda z: soft_target(z, teacher, 3.0, mask), (student,))


def test_masked_rows_count_neither_in_the_sum_nor_in_the_mean(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits[0].requires_grad_(), logits[1]
    mask = torch.arange(16) % 3 == 0
    expected = by_scipy(student.detach(), teacher, 2.0)[mask.numpy()]
    assert soft_target(student, teacher, 2.0, mask).item() == pytest.approx(expected.mean(), rel=1e-10)
    assert soft_target(student, teacher, 2.0, mask, "sum").item() == pytest.approx(expected.sum(), rel=1e-10)
    assert (soft_target(student, teacher, 2.0, mask, "none")[~mask] == 0).all()
    soft_target(student, teacher, 2.0, mask).backward()
    assert student.grad is not None
    assert (student.grad[~mask] == 0).all()
    assert (student.grad[mask] != 0).all()


def test_a_batch_in_which_nothing_counts_is_a_zero_with_a_graph(logits: tuple[Tensor, Tensor]) -> None:
    student = logits[0].requires_grad_()
    value = soft_target(student, logits[1], 2.0, torch.zeros(16, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_an_empty_batch_is_zero() -> None:
    assert soft_target(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0.0


def test_microbatches_weighted_by_what_counts_equal_the_whole(logits: tuple[Tensor, Tensor]) -> None:
    mask = torch.arange(16) % 3 != 1
    parts = [slice(0, 3), slice(3, 11), slice(11, 16)]
    means = torch.stack([soft_target(logits[0][s], logits[1][s], 2.0, mask[s]) for s in parts])
    counts = torch.stack([mask[s].sum() for s in parts])
    whole = soft_target(*logits, 2.0, mask)
    torch.testing.assert_close((means * counts).sum() / counts.sum(), whole)
    assert means.mean().item() != pytest.approx(whole.item(), rel=1e-4)  # a mean of means would be another number


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, temperature: float) -> None:
    student, teacher = (randn(8, 100, seed=seed, scale=1e4).clamp(-6e4, 6e4).to(dtype) for seed in (3, 4))
    student.requires_grad_()
    value = soft_target(student, teacher, temperature)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert torch.equal(value, soft_target(student.float(), teacher.float(), temperature))
    z_s, z_t = student.detach().double().numpy() / temperature, teacher.double().numpy() / temperature
    kl = (softmax(z_t, axis=-1) * (log_softmax(z_t, axis=-1) - log_softmax(z_s, axis=-1))).sum(-1)
    assert value.item() == pytest.approx(temperature**2 * kl.mean(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_ordinary_logits_is_near_float64(dtype: torch.dtype, logits: tuple[Tensor, Tensor]) -> None:
    narrow = [x.to(dtype) for x in logits]
    expected = by_scipy(narrow[0].double(), narrow[1].double(), 20.0).mean()
    assert soft_target(narrow[0], narrow[1], 20.0).item() == pytest.approx(expected, rel=1e-4)


def test_float64_stays_float64(logits: tuple[Tensor, Tensor]) -> None:
    assert soft_target(*logits).dtype == torch.float64


@pytest.mark.slow
def test_compiled_equals_eager(logits: tuple[Tensor, Tensor]) -> None:
    mask = torch.arange(16) % 3 == 0
    compiled = torch.compile(soft_target, fullgraph=True)
    results = []
    for function in (soft_target, compiled):
        student = logits[0].float().clone().requires_grad_()
        value = function(student, logits[1].float(), 4.0, mask)
        value.backward()
        results.append((value.detach(), student.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_refuses_a_temperature_that_is_not_positive_and_finite(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        soft_target(torch.zeros(2, 3), torch.zeros(2, 3), temperature)


def test_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\).*same shape"):
        soft_target(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"same shape"):
        soft_target(torch.zeros(2, 3), torch.zeros(1, 3))  # no silent broadcasting
    with pytest.raises(ValueError, match=r"mask \(3,\) must have the shape \(2,\)"):
        soft_target(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(3, dtype=torch.bool))


# -- the term ---------------------------------------------------------------------------------------------------------


def test_examples_are_averaged_whatever_their_labels(logits: tuple[Tensor, Tensor]) -> None:
    batch = {"labels": torch.full((16,), IGNORE)}  # only the teacher labels these
    assert loss(*logits, batch).item() == pytest.approx(by_scipy(*logits, 2.0).mean(), rel=1e-10)


@pytest.fixture
def sequences() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits `(3, 6, 7)` and lengths."""
    return randn(3, 6, 7, seed=5), randn(3, 6, 7, seed=6), torch.tensor([6, 4, 2])


def by_token(student: Tensor, teacher: Tensor, counts: list[tuple[int, int]]) -> float:
    return float(np.mean([by_scipy(student[b, t], teacher[b, t], 2.0) for b, t in counts]))


def test_tokens_are_averaged_over_valid_positions(sequences: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, lengths = sequences
    mask = torch.arange(6) < lengths[:, None]
    valid = [(b, t) for b, length in enumerate(lengths.tolist()) for t in range(length)]
    assert loss(student, teacher, {"keep": mask}).item() == pytest.approx(by_token(student, teacher, valid))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shifted", [False, True])
def test_more_padding_changes_nothing(sequences: tuple[Tensor, Tensor, Tensor], shifted: bool, side: str) -> None:
    student, teacher, _ = sequences

    def pad(x: Tensor, filler: Tensor) -> Tensor:
        return torch.cat([filler, x] if side == "left" else [x, filler], dim=1)

    def rows(mask: Tensor) -> Batch:
        return next_tokens({"input_ids": mask, "attention_mask": mask}) if shifted else {"keep": mask.bool()}

    mask = torch.ones(3, 6, dtype=torch.long)
    bare = loss(student, teacher, rows(mask))
    batch = rows(pad(mask, torch.zeros(3, 4, dtype=torch.long)))
    padded = loss(pad(student, randn(3, 4, 7, seed=7)), pad(teacher, randn(3, 4, 7, seed=8)), batch)
    torch.testing.assert_close(padded, bare)


def test_causal_position_t_predicts_token_t_plus_one(sequences: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = sequences
    student.requires_grad_()
    labels = torch.full((3, 6), IGNORE)
    labels[0, 0], labels[0, 3], labels[1, 5] = 4, 0, 6  # the first token has nothing before it that could predict it
    value = loss(student, teacher, next_tokens({"input_ids": labels, "labels": labels}))
    assert value.item() == pytest.approx(by_token(student.detach(), teacher, [(0, 2), (1, 4)]))
    value.backward()
    assert student.grad is not None
    reached = (student.grad != 0).any(-1).nonzero().tolist()
    assert reached == [[0, 2], [1, 4]]


def test_tokens_none_of_which_is_kept_give_a_zero_with_a_graph(sequences: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = sequences
    value = loss(student.requires_grad_(), teacher, {"keep": torch.zeros(3, 6, dtype=torch.bool)})
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None


def test_token_microbatches_weighted_by_tokens_equal_the_whole(sequences: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, lengths = sequences
    mask = torch.arange(6) < lengths[:, None]
    each = [loss(student[[b]], teacher[[b]], {"keep": mask[[b]]}) for b in range(3)]
    whole = loss(student, teacher, {"keep": mask})
    torch.testing.assert_close((torch.stack(each) * lengths).sum() / lengths.sum(), whole)


def test_other_numbers_of_classes_are_an_error_that_names_both() -> None:
    with pytest.raises(ValueError, match=r"student has 5 classes and the teacher 7.*`classes`"):
        loss(torch.zeros(2, 5), torch.zeros(2, 7))


@pytest.mark.parametrize("shape", [(2,), (2, 4)])
def test_classes_cuts_both_sides(shape: tuple[int, ...]) -> None:
    term = SoftTargetLoss(2.0, classes=5)
    student, teacher = randn(*shape, 8, seed=1), randn(*shape, 6, seed=2)
    batch = {"keep": torch.ones(2, 4, dtype=torch.bool)}
    expected = by_scipy(student[..., :5], teacher[..., :5], 2.0).mean()
    assert term(ModelOutput(student), ModelOutput(teacher), batch).item() == pytest.approx(expected)
    student[..., 5:], teacher[..., 5:] = 50.0, -50.0
    assert term(ModelOutput(student), ModelOutput(teacher), batch).item() == pytest.approx(expected)


def test_classes_beyond_either_side_is_an_error() -> None:
    with pytest.raises(ValueError, match="classes=6, but the student has 5 and the teacher 7"):
        SoftTargetLoss(classes=6)(ModelOutput(torch.zeros(2, 5)), ModelOutput(torch.zeros(2, 7)), {})


def test_the_temperature_follows_its_schedule(logits: tuple[Tensor, Tensor]) -> None:
    term = SoftTargetLoss(Linear(start=8.0, end=2.0))
    for progress, temperature in [(0.0, 8.0), (0.5, 5.0), (1.0, 2.0)]:
        term.progress = progress
        assert term.settings() == {"temperature": temperature}
        value = term(ModelOutput(logits[0]), ModelOutput(logits[1]), {})
        assert value.item() == pytest.approx(by_scipy(*logits, temperature).mean())
