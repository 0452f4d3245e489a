"""A teacher with another tokenizer reads the same bytes, and spans of both sides are the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from kd_lightning.data import LMTextData
from kd_lightning.data.text.tokens import load_tokenizer, tokenizer_differences, write_tokenizer
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE, Batch
from tests.data.corpus.texts import made, written

TEXTS = [*made(20), "Café für 人民 🙂 naïve 🙂🙂", "x", "  two  spaces \n\n and\tmore  "]


def tokenizer(folder: Path, size: int, bos: bool, texts: list[str]) -> str:
    """Write byte pairs of some size, learned from some texts, with a token that begins a text or without."""
    found: Any = load_tokenizer(f"bpe:{size}", texts)
    if bos:
        found.add_special_tokens({"bos_token": "<s>"})
        found.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", found.bos_token_id)]
        )
    write_tokenizer(found, folder)
    return str(folder)


def corpus(tmp_path: Path, student_bos: bool = False, teacher_bos: bool = True, **options: Any) -> LMTextData:
    given: dict[str, Any] = {
        "tokenizer": tokenizer(tmp_path / "student", 300, student_bos, TEXTS),
        "teacher_tokenizer": tokenizer(tmp_path / "teacher", 420, teacher_bos, [" ".join(TEXTS[:8])] * 4),
        "cross_tokenizer": True, "block_size": 13, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **options,
    }  # fmt: skip
    return LMTextData(str(written(tmp_path, TEXTS)), **given)


def batches(data: LMTextData) -> list[Batch]:
    data.prepare()
    return [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]


@pytest.mark.parametrize("bos", [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize("packing", ["documents", "concat", "none"])
def test_spans_are_the_same_text_on_both_sides(tmp_path: Path, bos: tuple[bool, bool], packing: Any) -> None:
    data = corpus(tmp_path, *bos, packing=packing)
    student, teacher = (data.tokenizer_of(role) for role in ("student", "teacher"))
    count = merged = ends = 0
    for batch in batches(data):
        for row, spans in enumerate(batch["spans"].tolist()):
            stops = [0, 0]
            for begin, stop, teacher_begin, teacher_stop in (span for span in spans if span[1]):
                assert begin >= stops[0] >= 0
                assert teacher_begin >= stops[1], "in order, none twice"
                stops = [stop, teacher_stop]
                own = batch["input_ids"][row, begin:stop].tolist()
                other = batch["teacher_input_ids"][row, teacher_begin:teacher_stop].tolist()
                if own == [student.eos_token_id]:
                    assert other == [teacher.eos_token_id]
                    ends += 1
                    continue
                texts = [t.decode(i, skip_special_tokens=True) for t, i in ((student, own), (teacher, other))]
                assert texts[0] == texts[1] != ""
                count, merged = count + 1, merged + (len(own) > 1 or len(other) > 1)
    assert count > 300
    assert merged > 30
    assert ends >= 10


def test_nothing_finer_could_be_compared(tmp_path: Path) -> None:
    """The prefixes of both sides' tokens that are the same text are found again one by one."""
    data = corpus(tmp_path, packing="none", block_size=400)
    student, teacher = (data.tokenizer_of(role) for role in ("student", "teacher"))
    for batch in batches(data):
        for row in range(len(batch["input_ids"])):
            texts = []
            for name, one in (("", student), ("teacher_", teacher)):
                length = int(batch[f"{name}attention_mask"][row].sum())
                ids = batch[f"{name}input_ids"][row, :length].tolist()
                texts.append([one.decode(ids[:i], skip_special_tokens=True) for i in range(1, length)])
            common = {t for t in set(texts[0]) & set(texts[1]) if not t.endswith("\N{REPLACEMENT CHARACTER}")}
            spans = [span for span in batch["spans"][row].tolist() if span[1]]
            assert len(spans) >= len(common - {""}) - 1 - ("🙂" in "".join(common)) * 4
            assert len({tuple(span) for span in spans}) == len(spans)


def test_a_block_within_a_document_is_read_from_its_first_whole_token(tmp_path: Path) -> None:
    data = corpus(tmp_path, block_size=5)
    student, teacher = (data.tokenizer_of(role) for role in ("student", "teacher"))
    bos = int(teacher.bos_token_id)
    for batch in batches(data):
        for row, documents in enumerate(batch["teacher_document_ids"]):
            ids, own = batch["teacher_input_ids"][row], batch["document_ids"][row]
            for number in documents[documents >= 0].unique():
                theirs = ids[documents == number]
                assert theirs[0] == bos, "its model expects it, wherever the text begins"
                assert not (theirs[1:] == bos).any()
                text = student.decode(batch["input_ids"][row, own == number], skip_special_tokens=True)
                read = teacher.decode(theirs, skip_special_tokens=True)
                clean = read.strip("\N{REPLACEMENT CHARACTER}")
                assert clean in text or "\N{REPLACEMENT CHARACTER}" in text
            positions = batch["teacher_position_ids"][row][documents >= 0]
            begun = len(documents[documents >= 0].unique())
            assert int((positions[1:] - positions[:-1] == 1).sum()) == len(positions) - begun


def test_the_teachers_tokens_alone_have_the_plain_names(tmp_path: Path) -> None:
    data = corpus(tmp_path)
    data.prepare()
    both, alone = (next(iter(data.select(tokens).val_dataloader())) for tokens in ("both", "teacher"))
    assert torch.equal(both["teacher_input_ids"], alone["input_ids"])
    assert torch.equal(both["index"], alone["index"])
    assert "spans" not in alone
    first = alone["position_ids"] == 0
    assert (alone["labels"][first] == IGNORE).all()
    kept = (alone["attention_mask"] == 1) & ~first
    assert torch.equal(alone["labels"][kept], alone["input_ids"][kept])
    assert "spans" not in next(iter(data.select("student").val_dataloader()))
    sizes = [data.model_arguments(role)["vocab_size"] for role in ("student", "teacher")]
    assert sizes == [data.select("student").task.outputs, data.select("teacher").task.outputs]


def test_other_tokens_are_an_error_that_names_both_unless_wanted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer .*teacher and data\.tokenizer=.*student differ in their vocabul"):
        corpus(tmp_path, cross_tokenizer=False).prepare()
    same = tokenizer(tmp_path / "same", 300, False, TEXTS)
    alike = corpus(tmp_path, teacher_tokenizer=same)
    alike.prepare()
    assert not alike.other_tokens
    more: Any = load_tokenizer(same)
    more.add_tokens(["<extra>"])
    write_tokenizer(more, tmp_path / "more")
    with pytest.raises(ConfigError, match="differ in their vocabularies, added tokens: give the data the teacher's"):
        corpus(tmp_path, teacher_tokenizer=str(tmp_path / "more"), cross_tokenizer=False).prepare()
    bos = tokenizer(tmp_path / "bos", 300, True, TEXTS)
    assert "the tokens around a text" in tokenizer_differences(load_tokenizer(bos), load_tokenizer(same))
