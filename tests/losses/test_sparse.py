"""Dense, chunked and sparse forms of a loss agree; what is particular to a few classes and a tail."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from kd_lightning.losses import chunked_linear
from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.generalized_jsd import generalized_jsd
from kd_lightning.losses.reverse_kl import reverse_kl
from kd_lightning.losses.skew_kl import skew_kl
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.losses.sparse import Divergence, SparseKDLoss, sparse_kd, sparse_linear_kd
from kd_lightning.losses.total_variation import total_variation
from kd_lightning.teachers.sampled import drawn
from kd_lightning.types import IGNORE, ModelOutput, SparseLogits
from tests.losses.conformance import Case, Conformance, randn, title

V, H = 11, 5
NAMES: list[Any] = list(get_args(Divergence))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a call, the last one shorter, and several blocks a chunk."""
    monkeypatch.setattr(chunked_linear, "CHUNK_BYTES", 5 * V * 8)
    monkeypatch.setattr(chunked_linear, "BLOCK_BYTES", 2 * V * 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def dense(student: Tensor, teacher: Tensor, divergence: Divergence, beta: float, **options: Any) -> Tensor:
    if divergence == "jsd":
        return generalized_jsd(student, teacher, beta=beta, **options)
    if divergence in ("skew_kl", "skew_reverse_kl"):
        direction: Any = "reverse" if "reverse" in divergence else "forward"
        return skew_kl(student, teacher, skew=beta, direction=direction, **options)
    functions = {"forward_kl": soft_target, "reverse_kl": reverse_kl, "total_variation": total_variation}
    return functions[divergence](student, teacher, **options)


def merged(logits: Tensor, ids: Tensor) -> Tensor:
    """Log probabilities of the classes that `ids` name and, last, of all others: by sums of probabilities."""
    p = logits.softmax(-1)
    kept = p.gather(-1, ids)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log()


@pytest.mark.parametrize("divergence", NAMES)
class TestForms:
    def test_of_all_classes_it_is_the_dense_one(self, divergence: Divergence) -> None:
        student, teacher = randn(7, V, seed=1).requires_grad_(), randn(7, V, seed=2)
        value = sparse_kd(student, SparseLogits.of(teacher, V), divergence, 0.3)
        expected = dense(student, teacher, divergence, 0.3)
        torch.testing.assert_close(value, expected)
        for one, other in zip(*(torch.autograd.grad(x, student) for x in (value, expected)), strict=True):
            torch.testing.assert_close(one, other)

    def test_of_some_classes_it_is_the_dense_one_with_the_others_merged(self, divergence: Divergence) -> None:
        student, teacher = randn(7, V, seed=1), randn(7, V, seed=2)
        sparse = SparseLogits.of(teacher, 4)
        expected = dense(merged(student, sparse.ids), merged(teacher, sparse.ids), divergence, 0.3)
        torch.testing.assert_close(sparse_kd(student, sparse, divergence, 0.3), expected)

    @pytest.mark.parametrize("k", [1, 4, V - 1, V])
    @pytest.mark.parametrize("labelled", [True, False])
    def test_from_hidden_states_it_is_the_same(self, divergence: Divergence, k: int, labelled: bool) -> None:
        hidden, matrix, bias = (
            x.requires_grad_() for x in (randn(17, H, seed=3), randn(V, H, seed=4), randn(V, seed=5))
        )
        sparse = SparseLogits.of(randn(17, V, seed=6), k)
        mask = torch.arange(17) % 3 != 0
        labels = torch.where(torch.arange(17) % 5 == 1, IGNORE, torch.arange(17) % V) if labelled else None
        ce_weight = 0.4 if labelled else 0.0
        found = sparse_linear_kd(
            hidden, matrix, sparse, labels, mask, student_bias=bias, ce_weight=ce_weight, kd_weight=0.7,
            divergence=divergence, beta=0.3,
        )  # fmt: skip
        logits = hidden @ matrix.T + bias
        counts = mask if labels is None else mask & (labels != IGNORE)
        expected = 0.7 * sparse_kd(logits, sparse, divergence, 0.3, counts)
        if labels is not None:
            expected = expected + 0.4 * cross_entropy(logits, labels, mask=mask)
        torch.testing.assert_close(found.loss, expected)
        leaves = [hidden, matrix, bias]
        for one, other in zip(*(torch.autograd.grad(x, leaves) for x in (found.loss, expected)), strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("k", [1, 4, V])
    def test_where_student_and_teacher_are_the_same_nothing_is_lost(self, divergence: Divergence, k: int) -> None:
        logits = randn(7, V, seed=1)
        hidden, matrix = logits.clone().requires_grad_(), torch.eye(V, dtype=torch.float64)
        sparse = SparseLogits.of(logits, k)
        student = logits.clone().requires_grad_()
        for value, leaf in (
            (sparse_kd(student, sparse, divergence, 0.3), student),
            (sparse_linear_kd(hidden, matrix, sparse, divergence=divergence, beta=0.3).loss, hidden),
        ):
            assert value.item() == pytest.approx(0.0, abs=1e-12)
            if divergence != "total_variation":  # whose gradient is no number where the two are equal
                assert torch.autograd.grad(value, leaf)[0].abs().max().item() < 1e-12

    def test_merging_classes_makes_it_no_larger(self, divergence: Divergence) -> None:
        student, teacher = randn(7, V, seed=1), randn(7, V, seed=2)
        values = [sparse_kd(student, SparseLogits.of(teacher, k), divergence, 0.3).item() for k in (1, 3, 6, V)]
        assert values == sorted(values)
        assert values[0] < values[-1]

    @pytest.mark.parametrize("where", ["kept", "tail", "values", "rest"])
    def test_nan_stays_nan(self, divergence: Divergence, where: str) -> None:
        student, sparse = randn(3, V, seed=1), SparseLogits.of(randn(3, V, seed=2), 4)
        if where == "kept":
            student[1, sparse.ids[1, 2]] = torch.nan
        elif where == "tail":
            others = [c for c in range(V) if c not in sparse.ids[1].tolist()]
            student[1, others[0]] = torch.nan
        else:
            getattr(sparse, where)[1, ...] = torch.nan
        assert torch.isnan(sparse_kd(student, sparse, divergence, 0.3))
        chunked = sparse_linear_kd(student, torch.eye(V, dtype=torch.float64), sparse, divergence=divergence, beta=0.3)
        assert torch.isnan(chunked.loss)

    def test_a_micro_batch_without_anything_that_counts_is_a_zero_with_a_graph(self, divergence: Divergence) -> None:
        hidden, matrix = randn(2, 3, H, seed=3).requires_grad_(), randn(V, H, seed=4).requires_grad_()
        sparse = SparseLogits.of(torch.full((2, 3, V), torch.nan), 4)
        mask = torch.zeros(2, 3, dtype=torch.bool)
        for value in (
            sparse_kd(hidden @ matrix.T, sparse, divergence, 0.3, mask),
            sparse_linear_kd(hidden, matrix, sparse, mask=mask, divergence=divergence, beta=0.3).loss,
        ):
            assert value.item() == 0.0
            assert all((gradient == 0).all() for gradient in torch.autograd.grad(value, [hidden, matrix]))

    def test_padding_changes_nothing(self, divergence: Divergence) -> None:
        student, teacher = randn(2, 3, V, seed=1), randn(2, 3, V, seed=2)
        mask = torch.ones(2, 3, dtype=torch.bool)
        value = sparse_kd(student, SparseLogits.of(teacher, 4), divergence, 0.3, mask)
        student, teacher = (
            torch.cat([x, torch.full((2, 2, V), torch.nan, dtype=x.dtype)], 1) for x in (student, teacher)
        )
        padded = torch.cat([mask, torch.zeros(2, 2, dtype=torch.bool)], 1)
        student.requires_grad_()
        again = sparse_kd(student, SparseLogits.of(teacher, 4), divergence, 0.3, padded)
        torch.testing.assert_close(again, value)
        (gradient,) = torch.autograd.grad(again, student)
        assert torch.isfinite(gradient).all()


def of_top_4(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return sparse_kd(student, SparseLogits.of(teacher, 4), **options)


def chunked_of_top_4(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    matrix = torch.eye(student.shape[-1], dtype=student.dtype)
    return sparse_linear_kd(student, matrix, SparseLogits.of(teacher, 4), **options).loss


ROWS, MASK = (randn(6, 7, seed=1), randn(6, 7, seed=2)), torch.arange(6) % 2 == 0
CASES = [
    *(Case(f"{name} {form.__name__}", form, ROWS, {"divergence": name, "beta": 0.3}, MASK,
           near=name != "total_variation", **apart)
      for name in NAMES
      for form, apart in ((of_top_4, {}), (chunked_of_top_4, {"compiled": False, "narrow": False}))),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    def test_of_one_class_or_entry_it_is_finite(self, case: Case) -> None:
        pytest.skip("the four largest of one class are not there")

    def test_autocast_does_not_reach_it(self, case: Case) -> None:
        if "chunked" in case.name:
            pytest.skip("its products are done in autocast's precision")
        super().test_autocast_does_not_reach_it(case)


def test_reverse_kl_costs_a_student_what_it_moves_out_of_the_classes_that_are_kept() -> None:
    """Without the tail's class the divergence of what is left falls as mass flees; with it it rises."""
    teacher = torch.tensor([[2.0, 1.0, 0.0, -4.0, -4.0]])
    sparse = SparseLogits.of(teacher, 3)
    flees = [torch.tensor([[2.0, 1.0, 0.0, z, z]]) for z in (-4.0, 0.0, 3.0)]
    values = [sparse_kd(student, sparse, "reverse_kl").item() for student in flees]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0.0, abs=1e-6)
    assert values[2] > 3


def test_a_sum_of_micro_batches_is_the_whole() -> None:
    hidden, matrix = randn(12, H, seed=3), randn(V, H, seed=4)
    teacher = randn(12, V, seed=6)
    whole = sparse_linear_kd(hidden, matrix, SparseLogits.of(teacher, 4)).loss
    parts = [
        sparse_linear_kd(hidden[at], matrix, SparseLogits.of(teacher[at], 4), count=12.0).loss
        for at in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_numbers_stored_in_16_bits_still_make_a_distribution() -> None:
    """Rounding of what is stored shifts no mass: the gradient of forward KL sums to 0 over the classes."""
    sparse = SparseLogits.of(randn(5, V, seed=2).float().log_softmax(-1), 4)
    sparse = sparse._replace(values=sparse.values.half(), ids=sparse.ids.int().long())
    student = randn(5, V, seed=1).float().requires_grad_()
    (gradient,) = torch.autograd.grad(sparse_kd(student, sparse), student)
    assert gradient.sum(-1).abs().max().item() < 1e-6


def test_a_tail_that_holds_next_to_nothing_has_a_finite_gradient() -> None:
    teacher = torch.tensor([[200.0, 100.0, 0.0, 0.0]])
    student = torch.tensor([[150.0, 0.0, 0.0, 0.0]], requires_grad=True)
    for name in NAMES:
        value = sparse_kd(student, SparseLogits.of(teacher, 2), name, 0.3)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, student)[0]).all()


class TestDrawn:
    """Forward KL from a few classes that a teacher drew."""

    def teacher(self, draws: int = 1, k: int = 4) -> tuple[Tensor, SparseLogits]:
        """Draws of one distribution, of which two classes are certain."""
        logits = 2 * randn(1, V, seed=2)
        many = logits.expand(draws, V)
        return logits, drawn(many, k, torch.linspace(0, 1, draws + 1, dtype=torch.float64)[:-1])

    def test_its_mean_and_its_gradient_are_the_dense_ones(self) -> None:
        """Over starts that go through [0, 1) evenly, not within noise."""
        logits, sparse = self.teacher(20_000)
        student = randn(1, V, seed=1).requires_grad_()
        value = sparse_kd(student.expand(20_000, V), sparse)
        dense_value = soft_target(student, logits)
        torch.testing.assert_close(value, dense_value, rtol=1e-4, atol=1e-4)
        for one, other in zip(*(torch.autograd.grad(x, student) for x in (value, dense_value)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-4)
        assert sparse_kd(student.expand(20_000, V), sparse, reduction="none").std().item() > 0.01

    @pytest.mark.parametrize("labelled", [True, False])
    def test_from_hidden_states_it_is_the_same(self, labelled: bool) -> None:
        hidden, matrix = randn(17, H, seed=3).requires_grad_(), randn(V, H, seed=4).requires_grad_()
        sparse = drawn(3 * randn(17, V, seed=6), 4, torch.linspace(0, 0.99, 17, dtype=torch.float64))
        mask = torch.arange(17) % 3 != 0
        labels = torch.where(torch.arange(17) % 5 == 1, IGNORE, torch.arange(17) % V) if labelled else None
        weight = 0.4 if labelled else 0.0
        found = sparse_linear_kd(hidden, matrix, sparse, labels, mask, ce_weight=weight, kd_weight=0.7).loss
        counts = mask if labels is None else mask & (labels != IGNORE)
        expected = 0.7 * sparse_kd(hidden @ matrix.T, sparse, mask=counts)
        if labels is not None:
            expected = expected + 0.4 * cross_entropy(hidden @ matrix.T, labels, mask=mask)
        torch.testing.assert_close(found, expected)
        leaves = [hidden, matrix]
        for one, other in zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True):
            torch.testing.assert_close(one, other)

    def test_a_student_like_the_teacher_loses_nothing(self) -> None:
        logits, sparse = self.teacher(7)
        assert sparse_kd(logits.expand(7, V), sparse, reduction="none").abs().max().item() < 1e-5

    def test_masked_rows_reach_neither_value_nor_gradient(self) -> None:
        _, sparse = self.teacher(2)
        sparse.values[1], sparse.rest[1] = torch.nan, torch.inf
        student = randn(2, V, seed=1)
        student[1] = torch.nan
        student.requires_grad_()
        value = sparse_kd(student, sparse, mask=torch.tensor([True, False]))
        assert value.isfinite()
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient[0].abs().sum() > 0
        assert not gradient[1].any()
        assert sparse_kd(student, sparse).isnan()

    @pytest.mark.parametrize("divergence", [name for name in NAMES if name != "forward_kl"])
    def test_what_would_be_biased_is_refused(self, divergence: Divergence) -> None:
        _, sparse = self.teacher()
        with pytest.raises(ValueError, match=f"divergence={divergence} is no mean over the teacher's distribution"):
            sparse_kd(randn(1, V, seed=1), sparse, divergence, 0.3)
        with pytest.raises(ValueError, match="would give a biased one: use forward_kl"):
            sparse_linear_kd(randn(1, H), randn(V, H), sparse, divergence=divergence, beta=0.3)


class TestTerm:
    def outputs(self) -> tuple[ModelOutput, ModelOutput, dict[str, Tensor]]:
        hidden, matrix = randn(2, 4, H, seed=3), randn(V, H, seed=4)
        features = {"last_hidden": hidden, "head": matrix}
        keep = torch.tensor([[True, True, False, False], [True, True, True, False]])
        labels = torch.where(keep, torch.arange(8).view(2, 4), IGNORE)
        return ModelOutput(hidden @ matrix.T, features), ModelOutput(randn(2, 4, V, seed=5)), {
            "keep": keep, "labels": labels,
        }  # fmt: skip

    def test_a_running_teacher_teaches_what_a_stored_one_does(self) -> None:
        student, teacher, batch = self.outputs()
        stored = ModelOutput(torch.zeros(2, 4, 0), sparse=SparseLogits.of(teacher.logits, 3))
        term = SparseKDLoss(top_k=3)
        torch.testing.assert_close(term(student, stored, batch), term(student, teacher, batch))
        assert term(student, teacher, batch).item() > 0

    def test_a_student_without_logits_learns_the_same(self) -> None:
        student, teacher, batch = self.outputs()
        bare = ModelOutput(student.logits[..., :0], student.features)
        value = SparseKDLoss(top_k=3, divergence="jsd")(bare, teacher, batch)
        torch.testing.assert_close(value, SparseKDLoss(top_k=3, divergence="jsd")(student, teacher, batch))
        ce, kd = SparseKDLoss(top_k=3).with_labels(bare, teacher, batch, 0.1, 0.9)
        torch.testing.assert_close(kd, SparseKDLoss(top_k=3)(student, teacher, batch))
        torch.testing.assert_close(ce, cross_entropy(student.logits, batch["labels"], mask=batch["keep"]))

    def test_more_classes_than_there_are_is_all_of_them(self) -> None:
        student, teacher, batch = self.outputs()
        expected = soft_target(student.logits, teacher.logits, mask=batch["keep"])
        torch.testing.assert_close(SparseKDLoss(top_k=99)(student, teacher, batch), expected)

    def test_errors_name_what_is_wrong(self) -> None:
        student, teacher, batch = self.outputs()
        with pytest.raises(ValueError, match="lack \\['head', 'last_hidden'\\]"):
            SparseKDLoss()(ModelOutput(student.logits[..., :0]), teacher, batch)
        with pytest.raises(ValueError, match="11 classes and the sparse teacher 12"):
            SparseKDLoss()(student, ModelOutput(randn(2, 4, 12)), batch)
        with pytest.raises(ValueError, match=r"rows \(2, 4\) and the sparse teacher \(2, 3\)"):
            SparseKDLoss()(student, ModelOutput(randn(2, 3, V)), batch)
        with pytest.raises(ValueError, match="divergence must be one of"):
            SparseKDLoss(divergence="kl")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="beta must be in"):
            SparseKDLoss(divergence="jsd", beta=0.0)
        with pytest.raises(ValueError, match="top_k must be 1"):
            SparseKDLoss(top_k=0)
