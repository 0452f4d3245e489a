"""What a budget comes to, by how much data there is."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from omegaconf import DictConfig

from kd_lightning.config.budget import (
    AMOUNTS,
    BYTES_PER_TOKEN,
    SHORT,
    Budget,
    Modality,
    student_examples,
    teacher_epochs,
    views_and_sets,
    worth,
)

BUDGETS: list[Budget] = ["quick", "standard", "best"]
SIZES = [50, 700, 2_000, 7_400, 10_000, 40_000, 500_000]


@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("labelled", SIZES)
def test_a_larger_budget_is_no_less_work(modality: Modality, labelled: int) -> None:
    work = [
        (
            teacher_epochs(budget, modality, labelled),
            student_examples(budget, modality, labelled, started=False),
            student_examples(budget, modality, labelled, started=True),
            views * sets,
        )
        for budget in BUDGETS
        for views, sets in [views_and_sets(budget, modality, labelled, transfer=100)]
    ]
    for less, more in itertools.pairwise(work):
        assert all(a <= b for a, b in zip(less, more, strict=True)), (less, more)
    assert work[0] != work[2]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("labelled", SIZES)
def test_the_teacher_predicts_no_more_than_the_budget_says(budget: Budget, labelled: int) -> None:
    views, sets = views_and_sets(budget, "text", labelled, transfer=300)
    outputs = labelled * (1 + views * sets) + 300
    assert outputs <= max(AMOUNTS["text", budget].outputs, labelled + 300)
    assert sets >= 1


def test_small_sets_get_more_epochs_and_more_views() -> None:
    epochs = [teacher_epochs("standard", "text", labelled) for labelled in SIZES]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] > 4 * epochs[-1]
    views = [views_and_sets("standard", "text", labelled, 0) for labelled in SIZES]
    all_of_them = [number * sets for number, sets in views]
    assert all_of_them == sorted(all_of_them, reverse=True)
    assert (views[0], views[-1]) == ((6, 16), (0, 1))


def test_students_of_trained_layers_need_fewer_examples() -> None:
    for budget in BUDGETS:
        assert student_examples(budget, "text", 1000, True) < student_examples(budget, "text", 1000, False)
    assert student_examples("standard", "corpus", 1000, True) == 3000


def test_long_texts_get_fewer_examples_of_everything() -> None:
    long = worth(size=4 * SHORT * BYTES_PER_TOKEN, max_length=512)
    assert long == 2.0
    assert teacher_epochs("standard", "text", 2_000, long) < teacher_epochs("standard", "text", 2_000)
    assert student_examples("standard", "text", 2_000, False, long) * 2 == student_examples(
        "standard", "text", 2_000, False
    )
    assert views_and_sets("standard", "text", 2_000, 0, long) < views_and_sets("standard", "text", 2_000, 0)
    assert worth(size=4 * SHORT * BYTES_PER_TOKEN, max_length=SHORT) == 1.0  # cut to be short


@pytest.mark.parametrize("data", ["masked_text", "general_documents"])
@pytest.mark.parametrize(
    ("overrides", "sets"),
    [
        (["budget=quick"], 1),
        (["budget=standard"], 3),
        (["budget=best"], 4),
        (["trainer.max_epochs=2"], 2),
        (["trainer.max_epochs=-1", "trainer.max_steps=9"], 4),
    ],
)
def test_a_block_has_no_more_masks_than_epochs_read(
    composed: Callable[..., DictConfig], data: str, overrides: list[str], sets: int
) -> None:
    assert composed(f"data={data}", *overrides).data.mask_sets == sets
