"""Windows of questions and contexts: what they hold, their labels, and what is refused."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from kd_lightning.data import QuestionFiles
from kd_lightning.data.text.question_windows import encode_questions, span_labels_of
from kd_lightning.data.text.questions import Answer, Question
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.runtime.errors import ConfigError, DataError
from kd_lightning.types import IGNORE
from tests.toy_questions import records, write_jsonl

CONTEXT = "one two three four five six seven eight nine ten eleven twelve"


def tokenizer(kind: str = "wordpiece:400") -> Any:
    return load_tokenizer(kind, [CONTEXT, "where is it ?"] * 50)


def asked(answers: tuple[Answer, ...] | None, text: str = "where is it ?", context: str = CONTEXT) -> Question:
    return Question("a", text, context, answers, "f.jsonl: line 3")


def at(word: str) -> Answer:
    return Answer(word, CONTEXT.index(word))


def test_windows_have_the_question_and_overlapping_parts_of_the_context() -> None:
    own = tokenizer()
    windows = encode_questions(own, [("where is it ?", CONTEXT)], 14, 6, 2)
    texts = own.batch_decode([windows.tokens[a:b] for a, b in zip(windows.offsets, windows.offsets[1:], strict=False)])
    assert texts[0] == "[CLS] where is it? [SEP] one two three four five six seven [SEP]"
    assert texts[1] == "[CLS] where is it? [SEP] six seven eight nine ten eleven twelve [SEP]"
    assert windows.questions.tolist() == [0, 0]
    assert windows.types is not None
    assert windows.types[:8].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    for number in range(2):
        own_tokens = slice(windows.offsets[number], windows.offsets[number + 1])
        kept = windows.keep[own_tokens]
        assert kept.tolist() == [True, *[False] * 5, *[True] * 7, False]
        words = [CONTEXT[a:b] for a, b in windows.chars[own_tokens][kept][1:]]
        assert words == CONTEXT.split()[5 * number : 5 * number + 7]


def test_windows_are_the_same_whichever_side_the_tokenizer_cuts() -> None:
    found = []
    for side in ("right", "left"):
        own = tokenizer()
        own.truncation_side = side
        found.append(encode_questions(own, [("where is it ?", CONTEXT)], 14, 6, 2).tokens.tolist())
    assert found[0] == found[1]


def labels(answers: tuple[Answer, ...] | None, stride: int = 2) -> list[list[int]]:
    windows = encode_questions(tokenizer(), [("where is it ?", CONTEXT)], 14, 6, stride)
    found = span_labels_of(windows, [asked(answers)])
    assert (found[~windows.keep] == IGNORE).all()
    parts = zip(np.split(found, windows.offsets[1:-1]), np.split(windows.keep, windows.offsets[1:-1]), strict=True)
    return [part[keep].tolist() for part, keep in parts]


def test_labels_are_bits_of_starts_and_ends_and_a_window_without_the_answer_has_none() -> None:
    assert labels((at("three four"),)) == [[0, 0, 0, 1, 2, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0, 0]]
    assert labels((at("seven"),)) == [[0, 0, 0, 0, 0, 0, 0, 3], [0, 0, 3, 0, 0, 0, 0, 0]]
    assert labels((at("five six seven"),))[1][0] == 3  # cut by the second window
    assert labels(()) == [[3] + [0] * 7] * 2
    assert labels(None) == [[IGNORE] * 8] * 2
    assert labels((at("two"), at("ten"))) == [[0, 0, 3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 3, 0, 0]]
    assert labels((Answer("wo thr", 5),))[0] == [0, 0, 1, 2, 0, 0, 0, 0]  # of the tokens that it touches


def test_an_answer_that_every_window_cuts_is_refused() -> None:
    with pytest.raises(DataError, match=r"f\.jsonl: line 3: the answer 'five six seven eight' is cut by every window"):
        labels((at("five six seven eight"),))
    labels((at("five six seven eight"),), stride=3)


def test_long_questions_are_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    own = tokenizer()
    windows = encode_questions(own, [("where is it where is it ?", CONTEXT)], 14, 3, 2)
    assert own.decode(windows.tokens[: windows.offsets[1]]).startswith("[CLS] where is it [SEP] one")
    assert "cut 1 of 1 questions to 3 tokens (max_question_length)" in caplog.text


def test_a_question_is_cut_between_characters() -> None:
    own = tokenizer("bpe:300")
    own.backend_tokenizer.post_processor = TemplateProcessing(
        "<|endoftext|> $A", "<|endoftext|> $A <|endoftext|> $B:1", [("<|endoftext|>", 0)]
    )
    assert len(own("\U0001f600")["input_ids"]) > 3  # with one before it
    windows = encode_questions(own, [("where \U0001f600?", CONTEXT)], 14, 3, 2)
    begin = windows.tokens[: int(windows.inside.argmax())]
    assert own.decode(begin) == "<|endoftext|>where <|endoftext|>"
    assert len(encode_questions(own, [("\U0001f600" * 9, CONTEXT)], 14, 2, 2)) == 2


def test_windows_that_do_not_get_on_and_other_tokenizers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.stride=5: expected less than the 5 tokens of a context"):
        encode_questions(tokenizer(), [("where ?", CONTEXT)], 14, 6, 5)
    with pytest.raises(ConfigError, match="puts no special token before a text"):
        encode_questions(tokenizer("bpe:300"), [("where ?", CONTEXT)], 14, 6, 2)


def data(folder: Path, **options: Any) -> QuestionFiles:
    given = {"tokenizer": "wordpiece:120", "max_length": 40, "stride": 8, "max_question_length": 12, **options}
    found = QuestionFiles(train_file=str(write_jsonl(folder / "qa.jsonl")), **given)
    found.prepare()
    return found


def test_batches_and_what_the_data_decide(tmp_path: Path, own_home: Path) -> None:
    own = data(tmp_path)
    batch = own.few()
    assert set(batch) == {
        "index", "question", "input_ids", "token_type_ids", "labels", "keep", "attention_mask",
    }  # fmt: skip
    assert batch["keep"][:, 0].all()
    assert ((batch["labels"] != IGNORE) == batch["keep"]).all()
    assert own.model_arguments("student")["num_classes"] == 2
    assert own.model_arguments("student")["per_token"] is True
    assert own.task.settings["may_be_none"] is True
    assert own.task.complete
    assert own.input_format["windows"] == {"stride": 8, "max_question_length": 12}
    assert own.num_examples == len(own.windows) > 120
    again = data(tmp_path)
    assert (again.fingerprint, again.teacher_key) == (own.fingerprint, own.teacher_key)
    assert data(tmp_path, stride=9).fingerprint != own.fingerprint
    assert data(tmp_path, max_answer_tokens=9).teacher_key == own.teacher_key


def test_questions_of_a_context_are_held_out_together(tmp_path: Path, own_home: Path) -> None:
    rows = records(40)
    rows += [{**row, "id": f"{row['id']}-again", "question": "Who ?", "answers": {"text": [], "answer_start": []}}
             for row in rows]  # fmt: skip
    found = QuestionFiles(train_file=str(write_jsonl(tmp_path / "twice.jsonl", rows))).read()
    contexts = [{one.context for one in part} for part in (found.train, found.validation, found.test)]
    assert not contexts[0] & contexts[1] | contexts[0] & contexts[2] | contexts[1] & contexts[2]
    assert sum(map(len, (found.train, found.validation, found.test))) == 80


def test_questions_for_the_teacher_alone_have_no_labels(tmp_path: Path, own_home: Path) -> None:
    rows = [{"id": f"t{i}", "question": "Where is Bob ?", "context": f"Bob is in town {i} ."} for i in range(3)]
    own = data(tmp_path, transfer=[str(write_jsonl(tmp_path / "more.jsonl", rows))])
    assert own.sizes["transfer"] == 3
    span = own._spans["transfer"]
    batch = own._dataset("transfer", "transfer")[range(len(span))]
    assert (batch["labels"] == IGNORE).all()
    assert batch["keep"].any(1).all()


def test_a_teacher_of_other_tokens_is_refused(tmp_path: Path, own_home: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.teacher_tokenizer=wordpiece:40 makes other tokens than data\.tokenizer"
    ):
        data(tmp_path, teacher_tokenizer="wordpiece:40")


def test_folds_are_of_contexts(tmp_path: Path, own_home: Path) -> None:
    rows = records(40)
    rows += [{**row, "id": f"{row['id']}-again", "question": "Who ?", "answers": {"text": [], "answer_start": []}}
             for row in rows]  # fmt: skip
    own = QuestionFiles(
        train_file=str(write_jsonl(tmp_path / "twice.jsonl", rows)), tokenizer="wordpiece:120", max_length=40,
        stride=8, max_question_length=12,
    )  # fmt: skip
    folds = own.folds(3)
    assert sorted(set(folds.tolist())) == [-1, 0, 1, 2]
    train = own._spans["train"]
    assert (np.flatnonzero(folds >= 0) == np.array(train)).all()
    of_context: dict[str, set[int]] = {}
    for window in train:
        of_context.setdefault(own.contexts.texts[own.windows.questions[window]], set()).add(int(folds[window]))
    assert all(len(one) == 1 for one in of_context.values())
    with pytest.raises(ConfigError, match=r"teacher\.folds=99, but there are \d+ training contexts"):
        own.folds(99)


def test_whether_there_may_be_no_answer_is_decided_by_the_training_split(
    tmp_path: Path, own_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", [{**row, "id": f"{name}{row['id']}"} for row in rows]))
        for name, rows in (("train", records(20, without=0.0)), ("test", records(20, seed=1, without=0.5)))
    }
    own = QuestionFiles(
        train_file=files["train"], validation_file=files["train"].replace("train", "test"), test_file=None,
        tokenizer="wordpiece:120", max_length=40, stride=8, max_question_length=12,
    )  # fmt: skip
    own.prepare()
    assert own.task.settings["may_be_none"] is False
    assert "validation questions have no answer, and no training question" in caplog.text


def test_long_answers_are_counted(tmp_path: Path, own_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    data(tmp_path)
    assert "max_answer_tokens" not in caplog.text
    data(tmp_path, max_answer_tokens=1)
    place = r"qa\.jsonl: line \d+"
    assert re.search(rf"questions have an answer of more than data.max_answer_tokens=1 tokens.*{place}", caplog.text)
