from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from kd_lightning.losses.deep_mutual import DeepMutualLoss, deep_mutual
from kd_lightning.types import IGNORE, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

LABELS = torch.tensor([0, 3, 1, 2, 2, 0])
TOKEN_LABELS = torch.arange(12).view(4, 3) % 5


class OfPeers(Case):
    def counts(self, side: int) -> Tensor:
        """The peers' axis comes before the positions'."""
        assert self.mask is not None
        return super().counts(0) if side == 0 else super().counts(0).unsqueeze(1).expand_as(self.tensors[1])


CASES = [
    OfPeers(
        "deep_mutual", deep_mutual, (randn(6, 4, seed=1), randn(6, 2, 4, seed=2), LABELS), {},
        mask=torch.arange(6) % 2 == 0,
        zero=False,  # the labels' part is never zero
    ),
    OfPeers(
        "deep_mutual tokens", deep_mutual, (randn(4, 3, 5, seed=1), randn(4, 1, 3, 5, seed=2), TOKEN_LABELS),
        {"temperature": 3.0},
        mask=torch.tensor([[True, True, False]] * 4),
        zero=False,  # as above
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def by_numpy(student: Tensor, peers: Tensor, labels: Tensor, temperature: float) -> float:
    z, known = student.numpy(), (labels != IGNORE).numpy()
    ce = -log_softmax(z, axis=1)[np.arange(len(z)), labels.clamp(min=0).numpy()][known].mean()
    kl = 0.0
    for other in peers.numpy().transpose(1, 0, 2):
        p = softmax(other / temperature, axis=1)
        kl += (p * (np.log(p) - log_softmax(z / temperature, axis=1))).sum(1).mean() / peers.shape[1]
    return float(ce + temperature**2 * kl)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_by_numpy(temperature: float) -> None:
    labels = LABELS.clone()
    labels[1] = IGNORE  # counts for the divergence alone
    student, peers = randn(6, 4, seed=1), randn(6, 2, 4, seed=2)
    expected = by_numpy(student, peers, labels, temperature)
    assert deep_mutual(student, peers, labels, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_the_term_is_the_mean_over_the_peers_and_each_follows_its_own_loss() -> None:
    peers = randn(6, 3, 4, seed=3).requires_grad_()
    value = DeepMutualLoss()(ModelOutput(peers[:, 0], {"peers": peers}), ModelOutput(peers[:, 0]), {"labels": LABELS})
    own = []
    for k in range(3):
        others = torch.cat([peers[:, :k], peers[:, k + 1 :]], 1)
        own.append(by_numpy(peers[:, k].detach(), others.detach(), LABELS, 1.0))
    assert value.item() == pytest.approx(np.mean(own), rel=1e-12)
    (found,) = torch.autograd.grad(value, peers)
    # d/dz_k of CE + mean_l KL(p_l || p_k) = (p_k - y) + (p_k - mean_l p_l), over B examples and K peers
    p = softmax(peers.detach().numpy(), axis=2)
    onehot = np.eye(4)[LABELS.numpy()]
    for k in range(3):
        others = p[:, [i for i in range(3) if i != k]].mean(1)
        np.testing.assert_allclose(found[:, k].numpy(), (2 * p[:, k] - onehot - others) / 18, atol=1e-12)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"student logits \(2, 3\) and peers' logits \(2, 4\)"):
        deep_mutual(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"peers' logits \(2, 1, 4\)"):
        deep_mutual(torch.zeros(2, 3), torch.zeros(2, 1, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        deep_mutual(torch.zeros(2, 3), torch.zeros(2, 1, 3), torch.zeros(2, dtype=torch.long), temperature=0.0)
    alone = ModelOutput(torch.zeros(2, 3), {"peers": torch.zeros(2, 1, 3)})
    with pytest.raises(ValueError, match="two peers or more"):
        DeepMutualLoss()(alone, alone, {"labels": torch.zeros(2, dtype=torch.long)})
