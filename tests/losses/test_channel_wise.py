from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from kd_lightning.losses.channel_wise import ChannelWiseLoss, channel_wise
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

MAPS = randn(4, 3, 2, 3, seed=1), randn(4, 3, 2, 3, seed=2)
TOKENS = randn(4, 5, 3, seed=1), randn(4, 5, 3, seed=2)
PADDED = torch.arange(20).view(4, 5) % 7 != 1
CASES = [
    Case("maps", channel_wise, MAPS, {"temperature": 2.0}),
    Case("tokens", channel_wise, TOKENS, {}, mask=PADDED),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def by_hand(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    """Of one example, positions on axis 0 and channels on axis 1."""
    divergences = [rel_entr(softmax(t[:, c] / temperature), softmax(s[:, c] / temperature)).sum() for c in range(3)]
    return temperature**2 * float(np.mean(divergences))


def test_value_by_scipy() -> None:
    flat = [x.flatten(2).transpose(1, 2).numpy() for x in MAPS]
    expected = [by_hand(s, t, 2.0) for s, t in zip(*flat, strict=True)]
    np.testing.assert_allclose(channel_wise(*MAPS, 2.0, reduction="none"), expected, rtol=1e-12)
    expected = [by_hand(s[m].numpy(), t[m].numpy(), 4.0) for s, t, m in zip(*TOKENS, PADDED, strict=True)]
    np.testing.assert_allclose(channel_wise(*TOKENS, 4.0, PADDED, "none"), expected, rtol=1e-12)


def test_what_a_channel_adds_everywhere_does_not_matter() -> None:
    shift = randn(4, 3, 1, 1, seed=3)
    torch.testing.assert_close(channel_wise(MAPS[0] + shift, MAPS[1]), channel_wise(*MAPS))
    assert channel_wise(MAPS[0] + shift, MAPS[0]).item() == pytest.approx(0.0, abs=1e-12)
    assert channel_wise(2 * MAPS[0], MAPS[0]).item() > 0.01


def test_an_example_of_padding_alone_counts_nowhere() -> None:
    mask = PADDED.clone()
    mask[2] = False
    values = channel_wise(*TOKENS, mask=mask, reduction="none")
    assert values[2] == 0
    assert channel_wise(*TOKENS, mask=mask).item() == pytest.approx(values[[0, 1, 3]].mean().item())


def test_at_high_temperature_it_is_half_the_variance_of_the_difference() -> None:
    difference = (MAPS[0] - MAPS[1]).flatten(2)
    expected = difference.var(2, correction=0).mean() / 2
    assert channel_wise(*MAPS, 1e4).item() == pytest.approx(expected.item(), rel=1e-3)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"student feature \(2, 3, 1, 1\) and teacher feature \(2, 4, 1, 1\)"):
        channel_wise(torch.zeros(2, 3, 1, 1), torch.zeros(2, 4, 1, 1))
    with pytest.raises(ValueError, match=r"feature \(2, 3\): expected a map"):
        channel_wise(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="without a mask"):
        channel_wise(*MAPS, mask=torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask \(4, 2\) must have the shape \(4, 5\)"):
        channel_wise(*TOKENS, mask=torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        channel_wise(*MAPS, temperature=0)


def test_the_term_on_maps_of_two_sizes() -> None:
    torch.manual_seed(0)
    student = ModelOutput(torch.zeros(2, 2), {"feature_maps[-1]": randn(2, 5, 2, 2).float()})
    teacher = ModelOutput(torch.zeros(2, 2), {"feature_maps[-1]": randn(2, 6, 4, 4, seed=1).float()})
    term = ChannelWiseLoss(temperature=lambda progress: 4.0 - 3.0 * progress)
    with pytest.raises(ValueError, match="ChannelWiseLoss: the projector is not built"):
        term(student, teacher, {})
    term.connect(student, teacher, 10)
    term.progress = 1.0
    assert term.settings() == {"temperature": 1.0}
    pooled = torch.nn.functional.avg_pool2d(teacher.features["feature_maps[-1]"], 2)
    assert isinstance(term.projector, torch.nn.Module)
    expected = channel_wise(term.projector(student.features["feature_maps[-1]"]), pooled, 1.0)
    value = term(student, teacher, {})
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(p.grad is not None for p in term.parameters())


def test_the_term_on_tokens_does_not_see_padding() -> None:
    features = [{"h": x.float()} for x in TOKENS]
    student, teacher = (ModelOutput(torch.zeros(4, 2), feature) for feature in features)
    term = ChannelWiseLoss("h", "h", projector="none")
    term.connect(student, teacher, 10)
    batch = {"attention_mask": PADDED.long()}
    torch.testing.assert_close(term(student, teacher, batch), channel_wise(*(x.float() for x in TOKENS), mask=PADDED))
    with pytest.raises(ValueError, match="of different tokens"):
        term(student, teacher, {**batch, "teacher_input_ids": torch.zeros(4, 5)})
