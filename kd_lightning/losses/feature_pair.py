"""Base class of terms that compare one projected feature of the student with one of the teacher."""

from __future__ import annotations

from torch import Tensor, nn

from kd_lightning.losses.projectors import Projection, projector, same_size
from kd_lightning.losses.term import Averages, Term, only_counted, token_mask
from kd_lightning.types import Batch, ModelOutput


class FeaturePairTerm(Term):
    """A term on one feature of each network, both of one kind: vectors, tokens or maps.

    Args:
        student_feature: Name of the student's feature; see `kd_lightning.models.features`.
        teacher_feature: Name of the teacher's.
        projector: Takes the student's feature to the teacher's width; trained with the student.
    """

    averages: Averages = "tokens"
    projector: Projection | nn.Module

    def __init__(
        self, student_feature: str, teacher_feature: str, projector: Projection | nn.Module = "linear"
    ) -> None:
        super().__init__()
        self.needs_student, self.needs_teacher = (student_feature,), (teacher_feature,)
        self.projector = projector

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the projector.

        Raises:
            ValueError: As `kd_lightning.losses.projectors.projector`.
        """
        of_student, of_teacher = self.features(student, teacher)
        self.projector = projector(self.projector, of_student, of_teacher, self.needs_student[0])
        if of_student.ndim != 3:
            self.averages = "examples"

    def features(self, student: ModelOutput, teacher: ModelOutput) -> tuple[Tensor, Tensor]:
        """Return the two features as the networks output them."""
        return student.features[self.needs_student[0]], teacher.features[self.needs_teacher[0]]

    def pair(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the student's feature, projected, the teacher's, and for tokens the mask of those that count.

        Of two maps the larger one is average pooled to the smaller one's height and width.
        """
        if isinstance(self.projector, str):
            raise ValueError(f"{type(self).__name__}: the projector is not built; call Objective.connect first")
        of_student, of_teacher = self.features(student, teacher)
        mask = token_mask(batch, of_student, of_teacher)
        return *same_size(self.projector(only_counted(of_student, mask)), of_teacher.detach()), mask
