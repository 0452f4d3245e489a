"""How much work a run does where nothing else is set: by `budget`, and by how much data there is.

All amounts are counts of examples, so that a run does the same work on every machine and with every batch size. For
10,000 short texts on two cores `quick` is meant to take about 5 minutes, `standard` 20 and `best` 60.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Budget = Literal["quick", "standard", "best"]
Modality = Literal["text", "image", "corpus"]

MOST_VIEW_SETS = 16
"""More views of an example than six times as many say little more about it."""

SHORT = 30
"""Tokens of a text up to which it is short."""

BYTES_PER_TOKEN = 4.5
"""Of English, in UTF-8; of Chinese about 3."""


def worth(size: float, max_length: int) -> float:
    """Return for how many short texts one of `size` bytes counts, cut to `max_length` tokens.

    It is the square root of how much longer it is: a run of texts nine times as long takes three times as long, with a
    third of the examples.

    >>> worth(100, 128), worth(1215, 512), worth(9_999, 30)
    (1.0, 3.0, 1.0)
    """
    return math.sqrt(max(min(size / BYTES_PER_TOKEN, max_length) / SHORT, 1.0))


@dataclass(frozen=True)
class Amounts:
    """What a budget allows, in examples.

    Attributes:
        teacher: How many the teacher is fine-tuned on, every repetition counted.
        epochs: The fewest and the most epochs of its fine-tuning.
        fresh: How many a student of fresh weights is trained on.
        started: How many a student is trained on that starts from trained layers.
        outputs: How many the teacher predicts for its students: the labelled ones, views and the transfer set.
    """

    teacher: int
    epochs: tuple[int, int]
    fresh: int
    started: int
    outputs: int


AMOUNTS: dict[tuple[Modality, Budget], Amounts] = {
    ("text", "quick"): Amounts(14_000, (1, 12), 96_000, 24_000, 18_000),
    ("text", "standard"): Amounts(22_000, (2, 20), 384_000, 64_000, 240_000),
    ("text", "best"): Amounts(37_000, (3, 30), 1_024_000, 192_000, 480_000),
    ("image", "quick"): Amounts(150_000, (2, 40), 64_000, 64_000, 60_000),
    ("image", "standard"): Amounts(430_000, (4, 60), 192_000, 192_000, 120_000),
    ("image", "best"): Amounts(1_000_000, (8, 90), 512_000, 512_000, 360_000),
}
CORPUS_EPOCHS: dict[Budget, int] = {"quick": 1, "standard": 3, "best": 6}
"""How often language models go through their text."""


def mask_sets(budget: Budget, max_epochs: int | str) -> int:
    """Return how many masks a training block has: one an epoch (`trainer.max_epochs`), 4 at most.

    >>> mask_sets("standard", "auto"), mask_sets("quick", 2), mask_sets("best", -1)
    (3, 2, 4)
    """
    epochs = CORPUS_EPOCHS[budget] if max_epochs == "auto" else int(max_epochs)
    return min(epochs, 4) if epochs > 0 else 4


def teacher_epochs(budget: Budget, modality: Modality, labelled: int, each: float = 1.0) -> int:
    """Return how often a teacher is fine-tuned on each of its labelled examples, which are `worth` `each`.

    >>> teacher_epochs("standard", "text", 10_000), teacher_epochs("standard", "text", 1_500)
    (3, 15)
    """
    if modality == "corpus":
        return CORPUS_EPOCHS[budget]
    amounts = AMOUNTS[modality, budget]
    least, most = amounts.epochs
    return min(max(math.ceil(amounts.teacher / (labelled * each)), least), most)


def student_examples(budget: Budget, modality: Modality, labelled: int, started: bool, each: float = 1.0) -> int:
    """Return how many examples, `worth` `each`, a student is trained on; `started`: from trained layers.

    >>> student_examples("standard", "text", 10_000, started=False)
    384000
    """
    if modality == "corpus":
        return CORPUS_EPOCHS[budget] * labelled
    amounts = AMOUNTS[modality, budget]
    return round((amounts.started if started else amounts.fresh) / each)


def views_and_sets(
    budget: Budget, modality: Modality, labelled: int, transfer: int, each: float = 1.0
) -> tuple[int, int]:
    """Return how many views a labelled example, `worth` `each`, has in a set, and how many sets there are.

    >>> views_and_sets("standard", "text", 10_000, 0), views_and_sets("standard", "text", 1_000, 10_000)
    ((5, 4), (6, 16))
    """
    views = (round(AMOUNTS[modality, budget].outputs / each) - labelled - transfer) // labelled
    if views < 1:
        return 0, 1
    sets = min(max(round(views / 6), 1), MOST_VIEW_SETS)
    return min(views // sets, 6), sets
