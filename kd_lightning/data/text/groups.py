"""Single texts, pairs and triplets: what their sources deliver, and splits that keep them apart."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.options import check_fractions
from kd_lightning.data.text.corpus import normalise
from kd_lightning.runtime.errors import DataError

log = logging.getLogger(__name__)

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class TextGroup:
    """A text alone, a query and its positive, or these and negatives.

    Attributes:
        texts: In this order.
        score: How similar the two of a pair are, 0 to 1; NaN where nobody has scored them.
        source: Groups of one source are in one split, as the packages built from one program; None: it is alone.
    """

    texts: tuple[str, ...]
    score: float = math.nan
    source: str | None = None


@dataclass(frozen=True)
class GroupCorpus:
    """Everything a run has to train, select and test on.

    Attributes:
        train: Groups to train on; single texts among them learn from a teacher alone.
        validation: Pairs or triplets to select on.
        test: Those to report on, once.
        transfer: Further single texts, for the teacher to embed.
    """

    train: list[TextGroup]
    validation: list[TextGroup]
    test: list[TextGroup]
    transfer: list[TextGroup] = field(default_factory=list)


def assemble_texts(
    train: list[TextGroup],
    validation: list[TextGroup] | None,
    test: list[TextGroup] | None,
    *,
    fractions: tuple[float, float],
    split_seed: int,
    origin: str,
    transfer: Iterable[str] = (),
) -> GroupCorpus:
    """Build the corpus; a split that was not given is held out of the training groups.

    Groups that have a text or a source in common stay together, so that no text is in two splits; single texts that
    have nothing in common with a pair are trained on, since no score is of them. Repeats of a group, and texts of
    `transfer` that are validation or test texts, are dropped.

    Args:
        train: Groups to train on.
        validation: Groups to select on.
        test: Groups to report on.
        fractions: How much of the pairs to hold out for a missing validation, and for a missing test.
        split_seed: Of what is held out.
        origin: What the data are called in messages.
        transfer: Further texts.

    Raises:
        DataError: Too few groups to split; a validation or test split without pairs; scores for some pairs only.
        ConfigError: Impossible fractions.
    """
    train = list({(group.texts, group.score): group for group in train}.values())
    parts = {"validation": validation, "test": test}
    missing = {name: share for (name, given), share in zip(parts.items(), fractions, strict=True) if given is None}
    if missing:
        train, *held = _held_out(train, list(missing.values()), split_seed, origin)
        parts |= dict(zip(missing, held, strict=True))
    for name, part in parts.items():
        if not any(len(group.texts) > 1 for group in part or ()):
            raise DataError(
                f"{origin}: the {name} split has no pairs, by which students are selected and scored: give "
                f"data.{name}_file with pairs, and their columns (data.positive_column)"
            )
    groups = [group for part in (train, *parts.values()) for group in part or ()]
    scored = [not math.isnan(group.score) for group in groups if len(group.texts) > 1]
    if any(scored) and not all(scored):
        raise DataError(
            f"{origin}: {sum(scored)} of {len(scored)} pairs have a score: give all of them one, or none "
            "(data.score_column=null)"
        )
    seen = {normalise((text,)) for part in parts.values() for group in part or () for text in group.texts}
    given = list(transfer)
    kept = [TextGroup((text,)) for text in given if normalise((text,)) not in seen]
    if len(kept) < len(given):
        log.info("dropped %d transfer texts that are validation or test texts", len(given) - len(kept))
    _warn_of_overlap(train, seen, origin)
    return GroupCorpus(train, parts["validation"] or [], parts["test"] or [], kept)


def _warn_of_overlap(train: Sequence[TextGroup], seen: set[str], origin: str) -> None:
    shared = sum(any(normalise((text,)) in seen for text in group.texts) for group in train)
    if shared:
        log.warning("%s: %d of %d training groups have a validation or test text", origin, shared, len(train))


def _held_out(groups: list[TextGroup], fractions: list[float], seed: int, origin: str) -> list[list[TextGroup]]:
    """Return the rest and a random part for each fraction of the pairs; connected groups stay together."""
    check_fractions(fractions, origin)
    owner = connected(groups)
    paired = np.array([len(group.texts) > 1 for group in groups], bool)
    if not paired.any():
        return [groups, *([] for _ in fractions)]
    part_of = dealt(owner, paired, fractions, seed)
    if part_of is None:
        raise DataError(
            f"{origin}: the pairs of {len(groups)} groups of texts fall into {len(np.unique(owner[paired]))} that have "
            f"nothing in common, too few to split into {len(fractions) + 1} parts; give data.validation_file and "
            "data.test_file"
        )
    return [[group for group, own in zip(groups, part_of, strict=True) if own == number]
            for number in range(len(fractions) + 1)]  # fmt: skip


def dealt(owner: Numbers, chosen: Flags, fractions: Sequence[float], seed: int) -> Numbers | None:
    """Deal groups out at random, those of one owner together: 0 for the rest, 1 and more for fractions.

    Args:
        owner: What each group is dealt out with, `(N,)`.
        chosen: Which groups may be held out, `(N,)`; an owner with any may, all others are the rest.
        fractions: How much of these owners to hold out.
        seed: Of the draw.

    Returns:
        Each group's part, `(N,)`; None where nothing would be left.

    >>> dealt(np.array([0, 0, 1, 2]), np.ones(4, bool), [0.3, 0.3], 0).tolist()
    [1, 1, 2, 0]
    """
    drawn = np.unique(owner[chosen])
    order = drawn[np.random.default_rng(seed).permutation(len(drawn))]
    sizes = [max(1, round(fraction * len(order))) for fraction in fractions]
    if sum(sizes) >= len(order):
        return None
    part_of = np.zeros(int(owner.max()) + 1, np.int64)
    for number, piece in enumerate(np.split(order, np.cumsum([len(order) - sum(sizes), *sizes])[:-1])):
        part_of[piece] = number
    found: Numbers = part_of[owner]
    return found


def connected(groups: Sequence[TextGroup]) -> Numbers:
    """Return a number for each group, equal for those that a chain of common texts or sources connects.

    >>> connected([TextGroup(("a", "b")), TextGroup(("c", "d")), TextGroup(("B", "e"))]).tolist()
    [0, 1, 0]
    """
    parent = list(range(len(groups)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    first: dict[str, int] = {}
    for number, group in enumerate(groups):
        keys = [normalise((text,)) for text in group.texts]
        for key in [*keys, *([] if group.source is None else [f"\x1e{group.source}"])]:
            one, other = root(first.setdefault(key, number)), root(number)
            parent[max(one, other)] = min(one, other)
    return np.unique([root(number) for number in range(len(groups))], return_inverse=True)[1]
