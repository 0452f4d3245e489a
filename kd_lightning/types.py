"""The two types everything agrees on: what goes into a model and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

Batch = dict[str, Tensor]
"""A batch, under Hugging Face's names.

* `input_ids`, `attention_mask`, `token_type_ids`: `(B, L)` int64; or `pixel_values`: `(B, C, H, W)` float
* `labels`: `(B,)` or `(B, L)` int64, `IGNORE` where there is no label; scores to regress are float32, NaN where none
* `keep`: `(B, L)` bool, which tokens are predicted, or after `Task.compared` which rows of logits count
* `index`: `(B,)` int64, each example's stable position in its data set
* `task`: `(B,)` int64, which of several tasks an example is of (`kd_lightning.tasks.MultiTask`)
* `teacher_*`: the same entries for a teacher whose tokenizer differs from the student's
"""

IGNORE = -100
"""The label that counts nowhere: neither in a loss nor in a metric (torch's `ignore_index` default)."""

MOST_PADDING_ROWS = 127
"""Embedding tables are padded to a multiple of up to 128 rows; a larger difference means another tokenizer."""


def is_labelled(labels: Tensor) -> Tensor:
    """Return which labels are labels: neither `IGNORE` nor NaN."""
    return (labels != IGNORE) & ~labels.isnan()


@dataclass
class ModelOutput:
    """What every model is adapted to, teacher or student.

    Attributes:
        logits: Unnormalised scores, `(B, C)` for classification or `(B, L, V)` for language modelling.
        features: Intermediate activations by name; only what the objective asked for.
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
