"""Queries with graded documents: what sources deliver, and splits that keep queries apart."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd_lightning.data.labels import folded
from kd_lightning.data.options import check_fractions
from kd_lightning.data.text.groups import TextGroup, connected, dealt
from kd_lightning.runtime.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankedList:
    """A query and its documents, in the order of their file.

    Attributes:
        query: The query.
        documents: Each of them once.
        grades: How relevant each is, 0 for not at all.
        source: Queries of one source are in one split, as the packages built from one program; None: it is alone.
    """

    query: str
    documents: tuple[str, ...]
    grades: tuple[float, ...]
    source: str | None = None

    @property
    def relevant(self) -> bool:
        """Whether it has a relevant document."""
        return max(self.grades) > 0

    @property
    def judged(self) -> bool:
        """Whether there is something to rank: a relevant document above an irrelevant one."""
        return self.relevant and min(self.grades) == 0


@dataclass(frozen=True)
class ListCorpus:
    """Everything a run has to train, select and test on.

    Attributes:
        train: Queries to train on.
        validation: Those to select on.
        test: Those to report on, once.
    """

    train: list[RankedList]
    validation: list[RankedList]
    test: list[RankedList]


def assemble_lists(
    train: list[RankedList],
    validation: list[RankedList] | None,
    test: list[RankedList] | None,
    *,
    fractions: tuple[float, float],
    split_seed: int,
    origin: str,
) -> ListCorpus:
    """Build the corpus; a split that was not given is held out of the training queries.

    Equal queries and those of one source stay together. Their documents may be in several splits, as of a corpus that
    all queries search. Only queries with a relevant document are held out; others of their source are left out.

    Args:
        train: Queries to train on.
        validation: Queries to select on.
        test: Queries to report on.
        fractions: How much of them to hold out for a missing validation, and for a missing test.
        split_seed: Of what is held out.
        origin: What the data are called in messages.

    Raises:
        DataError: Too few queries to split.
        ConfigError: Impossible fractions.
    """
    parts = {"validation": validation, "test": test}
    missing = {name: share for (name, given), share in zip(parts.items(), fractions, strict=True) if given is None}
    if missing:
        train, *held = _held_out(train, list(missing.values()), split_seed, origin)
        parts |= dict(zip(missing, held, strict=True))
    seen = {folded(one.query) for part in parts.values() for one in part or ()}
    if shared := sum(folded(one.query) in seen for one in train):
        log.warning("%s: %d of %d training queries are validation or test queries", origin, shared, len(train))
    return ListCorpus(train, parts["validation"] or [], parts["test"] or [])


def _held_out(lists: list[RankedList], fractions: list[float], seed: int, origin: str) -> list[list[RankedList]]:
    check_fractions(fractions, origin)
    owner = connected([TextGroup((one.query,), source=one.source) for one in lists])
    part_of = dealt(owner, np.array([one.relevant for one in lists], bool), fractions, seed)
    if part_of is None:
        raise DataError(
            f"{origin}: of {len(lists)} queries too few have a relevant document to split them into "
            f"{len(fractions) + 1} parts; give data.validation_file and data.test_file"
        )
    parts: list[list[RankedList]] = [[] for _ in range(len(fractions) + 1)]
    for one, number in zip(lists, part_of.tolist(), strict=True):
        if number == 0 or one.relevant:
            parts[number].append(one)
    if left := len(lists) - sum(map(len, parts)):
        log.info("%s: left out %d queries without a relevant document, whose sources are held out", origin, left)
    return parts


def check_ranked(lists: Sequence[RankedList], name: str, remedy: str) -> None:
    """Refuse queries of which none has anything to rank; log how many have not.

    Args:
        lists: The queries.
        name: What they are called in messages.
        remedy: What the user can do.

    Raises:
        DataError: There is nothing to rank.
    """
    without = sum(not one.judged for one in lists)
    if without == len(lists):
        raise DataError(f"no query of {name} has a relevant document and an irrelevant one to rank below it: {remedy}")
    if without:
        log.warning("%d of %d queries of %s have nothing to rank, and do not count", without, len(lists), name)
