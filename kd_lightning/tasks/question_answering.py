"""Extractive question answering: the span of a context that answers a question, or that there is none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.losses.span_labels import SpanLabelsLoss
from kd_lightning.losses.term import Term
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.base import Task, refuse_nan
from kd_lightning.tasks.scores import Scores, ScoreSpec
from kd_lightning.tasks.spans import Contexts, SpanFidelity, SpanScores, best_spans
from kd_lightning.types import Batch

_DESCRIPTION = re.compile(r"question answering, spans of up to (\d+) tokens( or none)?")


class QuestionAnswering(Task):
    """Where the answer to a question starts and ends in a context; the first token stands for no answer.

    An example is a window of tokens: the question and a part of its context. Its logits `(B, L, 2)` are of starts and
    ends; kept are the first token and those of the context. Scores are of questions: of all windows the best span.

    Args:
        may_be_none: Questions may have no answer in their context.
        max_answer_tokens: The longest span that is predicted.
        contexts: The texts that scores compare; the data's own task has them.

    >>> QuestionAnswering(may_be_none=True).description
    'question answering, spans of up to 30 tokens or none'
    """

    monitor, per_token, in_context, unit, outputs = "f1", True, True, "question", 2
    tags = ("question-answering",)
    input_columns: Mapping[str, str] = {"text_column": "question", "text_pair_column": "context"}

    def __init__(
        self, may_be_none: bool = False, max_answer_tokens: int = 30, contexts: Contexts | None = None
    ) -> None:
        if max_answer_tokens < 1:
            raise ConfigError(f"data.max_answer_tokens={max_answer_tokens}: expected 1 or more")
        self.may_be_none, self.max_answer_tokens, self.contexts = may_be_none, max_answer_tokens, contexts
        self.complete = contexts is not None
        by_kind = {
            "has_answer/f1": ScoreSpec("F1, questions with an answer"),
            "no_answer/f1": ScoreSpec("F1, questions without"),
        }
        self.specs = {
            "f1": ScoreSpec("F1", shown="always"),
            "exact_match": ScoreSpec("exact match"),
            **(by_kind if may_be_none else {}),
            "agreement": ScoreSpec("agreement with teacher"),
            "kl_to_teacher": ScoreSpec("KL to teacher, nats", "min"),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Its class and arguments, without the texts."""
        return {
            "_target_": "kd_lightning.tasks.QuestionAnswering", "may_be_none": self.may_be_none,
            "max_answer_tokens": self.max_answer_tokens,
        }  # fmt: skip

    @property
    def description(self) -> str:
        """Its name, the longest span, and whether there may be none."""
        none = " or none" if self.may_be_none else ""
        return f"question answering, spans of up to {self.max_answer_tokens} tokens{none}"

    @classmethod
    def described(cls, description: str) -> QuestionAnswering | None:
        """Return the task of a `description`; None where it describes another."""
        found = _DESCRIPTION.fullmatch(description)
        return None if found is None else cls(found[2] is not None, int(found[1]))

    def check_logits(self, logits: Tensor, batch: Batch) -> None:
        """Refuse a network that predicts something else."""
        expected = [*batch["input_ids"].shape, self.outputs]
        if list(logits.shape) != expected:
            raise ConfigError(
                f"it predicts logits of shape {list(logits.shape)}, and the data need {expected}: starts and ends of "
                "spans; bilstm, transformer and hf can give that, a network of your own with logits (B, L, 2)"
            )

    def finished(self, checkpoint: str, sizes: Mapping[str, int]) -> nn.Module:
        """Load a network that `AutoModelForQuestionAnswering` loads, as a classifier of tokens."""
        from kd_lightning.models.questions import finished_for_questions  # imports the models of transformers

        return finished_for_questions(checkpoint)

    def published(self, network: nn.Module) -> nn.Module:
        """Return a classifier of tokens as the class that `AutoModelForQuestionAnswering` loads."""
        from kd_lightning.models.spans import for_questions

        return for_questions(network)

    def as_published(self, folder: str, sizes: Mapping[str, int]) -> nn.Module:
        """Load it as `AutoModelForQuestionAnswering` does."""
        from kd_lightning.models.questions import load_for_questions
        from kd_lightning.models.spans import SpanNetwork

        return SpanNetwork(load_for_questions(folder))

    def pipeline(self, reads: str) -> str:
        """Return the hub's name."""
        return "question-answering"

    def loss(self) -> Term:
        """Return the cross-entropy of starts and ends over positions."""
        return SpanLabelsLoss()

    def scores(self) -> Scores:
        """Return exact match and F1 of questions, by SQuAD's rules."""
        return SpanScores(self.contexts, self.max_answer_tokens, self.may_be_none)

    def fidelity(self) -> Scores:
        """Return the share of windows with the teacher's span, and the divergence from it."""
        return SpanFidelity(self.max_answer_tokens, self.may_be_none)

    def read(self, logits: Tensor, rows: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the best span of each window by its tokens, with the scores of it and of no answer.

        That of no answer is -inf where there always is one.
        """
        for row, keep in zip(logits, rows["keep"], strict=True):
            refuse_nan(row[keep])
        best = best_spans(logits, rows["keep"], self.max_answer_tokens)
        if not self.may_be_none:
            best = best._replace(none=torch.full_like(best.none, -torch.inf))
        found = zip(*(column.tolist() for column in best), strict=True)
        return [dict(zip(best._fields, values, strict=True)) for values in found]

    def cells(self, record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
        """Return the answer and its probability."""
        text = "(none)" if record["answer"] is None else record["answer"]
        return {"answer": text, "score": f"{record['score']:.3f}"}

    def columns(self, names: Sequence[str]) -> str:
        """Return that they are those of starts and ends."""
        none = ", where the first token stands for no answer" if self.may_be_none else ""
        return (
            "It reads a question and a context. `logits` has a row for each token and two columns, of the first and "
            f"the last token of the answer{none}. The best span has the largest sum of both, over at most "
            f"{self.max_answer_tokens} tokens of the context."
        )

    def limits(self, names: Sequence[str]) -> str:
        """Return that it quotes the context, right or wrong."""
        none = "" if self.may_be_none else " It always finds one: it was not trained on questions without an answer."
        return f"An answer is a piece of the context, however the question is put.{none}"
