from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning.losses.hint import Distance, HintLoss, LayerHintLoss, hint
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

VECTORS = randn(6, 4, seed=1), randn(6, 4, seed=2)
TOKENS = randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)
MAPS = randn(4, 3, 4, 4, seed=1), randn(4, 3, 4, 4, seed=2)
SOME = torch.arange(6) % 2 == 0
PADDED = torch.arange(12).view(4, 3) % 5 != 1
CASES = [
    Case("mse", hint, VECTORS, {}, mask=SOME),
    Case("smooth_l1", hint, VECTORS, {"distance": "smooth_l1"}, mask=SOME),
    Case("cosine", hint, VECTORS, {"distance": "cosine"}, mask=SOME),
    Case("mse tokens", hint, TOKENS, {}, mask=PADDED),
    Case("cosine tokens", hint, TOKENS, {"distance": "cosine"}, mask=PADDED),
    Case("mse maps", hint, MAPS, {}, mask=torch.arange(4) != 1),
    Case("cosine maps", hint, MAPS, {"distance": "cosine"}, mask=torch.arange(4) != 1),
    Case("maps of another size", hint, (MAPS[0], randn(4, 3, 2, 2, seed=3)), {}),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def by_hand(s: np.ndarray, t: np.ndarray, distance: str) -> float:
    """The distance of two vectors."""
    if distance == "cosine":
        return 1 - float(s @ t / np.sqrt((s @ s) * (t @ t)))
    d = np.abs(s - t)
    return float(np.mean(d**2 if distance == "mse" else np.where(d < 1, d**2 / 2, d - 0.5)))


@pytest.mark.parametrize("distance", ["mse", "smooth_l1", "cosine"])
def test_value_by_numpy(distance: Distance) -> None:
    student, teacher = (x.numpy() for x in VECTORS)
    expected = [by_hand(s, t, distance) for s, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(hint(*VECTORS, distance, reduction="none").numpy(), expected, rtol=1e-12)
    assert hint(*VECTORS, distance, SOME).item() == pytest.approx(np.mean(expected[::2]))
    assert hint(*VECTORS, distance, reduction="sum").item() == pytest.approx(sum(expected))


@pytest.mark.parametrize("distance", ["mse", "smooth_l1", "cosine"])
def test_a_map_is_compared_place_by_place(distance: Distance) -> None:
    student, teacher = (x.numpy() for x in MAPS)
    places = [[by_hand(student[b, :, h, w], teacher[b, :, h, w], distance) for h in range(4) for w in range(4)]
              for b in range(4)]  # fmt: skip
    np.testing.assert_allclose(hint(*MAPS, distance, reduction="none"), np.mean(places, 1), rtol=1e-12)


def test_tokens_have_a_value_each() -> None:
    values = hint(*TOKENS, mask=PADDED, reduction="none")
    assert values.shape == (4, 3)
    assert (values[~PADDED] == 0).all()
    assert values[1, 1].item() == pytest.approx(by_hand(TOKENS[0][1, 1].numpy(), TOKENS[1][1, 1].numpy(), "mse"))


def test_a_larger_map_is_averaged_to_the_smaller() -> None:
    large, small = randn(2, 3, 4, 4), randn(2, 3, 2, 2, seed=1)
    pooled = large.view(2, 3, 2, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(hint(large, small), (pooled - small).square().mean())
    torch.testing.assert_close(hint(small, large), (pooled - small).square().mean())


def test_cosine_does_not_see_lengths() -> None:
    assert hint(3 * VECTORS[0], VECTORS[0], "cosine").item() == pytest.approx(0.0, abs=1e-12)
    assert hint(-VECTORS[0], VECTORS[0], "cosine").item() == pytest.approx(2.0)


def test_a_zero_vector_has_no_direction() -> None:
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    value = hint(student, torch.ones(2, 3, 2, 2), "cosine")
    value.backward()
    assert value.item() == 1.0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"student feature \(2, 3\) and teacher feature \(2, 4\)"):
        hint(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"student feature \(2, 3, 4, 4\) and teacher feature \(2, 5, 4, 4\)"):
        hint(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 8, 8))
    with pytest.raises(ValueError, match=r"mask \(3,\) must have the shape \(2,\)"):
        hint(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="distance='l1': expected one of mse, cosine, smooth_l1"):
        hint(torch.zeros(2, 3), torch.zeros(2, 3), "l1")  # type: ignore[arg-type]


def outputs(student: torch.Tensor, teacher: torch.Tensor, name: str = "pooled") -> tuple[ModelOutput, ModelOutput]:
    logits = torch.zeros(len(student), 2)
    return ModelOutput(logits, {name: student}), ModelOutput(logits, {name: teacher})


@pytest.mark.parametrize(
    ("projector", "student", "teacher"),
    [
        ("linear", randn(2, 3), randn(2, 4)),
        ("mlp", randn(2, 6, 3), randn(2, 6, 4)),
        ("conv1x1", randn(2, 3, 4, 4), randn(2, 5, 2, 2)),
        ("none", randn(2, 3), randn(2, 3, seed=1)),
        (nn.Linear(3, 4), randn(2, 3), randn(2, 4)),
    ],
    ids=["linear", "mlp", "conv1x1", "none", "given"],
)
def test_a_projector_takes_the_student_to_the_teacher(projector, student, teacher) -> None:
    term = HintLoss(projector=projector, distance="smooth_l1")
    sides = outputs(student.float(), teacher.float())
    term.connect(*sides, 10)
    value = term(*sides, {})
    assert isinstance(term.projector, nn.Module)
    torch.testing.assert_close(value, hint(term.projector(student.float()), teacher.float(), "smooth_l1"))
    assert len(list(term.parameters())) == {"mlp": 4, "conv1x1": 3, "none": 0}.get(str(projector), 2)
    if list(term.parameters()):
        value.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


def test_a_given_projector_is_registered_once() -> None:
    term = HintLoss(projector=nn.Linear(3, 4))
    term.connect(*outputs(torch.zeros(2, 3), torch.zeros(2, 4)), 10)
    assert list(term.state_dict()) == ["projector.weight", "projector.bias"]


def test_padding_does_not_reach_the_term() -> None:
    term = HintLoss("hidden[1]", "hidden[-1]", "linear")
    assert (term.needs_student, term.needs_teacher) == (("hidden[1]",), ("hidden[-1]",))
    student, teacher = randn(2, 3, 4).float(), randn(2, 3, 5).float()
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}

    def sides(padding: float) -> tuple[ModelOutput, ModelOutput]:
        s, t = student.clone(), teacher.clone()
        s[0, 2], t[0, 2] = padding, -padding
        logits = torch.zeros(2, 2)
        return ModelOutput(logits, {"hidden[1]": s}), ModelOutput(logits, {"hidden[-1]": t})

    term.connect(*sides(0.0), 10)
    torch.testing.assert_close(term(*sides(100.0), batch), term(*sides(0.0), batch))
    assert term(*sides(100.0), {}) > 10 * term(*sides(0.0), {})


def test_errors_of_the_term() -> None:
    sides = outputs(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"the projector is not built; call Objective.connect first"):
        HintLoss()(*sides, {})
    with pytest.raises(ValueError, match="pooled: the student's width is 3 and the teacher's 4, and projector=none"):
        HintLoss(projector="none").connect(*sides, 10)
    with pytest.raises(ValueError, match="projector=conv1x1: use linear"):
        HintLoss(projector="conv1x1").connect(*sides, 10)


def test_a_hint_for_each_layer() -> None:
    term = LayerHintLoss(distance="cosine")
    term.plan(lambda kind: {"hidden": 2}[kind], lambda kind: {"hidden": 4}[kind])
    assert term.needs_student == ("hidden[1]", "hidden[2]")
    assert term.needs_teacher == ("hidden[2]", "hidden[4]")
    student = ModelOutput(torch.zeros(2, 2), {name: randn(2, 5, 3).float() for name in term.needs_student})
    teacher = ModelOutput(torch.zeros(2, 2), {name: randn(2, 5, 4, seed=1).float() for name in term.needs_teacher})
    term.connect(student, teacher, 10)
    assert len(list(term.parameters())) == 4
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    layers = enumerate(zip(student.features.values(), teacher.features.values(), strict=True))
    expected = [hint(term.projectors[str(i)](s), t, "cosine", mask.bool()) for i, (s, t) in layers]
    value = term(student, teacher, {"attention_mask": mask})
    torch.testing.assert_close(value, torch.stack(expected).mean())
    assert expected[0].item() != pytest.approx(expected[1].item())


def test_a_hint_for_each_stage() -> None:
    term = LayerHintLoss("feature_maps", projector="conv1x1")
    term.plan(lambda kind: {"feature_maps": 2}[kind], lambda kind: {"feature_maps": 2}[kind])
    assert term.needs_student == term.needs_teacher == ("feature_maps[0]", "feature_maps[1]")
    student = ModelOutput(torch.zeros(2, 2), {name: randn(2, 3, 4, 4).float() for name in term.needs_student})
    teacher = ModelOutput(torch.zeros(2, 2), {name: randn(2, 5, 2, 2).float() for name in term.needs_teacher})
    term.connect(student, teacher, 10)
    term.eval()
    layers = enumerate(zip(student.features.values(), teacher.features.values(), strict=True))
    expected = [hint(term.projectors[str(i)](s), t) for i, (s, t) in layers]
    torch.testing.assert_close(term(student, teacher, {}), torch.stack(expected).mean())
