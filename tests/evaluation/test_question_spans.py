"""Spans that kd-predict finds: the windows it reads, and what is cut off their ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from kd_lightning.data.text.question_windows import encode_questions
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.evaluation.question_spans import found_spans
from kd_lightning.tasks import QuestionAnswering
from kd_lightning.tasks.spans import trimmed
from kd_lightning.training.run_folder import TrainedModel
from kd_lightning.types import ModelOutput

CONTEXT = "one two three four five six seven eight nine ten eleven twelve"
WINDOWS = {"stride": 1, "max_question_length": 4}


class Finds(nn.Module):
    """Starts and ends a span at a token; notes what it reads."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token
        self.read: list[list[int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ModelOutput:
        self.read += [row[kept.bool()].tolist() for row, kept in zip(input_ids, attention_mask, strict=True)]
        logits = 9.0 * (input_ids == self.token).float()
        logits[:, 0] += 4
        return ModelOutput(torch.stack([logits, logits], 2))


def model(network: nn.Module, tokenizer: Any, task: QuestionAnswering) -> TrainedModel:
    return TrainedModel(network, tokenizer, [], 14, 2, Path("run"), task, windows=WINDOWS)


def test_windows_are_those_of_the_training() -> None:
    own: Any = load_tokenizer("wordpiece:400", [CONTEXT, "where is it ?"] * 50)
    network = Finds(own.convert_tokens_to_ids("nine"))
    (found,) = found_spans(model(network, own, QuestionAnswering(True)), [("where is it ?", CONTEXT)])
    assert (found["answer"], CONTEXT[found["start"] : found["end"]]) == ("nine", "nine")
    windows = encode_questions(own, [("where is it ?", CONTEXT)], 14, 4, 1)
    assert sorted(map(len, network.read)) == sorted(windows.lengths.tolist())
    assert len(windows) == 2


def test_an_answer_begins_with_a_letter_whatever_its_first_token_does() -> None:
    own: Any = load_tokenizer("bpe:300", [CONTEXT, "where is it ?"] * 50)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        "<|endoftext|> $A", "<|endoftext|> $A <|endoftext|> $B:1", [("<|endoftext|>", 0)]
    )
    token = own.convert_tokens_to_ids("Ġnine")
    (found,) = found_spans(model(Finds(token), own, QuestionAnswering(True)), [("where is it ?", CONTEXT)])
    assert found["answer"] == "nine"
    assert CONTEXT[found["start"] : found["end"]] == "nine"
    assert trimmed(CONTEXT, 3, 8) == (4, 7)


@pytest.mark.parametrize("may_be_none", [True, False])
def test_an_empty_context_has_no_answer_and_the_task_decides_about_others(may_be_none: bool) -> None:
    own: Any = load_tokenizer("wordpiece:400", [CONTEXT, "where is it ?"] * 50)
    network = Finds(own.convert_tokens_to_ids("[SEP]"))  # no token of the context, so that no answer scores highest
    found = found_spans(
        model(network, own, QuestionAnswering(may_be_none)), [("where is it ?", ""), ("where is it ?", "one two")]
    )
    assert found[0]["answer"] is None
    assert (found[1]["answer"] is None) == may_be_none
    assert all(0 <= one["score"] <= 1 for one in found)
