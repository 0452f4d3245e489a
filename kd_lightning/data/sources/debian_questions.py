"""Made questions about Debian's packages: what one does, and which one does something."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from kd_lightning.data.options import check_fractions, check_least
from kd_lightning.data.sources.debian_index import Described
from kd_lightning.data.sources.debian_pairs import described
from kd_lightning.data.text.passages import SENTENCE_END
from kd_lightning.data.text.question_data import QuestionData
from kd_lightning.data.text.questions import Answer, Question, QuestionCorpus, checked
from kd_lightning.runtime.errors import ConfigError, DataError

log = logging.getLogger(__name__)

OF_NAME = (
    "What does {} do?", "What is {} for?", "What kind of package is {}?", "How is {} described?",
    "What would I install {} for?", "Describe {} in a few words.", "What do you get with {}?", "Tell me what {} is.",
    "What is the purpose of {}?", "I came across {}, what is it?",
)  # fmt: skip
"""Questions whose answer is a package's short description."""
OF_TEXT = (
    "Which package fits this: {}", "What should I install? {}", "Name the package. {}", "{} Which package is that?",
    "Which one is meant? {}", "Find the package for this: {}", "{} What is it called?", "I need this: {}",
    "What is the name of this package? {}", "This is about a package: {} Which?",
)  # fmt: skip
"""Questions by the first sentence of a long description, whose answer is the package's name."""

MOST_WORDS = 30
"""Of a sentence in a question."""

TRIES = 100
"""Draws of packages for a context, until none could be taken for another."""


class DebianQuestions(QuestionData):
    """Made questions about contexts of several of Debian 12's packages with their short descriptions.

    Half of the questions name a package, and its short description is the answer; half have the first sentence of a
    package's long description, without its name, and the name is the answer. Of a share of the questions the package is
    not in the context: they have no answer. Packages of one source package are in one split, and so is each template:
    test questions are put in words that no training question has.

    The descriptions are those of `DebianPairs`.

    Args:
        index_file: Kept descriptions, such as another machine's; by default those fetched here.
        sha256: Refuse descriptions with another sha256.
        questions: Training questions.
        held_out_questions: Questions of the validation split, and of the test split.
        packages: In a context.
        without: Share of the questions that have no answer.
        validation_fraction: Share of the source packages, and of the templates, for validation.
        test_fraction: Share of both for the test.
        options: Those of `QuestionData` but for `transfer`.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(
        self,
        index_file: str | None = None,
        sha256: str | None = None,
        questions: int = 8000,
        held_out_questions: int = 1000,
        packages: int = 8,
        without: float = 0.2,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_least(2, packages=packages)
        check_least(1, questions=questions, held_out_questions=held_out_questions)
        if not 0 <= without < 1:
            raise ConfigError(f"data.without={without}: expected a share of the questions, at least 0 and below 1")
        self.fractions = validation_fraction, test_fraction
        check_fractions(self.fractions, "the packages and the templates")
        self.index_file, self.sha256 = index_file, sha256
        self.sizes_made = {"train": questions, "validation": held_out_questions, "test": held_out_questions}
        self.packages, self.without = packages, without

    def read(self) -> QuestionCorpus:
        """Read the descriptions, fetching them if need be, and make the questions."""
        path, found = described(self.index_file, self.sha256)
        generator = np.random.default_rng(self.split_seed)
        sources = self._parts(sorted({one.source for one in found}), generator)
        templates = [self._parts(kind, generator) for kind in (OF_NAME, OF_TEXT)]
        made = {}
        for name, count in self.sizes_made.items():
            chosen = set(sources[name])
            own = [one for one in found if one.source in chosen]
            if len(own) <= self.packages:
                raise DataError(f"{path}: the {name} split has {len(own)} packages, too few for data.packages="
                                f"{self.packages}")  # fmt: skip
            made[name] = self._made(name, count, own, [kind[name] for kind in templates], generator)
        log.info("%s: made %s questions", path, ", ".join(f"{len(part)} {name}" for name, part in made.items()))
        return QuestionCorpus(**made)

    def _parts(self, given: Sequence[str], generator: np.random.Generator) -> dict[str, list[str]]:
        """Return what each split has of these; each has one at least."""
        sizes = [max(1, round(fraction * len(given))) for fraction in self.fractions]
        pieces = np.split(generator.permutation(len(given)), np.cumsum(sizes))
        names = ("validation", "test", "train")
        return {name: [given[i] for i in piece] for name, piece in zip(names, pieces, strict=True)}

    def _drawn(self, packages: Sequence[Described], generator: np.random.Generator) -> list[Described]:
        """Return packages for a context, and one more; none could be taken for another.

        Raises:
            DataError: The packages are too much alike.
        """
        for _ in range(TRIES):
            found = [packages[i] for i in generator.choice(len(packages), self.packages + 1, replace=False)]
            if _all_differ(found):
                return found
        raise DataError(f"{self.packages + 1} packages with different descriptions were not found in {TRIES} draws")

    def _made(
        self, split: str, count: int, packages: Sequence[Described], templates: Sequence[Sequence[str]],
        generator: np.random.Generator,
    ) -> list[Question]:  # fmt: skip
        found = []
        for number in range(count):
            chosen = self._drawn(packages, generator)
            without = generator.random() < self.without
            shown, of_text = chosen[: self.packages], number % 2 == 1
            about = chosen[-1] if without else shown[int(generator.integers(self.packages))]
            context, places = context_of(shown)
            template = templates[of_text][int(generator.integers(len(templates[of_text])))]
            answers: tuple[Answer, ...] = ()
            if not without:
                place = places[shown.index(about)]
                answers = (Answer(about.name, place[0]) if of_text else Answer(about.summary, place[1]),)
            text = template.format(sentence_of(about) if of_text else about.name)
            where = f"{split} question {number + 1}"
            found.append(checked(Question(where, text, context, answers, where)))
        return found


def _all_differ(packages: Sequence[Described]) -> bool:
    """Return whether no two packages have one name, short description or first sentence."""
    columns = [(one.name, one.summary, sentence_of(one)) for one in packages]
    return all(len(set(column)) == len(packages) for column in zip(*columns, strict=True))


def context_of(packages: Sequence[Described]) -> tuple[str, list[tuple[int, int]]]:
    """Return packages and short descriptions as a text, and where each name and description begins.

    >>> context_of([Described("a", "a", "does this", ""), Described("b", "b", "does that", "")])
    ('a: does this. b: does that.', [(0, 3), (14, 17)])
    """
    text, places = "", []
    for package in packages:
        text += " " if text else ""
        places.append((len(text), len(text) + len(package.name) + 2))
        text += f"{package.name}: {package.summary}."
    return text, places


def sentence_of(package: Described) -> str:
    """Return the first sentence of a long description, without the package's name.

    >>> sentence_of(Described("sed", "sed", "", "GNU sed edits streams. It is small."))
    'GNU it edits streams.'
    """
    words = SENTENCE_END.split(package.text)[0].split()[:MOST_WORDS]
    return re.sub(rf"(?<!\w){re.escape(package.name)}(?!\w)", "it", " ".join(words), flags=re.IGNORECASE)
