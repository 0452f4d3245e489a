"""Contrastive representation distillation: identify an example's teacher embedding among others."""

from __future__ import annotations

import math

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.term import (
    Reduction,
    Term,
    check_mask,
    check_positive,
    check_same_shape,
    in_float32,
    masked_mean,
    only_counted,
    reduce,
)
from kd_lightning.types import IGNORE, Batch, ModelOutput


@in_float32
def crd(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    student_negatives: Tensor,
    teacher_negatives: Tensor,
    offsets: tuple[float, float] | Tensor,
    temperature: float = 0.07,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Noise-contrastive estimation on embeddings, in nats (Tian, Krishnan & Isola 2019, arXiv 1910.10699).

    .. math:: -\log h(s \cdot t) - \sum_{k=1}^K \log\left(1 - h(s \cdot t_k)\right) \; + \; \text{the same of }
              t \cdot s \text{ and } t \cdot s_k, \qquad
              h(x) = \frac{e^{x / \tau} / Z}{e^{x / \tau} / Z + K / M}

    averaged over the examples that count: h is the probability that a pair is one example's and not one of K drawn from
    M. In logistic form h is the sigmoid of x / tau - log Z - log(K / M); the sum of these logarithms is an offset, one
    for each side. The paper has Z = 1 (equation 19); its program, as this, estimates it, so that h begins at chance.

    Both embeddings of the pair get a gradient, since the teacher's side has a learned embedding too; what is below it
    must be detached. The negatives get none.

    Args:
        student_embedding: s, `(B, D)`, of length 1.
        teacher_embedding: t, `(B, D)`, of length 1.
        student_negatives: s_k, `(B, K, D)`: the student's embeddings of other examples.
        teacher_negatives: t_k, `(B, K, D)`.
        offsets: log Z + log(K / M) for s against t_k, and for t against s_k.
        temperature: tau > 0.
        mask: `(B,)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Shapes that do not fit, or a temperature that is not positive.

    Example:
        >>> import torch
        >>> one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]]])
        >>> round(crd(one, one, other, other, (0.0, 0.0), temperature=1.0).item(), 4)  # 2 (log(1 + 1/e) + log 2)
        2.0128
    """
    check_same_shape(student_embedding, teacher_embedding, "embedding")
    check_same_shape(student_negatives, teacher_negatives, "negatives")
    batch, width = student_embedding.shape
    if student_negatives.ndim != 3 or (len(student_negatives), student_negatives.shape[2]) != (batch, width):
        raise ValueError(
            f"negatives {tuple(student_negatives.shape)} must be (B, K, D) for embeddings "
            f"{tuple(student_embedding.shape)}"
        )
    check_positive("temperature", temperature)
    check_mask(mask, (batch,))
    student_embedding, teacher_embedding, student_negatives, teacher_negatives = (
        only_counted(x, mask) for x in (student_embedding, teacher_embedding, student_negatives, teacher_negatives)
    )
    positive = (student_embedding * teacher_embedding).sum(1) / temperature
    values = torch.zeros_like(positive)
    sides = ((student_embedding, teacher_negatives), (teacher_embedding, student_negatives))
    for (anchor, others), offset in zip(sides, offsets, strict=True):
        scores = torch.einsum("bd,bkd->bk", anchor, others.detach()) / temperature
        values = values - F.logsigmoid(positive - offset) - F.logsigmoid(offset - scores).sum(1)
    return reduce(values, mask, reduction)


class CRDLoss(Term):
    """Contrastive distillation with a bank of every example's embeddings; see `crd` for the formula.

    Each network's feature (the mean of one that has positions) goes through a linear embedding and is scaled to length
    1. Two banks hold, for each example of the data by `batch["index"]`, an average of its embeddings over the epochs:
    random at first, then `momentum` times the old one plus the rest of the new one, to length 1 again, in every
    training step after the loss. They are buffers, so a checkpoint has them, and a resumed run equals an uninterrupted
    one. The normalisation constants Z are estimated once, in `connect`, from random banks.

    * Negatives are drawn uniformly, with replacement, from the examples of other classes that the banks have taken in
      (one without a label counts as one); for an example without a label, from all others that they have. Examples
      that are never trained on, such as those of validation, are thus no negatives: their rows stay random. Only while
      an example has fewer than `FEW` negatives, rows not taken in are drawn as well. The same ones serve both sides.
      Each batch takes K numbers from torch's global generator, which every example shifts by its own, by its index.
    * An example without a stable index (-1, of a view created anew) is an anchor like others, and adds nothing
      in the banks.
    * Where an index comes twice in a batch, the bank takes in the mean of both embeddings.
    * Of several processes each has the same banks, which take in the examples of all, and the first one draws: together
      they train as one process with the whole batch.

    Unlike the paper's program the pair of one example is made of the embeddings of this step, not of one of them and
    the other's bank, which at first is random and later an epoch old.

    Args:
        student_feature: Name of the student's feature; see `kd_lightning.models.features`.
        teacher_feature: Name of the teacher's.
        embedding_size: Width D of the embeddings; the paper's is 128.
        negatives: K for each example; the paper's is 16384, which is for a GPU.
        temperature: tau > 0.
        momentum: Share of the old embedding that stays in the bank, in [0, 1).

    Raises:
        ValueError: Sizes or values out of range, or, at the first batch, one without `index`.
    """

    FEW = 8
    """With fewer known negatives than this, rows of the banks that are still random are used too."""
    SHIFT = (5**0.5 - 1) / 2
    """How far apart the draws of examples with neighbouring indices begin; its multiples spread evenly over [0, 1)."""

    bank_s: Tensor
    bank_t: Tensor
    seen: Tensor
    classes: Tensor
    offsets: Tensor
    embed_s: nn.Module
    embed_t: nn.Module

    def __init__(
        self,
        student_feature: str = "pooled",
        teacher_feature: str = "pooled",
        embedding_size: int = 128,
        negatives: int = 512,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        for name, size in (("embedding_size", embedding_size), ("negatives", negatives)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        check_positive("temperature", temperature)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1)")
        self.needs_student, self.needs_teacher = (student_feature,), (teacher_feature,)
        self.embedding_size, self.negatives = embedding_size, negatives
        self.temperature, self.momentum = temperature, momentum

    @torch.no_grad()
    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build embeddings and banks, and estimate Z with them.

        Raises:
            ValueError: Fewer than two examples, which leaves no negatives.
        """
        if examples < 2:
            raise ValueError(f"CRD needs examples to contrast, and the data has {examples}")
        features = student.features[self.needs_student[0]], teacher.features[self.needs_teacher[0]]
        self.embed_s, self.embed_t = (nn.Linear(self._vectors(x, None).shape[1], self.embedding_size) for x in features)
        device = features[0].device
        for name in ("bank_s", "bank_t"):
            bank = F.normalize(torch.randn(examples, self.embedding_size), dim=1)
            self.register_buffer(name, bank.to(device))
        self.register_buffer("seen", torch.zeros(examples, dtype=torch.bool, device=device))
        self.register_buffer("classes", torch.full((examples,), IGNORE, device=device))
        embedded = [
            F.normalize(embed.to(device)(self._vectors(x, None)), dim=1)
            for embed, x in zip((self.embed_s, self.embed_t), features, strict=True)
        ]
        drawn = torch.randint(examples, (self.negatives,)).to(device)
        scores = [embedded[0] @ self.bank_t[drawn].T, embedded[1] @ self.bank_s[drawn].T]
        # Z is M times the mean of exp(x / tau), so the M of K / M cancels.
        means = [(x.flatten() / self.temperature).logsumexp(0) - math.log(x.numel()) for x in scores]
        self.register_buffer("offsets", torch.stack(means) + math.log(self.negatives))

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the contrastive loss, averaged over examples; in training, update the banks."""
        if "index" not in batch:
            raise ValueError("CRD keeps embeddings by batch['index'], which this batch does not have")
        mask = batch.get("attention_mask")
        of_student = self._vectors(student.features[self.needs_student[0]], mask)
        mask = batch.get("teacher_attention_mask", mask)
        of_teacher = self._vectors(teacher.features[self.needs_teacher[0]].detach(), mask)
        embedded_s = F.normalize(self.embed_s(of_student), dim=1)
        embedded_t = F.normalize(self.embed_t(of_teacher), dim=1)
        index, labels = batch["index"], self._labels(batch)
        drawn = self._draw(index, labels)
        value = crd(embedded_s, embedded_t, self.bank_s[drawn], self.bank_t[drawn], self.offsets, self.temperature)
        if self.training:
            index = _everyones(index)
            self._note(index, _everyones(labels))
            self._take_in(self.bank_s, index, _everyones(embedded_s.detach()))
            self._take_in(self.bank_t, index, _everyones(embedded_t.detach()))
        return value

    @staticmethod
    def _vectors(feature: Tensor, mask: Tensor | None) -> Tensor:
        return masked_mean(feature, mask.bool() if mask is not None and feature.ndim == 3 else None)

    @staticmethod
    def _labels(batch: Batch) -> Tensor:
        """Return a class for each example `(B,)`; `IGNORE` without one, as for labels of tokens or scores."""
        labels, index = batch.get("labels"), batch["index"]
        if labels is None or labels.shape != index.shape or labels.is_floating_point():
            return torch.full_like(index, IGNORE)
        return labels

    @torch.no_grad()
    def _note(self, index: Tensor, labels: Tensor) -> None:
        known = index >= 0
        self.seen[index[known]] = True
        self.classes[index[known]] = labels[known]

    @torch.no_grad()
    def _draw(self, index: Tensor, labels: Tensor) -> Tensor:
        """Return `(B, K)` positions in the banks.

        With the examples taken in sorted by class, and the rest behind them, those to draw from are the first so many,
        or all, and those excluded for an anchor are one run: its class, or itself. A number is drawn below the count of
        the others and, from the run on, moved behind it.
        """
        count, known = len(self.seen), self.seen.sum()
        classes, order = torch.where(self.seen, self.classes, torch.iinfo(torch.int64).max).sort(stable=True)
        start = torch.searchsorted(classes, labels)
        end = torch.searchsorted(classes, labels, right=True)
        place = order.argsort()[index.clamp(min=0)]
        alone = (labels == IGNORE) | (end - start == count)  # no label, or no other class
        start = torch.where(alone, place, start)
        end = torch.where(alone, place + (index >= 0), end)
        drawable = torch.where(known - (end - start) < self.FEW, count, known)
        start, end = start.minimum(drawable).unsqueeze(1), end.minimum(drawable).unsqueeze(1)
        others = drawable.unsqueeze(1) - (end - start)
        common = torch.rand(self.negatives, dtype=torch.float64, device=index.device)
        if self.training:
            common = _first_ones(common)
        uniform = (common + self.SHIFT * index.unsqueeze(1)) % 1.0
        drawn = (uniform * others).long()  # float64: in float32 a product may round up to the count itself
        return order[drawn + torch.where(drawn >= start, end - start, 0)]

    @torch.no_grad()
    def _take_in(self, bank: Tensor, index: Tensor, embedded: Tensor) -> None:
        known = index >= 0
        rows, position = index[known].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        new = bank.new_zeros(len(rows), bank.shape[1]).index_add_(0, position, embedded[known].to(bank.dtype))
        bank[rows] = F.normalize(self.momentum * bank[rows] + (1 - self.momentum) * F.normalize(new, dim=1), dim=1)


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _first_ones(x: Tensor) -> Tensor:
    """Return the first process's tensor."""
    if _together():
        torch.distributed.broadcast(x, src=0)
    return x


def _everyones(x: Tensor) -> Tensor:
    """Return the tensors of all processes, joined; in training all have as many examples."""
    if not _together():
        return x
    gathered = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, x.contiguous())
    return torch.cat(gathered)
