"""Questions about contexts as a `LightningDataModule`: read, split, tokenised once, in windows."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.datamodule import Role
from kd_lightning.data.options import check_least
from kd_lightning.data.text.corpus import normalise
from kd_lightning.data.text.flat import FlatDataset
from kd_lightning.data.text.question_windows import VERSION, QuestionWindows, encode_questions, span_labels_of
from kd_lightning.data.text.questions import Question, QuestionCorpus
from kd_lightning.data.text.tokenized import ROLES, TokenizedData
from kd_lightning.data.text.tokens import tokenizer_fingerprint
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import content_digest
from kd_lightning.tasks import QuestionAnswering
from kd_lightning.tasks.spans import Contexts
from kd_lightning.types import END, START

log = logging.getLogger(__name__)


class QuestionData(TokenizedData):
    """Questions whose answers are spans of a context, and others for a teacher alone.

    An example is a window of at most `max_length` tokens: the whole question, and a part of its context; a longer
    context has several windows, which overlap. Scores are of questions. Student and teacher have one tokenizer, since
    starts and ends are compared token by token.

    Args:
        stride: How many tokens of the context two windows share.
        max_question_length: Longer questions are cut to so many tokens.
        max_answer_tokens: The longest span that is predicted.
        transfer: Files with more questions, for the teacher.
        max_length: The longest window in tokens.
        options: Those of `TokenizedData`.

    Raises:
        ConfigError: An option out of its range.
    """

    parts = ("train", "transfer", "validation", "test")

    def __init__(
        self,
        stride: int = 128,
        max_question_length: int = 64,
        max_answer_tokens: int = 30,
        transfer: Sequence[str] = (),
        max_length: int = 384,
        **options: Any,
    ) -> None:
        super().__init__(max_length=max_length, **options)
        check_least(0, stride=stride)
        check_least(1, max_question_length=max_question_length, max_answer_tokens=max_answer_tokens)
        self.stride, self.max_question_length, self.max_answer_tokens = stride, max_question_length, max_answer_tokens
        self.transfer = [transfer] if isinstance(transfer, str) else list(transfer)
        self._without_pool = ("train", "validation", "test")

    @abstractmethod
    def read(self) -> QuestionCorpus:
        """Return the questions."""

    def prepare(self) -> None:
        """Read, split and encode everything; a second call does nothing."""
        if self.fingerprint:
            return
        corpus = self.read()
        self.class_names = ["start", "end"]
        self._load_tokenizers([text for one in corpus.train for text in (one.text, one.context)])
        prints = [tokenizer_fingerprint(self.tokenizer_of(role)) for role in ROLES]
        if prints[0] != prints[1]:
            raise ConfigError(
                f"data.teacher_tokenizer={self.tokenizer_names['teacher']} makes other tokens than data.tokenizer="
                f"{self.tokenizer_names['student']}, and starts and ends of spans are compared token by token: give "
                "both the teacher's"
            )
        of_parts: dict[str, list[Question]] = {name: getattr(corpus, name) for name in self.parts}
        questions = [question for part in of_parts.values() for question in part]
        self.windows: QuestionWindows = encode_questions(
            self.tokenizer_of("student"), [(one.text, one.context) for one in questions], self.max_length,
            self.max_question_length, self.stride,
        )  # fmt: skip
        self._stores: dict[Role, QuestionWindows] = dict.fromkeys(ROLES, self.windows)
        begins = np.cumsum([0, *map(len, of_parts.values())])
        self._lay_out(np.diff(np.searchsorted(self.windows.questions, begins)).tolist())
        self._labels = span_labels_of(self.windows, questions)
        self.may_be_none = self._trains_none(of_parts)
        self._warn_of_long_answers(questions)
        self.contexts = Contexts(
            [question.context for question in questions],
            [None if one.answers is None else [answer.text for answer in one.answers] for one in questions],
            self.windows.chars, self.windows.offsets,
        )  # fmt: skip
        self._name_all(of_parts, prints[0])

    def _trains_none(self, of_parts: dict[str, list[Question]]) -> bool:
        """Return whether training questions have no answer; warn where only others have none."""
        without = {name: sum(one.answers == () for one in part) for name, part in of_parts.items()}
        for name, count in without.items():
            if count and not without["train"]:
                log.warning("%d %s questions have no answer, and no training question: an answer is always predicted",
                            count, name)  # fmt: skip
        return without["train"] > 0

    def _warn_of_long_answers(self, questions: Sequence[Question]) -> None:
        starts, ends = (np.flatnonzero((self._labels & bit) * (self._labels > 0)) for bit in (START, END))
        long = starts[ends - starts >= self.max_answer_tokens]
        windows = np.searchsorted(self.windows.offsets, long, side="right") - 1
        if len(found := np.unique(self.windows.questions[windows])):
            log.warning(
                "%d questions have an answer of more than data.max_answer_tokens=%d tokens, which is never predicted; "
                "the first: %s", len(found), self.max_answer_tokens, questions[found[0]].place,
            )  # fmt: skip

    def folds(self, count: int) -> NDArray[np.int64]:
        """Return each example's fold of `count`, by `index`: all windows of a training context are in one.

        Raises:
            ConfigError: More folds than training contexts.
        """
        self.prepare()
        train, numbers = self._spans["train"], dict[Any, int]()
        keys = [normalise((self.contexts.texts[one],)) for one in range(self.windows.questions[train[-1]] + 1)]
        of_question = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        if count > len(numbers):
            raise ConfigError(f"teacher.folds={count}, but there are {len(numbers)} training contexts")
        fold = np.empty(len(numbers), np.int64)
        fold[np.random.default_rng(self.split_seed).permutation(len(numbers))] = (
            np.arange(len(numbers)) * count // len(numbers)
        )
        found = np.full(self.num_examples, -1, np.int64)
        found[train] = fold[of_question[self.windows.questions[train]]]
        return found

    def _name_all(self, of_parts: dict[str, list[Question]], tokenizer: str) -> None:
        """Name the data with the pool and without, and as far as a teacher's outputs depend on them."""
        reading = {
            "windows": VERSION, "tokenizer": tokenizer, "max_length": self.max_length, "stride": self.stride,
            "max_question_length": self.max_question_length,
        }  # fmt: skip
        for pool, names in ((True, self.parts), (False, self._without_pool)):
            content = {name: [[one.id, one.text, one.context, one.answers] for one in of_parts[name]] for name in names}
            self._fingerprints[pool] = content_digest([content, reading, self.max_answer_tokens])
        self.fingerprint, self._labelled = self._fingerprints[True], self._fingerprints[False]
        texts = [[one.text, one.context] for part in of_parts.values() for one in part]
        self.teacher_key = {"questions": content_digest(texts), "examples": len(self.windows), **reading}

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def task(self) -> QuestionAnswering:
        """The span of a context that answers a question."""
        return QuestionAnswering(self.may_be_none, self.max_answer_tokens, self.contexts)

    @property
    def title(self) -> str:
        """What it is."""
        return "extractive QA" + (", also without an answer" if self.may_be_none else "")

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens in each window, `(num_examples,)`."""
        return self.windows.lengths

    def model_arguments(self, role: Role) -> dict[str, int]:
        """Return what the data decide about a network: beside its sizes that it predicts for each token."""
        return {**super().model_arguments(role), "per_token": True}

    @property
    def input_format(self) -> dict[str, Any]:
        """The longest window in tokens, that an example is two texts, and how these become windows."""
        windows = {"stride": self.stride, "max_question_length": self.max_question_length}
        return {"max_length": self.max_length, "texts": 2, "windows": windows}

    # -- batches ------------------------------------------------------------------------------------------------------

    def _training_dataset(self) -> FlatDataset:
        return self._trained_on(self._dataset("train", "transfer" if self._pool else "train"))

    def _dataset(self, first: str, last: str) -> FlatDataset:
        self.prepare()
        span = range(self._spans[first].start, self._spans[last].stop)
        return self.windows.dataset(self._labels, span, int(self.tokenizer_of("student").pad_token_id))
