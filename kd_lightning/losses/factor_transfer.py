"""Factor transfer: a paraphraser compresses the teacher's feature, and the student matches the result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.projectors import same_size
from kd_lightning.losses.relations import unit
from kd_lightning.losses.term import Reduction, Term, check_same_shape, in_float32, reduce
from kd_lightning.types import Batch, ModelOutput


@in_float32
def factor_transfer(student_factor: Tensor, teacher_factor: Tensor, reduction: Reduction = "mean") -> Tensor:
    r"""L1 distance of unit-length factors (Kim, Park & Kwak 2018, arXiv 1802.04977, equation 4 with p = 1).

    .. math:: \left\| \frac{f_s}{\|f_s\|_2} - \frac{f_t}{\|f_t\|_2} \right\|_1

    where a factor is all of an example's entries, averaged over examples. It is unchanged when a side is scaled, and at
    most twice the square root of the number of entries. A factor of zeros stays zero. The teacher's factor gets no
    gradient.

    Args:
        student_factor: f_s, `(B, ...)`, from the translator.
        teacher_factor: f_t, the same shape, from the paraphraser.
        reduction: `mean` over examples, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> round(factor_transfer(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])).item(), 4)  # 0.4 + 0.8
        1.2
    """
    check_same_shape(student_factor, teacher_factor, "factor")
    difference = unit(student_factor.flatten(1)) - unit(teacher_factor.detach().flatten(1))
    return reduce(difference.abs().sum(1), None, reduction)


class FactorTransferLoss(Term):
    """Factor transfer between two maps; see `factor_transfer` for the formula.

    The teacher's *paraphraser* is an autoencoder of its map; its code is the teacher's factor. The student's
    *translator* makes a factor of the student's map. In the paper the paraphraser is trained first, without labels, and
    then kept. Here it is trained in the same run, so that a method needs no stage of its own: for the first `pretrain`
    of the training this term is

        mean squared error of the reconstruction + distance of the factors,

    and after that the distance alone. The reconstruction trains the paraphraser only, and the distance the student and
    its translator only: the teacher's factor is detached. From then on the paraphraser gets no gradient at all, so that
    it stays as it is. (Under DDP that needs `trainer.strategy=ddp_spawn_find_unused_parameters_true`.)

    Args:
        student_feature: Name of the student's map; see `kd_lightning.models.features`.
        teacher_feature: Name of the teacher's.
        rate: Channels of the factors, as a share of the teacher's (the paper's k, 0.5).
        pretrain: Share of the training in which the paraphraser is trained, in (0, 1].

    Raises:
        ValueError: A rate or share that is not in (0, 1].
    """

    paraphraser: nn.Module
    reconstruction: nn.Module
    translator: nn.Module

    def __init__(
        self,
        student_feature: str = "feature_maps[-1]",
        teacher_feature: str = "feature_maps[-1]",
        rate: float = 0.5,
        pretrain: float = 0.3,
    ) -> None:
        super().__init__()
        for name, value in (("rate", rate), ("pretrain", pretrain)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be in (0, 1]")
        self.needs_student, self.needs_teacher = (student_feature,), (teacher_feature,)
        self.rate, self.pretrain = rate, pretrain

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build paraphraser and translator.

        Raises:
            ValueError: Features that are no maps.
        """
        of_student, of_teacher = student.features[self.needs_student[0]], teacher.features[self.needs_teacher[0]]
        if of_student.ndim != 4 or of_teacher.ndim != 4:
            raise ValueError(
                f"factor transfer: {self.needs_student[0]} of the student is {tuple(of_student.shape)} and "
                f"{self.needs_teacher[0]} of the teacher {tuple(of_teacher.shape)}; both must be maps (B, C, H, W)"
            )
        narrow, wide = of_student.shape[1], of_teacher.shape[1]
        code = max(round(self.rate * wide), 1)
        self.paraphraser = nn.Sequential(_block(wide, wide), _block(wide, code), _block(code, code))
        # The last layer is bare: a map's values need not be those of a normalised activation.
        last = nn.Conv2d(wide, wide, 3, padding=1)
        self.reconstruction = nn.Sequential(_block(code, code), _block(code, wide), last)
        self.translator = nn.Sequential(_block(narrow, narrow), _block(narrow, code), _block(code, code))

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the distance of the factors and, while the paraphraser is trained, its error."""
        of_student, of_teacher = same_size(
            student.features[self.needs_student[0]], teacher.features[self.needs_teacher[0]].detach()
        )
        if self.progress < self.pretrain:
            factor = self.paraphraser(of_teacher)
            error = F.mse_loss(self.reconstruction(factor), of_teacher)
            return error + factor_transfer(self.translator(of_student), factor)
        with torch.no_grad():
            self.paraphraser.eval()  # its BatchNorms stay, too
            factor = self.paraphraser(of_teacher)
        return factor_transfer(self.translator(of_student), factor)


def _block(inside: int, outside: int) -> nn.Module:
    convolution = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.LeakyReLU(0.1))
