from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd_lightning.losses.fsp import FSPLoss, fsp
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

MAPS = randn(4, 3, 4, 4, seed=1), randn(4, 3, 4, 4, seed=2), randn(4, 2, 2, 2, seed=3), randn(4, 2, 2, 2, seed=4)
TOKENS = randn(4, 5, 3, seed=1), randn(4, 5, 3, seed=2), randn(4, 5, 2, seed=3), randn(4, 5, 2, seed=4)
PADDED = torch.arange(20).view(4, 5) % 7 != 1


def with_one_second_layer(student: Tensor, teacher: Tensor, second: Tensor, **more: object) -> Tensor:
    """Both sides have the second layer in common, so that they are equal where their first layers are."""
    return fsp([student, second], [teacher, second], **more)  # type: ignore[arg-type]


def as_second_layer(student: Tensor, teacher: Tensor, first: Tensor, **more: object) -> Tensor:
    return fsp([first, student], [first, teacher], **more)  # type: ignore[arg-type]


def with_one_mask(student: Tensor, teacher: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    return with_one_second_layer(student, teacher, second, mask=mask)


CASES = [
    Case("maps", with_one_second_layer, MAPS[:3], {}),
    Case("maps, second layer", as_second_layer, (MAPS[2], MAPS[3], MAPS[0]), {}),
    Case("tokens", with_one_mask, TOKENS[:3], {}, mask=PADDED),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def gram(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """G of one example, from features `(places, channels)`."""
    return np.mean([np.outer(a, b) for a, b in zip(first, second, strict=True)], axis=0)


def test_value_by_numpy() -> None:
    def flows(first: Tensor, second: Tensor) -> np.ndarray:
        pooled = first.numpy().reshape(4, 3, 2, 2, 2, 2).mean((3, 5))  # 4 x 4 to 2 x 2
        places = [x.transpose(0, 2, 3, 1).reshape(4, 4, -1) for x in (pooled, second.numpy())]
        return np.array([gram(a, b) for a, b in zip(*places, strict=True)])

    s1, t1, s2, t2 = MAPS
    expected = ((flows(s1, s2) - flows(t1, t2)) ** 2).mean((1, 2))
    np.testing.assert_allclose(fsp([s1, s2], [t1, t2], reduction="none"), expected, rtol=1e-12)
    assert fsp((s1, s2), (t1, t2)).item() == pytest.approx(expected.mean())


def test_tokens_by_numpy() -> None:
    s1, t1, s2, t2 = (x.numpy() for x in TOKENS)
    mask = PADDED.clone()
    mask[2] = False  # an example without any token counts neither in the sum nor in the mean
    expected = [
        ((gram(s1[b][mask[b]], s2[b][mask[b]]) - gram(t1[b][mask[b]], t2[b][mask[b]])) ** 2).mean() for b in (0, 1, 3)
    ]
    value = fsp([TOKENS[0], TOKENS[2]], [TOKENS[1], TOKENS[3]], mask)
    assert value.item() == pytest.approx(np.mean(expected))


def test_the_order_of_places_does_not_matter_but_that_of_channels_does() -> None:
    s1, t1, s2, t2 = TOKENS
    order = torch.tensor([3, 0, 4, 1, 2])
    value = fsp([s1, s2], [t1, t2])
    torch.testing.assert_close(fsp([s1[:, order], s2[:, order]], [t1, t2]), value)
    assert fsp([s1[:, :, [1, 2, 0]], s2], [t1, t2]).item() != pytest.approx(value.item(), rel=1e-3)


def test_a_scale_that_moves_from_one_layer_to_the_other_is_the_same_flow() -> None:
    s1, t1, s2, t2 = TOKENS
    torch.testing.assert_close(fsp([2 * s1, s2 / 2], [t1, t2]), fsp([s1, s2], [t1, t2]))


def test_networks_may_have_maps_of_other_sizes() -> None:
    student = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in MAPS[::2]]
    assert fsp(student, MAPS[::2]).item() == pytest.approx(0.0, abs=1e-20)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = ([x.clone().requires_grad_() for x in MAPS[i::2]] for i in (0, 1))
    fsp(student, teacher).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"student FSP matrices \(4, 3, 2\) and teacher FSP matrices \(4, 3, 3\)"):
        fsp([TOKENS[0], TOKENS[2]], [TOKENS[1], TOKENS[1]])
    with pytest.raises(ValueError, match="the two layers have 5 and 3 positions"):
        fsp([TOKENS[0], TOKENS[2][:, :3]], [TOKENS[1], TOKENS[3]])
    with pytest.raises(ValueError, match=r"feature \(4, 3\): expected a map"):
        fsp([randn(4, 3), randn(4, 2)], [randn(4, 3), randn(4, 2)])


def outputs(scale: float = 0.0) -> tuple[ModelOutput, ModelOutput]:
    """Three token layers on either side, the student's narrower; `scale` times noise where the mask is False."""
    noise = scale * (~PADDED).double().unsqueeze(2)
    student = {f"hidden[{i}]": (randn(4, 5, 2, seed=i) + noise).float() for i in range(3)}
    teacher = {f"hidden[{i}]": (randn(4, 5, 3, seed=9 + i) - noise).float() for i in range(3)}
    return ModelOutput(torch.zeros(4, 2), student), ModelOutput(torch.zeros(4, 2), teacher)


def test_the_term_averages_consecutive_flows() -> None:
    names = ["hidden[0]", "hidden[1]", "hidden[2]"]
    term = FSPLoss(names, names)
    assert term.needs_student == term.needs_teacher == tuple(names)
    student, teacher = outputs()
    term.connect(student, teacher, 10)
    assert [(p.in_features, p.out_features) for p in term.projectors if isinstance(p, nn.Linear)] == [(2, 3)] * 3
    s = [projector(student.features[name]) for projector, name in zip(term.projectors, names, strict=True)]
    t = [teacher.features[name] for name in names]
    expected = (fsp(s[:2], t[:2], PADDED) + fsp(s[1:], t[1:], PADDED)) / 2
    batch = {"attention_mask": PADDED.long()}
    value = term(student, teacher, batch)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(term(*outputs(scale=50.0), batch), value)
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


def test_errors_of_the_term() -> None:
    with pytest.raises(ValueError, match="student_layers has 1 names and teacher_layers 1"):
        FSPLoss(["hidden[0]"], ["hidden[0]"])
    with pytest.raises(ValueError, match="student_layers has 2 names and teacher_layers 3"):
        FSPLoss(["hidden[0]", "hidden[1]"], ["hidden[0]", "hidden[1]", "hidden[2]"])
    term = FSPLoss(["hidden[0]", "hidden[1]"], ["hidden[0]", "hidden[1]"], "none")
    with pytest.raises(ValueError, match=r"the projectors are not built; call Objective.connect first"):
        term(*outputs(), {})
    with pytest.raises(ValueError, match=r"hidden\[0\]: the student's width is 2 and the teacher's 3"):
        term.connect(*outputs(), 10)
