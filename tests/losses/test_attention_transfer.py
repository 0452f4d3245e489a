from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.losses.attention_transfer import AttentionTransferLoss, attention_transfer
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

MAPS = randn(4, 3, 4, 4, seed=1), randn(4, 3, 4, 4, seed=2)
TOKENS = randn(4, 5, 3, seed=1), randn(4, 5, 6, seed=2)
PADDED = torch.arange(20).view(4, 5) % 7 != 1
CASES = [
    Case("maps", attention_transfer, MAPS, {}),
    Case("maps of another size and width", attention_transfer, (MAPS[0], randn(4, 7, 2, 2, seed=3)), {}),
    Case("third power", attention_transfer, MAPS, {"power": 3.0}),
    Case("first power", attention_transfer, MAPS, {"power": 1.0}),
    Case("tokens", attention_transfer, TOKENS, {}, mask=PADDED),
    Case("tokens of one width", attention_transfer, (TOKENS[0], randn(4, 5, 3, seed=2)), {}, mask=PADDED),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def attention(places: np.ndarray, power: float) -> np.ndarray:
    """The map of one example, from its features `(places, channels)`."""
    values = np.array([sum(abs(x) ** power for x in place) for place in places])
    return values / np.sqrt((values**2).sum())


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_value_by_numpy(power: float) -> None:
    student, teacher = (x.numpy().transpose(0, 2, 3, 1).reshape(4, 16, 3) for x in MAPS)
    expected = [((attention(s, power) - attention(t, power)) ** 2).sum() for s, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(attention_transfer(*MAPS, power, reduction="none"), expected, rtol=1e-12)
    assert attention_transfer(*MAPS, power).item() == pytest.approx(np.mean(expected))


def test_tokens_by_numpy() -> None:
    student, teacher = (x.numpy() for x in TOKENS)
    mask = PADDED.clone()
    mask[2] = False  # an example without any token counts neither in the sum nor in the mean
    expected = [((attention(student[b][mask[b]], 2) - attention(teacher[b][mask[b]], 2)) ** 2).sum() for b in (0, 1, 3)]
    assert attention_transfer(*TOKENS, mask=mask).item() == pytest.approx(np.mean(expected))
    assert attention_transfer(*TOKENS, mask=mask, reduction="none")[2] == 0


def test_only_where_a_side_is_active_matters() -> None:
    value = attention_transfer(*MAPS)
    torch.testing.assert_close(attention_transfer(-3 * MAPS[0], 0.1 * MAPS[1]), value)
    shuffled = MAPS[0][:, [2, 0, 1]]
    torch.testing.assert_close(attention_transfer(shuffled, MAPS[1]), value)
    turned = attention_transfer(*(x.flip(3) for x in MAPS))
    torch.testing.assert_close(turned, value)
    assert attention_transfer(MAPS[0].flip(3), MAPS[1]).item() != pytest.approx(value.item(), rel=1e-3)


def test_signs_do_not_cancel_where_maps_differ_in_size() -> None:
    # Each 2 x 2 block of the student sums to 0 but is active; the attention map is pooled, not the feature.
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(2, 2)
    strength = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    student = (strength.repeat_interleave(2, 0).repeat_interleave(2, 1) * signs).view(1, 1, 4, 4)
    assert attention_transfer(student, strength.view(1, 1, 2, 2)).item() == pytest.approx(0.0, abs=1e-12)


def test_active_at_other_places_is_the_largest_value() -> None:
    student, teacher = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    student[0, :, 0, 0], teacher[0, :, 1, 1] = 3.0, 0.5
    assert attention_transfer(student, teacher).item() == pytest.approx(2.0)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_side_without_activation(power: float) -> None:
    student = torch.zeros(2, 3, 2, 2).requires_grad_()
    value = attention_transfer(student, torch.ones(2, 3, 2, 2), power)
    value.backward()
    assert value.item() == pytest.approx(1.0)
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"power must be at least 1, got 0\.5"):
        attention_transfer(*MAPS, power=0.5)
    with pytest.raises(ValueError, match="power must be at least 1, got nan"):
        attention_transfer(*MAPS, power=float("nan"))
    with pytest.raises(ValueError, match=r"student feature \(4, 3, 4, 4\) and teacher feature \(4, 5, 6\)"):
        attention_transfer(MAPS[0], TOKENS[1])
    with pytest.raises(ValueError, match=r"student attention map \(4, 5, 1\) and teacher attention map \(4, 3, 1\)"):
        attention_transfer(TOKENS[0], TOKENS[1][:, :3])
    with pytest.raises(ValueError, match=r"mask \(4, 3\) must have the shape \(4, 5\)"):
        attention_transfer(*TOKENS, mask=PADDED[:, :3])


def test_the_term_pairs_stages() -> None:
    term = AttentionTransferLoss(power=3.0)
    term.plan(lambda kind: {"feature_maps": 2}[kind], lambda kind: {"feature_maps": 4}[kind])
    assert term.needs_student == ("feature_maps[0]", "feature_maps[1]")
    assert term.needs_teacher == ("feature_maps[1]", "feature_maps[3]")
    maps = {"feature_maps[0]": MAPS[0], "feature_maps[1]": MAPS[1]}
    of_teacher = {"feature_maps[1]": randn(4, 5, 4, 4, seed=5), "feature_maps[3]": randn(4, 6, 4, 4, seed=6)}
    student, teacher = ModelOutput(torch.zeros(4, 2), maps), ModelOutput(torch.zeros(4, 2), of_teacher)
    term.connect(student, teacher, 10)
    assert not list(term.parameters())
    expected = [attention_transfer(s, t, 3.0) for s, t in zip(maps.values(), of_teacher.values(), strict=True)]
    torch.testing.assert_close(term(student, teacher, {}), torch.stack(expected).mean())


def test_padding_does_not_reach_the_term() -> None:
    term = AttentionTransferLoss("hidden", "last")
    term.plan(lambda kind: {"hidden": 1}[kind], lambda kind: {"hidden": 3}[kind])
    assert (term.needs_student, term.needs_teacher) == (("hidden[1]",), ("hidden[3]",))
    student, teacher = randn(2, 3, 4), randn(2, 3, 5, seed=1)
    logits = torch.zeros(2, 2)
    short = term(
        ModelOutput(logits, {"hidden[1]": student}), ModelOutput(logits, {"hidden[3]": teacher}),
        {"attention_mask": torch.ones(2, 3)},
    )  # fmt: skip
    padded = term(
        ModelOutput(logits, {"hidden[1]": torch.cat([student, randn(2, 2, 4, seed=2)], 1)}),
        ModelOutput(logits, {"hidden[3]": torch.cat([teacher, randn(2, 2, 5, seed=3)], 1)}),
        {"attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 2)},
    )
    torch.testing.assert_close(padded, short)
