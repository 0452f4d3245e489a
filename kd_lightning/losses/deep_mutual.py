"""Deep mutual learning: several students learn from labels and from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.losses.term import Scheduled, Term, check_mask, in_float32, kept_rows
from kd_lightning.types import IGNORE, Batch, ModelOutput


@in_float32
def deep_mutual(
    student_logits: Tensor,
    peer_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""One student's loss among K peers, in nats (Zhang et al. 2018, arXiv 1706.00384, equation 8).

    .. math:: \mathrm{CE}(z_k, y) + \frac{T^2}{K - 1} \sum_{l \ne k}
              \mathrm{KL}(\mathrm{softmax}(z_l / T) \,\|\, \mathrm{softmax}(z_k / T))

    with the cross-entropy averaged over the labelled examples (positions) that count and the divergence over all that
    count. The paper has T = 1. The other peers' logits get no gradient: each peer follows its own loss.

    Args:
        student_logits: z_k, `(B, C)` or `(B, L, V)`.
        peer_logits: The other peers' z_l, `(B, K - 1, C)` or `(B, K - 1, L, V)`.
        labels: `(B,)` or `(B, L)` int64, -100 where there is none.
        temperature: T > 0.
        mask: `(B,)` or `(B, L)` bool, True = counts.

    Raises:
        ValueError: Shapes that do not fit, or a temperature that is not positive and finite.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> deep_mutual(z, z.unsqueeze(1), torch.tensor([0])).item()  # the peers agree: log(1 + exp(-2))
        0.12692804634571075
    """
    return _parts(student_logits, peer_logits, labels, temperature, mask).sum()


def _parts(
    student_logits: Tensor, peer_logits: Tensor, labels: Tensor, temperature: float, mask: Tensor | None
) -> Tensor:
    """Return the cross-entropy over labelled logits and the divergence over all counted ones, `(2,)`."""
    if peer_logits.ndim != student_logits.ndim + 1 or peer_logits[:, 0].shape != student_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and peers' logits {tuple(peer_logits.shape)}: expected the "
            "same shape with the peers as axis 1"
        )
    check_mask(mask, student_logits.shape[:-1])
    everyone = student_logits.unsqueeze(1).expand_as(peer_logits)
    counts = None if mask is None else mask.unsqueeze(1).expand(peer_logits.shape[:-1])
    labelled = labels if mask is None else labels.masked_fill(~mask, IGNORE)
    divergence = soft_target(everyone, peer_logits, temperature, counts)
    return torch.stack([cross_entropy(student_logits, labelled), divergence])


class DeepMutualLoss(Term):
    """Deep mutual learning of K >= 2 peers; see `deep_mutual` for one peer's loss.

    Returns the mean over the peers, so each gets 1/K of the gradient that an optimizer of its own would see, which Adam
    does not notice. All peers train in one run; the student has to be a `kd_lightning.models.cohort.Cohort`.

    Args:
        temperature: T > 0, or a schedule over training progress; the paper's is 1.
    """

    uses_teacher = False
    needs_student = ("peers",)

    def __init__(self, temperature: Scheduled = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def settings(self) -> dict[str, float]:
        """Return the current temperature."""
        return {"temperature": self.now(self.temperature)}

    def counts(self, batch: Batch) -> Tensor:
        """Return how many logits are labelled, and how many there are."""
        return torch.cat([self.count(batch, "labels"), self.count(batch, "logits")])

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean of the peers' losses."""
        return self.parts(student, teacher, batch).sum()

    def parts(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the peers of their cross-entropies, and that of their divergences."""
        peers = student.features["peers"]
        count = peers.shape[1]
        if count < 2:
            raise ValueError("deep mutual learning needs two peers or more, and there is one student only")
        mask = kept_rows(student.logits, batch)
        losses = []
        for k in range(count):
            others = torch.cat([peers[:, :k], peers[:, k + 1 :]], dim=1).detach()
            losses.append(_parts(peers[:, k], others, batch["labels"], self.now(self.temperature), mask))
        return torch.stack(losses).mean(0)
