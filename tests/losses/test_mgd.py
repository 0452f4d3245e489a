from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.losses.mgd import MGDLoss, mgd
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

MAPS = randn(4, 3, 2, 5, seed=1), randn(4, 3, 2, 5, seed=2)
WEIGHT = randn(5, 5, seed=9)


def generate(x: Tensor) -> Tensor:
    """Mixes the last axis, whatever the precision and the device."""
    return torch.tanh(x) @ WEIGHT.to(x)


def kept(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) > 0.4


class Holed(Case):
    def reads(self, side: int) -> Tensor:
        return self.tensors[2].expand_as(self.tensors[0]) if side == 0 else super().reads(side)


CASES = [  # what is generated from the teacher's own feature, with holes, is not the teacher's feature: no zero
    Holed("vectors", mgd, (randn(6, 5, seed=1), randn(6, 5, seed=2), kept(6, 5)), {"generate": generate},
          torch.arange(6) % 2 == 0, zero=False),
    Holed("tokens", mgd, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2), kept(4, 3, 5)), {"generate": generate},
          torch.arange(12).view(4, 3) % 5 != 1, zero=False),
    Holed("maps", mgd, (*MAPS, kept(4, 1, 2, 5)), {"generate": generate},
          torch.arange(4) != 1, zero=False),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    student, teacher, keep = randn(6, 5, seed=1), randn(6, 5, seed=2), kept(6, 5)
    generated = np.tanh(np.where(keep, student, 0.0)) @ WEIGHT.numpy()
    expected = ((generated - teacher.numpy()) ** 2).mean(1)
    np.testing.assert_allclose(mgd(student, teacher, keep, generate, reduction="none"), expected, rtol=1e-12)


def test_nothing_masked_and_nothing_generated_is_a_hint() -> None:
    student, teacher = randn(4, 3, 2, 2, seed=1), randn(4, 3, 2, 2, seed=2)
    value = mgd(student, teacher, torch.ones(4, 1, 2, 2, dtype=torch.bool), lambda x: x)
    torch.testing.assert_close(value, (student - teacher).square().mean())


def test_what_is_masked_gets_no_gradient() -> None:
    student = randn(4, 3, 2, 5, seed=1).requires_grad_()
    keep = kept(4, 1, 2, 5)
    mgd(student, randn(4, 3, 2, 5, seed=2), keep, lambda x: 2 * x).backward()
    assert student.grad is not None
    assert torch.equal(student.grad != 0, keep.expand_as(student))


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"student feature \(2, 3\) and teacher feature \(2, 4\)"):
        mgd(torch.zeros(2, 3), torch.zeros(2, 4), kept(2, 3), generate)
    with pytest.raises(ValueError, match=r"student generated feature \(2, 2\) and teacher generated feature \(2, 3\)"):
        mgd(torch.zeros(2, 3), torch.zeros(2, 3), kept(2, 3), lambda x: x[:, :2])
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"ratio=.* must be in \[0, 1\)"):
            MGDLoss(ratio=ratio)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 6, 5, 5)])
def test_the_term_trains_its_generator_and_draws_anew(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    narrow = tuple(5 if size == 6 else size for size in shape)
    student = ModelOutput(torch.zeros(4, 2), {"x": randn(*narrow).float()})
    teacher = ModelOutput(torch.zeros(4, 2), {"x": randn(*shape, seed=1).float()})
    term = MGDLoss("x", "x", ratio=0.5)
    with pytest.raises(ValueError, match="MGDLoss: the projector is not built"):
        term(student, teacher, {})
    term.connect(student, teacher, 10)
    value = term(student, teacher, {})
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
    assert term(student, teacher, {}) != value  # another mask
    torch.manual_seed(1)
    first = term(student, teacher, {})
    torch.manual_seed(1)
    assert term(student, teacher, {}) == first


def test_of_a_map_whole_places_are_masked() -> None:
    student = ModelOutput(torch.zeros(2, 2), {"x": torch.ones(2, 6, 9, 9)})
    term = MGDLoss("x", "x", projector="none", ratio=0.3)
    term.connect(student, student, 10)
    seen = []
    term.generator = torch.nn.Identity()
    term.generator.register_forward_hook(lambda module, args, output: seen.append(output))
    term(student, student, {})
    assert torch.equal(seen[0], seen[0][:, :1].expand(2, 6, 9, 9))
    assert 0.1 < float((seen[0] == 0).float().mean()) < 0.5


def test_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    feature, target = randn(2, 3, 4).float(), randn(2, 3, 4, seed=1).float()
    term = MGDLoss("x", "x", projector="none", ratio=0.0)  # the masks that are drawn depend on the length
    outputs = [ModelOutput(torch.zeros(2, 2), {"x": x}) for x in (feature, target)]
    term.connect(*outputs, 10)
    value = term(*outputs, {"attention_mask": mask})
    noisy = [
        ModelOutput(torch.zeros(2, 2), {"x": x.masked_fill(mask.unsqueeze(2) == 0, 9.0)}) for x in (feature, target)
    ]
    torch.testing.assert_close(term(*noisy, {"attention_mask": mask}), value)
