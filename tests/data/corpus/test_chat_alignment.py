"""Conversations for a teacher with another tokenizer and chat template: which of its tokens are compared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from kd_lightning.data import ChatData
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE
from tests.data.corpus.test_chat import CHATML, MARKED, data, talks, tokenizer
from tests.data.corpus.texts import WORDS

__all__ = ["tokenizer"]  # a fixture

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start>' + role + '\n' + m['content'] | trim + '<end>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)


def teacher(folder: Path, template: str | None = GEMMA) -> str:
    """Write other byte pairs, with a token before each text and others around a turn."""
    made: Any = load_tokenizer("bpe:420", [" ".join(WORDS[:9])] * 4)
    made.add_special_tokens(
        {"bos_token": "<bos>", "eos_token": "<end>", "additional_special_tokens": ["<start>", "<end>"]}
    )
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", made.bos_token_id)]
    )
    made.chat_template = template
    write_tokenizer(made, folder)
    return str(folder)


def crossed(tmp_path: Path, tokenizer: Path, conversations: list[Any], **options: Any) -> ChatData:
    given = {"teacher_tokenizer": teacher(tmp_path / "teacher"), "cross_tokenizer": True, **options}
    return data(tmp_path, tokenizer, conversations, **given)


def spanned(module: ChatData) -> list[tuple[str, bool]]:
    """Return the texts of all spans, and whether they end a turn, after checking both sides and that all count."""
    module.prepare()
    student, other = (module.tokenizer_of(role) for role in ("student", "teacher"))
    found = []
    loaders = [module.train_dataloader(), module.val_dataloader(), module.test_dataloader()]
    alone = [module.select("teacher").val_dataloader(), module.select("teacher").test_dataloader()]
    for batch in itertools.chain(*loaders):
        for row, spans in enumerate(batch["spans"].tolist()):
            stops = [0, 0]
            for begin, stop, teacher_begin, teacher_stop in (span for span in spans if span[1]):
                assert begin >= stops[0]
                assert teacher_begin >= stops[1], "in order, none twice"
                stops = [stop, teacher_stop]
                assert (batch["labels"][row, begin:stop] != IGNORE).all(), "only assistant's turns are compared"
                own = batch["input_ids"][row, begin:stop].tolist()
                theirs = batch["teacher_input_ids"][row, teacher_begin:teacher_stop].tolist()
                ends = own == [student.eos_token_id]
                assert ends == (theirs == [other.eos_token_id])
                texts = [one.decode(ids, skip_special_tokens=True) for one, ids in ((student, own), (other, theirs))]
                assert ends or texts[0] == texts[1] != ""
                found.append((texts[0], ends))
    for batch in itertools.chain(*alone):
        counted = batch["input_ids"][batch["labels"] != IGNORE]
        assert 0 < len(counted) < int(batch["attention_mask"].sum())
        assert not (counted == other.convert_tokens_to_ids("<start>")).any()
        begins = batch["position_ids"][batch["attention_mask"] == 1] == 0
        ids = batch["input_ids"][batch["attention_mask"] == 1]
        assert torch.equal(ids == other.bos_token_id, begins), "once, whether its template writes it or not"
    return found


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_teachers_turns_are_compared_with_the_students_and_nothing_else(
    tmp_path: Path, tokenizer: Path, template: str, turns: Any
) -> None:
    """Each by its own template: every counted token of the student is in a span."""
    conversations = talks(20, turns=3)
    module = crossed(tmp_path, tokenizer, conversations, chat_template=template, turns=turns, block_size=512)
    found = spanned(module)
    of = [[m["content"] for m in one if m["role"] == "assistant"] for one in conversations]
    contents = [text for one in of for text in (one if turns == "all" else one[-1:])]
    assert sum(ends for _, ends in found) == len(contents)
    texts, turn = [], ""
    for text, ends in found:
        turn += text
        if ends:
            texts.append(turn)
            turn = ""
    assert sorted(texts) == sorted(contents)


def test_turns_that_a_template_changes_are_left_out(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The teacher's trims white space, and to it the student's special token in a turn is text."""
    conversations = talks(12, turns=1)
    conversations[0][1]["content"] = "kept as it is  "
    conversations[1][1]["content"] = "an end<|im_end|> within"
    found = spanned(crossed(tmp_path, tokenizer, conversations))
    assert sum(ends for _, ends in found) == 10
    assert not any("kept" in text or "within" in text for text, _ in found)
    assert "2 of 12 turns are another text in the teacher's template" in caplog.text
    changed = [[one[0], {**one[1], "content": "  " + one[1]["content"]}] for one in talks(12, turns=1)]
    with pytest.raises(ConfigError, match=r"data\.cross_tokenizer=true: no assistant's turn is the same text .* set "):
        crossed(tmp_path, tokenizer, changed).prepare()


def test_a_teacher_reads_the_messages_that_fit_the_students_block(tmp_path: Path, tokenizer: Path) -> None:
    """`last` is the last one that is left."""
    long = [{"role": role, "content": f"long {i}, laws"} for i in range(9) for role in ("user", "assistant")]
    module = crossed(tmp_path, tokenizer, [long, *talks(9, turns=1)], turns="last")
    text = "".join(text for text, _ in spanned(module))
    turns = [i for i in range(9) if f"long {i}, laws" in text]
    assert len(turns) == 1
    assert 0 < turns[0] < 8, "it lost some of its messages"
    assert len(module._reading.compared[0]) == 10  # type: ignore[union-attr]


def test_one_template_serves_both_where_the_teacher_has_none(tmp_path: Path, tokenizer: Path) -> None:
    """What its tokenizer puts before any text stands there, too."""
    bare = teacher(tmp_path / "bare", None)
    module = crossed(tmp_path, tokenizer, talks(9), chat_template="plain", teacher_tokenizer=bare)
    found = spanned(module)
    assert sum(ends for _, ends in found) == len(module._reading.turns[1].begins)  # type: ignore[union-attr]
    assert module.tokenizer_of("student").bos_token is None
    with pytest.raises(ConfigError, match=r"^data\.teacher_tokenizer='.*bare' has no chat template: set data\.chat_"):
        crossed(tmp_path, tokenizer, talks(9), teacher_tokenizer=bare).prepare()
    with pytest.raises(ConfigError, match=r"data\.cross_tokenizer=true: .* set data\.turns to all, or last"):
        crossed(tmp_path, tokenizer, talks(9), turns="everything")


@pytest.mark.parametrize("teacher_has_one", [True, False])
def test_a_student_with_a_token_before_a_text_reads_it_once(tmp_path: Path, teacher_has_one: bool) -> None:
    """By the template `plain`, also where the teacher has none, whose tokens then begin with a role."""
    own = teacher(tmp_path / "own", None)
    other = load_tokenizer("bpe:350", [" ".join(WORDS[:6])] * 4)
    write_tokenizer(other, tmp_path / "without")
    names = (tmp_path / "without", own) if teacher_has_one else (own, tmp_path / "without")
    module = data(
        tmp_path, Path(names[0]), talks(9), chat_template="plain", teacher_tokenizer=str(names[1]), cross_tokenizer=True
    )
    module.prepare()
    for role, has in (("student", not teacher_has_one), ("teacher", teacher_has_one)):
        bos = module.tokenizer_of(role).bos_token_id
        loader = module.select(tokens=role).val_dataloader()  # type: ignore[arg-type]
        for batch in loader:
            real = batch["attention_mask"] == 1
            begins = batch["position_ids"][real] == 0
            assert (bos is not None) == has
            assert not has or torch.equal(batch["input_ids"][real] == bos, begins)
    spans = torch.cat([batch["spans"].flatten(0, 1) for batch in module.val_dataloader()])
    assert (spans[:, 1] > 0).sum() > 5
