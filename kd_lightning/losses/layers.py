"""Layer maps, which pair student and teacher layers, and the base class of layer-wise terms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kd_lightning.losses.projectors import Projection, projector
from kd_lightning.losses.term import Averages, Depth, Term, at_least_float32, only_counted, token_mask
from kd_lightning.types import Batch, ModelOutput

Kind = Literal["hidden", "attention", "qkv", "feature_maps"]
LayerMap = Literal["uniform", "last", "first", "emd"] | Sequence[tuple[int, int]]
"""How m student layers are paired with n >= m teacher layers.

* `uniform`: student layer i (from 1) with teacher layer round(i n / m): the last with the last
* `last`: the student's layers with the teacher's last m
* `first`: ... its first m
* `emd`: every layer with every layer, weighted by the optimal transport between them (Li et al. 2020, arXiv 2010.06133)
* pairs `[[student, teacher], ...]` of layers counted from 0, negative ones from the end
"""


def layer_pairs(layers: LayerMap, student: int, teacher: int) -> list[tuple[int, int]]:
    """Return the pairs (student layer, teacher layer), counted from 0, that a layer map makes.

    Args:
        layers: See `LayerMap`.
        student: m, the student's number of layers.
        teacher: n, the teacher's.

    Raises:
        ValueError: An unknown map, an empty list, a layer that does not exist, or a student deeper than its teacher.

    >>> layer_pairs("uniform", 3, 12), layer_pairs("last", 2, 6)
    ([(0, 3), (1, 7), (2, 11)], [(0, 4), (1, 5)])
    """
    if not isinstance(layers, str):
        if not layers:
            raise ValueError("layers: the list of pairs is empty")
        for pair in layers:
            fits = isinstance(pair, Sequence) and len(pair) == 2
            if not (fits and -student <= pair[0] < student and -teacher <= pair[1] < teacher):
                raise ValueError(
                    f"layers: {pair} is not a pair of a student's layer (it has {student}) and a teacher's "
                    f"({teacher}), counted from 0"
                )
        return [(s % student, t % teacher) for s, t in layers]
    if layers not in ("uniform", "last", "first", "emd"):
        raise ValueError(f"layers={layers!r}: expected uniform, last, first, emd or a list of pairs")
    if layers == "emd":
        return [(s, t) for s in range(student) for t in range(teacher)]
    if student > teacher:
        raise ValueError(f"layers={layers}: the student has {student} layers and the teacher {teacher}; give the pairs")
    if layers == "uniform":
        return [(i, round((i + 1) * teacher / student) - 1) for i in range(student)]
    if layers == "last":
        return [(i, teacher - student + i) for i in range(student)]
    return [(i, i) for i in range(student)]


def transport(costs: Tensor, sharpness: float = 20.0, iterations: int = 100) -> Tensor:
    r"""Return the plan that moves equal masses from rows to columns at least cost, smoothed by entropy.

    .. math:: \arg\min_F \sum_{ij} F_{ij} \frac{C_{ij}}{\bar C} - \frac{1}{sharpness} H(F),
              \quad \sum_j F_{ij} = 1/m, \quad \sum_i F_{ij} = 1/n

    by Sinkhorn's iterations in log space (Cuturi 2013, arXiv 1306.0895).

    Args:
        costs: C, `(m, n)`, finite and not negative.
        sharpness: The larger, the nearer to the unsmoothed plan.
        iterations: How often rows and columns are scaled.

    Returns:
        F, `(m, n)`, which sums to 1, without a graph. Its columns' sums are exact, its rows' nearly: with the values
        above to 1 %.
    """
    with torch.no_grad():
        scores = -sharpness * costs.detach() / costs.detach().mean().clamp(min=torch.finfo(costs.dtype).tiny)
        rows, columns = (scores.new_tensor(float(size)).log() for size in scores.shape)
        for _ in range(iterations):
            scores = scores - scores.logsumexp(1, keepdim=True) - rows
            scores = scores - scores.logsumexp(0, keepdim=True) - columns
        return scores.exp()


class LayerwiseTerm(Term):
    r"""A term that compares layers of the student with layers of the teacher and averages over the pairs.

    Subclasses implement `compare`. With `layers=emd` the pairs' values are costs, and their mean is
    weighted by the optimal transport between the two networks' layers, computed for each batch.

    Args:
        layers: See `LayerMap`; resolved by `plan`.
        projector: Takes a student's layer to the teacher's width: one for each student layer; a module of your own is
            shared by all. None: `compare` gets the layers as the networks output them.

    Attributes:
        kind: The feature that is compared.
    """

    averages: Averages = "tokens"
    kind: Kind = "hidden"

    def __init__(self, layers: LayerMap = "uniform", projector: Projection | nn.Module | None = None) -> None:
        super().__init__()
        self.layers, self.projection = layers, projector
        self.pairs: list[tuple[int, int]] = []
        self.projectors = nn.ModuleDict()

    def plan(self, student: Depth, teacher: Depth) -> None:
        """Pair the layers.

        Raises:
            ValueError: As `layer_pairs`.
        """
        self.pairs = self.pair(student(self.kind), teacher(self.kind))
        self.needs_student = tuple(dict.fromkeys(self.feature(s) for s, _ in self.pairs))
        self.needs_teacher = tuple(dict.fromkeys(self.feature(t) for _, t in self.pairs))

    def pair(self, student: int, teacher: int) -> list[tuple[int, int]]:
        """Return the pairs for networks of these depths; a method that leaves layers out overrides this."""
        return layer_pairs(self.layers, student, teacher)

    def feature(self, layer: int) -> str:
        """Return the name of a layer's feature; `hidden[0]` is the first layer's input, so layer i is i + 1."""
        return f"{self.kind}[{layer + 1 if self.kind == 'hidden' else layer}]"

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the projectors.

        Raises:
            ValueError: As `projector`, or teacher layers of different widths for one student layer.
        """
        if self.projection is None:
            return
        widths: dict[int, int] = {}
        for s, t in self.pairs:
            of_student, of_teacher = student.features[self.feature(s)], teacher.features[self.feature(t)]
            width = of_teacher.shape[1 if of_teacher.ndim == 4 else -1]
            if widths.setdefault(s, width) != width:
                raise ValueError(
                    f"{self.feature(s)} has one projector, but is paired with teacher layers of widths {widths[s]} and "
                    f"{width}"
                )
            if str(s) not in self.projectors:
                self.projectors[str(s)] = projector(self.projection, of_student, of_teacher, self.feature(s))

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the value of one pair, a scalar.

        Args:
            student: The student's feature, projected.
            teacher: The teacher's.
            mask: `(B, L)`, True = counts; None where there is none (images).
        """

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the pairs, or with `emd` its weighted form."""
        if not self.pairs:
            raise ValueError(
                f"{type(self).__name__}: no layers are paired; call Objective.plan(student, teacher) first"
            )
        values = torch.stack([self._pair(student, teacher, batch, s, t) for s, t in self.pairs])
        if self.layers != "emd":
            return values.mean()
        costs = values.view(len(self.needs_student), len(self.needs_teacher))
        return (transport(costs) * costs).sum()

    def _pair(self, student: ModelOutput, teacher: ModelOutput, batch: Batch, s: int, t: int) -> Tensor:
        of_student = at_least_float32(student.features[self.feature(s)])
        of_teacher = at_least_float32(teacher.features[self.feature(t)]).detach()
        mask = token_mask(batch, of_student, of_teacher, axis=-1 if self.kind == "attention" else 1)
        if self.projection is not None:
            of_student = self.projectors[str(s)](only_counted(of_student, mask))
        return self.compare(of_student, of_teacher, mask)
