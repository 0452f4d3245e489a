"""A corpus of labelled sentences, with the checks and splits that all sources share."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kd_lightning.data.labels import (
    NO_LABEL,
    ClassNames,
    check_unicode,
    folded,
    found_names,
    given_names,
    positions_in,
)
from kd_lightning.data.options import check_fractions
from kd_lightning.data.splits import stratified_order
from kd_lightning.runtime.errors import DataError

log = logging.getLogger(__name__)

MOST_SHOWN = 3
"""Of examples in a message."""

Sentence = tuple[str, ...]
"""One text, or the two texts of a pair."""


@dataclass(frozen=True)
class Examples:
    """Sentences and, for each, the position of its class in the class names; for a regression its score."""

    texts: list[Sentence]
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, positions: Iterable[int]) -> Examples:
        """Return the examples at `positions`, in that order."""
        chosen = list(positions)
        return Examples([self.texts[i] for i in chosen], [self.labels[i] for i in chosen])


@dataclass(frozen=True)
class RawExamples:
    """Sentences with their labels as written in a file or data set.

    Attributes:
        texts: The sentences.
        labels: One label a sentence, as text.
        source: The name in messages, such as the file's path.
        where: Returns the place of example `i`'s label: file, line and column.
    """

    texts: list[Sentence]
    labels: list[str]
    source: str
    where: Callable[[int], str]


@dataclass(frozen=True)
class Corpus:
    """All sentences of a data set, by split.

    Attributes:
        class_names: In the order of the labels.
        train: Labelled sentences to train on.
        validation: Labelled sentences for selection.
        test: Labelled sentences for the report.
        transfer: Unlabelled sentences.
        regression: The labels are scores, and `class_names` holds the name of the score.
    """

    class_names: list[str]
    train: Examples
    validation: Examples
    test: Examples
    transfer: list[Sentence] = field(default_factory=list)
    regression: bool = False


def text_of(value: object, where: str) -> str:
    """Return a stripped text cell; raise `DataError` if it is not a text or empty."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: expected a text, got the {type(value).__name__} {value!r}")
    text = (value or "").strip()
    if is_blank(text):
        raise DataError(f"{where}: the text is empty; fill it in or remove the example")
    check_unicode(text, where)
    return text


def is_blank(text: str) -> bool:
    """Return whether a text has only invisible characters, such as a zero-width space."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


def assemble(
    train: RawExamples,
    validation: RawExamples | None,
    test: RawExamples | None,
    *,
    class_names: ClassNames | None,
    validation_fraction: float,
    test_fraction: float,
    split_seed: int,
    transfer: Sequence[Sentence] = (),
) -> Corpus:
    """Check labels and build the corpus; a split that was not given is held out of the training examples.

    Training examples labelled -100 become transfer sentences, before the others.

    Where something has to be held out, exact duplicates (same normalised text) are first dropped from the training
    examples (the first one stays), so that no text is in two splits. Transfer sentences that are also validation or
    test sentences are dropped.

    Raises:
        DataError: Fewer than two classes, an unknown label, or too few examples to split.
        ConfigError: Impossible fractions or class names.
    """
    train, unlabelled = _set_apart(train)
    transfer = [*unlabelled, *transfer]
    numbered = class_names is not None
    names = found_names(train.labels, train.where, train.source) if class_names is None else given_names(class_names)
    examples = encode_labels(train, names, numbered)
    if len(set(examples.labels)) < 2:
        raise DataError(f"{train.source}: all {len(examples)} labels are {train.labels[0]!r}; need two classes or more")
    held = {
        "validation": (encode_labels(validation, names, numbered) if validation else None, validation_fraction),
        "test": (encode_labels(test, names, numbered) if test else None, test_fraction),
    }
    _warn_of_contrary(train, examples, bool(validation and test))
    missing = {part: fraction for part, (given, fraction) in held.items() if given is None}
    given = {part: examples for part, (examples, _) in held.items() if examples is not None}
    parts = dict(given)
    if missing:
        examples = _drop_duplicates(examples, train.source)
        labels = [int(label) for label in examples.labels]
        carved = stratified_split(labels, list(missing.values()), split_seed, names, train.source)
        parts |= {part: examples.take(positions) for part, positions in zip(missing, carved[1:], strict=True)}
        examples = examples.take(carved[0])
    _warn_of_overlap(examples, given, train.source)  # held-out sentences do not overlap with the rest
    seen = {normalise(text) for part in parts.values() for text in part.texts} if transfer else set()
    kept = [text for text in transfer if normalise(text) not in seen]
    if len(kept) < len(transfer):
        log.info("dropped %d transfer sentences that are validation or test sentences", len(transfer) - len(kept))
    return Corpus(names, examples, parts["validation"], parts["test"], kept)


def assemble_groups(
    rows: Iterable[tuple[Sentence, str, str]],
    *,
    class_names: list[str],
    fractions: Sequence[float],
    split_seed: int,
    source: str,
    transfer: Sequence[Sentence],
) -> Corpus:
    """Build the corpus of sentences, labels and groups; no group and no sentence is in two splits.

    Validation and test splits get the two `fractions` of the groups, stratified by the label of their first sentence.

    Raises:
        ConfigError: Impossible fractions.
    """
    check_fractions(fractions, source)
    kept: dict[str, tuple[Sentence, str, str]] = {}
    for row in rows:
        kept.setdefault(normalise(row[0]), row)
    labels: dict[str, int] = {}
    for _, label, group in kept.values():
        labels.setdefault(group, class_names.index(label))
    groups = np.array(list(labels))[stratified_order(np.array(list(labels.values())), split_seed)]
    sizes = [max(1, round(fraction * len(groups))) for fraction in fractions]
    runs = np.split(groups, np.cumsum(sizes))
    part_of = {str(group): part for part, run in enumerate(runs) for group in run}
    validation, test, train = (
        RawExamples([text for text, _, _ in part], [label for _, label, _ in part], source, str)
        for part in ([row for row in kept.values() if part_of[row[2]] == number] for number in range(3))
    )
    return assemble(
        train, validation, test, class_names=class_names, validation_fraction=fractions[0],
        test_fraction=fractions[1], split_seed=split_seed, transfer=transfer,
    )  # fmt: skip


def _set_apart(train: RawExamples) -> tuple[RawExamples, list[Sentence]]:
    """Return the labelled examples, and the unlabelled sentences."""
    labelled = [i for i, label in enumerate(train.labels) if label != NO_LABEL]
    kept = RawExamples(
        [train.texts[i] for i in labelled], [train.labels[i] for i in labelled], train.source,
        lambda i: train.where(labelled[i]),
    )  # fmt: skip
    return kept, [text for text, label in zip(train.texts, train.labels, strict=True) if label == NO_LABEL]


def normalise(text: Sentence) -> str:
    """Return the normal form for duplicates: normalised Unicode, case and white space."""
    return "\x1f".join(map(folded, text))


def stratified_split(
    labels: Sequence[int], fractions: Sequence[float], seed: int, class_names: Sequence[str], source: str
) -> list[list[int]]:
    """Return stratified positions for the rest and for each fraction; every class is in every split.

    Raises:
        ConfigError: A fraction outside (0, 1), or fractions that leave nothing.
        DataError: A class with fewer examples than splits.
    """
    check_fractions(fractions, source)
    generator = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    all_labels = np.asarray(labels)
    for label in np.unique(all_labels):
        positions = generator.permutation(np.flatnonzero(all_labels == label))
        sizes = [max(1, round(fraction * len(positions))) for fraction in fractions]
        if sum(sizes) >= len(positions):
            raise DataError(
                f"{source}: class {class_names[label]!r} has {len(positions)} different examples, too few to split "
                f"into {len(parts)} splits; add examples, or give data.validation_file and data.test_file"
            )
        for part, piece in zip(
            parts, np.split(positions, np.cumsum([len(positions) - sum(sizes), *sizes])[:-1]), strict=True
        ):
            part.extend(piece.tolist())
    return [sorted(part) for part in parts]


def encode_labels(raw: RawExamples, names: Sequence[str], numbered: bool = True) -> Examples:
    """Turn labels into positions in `names`; see `positions_in`."""
    if not raw.labels:
        raise DataError(f"{raw.source}: there are no examples with a label")
    return Examples(raw.texts, positions_in(raw.labels, names, raw.where, numbered))


def _warn_of_contrary(raw: RawExamples, examples: Examples, kept: bool) -> None:
    """Warn about sentences with several labels."""
    first: dict[str, int] = {}
    contrary: dict[str, tuple[int, int]] = {}
    for i, text in enumerate(examples.texts):
        form = normalise(text)
        if examples.labels[first.setdefault(form, i)] != examples.labels[i]:
            contrary.setdefault(form, (first[form], i))
    if not contrary:
        return
    which = [
        f"{' / '.join(raw.texts[one])[:60]!r} is {raw.labels[one]!r} ({raw.where(one)}) and {raw.labels[other]!r} "
        f"({raw.where(other)})"
        for one, other in list(contrary.values())[:MOST_SHOWN]
    ]
    log.warning(
        "%s: %d sentences have contradictory labels, and %s: %s%s", raw.source, len(contrary),
        "all are trained on" if kept else "the first of each stays", "; ".join(which),
        "; ..." if len(contrary) > len(which) else "",
    )  # fmt: skip


def _drop_duplicates(examples: Examples, source: str) -> Examples:
    first: dict[str, int] = {}
    for i, text in enumerate(examples.texts):
        first.setdefault(normalise(text), i)
    if len(first) < len(examples):
        log.info("%s: dropped %d duplicates of %d sentences", source, len(examples) - len(first), len(examples))
    return examples.take(first.values())


def _warn_of_overlap(train: Examples, parts: dict[str, Examples], source: str) -> None:
    held_out = {normalise(text) for examples in parts.values() for text in examples.texts}
    if not held_out:
        return
    both = {form for text in train.texts if (form := normalise(text)) in held_out}
    for part, examples in parts.items():
        shared = sum(normalise(text) in both for text in examples.texts)
        if shared:
            log.warning("%d of %d %s sentences are also training sentences of %s", shared, len(examples), part, source)
