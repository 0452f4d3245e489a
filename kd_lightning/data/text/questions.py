"""Questions about contexts: what sources deliver, and the checks and splits that all of them share."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kd_lightning.data.labels import check_unicode
from kd_lightning.data.options import check_fractions
from kd_lightning.data.text.corpus import is_blank, normalise
from kd_lightning.runtime.errors import DataError

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """An answer: a piece of a context, and the character where it begins there."""

    text: str
    start: int

    @property
    def stop(self) -> int:
        """The character after its last."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        id: Unique among all questions of the data.
        text: The question.
        context: What it is about.
        answers: The known answers, none where the context has none; None: nobody knows, only a teacher predicts it.
        place: Where it stands.
    """

    id: str
    text: str
    context: str
    answers: tuple[Answer, ...] | None
    place: str


@dataclass(frozen=True)
class QuestionCorpus:
    """Everything a run has to train, select and test on.

    Attributes:
        train: Questions to train on.
        validation: Questions to select on.
        test: Questions to report on, once.
        transfer: Questions without known answers, for the teacher.
    """

    train: list[Question]
    validation: list[Question]
    test: list[Question]
    transfer: list[Question] = field(default_factory=list)


def checked(question: Question) -> Question:
    """Return a question whose texts are there, and whose answers stand where they are given.

    Raises:
        DataError: Names its place and what is wrong.
    """
    place = question.place
    for name, text in (("question", question.text), ("context", question.context)):
        check_unicode(text, f"{place}, {name}")
        if is_blank(text):
            raise DataError(f"{place}: the {name} is empty; fill it in or remove the entry")
    for answer in question.answers or ():
        what, length = f"{place}: the answer {answer.text[:60]!r}", len(question.context)
        if is_blank(answer.text):
            raise DataError(f"{what} is empty; a question without an answer has an empty list of them")
        if not 0 <= answer.start < length or answer.stop > length:
            raise DataError(f"{what} at {answer.start} lies beyond the context, which has {length} characters")
        if (stands := question.context[answer.start : answer.stop]) != answer.text:
            place_of = question.context.find(answer.text)
            hint = "which does not contain it" if place_of < 0 else f"where it stands at {place_of}"
            raise DataError(f"{what} is not at {answer.start} of the context, {hint}; there is {stands[:60]!r}")
    return question


def assemble_questions(
    train: list[Question],
    validation: list[Question] | None,
    test: list[Question] | None,
    *,
    fractions: tuple[float, float],
    split_seed: int,
    transfer: Sequence[Question] = (),
) -> QuestionCorpus:
    """Check ids and build the corpus; a split that was not given is held out of the training questions.

    All questions of one context are held out together. Questions of `transfer` about contexts of the validation or test
    split are dropped.

    Args:
        train: Questions to train on.
        validation: Questions to select on.
        test: Questions to report on.
        fractions: How many of the contexts to hold out for a missing validation, and for a missing test.
        split_seed: Of what is held out.
        transfer: Questions without known answers.

    Raises:
        DataError: An id that comes again, no known answers at all, or too few contexts to split.
        ConfigError: Impossible fractions.
    """
    _check_ids(question for part in (train, validation, test) for question in part or ())
    parts = {"validation": validation, "test": test}
    missing = {name: share for (name, given), share in zip(parts.items(), fractions, strict=True) if given is None}
    if missing:
        train, *held = _held_out(train, list(missing.values()), split_seed)
        parts |= dict(zip(missing, held, strict=True))
    if not any(question.answers for question in train):
        raise DataError(f"{train[0].place}: no training question has an answer; nothing can be learned from that")
    seen = {normalise((question.context,)) for part in parts.values() for question in part or ()}
    if shared := sum(normalise((question.context,)) in seen for question in train):
        log.warning("%d of %d training questions are about a validation or test context", shared, len(train))
    kept = [question for question in transfer if normalise((question.context,)) not in seen]
    if len(kept) < len(transfer):
        log.info("left out %d transfer questions about validation or test contexts", len(transfer) - len(kept))
    return QuestionCorpus(train, parts["validation"] or [], parts["test"] or [], kept)


def _check_ids(questions: Iterable[Question]) -> None:
    first: dict[str, Question] = {}
    for question in questions:
        if (before := first.setdefault(question.id, question)) is not question:
            raise DataError(f"{question.place}: the id {question.id!r} comes again, it is that of {before.place}, too")


def _held_out(questions: list[Question], fractions: list[float], seed: int) -> list[list[Question]]:
    """Return the rest and a random part for each fraction of the contexts."""
    check_fractions(fractions, questions[0].place)
    keys = [normalise((question.context,)) for question in questions]
    contexts = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    sizes = [max(1, round(fraction * len(contexts))) for fraction in fractions]
    if sum(sizes) >= len(contexts):
        raise DataError(
            f"{questions[0].place}: {len(contexts)} different contexts are too few to split into {len(sizes) + 1} "
            "parts; add some, or give data.validation_file and data.test_file"
        )
    order = np.random.default_rng(seed).permutation(len(contexts))
    part_of = np.zeros(len(contexts), np.int64)
    for number, piece in enumerate(np.split(order, np.cumsum([len(contexts) - sum(sizes), *sizes])[:-1])):
        part_of[piece] = number
    parts: list[list[Question]] = [[] for _ in range(len(sizes) + 1)]
    for question, key in zip(questions, keys, strict=True):
        parts[part_of[contexts[key]]].append(question)
    return parts
