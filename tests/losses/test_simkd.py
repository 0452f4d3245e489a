from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.losses.simkd import SimKDLoss, simkd
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.features import FeatureTap
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

CASES = [Case("simkd", simkd, (randn(6, 4, seed=1), randn(6, 4, seed=2)), {}, mask=torch.arange(6) % 2 == 0)]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    student, teacher = randn(6, 4, seed=1), randn(6, 4, seed=2)
    expected = ((student.numpy() - teacher.numpy()) ** 2).mean(1)
    np.testing.assert_allclose(simkd(student, teacher, reduction="none"), expected, rtol=1e-12)
    assert simkd(student, teacher, reduction="sum").item() == pytest.approx(expected.sum())


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"student feature \(2, 3\) and teacher feature \(2, 4\)"):
        simkd(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"mask \(3,\) must have the shape \(2,\)"):
        simkd(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))


def test_the_term_reads_the_projector_of_the_student() -> None:
    term = SimKDLoss()
    assert (term.needs_student, term.needs_teacher) == (("simkd_projector",), ("pooled",))
    student = ModelOutput(torch.zeros(4, 2), {"simkd_projector": randn(4, 3)})
    teacher = ModelOutput(torch.zeros(4, 2), {"pooled": randn(4, 3, seed=1)})
    torch.testing.assert_close(term(student, teacher, {}), (randn(4, 3) - randn(4, 3, seed=1)).square().mean())


def test_a_student_without_the_teachers_classifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="feature 'simkd_projector': BiLSTM has none of this name"):
        FeatureTap(BiLSTM(2, 10), SimKDLoss.needs_student)
