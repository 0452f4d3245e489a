from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from kd_lightning.losses.byot import BYOTLoss, byot
from kd_lightning.types import IGNORE, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

LABELS = torch.tensor([0, 3, 1, 2, 2, 0])
TENSORS = (randn(6, 4, seed=1), randn(6, 4, seed=2), LABELS, randn(6, 5, seed=3), randn(6, 5, seed=4))

CASES = [
    Case("byot", byot, TENSORS, {}, zero=False),  # the labels' part is never zero
    Case("byot without labels", byot, TENSORS, {"alpha": 1.0, "hint_weight": 0.0, "temperature": 2.0}),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    labels = LABELS.clone()
    labels[4] = IGNORE
    exit_logits, deepest, _, feature, target = (x.numpy() for x in TENSORS)
    known = labels.numpy() != IGNORE
    ce = -log_softmax(exit_logits, axis=1)[np.arange(6), np.where(known, labels.numpy(), 0)][known].mean()
    p = softmax(deepest / 3, axis=1)
    kl = 9 * (p * (np.log(p) - log_softmax(exit_logits / 3, axis=1))).sum(1).mean()
    hint = ((feature - target) ** 2).mean()
    found = byot(TENSORS[0], TENSORS[1], labels, *TENSORS[3:], alpha=0.4, temperature=3.0, hint_weight=0.2)
    assert found.item() == pytest.approx(0.6 * ce + 0.4 * kl + 0.2 * hint, rel=1e-12)


def test_the_deepest_layer_gets_no_gradient_and_the_exit_does() -> None:
    logits, deepest, _, feature, target = (x.clone().requires_grad_(x.is_floating_point()) for x in TENSORS)
    byot(logits, deepest, LABELS, feature, target).backward()
    assert deepest.grad is None
    assert target.grad is None
    assert feature.grad is not None
    # of lambda / D sum (f_i - f_n)^2, averaged over 6 examples
    torch.testing.assert_close(feature.grad, 0.03 * 2 * (feature - target).detach() / 30)


def output(lengths: list[int]) -> tuple[ModelOutput, Tensor]:
    mask = (torch.arange(5) < torch.tensor(lengths).unsqueeze(1)).long()
    features = {f"hidden[{i}]": randn(len(lengths), 5, width, seed=i).float() for i, width in ((1, 3), (2, 6), (3, 4))}
    return ModelOutput(randn(len(lengths), 2, seed=9).float(), features), mask


def test_the_term_builds_an_exit_a_layer_and_sums_what_they_give() -> None:
    torch.manual_seed(0)
    term = BYOTLoss()
    assert not term.uses_teacher
    term.plan(lambda kind: 3, lambda kind: 0)
    assert term.needs_student == ("hidden[1]", "hidden[2]", "hidden[3]")
    student, mask = output([5, 2, 4])
    term.connect(student, student, 10)
    assert [block[0].in_features for block in term.bottlenecks] == [3, 6]  # type: ignore[index]
    assert {tuple(layer.weight.shape) for layer in term.classifiers} == {(2, 4)}  # type: ignore[union-attr]
    batch = {"attention_mask": mask, "labels": torch.tensor([0, 1, 1])}
    value = term(student, student, batch)

    expected = torch.zeros(())
    pooled = [
        torch.stack([x[i, : mask[i].sum()].mean(0) for i in range(3)]) for x in student.features.values()
    ]  # the mean over each example's own tokens
    for vector, bottleneck, classifier in zip(pooled[:2], term.bottlenecks, term.classifiers, strict=True):
        feature = bottleneck(vector)
        expected = expected + byot(classifier(feature), student.logits, batch["labels"], feature, pooled[2])
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


def test_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    term = BYOTLoss()
    term.plan(lambda kind: 3, lambda kind: 0)
    student, mask = output([3, 2])
    term.connect(student, student, 10)
    value = term(student, student, {"attention_mask": mask, "labels": torch.tensor([0, 1])})
    noisy = {name: x.masked_fill(mask.unsqueeze(2) == 0, 50.0) for name, x in student.features.items()}
    again = term(ModelOutput(student.logits, noisy), student, {"attention_mask": mask, "labels": torch.tensor([0, 1])})
    torch.testing.assert_close(again, value)


def test_exits_may_be_chosen_and_stand_on_maps() -> None:
    term = BYOTLoss(kind="feature_maps", exits=[-2])
    term.plan(lambda kind: 4, lambda kind: 0)
    assert term.needs_student == ("feature_maps[2]", "feature_maps[3]")
    features = {"feature_maps[2]": randn(2, 3, 4, 4).float(), "feature_maps[3]": randn(2, 6, 2, 2).float()}
    student = ModelOutput(randn(2, 5).float(), features)
    term.connect(student, student, 10)
    assert torch.isfinite(term(student, student, {"labels": torch.tensor([4, 0])}))


def test_errors() -> None:
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 2"):
        byot(*TENSORS, alpha=2.0)
    with pytest.raises(ValueError, match="hint_weight must not be negative"):
        byot(*TENSORS, hint_weight=-1.0)
    with pytest.raises(ValueError, match=r"student features \(6, 5\) and teacher features \(6, 3\)"):
        byot(*TENSORS[:4], torch.zeros(6, 3))
    with pytest.raises(ValueError, match="kind='maps': expected hidden or feature_maps"):
        BYOTLoss(kind="maps")  # type: ignore[arg-type]
    for exits, layers in ((None, 1), ([3], 4), ([-1], 4), ([0, 9], 4), ([], 4)):
        with pytest.raises(ValueError, match=f"the student has {layers} layers in hidden"):
            BYOTLoss(exits=exits).plan(lambda kind, n=layers: n, lambda kind: 0)
    term = BYOTLoss()
    term.plan(lambda kind: 2, lambda kind: 0)
    with pytest.raises(ValueError, match="exits classify whole examples"):
        term.connect(ModelOutput(torch.zeros(2, 3, 4)), ModelOutput(torch.zeros(2, 3, 4)), 1)
