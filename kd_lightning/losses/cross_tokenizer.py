r"""Distillation between models whose tokenizers cut the same text into other tokens.

Their vocabularies have no class in common, but their texts have: spans of one or more tokens on either side that are
the same bytes. For each span two things are compared, both without a map of tokens:

* the distributions of its first token, sorted, so that the i-th likeliest stands against the i-th likeliest (Universal
  Logit Distillation, Boizard et al. 2024, arXiv 2402.12030); the shorter one is filled up with zeros:

  .. math:: \text{ULD} = \sum_i \bigl| p_{(i)} - q_{(i)} \bigr|

* the likelihood of the whole span, :math:`P = \prod_k p(t_k \mid t_{<k})` over its tokens, against that it is any other
  text (approximate likelihood matching, Minixhofer, Vulić & Ponti 2025, arXiv 2503.20083):

  .. math:: \text{KL} = P \log \frac{P}{Q} + (1 - P) \log \frac{1 - P}{1 - Q}

with p, P the teacher's and q, Q the student's. Of a teacher whose outputs are stored, :math:`p` is known for its K
likeliest tokens and for all others together, which are then compared so; and P from the feature `next_log_prob`, in
which each token's own log probability is stored beside these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.sparse import teacher_buckets
from kd_lightning.losses.term import Term, in_float32
from kd_lightning.types import NEXT_LOG_PROB, Batch, ModelOutput, SparseLogits

MOST = -1e-6
"""The largest log likelihood of a span in float32 that is not taken for certainty."""


@in_float32
def sorted_distance(
    student_logits: Tensor, teacher_logits: Tensor | SparseLogits, most: int | None = None
) -> Tensor:  # fmt: skip
    """Return ULD of rows of logits `(N, V)` and `(N, W)`, `(N,)`; the teacher's get no gradient.

    Args:
        student_logits: `(N, V)`.
        teacher_logits: `(N, W)`, or these in sparse form with the K largest, of which the others' order is not known.
        most: Compare so many of the likeliest one by one and the sums of all others, which is never more and spares
            the sorting of large vocabularies; None: all that are known one by one.

    Raises:
        ValueError: Drawn classes, which are not the likeliest.

    Example:
        >>> import torch
        >>> sorted_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 5.0, -1e4]])).item()
        0.0
    """
    whole = max(student_logits.shape[-1], teacher_logits.shape[-1])
    most = min(most or whole, whole)
    q = student_logits.softmax(-1)
    if isinstance(teacher_logits, SparseLogits):
        if teacher_logits.drawn:
            raise ValueError("sorted probabilities are compared, and drawn tokens are not the likeliest: keep these")
        known = teacher_logits.values.shape[-1]
        most = most if known == teacher_logits.classes else min(most, known)
        p = teacher_buckets(teacher_logits, None)[..., :known].exp()
    else:
        p = teacher_logits.detach().softmax(-1)
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
    teacher's do in its own; both 0 where there is none (`data.cross_tokenizer=true`). The teacher's output has
    `next_log_prob` among its features (`next_log_probs`), and logits, all of them or the K largest in `sparse`.

    Args:
        uld_weight: Weight of the sorted distributions.
        likelihood_weight: Weight of the spans' likelihoods.
        most: As for `sorted_distance`.

    Raises:
        ValueError: At the first batch: it has no `spans`, the student no logits, or the teacher no `next_log_prob`.
    """

    needs_teacher = (NEXT_LOG_PROB,)

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
        if NEXT_LOG_PROB not in teacher.features:
            raise ValueError(f"the teacher's output lacks {NEXT_LOG_PROB}: FrozenTeacher(..., ['{NEXT_LOG_PROB}'])")
        first = rows, teacher_begin - 1
        above = teacher.logits[first] if teacher.sparse is None else teacher.sparse.at(first)
        uld = sorted_distance(student.logits[rows, begin - 1], above, self.most)
        span, row, place = _tokens(rows, begin, stop)
        own = _log_likelihoods(student.logits[row, place - 1], batch["input_ids"][row, place])
        own = own.new_zeros(len(rows)).index_add(0, span, own)
        span, row, place = _tokens(rows, teacher_begin, teacher_stop)
        other = own.new_zeros(len(rows)).index_add(0, span, teacher.features[NEXT_LOG_PROB][row, place - 1, 0].to(own))
        return self.uld_weight * uld.mean() + self.likelihood_weight * span_kl(own, other).mean()


def next_log_probs(logits: Tensor, ids: Tensor, at_once: int = 2**22) -> Tensor:
    """Return how likely each row's next token was, in logarithms, `(B, L, 1)`; 0 in the last row.

    Args:
        logits: `(B, L, V)`, float32.
        ids: The tokens that they are of, `(B, L)` int64.
        at_once: How many logits are gone through together.

    Example:
        >>> import torch
        >>> next_log_probs(torch.zeros(1, 2, 4), torch.tensor([[0, 3]])).flatten().tolist()  # log 1/4
        [-1.3862943649291992, 0.0]
    """
    size = max(at_once // logits.shape[-1], 1)
    following = F.pad(ids[:, 1:], (0, 1)).flatten()
    pairs = zip(torch.split(logits.flatten(0, 1), size), torch.split(following, size), strict=True)
    found = torch.cat([_log_likelihoods(*pair) for pair in pairs]).view(ids.shape)
    return F.pad(found[:, :-1], (0, 1))[..., None]


def _spans(batch: Batch) -> Tensor:
    if "spans" not in batch:
        raise ValueError("the batch has no spans of the same text: set data.cross_tokenizer=true, or another loss")
    return batch["spans"]


def _tokens(rows: Tensor, begin: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each token of spans its span, its row and its place there."""
    counted = torch.arange(int((stop - begin).max()), device=rows.device) < (stop - begin)[:, None]
    span, offset = counted.nonzero().unbind(1)
    return span, rows[span], begin[span] + offset


@in_float32
def _log_likelihoods(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log likelihood of each token `(N,)` under its row `(N, V)`."""
    return -F.cross_entropy(logits, ids, reduction="none")
