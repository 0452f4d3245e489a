from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.crd import CRDLoss, crd
from kd_lightning.types import Batch, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(randn(*shape, seed=seed), dim=-1)


PAIR = unit(6, 4, seed=1), unit(6, 4, seed=2)
NEGATIVES = unit(6, 3, 4, seed=3), unit(6, 3, 4, seed=4)
OFFSETS = (0.7, 1.3)
CASES = [  # a contrast has no zero
    Case(
        "crd",
        crd,
        (*PAIR, *NEGATIVES),
        {"offsets": OFFSETS, "temperature": 0.5},
        torch.arange(6) % 2 == 0,
        zero=False,
        values="unit",
    )
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    def test_only_the_student_gets_a_gradient(self, case: Case) -> None:
        # The teacher's embedding is learned too: it gets one, and what lies below it is detached by the term.
        tensors = [x.clone().requires_grad_() for x in case.tensors]
        case(*tensors).backward()
        assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in tensors[:2])
        assert all(x.grad is None for x in tensors[2:])

    def test_what_is_masked_does_not_matter(self, case: Case) -> None:
        # Here the mask is of examples, and the negatives of a masked one do not matter either.
        noisy = [torch.where(case.mask.view(-1, *[1] * (x.ndim - 1)), x, 5.0) for x in case.tensors]  # type: ignore[union-attr]
        torch.testing.assert_close(case(*noisy, mask=case.mask), case(*case.tensors, mask=case.mask))


def test_value_by_the_papers_formula() -> None:
    (s, t), (s_k, t_k), tau = (x.numpy() for x in PAIR), (x.numpy() for x in NEGATIVES), 0.5
    expected = np.zeros(6)
    for anchor, positive, others, offset in ((s, t, t_k, OFFSETS[0]), (t, s, s_k, OFFSETS[1])):
        noise = math.exp(offset)  # Z K / M
        for b in range(6):
            pair = math.exp(anchor[b] @ positive[b] / tau)
            expected[b] -= math.log(pair / (pair + noise))
            for other in others[b]:
                score = math.exp(anchor[b] @ other / tau)
                expected[b] -= math.log(1 - score / (score + noise))
    np.testing.assert_allclose(crd(*PAIR, *NEGATIVES, OFFSETS, tau, reduction="none"), expected, rtol=1e-10)


def test_its_arguments_may_come_in_any_order() -> None:
    names = ("student_embedding", "teacher_embedding", "student_negatives", "teacher_negatives")
    given = dict(zip(names, (*PAIR, *NEGATIVES), strict=True))
    assert torch.equal(crd(offsets=OFFSETS, temperature=0.5, **given), crd(*PAIR, *NEGATIVES, OFFSETS, 0.5))


def test_a_pair_that_is_nearer_than_its_negatives_costs_less() -> None:
    s, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    far, near = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    good = crd(s, t, far, far, (0.0, 0.0), 0.5)
    assert good < crd(s, t, near, near, (0.0, 0.0), 0.5)
    assert good < crd(s, far[0], far, far, (0.0, 0.0), 0.5)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"student embedding \(2, 3\) and teacher embedding \(2, 4\)"):
        crd(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 1, 3), torch.zeros(2, 1, 3), OFFSETS)
    with pytest.raises(ValueError, match=r"student negatives \(2, 1, 3\) and teacher negatives \(2, 2, 3\)"):
        crd(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1, 3), torch.zeros(2, 2, 3), OFFSETS)
    with pytest.raises(ValueError, match=r"negatives \(2, 1, 4\) must be \(B, K, D\) for embeddings \(2, 3\)"):
        crd(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), OFFSETS)
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        crd(*PAIR, *NEGATIVES, OFFSETS, 0.0)
    with pytest.raises(ValueError, match=r"mask \(2,\) must have the shape \(6,\)"):
        crd(*PAIR, *NEGATIVES, OFFSETS, mask=torch.ones(2, dtype=torch.bool))
    for options, says in (
        ({"negatives": 0}, "negatives=0"),
        ({"embedding_size": 0}, "embedding_size=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"temperature": -1.0}, "temperature must be"),
    ):
        with pytest.raises(ValueError, match=says):
            CRDLoss(**options)  # type: ignore[arg-type]


# -- the term ---------------------------------------------------------------------------------------------------------

EXAMPLES = 12


def output(batch: int, width: int, seed: int) -> ModelOutput:
    return ModelOutput(torch.zeros(batch, 2), {"pooled": randn(batch, width, seed=seed).float()})


def connected(**options: Any) -> CRDLoss:
    torch.manual_seed(0)
    term = CRDLoss(**{"embedding_size": 4, "negatives": 5, **options})
    term.connect(output(4, 3, 1), output(4, 6, 2), EXAMPLES)
    return term


def batch_of(index: list[int], labels: list[int] | None = None) -> Batch:
    found = {"index": torch.tensor(index)}
    return found if labels is None else {**found, "labels": torch.tensor(labels)}


def test_it_builds_banks_and_constants() -> None:
    term = connected()
    assert {"bank_s", "bank_t", "seen", "classes", "offsets"} == set(dict(term.named_buffers()))
    assert term.bank_s.shape == (EXAMPLES, 4)
    torch.testing.assert_close(term.bank_t.norm(dim=1), torch.ones(EXAMPLES))
    assert (term.classes == -100).all()
    assert not term.seen.any()
    with pytest.raises(ValueError, match="the data has 1"):
        CRDLoss().connect(output(1, 3, 1), output(1, 3, 2), 1)
    with pytest.raises(ValueError, match=r"batch\['index'\]"):
        term(output(2, 3, 1), output(2, 6, 2), {})


def test_with_its_constants_random_embeddings_are_at_chance() -> None:
    torch.manual_seed(0)
    term = CRDLoss(embedding_size=16, negatives=400, temperature=0.2)
    student, teacher = output(64, 8, 1), output(64, 8, 2)
    term.connect(student, teacher, 5000)
    scores = F.normalize(term.embed_s(student.features["pooled"]), dim=1) @ term.bank_t.T
    h = torch.sigmoid(scores / 0.2 - term.offsets[0])
    assert h.mean().item() == pytest.approx(1 / 401, rel=0.1)


def test_the_value_is_that_of_the_drawn_negatives() -> None:
    term = connected().eval()
    student, teacher, batch = output(3, 3, 5), output(3, 6, 6), batch_of([1, 4, 7])
    torch.manual_seed(3)
    value = term(student, teacher, batch)
    torch.manual_seed(3)
    drawn = term._draw(batch["index"], torch.full((3,), -100))
    embedded = [F.normalize(embed(x.features["pooled"]), dim=1)
                for embed, x in ((term.embed_s, student), (term.embed_t, teacher))]  # fmt: skip
    expected = crd(*embedded, term.bank_s[drawn], term.bank_t[drawn], term.offsets, 0.07)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


def test_the_features_below_the_teachers_embedding_get_no_gradient() -> None:
    term = connected()
    student, teacher = output(3, 3, 5), output(3, 6, 6)
    for side in (student, teacher):
        side.features["pooled"].requires_grad_()
    term(student, teacher, batch_of([0, 1, 2])).backward()
    assert student.features["pooled"].grad is not None
    assert teacher.features["pooled"].grad is None


def test_only_training_moves_the_banks_and_only_the_rows_of_the_batch() -> None:
    term = connected(momentum=0.25)
    student, teacher, batch = output(3, 3, 5), output(3, 6, 6), batch_of([9, 2, 5], [0, 1, 0])
    before = copy.deepcopy(dict(term.named_buffers()))
    term.eval()(student, teacher, batch)
    assert all(torch.equal(value, before[name]) for name, value in term.named_buffers())
    term.train()(student, teacher, batch)
    for bank, embed, said in (("bank_s", term.embed_s, student), ("bank_t", term.embed_t, teacher)):
        new = F.normalize(embed(said.features["pooled"]), dim=1).detach()
        expected = before[bank].clone()
        expected[[9, 2, 5]] = F.normalize(0.25 * expected[[9, 2, 5]] + 0.75 * new, dim=1)
        torch.testing.assert_close(term.get_buffer(bank), expected)
    assert term.seen.nonzero().flatten().tolist() == [2, 5, 9]
    assert term.classes.tolist() == [-100, -100, 1, -100, -100, 0, -100, -100, -100, 0, -100, -100]
    assert torch.equal(term.offsets, before["offsets"])


def test_examples_without_an_index_leave_nothing_and_repeated_ones_their_mean() -> None:
    term = connected(momentum=0.0)
    student, teacher, batch = output(4, 3, 5), output(4, 6, 6), batch_of([3, -1, 3, 8], [1, -100, 1, 0])
    before = term.bank_s.clone()
    value = term(student, teacher, batch)
    assert torch.isfinite(value)
    new = F.normalize(term.embed_s(student.features["pooled"]), dim=1).detach()
    torch.testing.assert_close(term.bank_s[3], F.normalize(new[0] + new[2], dim=0))
    torch.testing.assert_close(term.bank_s[8], new[3])
    others = [i for i in range(EXAMPLES) if i not in (3, 8)]
    assert torch.equal(term.bank_s[others], before[others])
    term(student, teacher, batch_of([-1, -1, -1, -1]))
    assert torch.equal(term.bank_s[others], before[others])


def drawn_from(term: CRDLoss, index: int, label: int) -> set[int]:
    term.negatives = 2000
    torch.manual_seed(0)
    counts = term._draw(torch.tensor([index]), torch.tensor([label]))[0].bincount(minlength=EXAMPLES)
    chosen = counts[counts > 0].float()
    assert (chosen / chosen.mean() - 1).abs().max() < 0.35, "not uniform"
    return set(counts.nonzero().flatten().tolist())


def test_negatives_are_drawn_uniformly_from_other_classes() -> None:
    term = connected()
    term.seen[:] = True
    term.classes = torch.tensor([2, 0, 0, 1, 2, -100, 1, 0, -100, 2, 1, 0])
    everything = set(range(EXAMPLES))
    assert drawn_from(term, 1, 0) == everything - {1, 2, 7, 11}
    assert drawn_from(term, -1, 2) == everything - {0, 4, 9}
    assert drawn_from(term, 5, -100) == everything - {5}
    assert drawn_from(term, 11, -100) == everything - {11}
    assert drawn_from(term, -1, -100) == everything
    assert drawn_from(term, 3, 9) == everything  # a class that nobody has been seen to have
    term.classes = torch.zeros(EXAMPLES, dtype=torch.int64)
    assert drawn_from(term, 4, 0) == everything - {4}  # there is no other class
    assert drawn_from(term, -1, 0) == everything


def test_rows_that_are_never_trained_are_no_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CRDLoss, "FEW", 3)
    term = connected()
    everything = set(range(EXAMPLES))
    assert drawn_from(term, 5, 1) == everything  # nothing is known yet, and the anchor's own row is random as well
    assert drawn_from(term, 5, -100) == everything - {5}
    for index, labels in ([0, 1, 2], [0, 1, 1]), ([3, 4, 7], [0, 1, 1]):  # 5, 6, 8, ... are of validation
        term(output(3, 3, 5), output(3, 6, 6), batch_of(index, labels))
    assert drawn_from(term, 0, 0) == {1, 2, 4, 7}
    assert drawn_from(term, -1, 0) == {1, 2, 4, 7}
    assert drawn_from(term, 8, 0) == {1, 2, 4, 7}
    assert drawn_from(term, 3, -100) == {0, 1, 2, 4, 7}
    assert drawn_from(term, 8, -100) == {0, 1, 2, 3, 4, 7}
    assert drawn_from(term, 1, 1) == everything - {1, 2, 4, 7}  # two of class 0 are too few: random rows as well
    assert drawn_from(term, -1, 2) == {0, 1, 2, 3, 4, 7}


def test_labels_that_are_no_classes_of_examples_are_not_read() -> None:
    term = connected()
    student, teacher = output(2, 3, 5), output(2, 6, 6)
    for labels in (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0.5, 1.0])):
        term(student, teacher, {"index": torch.tensor([0, 1]), "labels": labels})
        assert (term.classes == -100).all()


def steps(term: CRDLoss, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    values = []
    for i in numbers:
        torch.manual_seed(100 + i)  # as the module does before each step
        start = 3 * i % EXAMPLES
        batch = batch_of([start, start + 1, start + 2], [0, 1, 0])
        value = term(output(3, 3, 20 + i), output(3, 6, 40 + i), batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


def test_a_resumed_run_equals_an_uninterrupted_one() -> None:
    whole = connected()
    expected = steps(whole, torch.optim.SGD(whole.parameters(), lr=0.1), range(8))
    first = connected()
    begun = steps(first, torch.optim.SGD(first.parameters(), lr=0.1), range(4))
    torch.manual_seed(99)
    second = CRDLoss(embedding_size=4, negatives=5)
    second.connect(output(4, 3, 7), output(4, 6, 8), EXAMPLES)
    second.load_state_dict(first.state_dict())
    assert begun + steps(second, torch.optim.SGD(second.parameters(), lr=0.1), range(4, 8)) == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_it_learns_to_tell_pairs_apart() -> None:
    torch.manual_seed(0)
    world = torch.randn(EXAMPLES, 6)
    student, teacher = (
        ModelOutput(torch.zeros(12, 2), {"pooled": world @ torch.randn(6, 3)}),
        ModelOutput(torch.zeros(12, 2), {"pooled": world}),
    )
    term = CRDLoss(embedding_size=8, negatives=20, temperature=0.2)
    term.connect(student, teacher, EXAMPLES)
    optimizer = torch.optim.Adam(term.parameters(), lr=0.02)
    values = []
    for _ in range(80):
        value = term(student, teacher, batch_of(list(range(EXAMPLES))))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert np.mean(values[-10:]) < 0.7 * np.mean(values[:10])


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 2, 2)])
def test_features_with_positions_are_averaged_over_those_that_count(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    feature = randn(*shape).float()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    said = ModelOutput(torch.zeros(2, 2), {"x": feature})
    term = CRDLoss("x", "x", embedding_size=4, negatives=3)
    term.connect(said, said, EXAMPLES)
    term.eval()
    batch = {"index": torch.tensor([0, 1])} | ({"attention_mask": mask} if len(shape) == 3 else {})
    torch.manual_seed(1)
    value = term(said, said, batch)
    mean = feature.mean((2, 3)) if len(shape) == 4 else torch.stack([feature[0, :2].mean(0), feature[1, 0]])
    vectors = ModelOutput(torch.zeros(2, 2), {"x": mean})
    torch.manual_seed(1)
    torch.testing.assert_close(term(vectors, vectors, {"index": batch["index"]}), value)
