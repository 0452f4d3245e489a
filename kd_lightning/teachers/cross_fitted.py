"""Teachers trained without one fold each, which predict the examples they have not seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.teachers.ensemble import Combine, EnsembleTeacher, combined
from kd_lightning.teachers.frozen import Teacher
from kd_lightning.types import Batch, ModelOutput


class CrossFittedTeacher(EnsembleTeacher):
    """Predicts a training example with the member trained without it, and other examples with all members.

    A teacher that has memorised its training split adds little to the labels there. Of K members, member k is trained
    without fold k and has not seen its labels, so its outputs there are those for a new example (as in stacking,
    Wolpert 1992, and cross-fitting, Chernozhukov et al. 2018, arXiv 1608.00060). Exact duplicates of an example may lie
    in another fold, unless the data drop them.

    Each member runs only on the examples it predicts.

    Args:
        members: K teachers.
        folds: By `index`: the number of the member that has not seen the example, -1 if none has; `(N,)` int64.
        combine: What is averaged over members for examples that no member has seen; see `EnsembleTeacher`.
    """

    def __init__(self, members: Sequence[Teacher], folds: Tensor, combine: Combine = "probabilities") -> None:
        super().__init__(members, None, combine)
        self.folds = folds

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return each example's logits in float32."""
        self.refuse_spans(batch)
        index = batch["index"]
        fold = self.folds[index.cpu()].to(index.device)
        unseen = fold < 0  # by any
        logits, of_all = torch.empty(0), []
        for number, member in enumerate(self.members):
            rows = unseen | (fold == number)
            if not rows.any():
                continue
            output = member({name: value[rows] for name, value in batch.items()}).logits.float()
            if not logits.numel():
                logits = output.new_zeros(len(index), *output.shape[1:])
            logits[rows] = combined([output], [1.0], self.combine)  # on the scale of the members' mean
            of_all.append(output[unseen[rows]])
        if unseen.any():
            logits[unseen] = combined(of_all, self.weights, self.combine)
        return ModelOutput(logits)
