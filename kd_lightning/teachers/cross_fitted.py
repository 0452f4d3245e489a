"""Teachers that each were trained without one fold, and answer for what they have not seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.teachers.ensemble import Combine, EnsembleTeacher, combined
from kd_lightning.teachers.frozen import Teacher
from kd_lightning.types import Batch, ModelOutput


class CrossFittedTeacher(EnsembleTeacher):
    """Answers about a training example with the one member that was trained without it, about others with all.

    A teacher that has memorised its training split says little there beyond the labels. Of K members, member k is
    trained without fold k, and so has not seen the labels of that fold: its answers there are those that it would give
    to a new example (as in stacking, Wolpert 1992, and in cross-fitting, Chernozhukov et al. 2018, arXiv 1608.00060).
    Exact duplicates of an example may lie in another fold; data that drop them beforehand have none.

    Each member is asked only about what it has to answer.

    Args:
        members: K teachers.
        folds: By `index`: the number of the member that has not seen the example, -1 where none has; `(N,)` int64.
        combine: What is averaged where none has seen it; see `EnsembleTeacher`.
    """

    def __init__(self, members: Sequence[Teacher], folds: Tensor, combine: Combine = "probabilities") -> None:
        super().__init__(members, None, combine)
        self.folds = folds

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return each example's logits in float32."""
        index = batch["index"]
        fold = self.folds[index.cpu()].to(index.device)
        unseen = fold < 0  # by any
        logits, of_all = torch.empty(0), []
        for number, member in enumerate(self.members):
            rows = unseen | (fold == number)
            if not rows.any():
                continue
            said = member({name: value[rows] for name, value in batch.items()}).logits.float()
            if not logits.numel():
                logits = said.new_zeros(len(index), *said.shape[1:])
            logits[rows] = combined([said], [1.0], self.combine)  # on the scale of what all say together
            of_all.append(said[unseen[rows]])
        if unseen.any():
            logits[unseen] = combined(of_all, self.weights, self.combine)
        return ModelOutput(logits)
