r"""Log probabilities of some classes and of the tail of all others, in one pass forward and back.

With :math:`z_i` the logits and :math:`l = \log \sum_{j \notin S} e^{z_j}` that of the tail, the gradient of l is the
softmax over the tail alone, :math:`\partial l / \partial z_j = e^{z_j - l}`. Autograd of gather, scatter and logsumexp
makes seven tensors of the logits' size for it, and cross-entropy of the same logits four more. Here one is made, their
gradient: the log-sum-exp over all classes is that over the K + 1 merged ones. Logits are first made less by their row's
largest, which changes no probability: large ones lose nothing to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kd_lightning.losses.chunked_linear import BLOCK_BYTES
from kd_lightning.losses.term import in_float32, only_counted


@in_float32
def merged(
    logits: Tensor, ids: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return log probabilities of classes and their tail, `(..., K + 1)`, and of labels, `(...)`.

    Args:
        logits: `(..., V)`.
        ids: The classes, `(..., K)` int64, none twice in a row that counts. Where K = V there is no tail.
        labels: `(...)` int64, a class in every row that counts.
        mask: `(...)` bool, True = counts: other rows have all classes equal and get no gradient, whatever stands in
            them.

    Example:
        >>> import torch
        >>> [round(p, 4) for p in merged(torch.zeros(1, 4), torch.tensor([[2]]))[0].exp()[0].tolist()]
        [0.25, 0.75]
    """
    rows, classes, shape = logits.flatten(0, -2), ids.flatten(0, -2), ids.shape
    chosen, counts = (None if x is None else x.flatten() for x in (labels, mask))
    chosen = None if chosen is None else chosen.clamp(min=0)
    if shape[-1] < logits.shape[-1]:
        values, rest, right = _Merged.apply(rows, classes, chosen, counts)  # type: ignore[no-untyped-call]
        found = torch.cat([values, rest[:, None]], dim=1)
    else:
        whole = only_counted(rows, counts)
        whole = whole - whole.detach().amax(1, keepdim=True)
        found = whole.gather(1, classes)
        right = found if chosen is None else whole.gather(1, chosen[:, None])[:, 0]
    found = only_counted(found, counts)
    right = None if labels is None else only_counted(right, counts) - found.logsumexp(1)
    return found.log_softmax(1).view(*shape[:-1], found.shape[1]), None if right is None else right.view(shape[:-1])


class _Merged(torch.autograd.Function):
    """The logits of classes, tail and labels, less the row's largest; without labels the tail again."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, labels: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rest, top = logits.new_empty(len(logits)), logits.new_empty(len(logits), 1)
        for at in _runs(logits):
            top[at] = logits[at].amax(1, keepdim=True)
            rest[at] = (logits[at] - top[at]).scatter_(1, ids[at], -torch.inf).logsumexp(1)
        ctx.save_for_backward(logits, ids, labels, mask, rest, top)
        right = rest.clone() if labels is None else (logits.gather(1, labels[:, None]) - top)[:, 0]
        return logits.gather(1, ids) - top, rest, right

    @staticmethod
    def backward(ctx: Any, of_values: Tensor, of_rest: Tensor, of_right: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, labels, mask, rest, top = ctx.saved_tensors

        def gradient(at: slice) -> Tensor:
            """Return it so that its own gradient is finite: no NaN or infinity is multiplied, not even with 0."""
            share = (logits[at] - top[at]).sub_(rest[at, None])
            share = share if mask is None else share.masked_fill_(~mask[at, None], -torch.inf)
            found: Tensor = share.scatter_(1, ids[at], -torch.inf).exp_() * of_rest[at, None]
            found = found.scatter(1, ids[at], of_values[at])
            return found if labels is None else found.scatter_add(1, labels[at, None], of_right[at, None])

        if torch.is_grad_enabled():  # create_graph=True
            found = gradient(slice(None))
        else:
            found = torch.empty_like(logits)
            for at in _runs(logits):
                found[at] = gradient(at)
        return found, None, None, None


def _runs(logits: Tensor) -> Iterator[slice]:
    """Yield runs of rows that stay in a processor's cache; on a GPU, and in a compiled graph, all of them."""
    if logits.is_cuda or torch.compiler.is_compiling():
        rows = max(len(logits), 1)
    else:
        rows = torch.get_num_threads() * max(BLOCK_BYTES // (4 * logits.shape[1]), 1)
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
