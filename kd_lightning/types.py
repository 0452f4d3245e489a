"""The two types everything agrees on: what goes into a model and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""A batch, under Hugging Face's names.

* `input_ids`, `attention_mask`, `token_type_ids`: `(B, L)` int64; or `pixel_values`: `(B, C, H, W)` float
* `position_ids`, `document_ids`: `(B, L)` int64, of packed text: a token's place in its document, and which document,
  -1 at padding; a token attends within its document
* `token_bytes`: `(B, L)` int64, how many bytes of text each token stands for
* `of_document`: `(B, L)` int64, which document each token is of, where there are no `document_ids`: tokens are drawn by
  the document, and so are errors of means over them
* `labels`: `(B,)` or `(B, L)` int64, `IGNORE` where there is no label; scores to regress are float32, NaN where none
* `keep`: `(B, L)` bool, which rows of logits count
* `masked_places`: `(B, M)` int64, where the masked tokens of a text are: logits are of these alone, and so are
  `labels`, `keep` and `of_document`, `(B, M)`
* `index`: `(B,)` int64, each example's stable position in its data set
* `task`: `(B,)` int64, which of several tasks an example is of (`kd_lightning.tasks.MultiTask`)
* `begins`: `(B, L)` bool, which kept tokens begin a word; absent where each does
* `window_of`: `(B,)` int64, the number of the text that a row is a window of; -1 where it is a whole text
* `question`: `(B,)` int64, the number of the question that a row is a window of: logits are of starts and ends of spans
* `group`, `place`, `text`: `(B,)` int64, of pairs and triplets of texts: the number of a text's own, 0 where it is the
  query, 1 the positive and more a negative, and a number that equal texts have in common
* `score`: `(B,)` float32, how similar the two texts of a pair are, NaN where nobody has scored them
* `spans`: `(B, M, 4)` int64, where student's and teacher's tokens of the same text begin and end, of other tokenizers
* `teacher_rows`: `(B, L')` bool, which of the teacher's tokens stand for those that `keep` has, in the same order
* `teacher_*`: the same entries for a teacher whose tokenizer differs from the student's; `teacher_keep` `(B, L')` are
  the rows of its own logits that are stored
"""

NEXT_LOG_PROB = "next_log_prob"
"""The feature `(B, L, 1)` of a language model: the log probability of each row's next token, 0 in the last row."""

IGNORE = -100
"""The label that counts nowhere: neither in a loss nor in a metric (torch's `ignore_index` default)."""

START, END = 1, 2
"""The bits of a position's label, where labels are of spans: one starts there, one ends there."""

AT_ONCE = 2**20
"""How many logits a CPU goes through together when the largest are looked for: they stay in its cache."""

MOST_PADDING_ROWS = 127
"""Embedding tables are padded to a multiple of up to 128 rows; a larger difference means another tokenizer."""


def is_labelled(labels: Tensor) -> Tensor:
    """Return which labels are labels: neither `IGNORE` nor NaN."""
    return (labels != IGNORE) & ~labels.isnan()


class SparseLogits(NamedTuple):
    """K logits of each row, for large vocabularies: the largest and the others' mass, or drawn ones.

    Attributes:
        values: The K largest logits, or these less one number for each row, `(..., K)`. Drawn: log probabilities.
        ids: Their classes, `(..., K)` int64, no class twice in a row that counts.
        rest: The logarithm of the sum of exp of all other logits, less the same number, `(...)`. Not read where K = V.
            Drawn: that of the threshold of probability below which a class has it as its weight (`weights`).
        classes: V.
        drawn: Whether the classes were drawn (`kd_lightning.teachers.sampled`).
    """

    values: Tensor
    ids: Tensor
    rest: Tensor
    classes: int
    drawn: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of all logits, `(..., V)`."""
        return torch.Size([*self.rest.shape, self.classes])

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.rest.device

    @property
    def likeliest(self) -> Tensor:
        """The likeliest class of each row, `(...)`; of drawn ones that of these."""
        return self.ids.gather(-1, self.values.argmax(-1, keepdim=True))[..., 0]

    def to(self, device: torch.device) -> SparseLogits:
        """Return it on a device."""
        return self._replace(values=self.values.to(device), ids=self.ids.to(device), rest=self.rest.to(device))

    def at(self, places: Tensor | tuple[Tensor, ...]) -> SparseLogits:
        """Return the rows where `places` is True, or that it numbers."""
        return self._replace(values=self.values[places], ids=self.ids[places], rest=self.rest[places])

    @classmethod
    def of(cls, logits: Tensor, k: int) -> SparseLogits:
        """Return the sparse form of logits `(..., V)`."""
        flat, at_once = logits.reshape(-1, logits.shape[-1]), max(AT_ONCE // logits.shape[-1], 1)
        if logits.device.type == "cpu" and len(flat) > at_once:
            parts = [cls.of(rows, k) for rows in torch.split(flat, at_once)]
            values, ids, rest = (torch.cat(each) for each in list(zip(*parts, strict=True))[:3])
            shape = logits.shape[:-1]
            return cls(values.view(*shape, k), ids.view(*shape, k), rest.view(shape), logits.shape[-1])
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        values, ids = logits.topk(k)
        return cls(values, ids, logits.scatter(-1, ids, -torch.inf).logsumexp(-1), logits.shape[-1])


@dataclass
class ModelOutput:
    """What every model is adapted to, teacher or student.

    Attributes:
        logits: Unnormalised scores, `(B, C)` for classification or `(B, L, V)` for language modelling; `(B, L, 0)` of
            a network that leaves out its output layer or a teacher that gives `sparse` alone.
        features: Intermediate activations by name; only those that the objective needs.
        sparse: The logits in sparse form, where a teacher gives only these.
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    sparse: SparseLogits | None = None
