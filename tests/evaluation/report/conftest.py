from __future__ import annotations

from typing import Any

import pytest

from tests.evaluation.report.examples import FIVE, model, models, report_of


@pytest.fixture
def single() -> dict[str, Any]:
    return report_of(models())


@pytest.fixture
def five() -> dict[str, Any]:
    return report_of(models(**FIVE))


@pytest.fixture
def everything() -> dict[str, Any]:
    extra = [
        model("baseline_initialised", [0.78, 0.776, 0.781, 0.779, 0.774]),
        model("finetuned", [0.829, 0.822, 0.826, 0.824, 0.83]),
    ]
    return report_of(models(**FIVE) + extra)
