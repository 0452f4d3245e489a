r"""Distillation between models whose tokenizers cut the same text into other tokens.

Their vocabularies have no class in common, but their texts have: spans of one or more tokens on either side that are
the same bytes. For each span two things are compared, both without a map of tokens:

* the distributions of its first token, sorted, so that the i-th likeliest stands against the i-th likeliest (Universal
  Logit Distillation, Boizard et al. 2024, arXiv 2402.12030); the shorter one is filled up with zeros:

  .. math:: \text{ULD} = \sum_i \bigl| p_{(i)} - q_{(i)} \bigr|

* the likelihood of the whole span, :math:`P = \prod_k p(t_k \mid t_{<k})` over its tokens, against that it is any other
  text (approximate likelihood matching, Minixhofer, Vulić & Ponti 2025, arXiv 2503.20083):

  .. math:: \text{KL} = P \log \frac{P}{Q} + (1 - P) \log \frac{1 - P}{1 - Q}

with p, P the teacher's and q, Q the student's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import Term, in_float32
from kd_lightning.types import Batch, ModelOutput

MOST = -1e-6
"""The largest log likelihood of a span in float32 that is not taken for certainty."""


@in_float32
def sorted_distance(student_logits: Tensor, teacher_logits: Tensor, most: int | None = None) -> Tensor:
    """Return ULD of rows of logits `(N, V)` and `(N, W)`, `(N,)`; the teacher's get no gradient.

    Args:
        student_logits: `(N, V)`.
        teacher_logits: `(N, W)`.
        most: Compare so many of the likeliest one by one and the sums of all others, which is never more and spares
            the sorting of large vocabularies; None: all.

    Example:
        >>> import torch
        >>> sorted_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 5.0, -1e4]])).item()
        0.0
    """
    q, p = student_logits.softmax(-1), teacher_logits.detach().softmax(-1)
    whole = max(q.shape[-1], p.shape[-1])
    most = min(most or whole, whole)
    first, second = (one.topk(min(most, one.shape[-1])).values for one in (p, q))
    first, second = (F.pad(one, (0, most - one.shape[-1])) for one in (first, second))
    rest = first.sum(-1) - second.sum(-1) if most < whole else first.new_zeros(())
    return (first - second).abs().sum(-1) + rest.abs()


@in_float32
def span_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL of spans' log likelihoods `(N,)`, `(N,)`; the teacher's get no gradient.

    Example:
        >>> import torch
        >>> round(span_kl(torch.tensor([0.5]).log(), torch.tensor([0.25]).log()).item(), 4)
        0.1308
    """
    log_q, log_p = student.clamp(max=MOST), teacher.detach().clamp(max=MOST)
    not_q, not_p = (torch.log(-torch.expm1(one)) for one in (log_q, log_p))
    return log_p.exp() * (log_p - log_q) - log_p.expm1() * (not_p - not_q)


class CrossTokenizerLoss(Term):
    """`sorted_distance` and `span_kl` from a teacher with another tokenizer, means over spans.

    The batch has `spans` `(B, M, 4)`: where the student's tokens of a span begin and end in its row, and where the
    teacher's do in its own; both 0 where there is none (`data.cross_tokenizer=true`).

    Args:
        uld_weight: Weight of the sorted distributions.
        likelihood_weight: Weight of the spans' likelihoods.
        most: As for `sorted_distance`.

    Raises:
        ValueError: At the first batch: it has no `spans`, or the student no logits.
    """

    def __init__(self, uld_weight: float = 1.0, likelihood_weight: float = 1.0, most: int | None = 1024) -> None:
        super().__init__()
        if min(uld_weight, likelihood_weight) < 0:
            raise ValueError(f"weights must be 0 or more, got {uld_weight} and {likelihood_weight}")
        if most is not None and most < 1:
            raise ValueError(f"most must be 1 or more, or None, got {most}")
        self.uld_weight, self.likelihood_weight, self.most = uld_weight, likelihood_weight, most

    def counts(self, batch: Batch) -> Tensor:
        """Return how many spans a batch has."""
        return (_spans(batch)[..., 1] > 0).sum(dtype=torch.float32).view(1)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the spans; 0 with a graph where there is none."""
        if not student.logits.shape[-1]:
            raise ValueError("it reads all of the student's logits: set student.logits_in_training=true")
        spans = _spans(batch)
        rows, places = (spans[..., 1] > 0).nonzero().unbind(1)
        begin, stop, teacher_begin, teacher_stop = spans[rows, places].unbind(-1)
        if not len(rows):
            return student.logits.sum() * 0.0
        uld = sorted_distance(student.logits[rows, begin - 1], teacher.logits[rows, teacher_begin - 1], self.most)
        own = _likelihoods(student.logits, batch["input_ids"], rows, begin, stop)
        with torch.no_grad():
            other = _likelihoods(teacher.logits, batch["teacher_input_ids"], rows, teacher_begin, teacher_stop)
        return self.uld_weight * uld.mean() + self.likelihood_weight * span_kl(own, other).mean()


def _spans(batch: Batch) -> Tensor:
    if "spans" not in batch:
        raise ValueError("the batch has no spans of the same text: set data.cross_tokenizer=true, or another loss")
    return batch["spans"]


@in_float32
def _likelihoods(logits: Tensor, ids: Tensor, rows: Tensor, begin: Tensor, stop: Tensor) -> Tensor:
    """Return the log likelihood of each span, `(N,)`, from logits `(B, L, V)` whose row t predicts t + 1."""
    counted = torch.arange(int((stop - begin).max()), device=ids.device) < (stop - begin)[:, None]
    span, offset = counted.nonzero().unbind(1)
    row, place = rows[span], begin[span] + offset
    own = logits[row, place - 1]
    surprise = F.cross_entropy(own, ids[row, place], reduction="none")
    return surprise.new_zeros(len(rows)).index_add(0, span, -surprise)
