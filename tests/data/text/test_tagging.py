from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_lightning.data import TokenFiles
from kd_lightning.data.datamodule import Role
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.runtime.errors import ConfigError, DataError
from kd_lightning.teachers.frozen import FrozenTeacher
from kd_lightning.types import IGNORE

LINES = "Ada B-PER\nLovelace I-PER\ncame O\nto O\nParis B-LOC\n. O\n\n"


@pytest.fixture
def train(tmp_path: Path) -> str:
    """Thirty texts of six words, and one of sixty."""
    texts = [LINES.replace("came", f"came{i}") for i in range(30)]
    path = tmp_path / "train.conll"
    path.write_text("".join(texts) + LINES[:-1] * 10 + "\n")
    return str(path)


def make(train: str, **options: Any) -> TokenFiles:
    small = {"tokenizer": "wordpiece:200", "batch_size": 8, "max_length": 16, "stride": 4}
    return TokenFiles(train, **(small | options))


def words(data: TokenFiles, batch: dict[str, torch.Tensor]) -> list[list[str]]:
    """The tags of each row's words, as the labels name them."""
    return [[data.class_names[label] for label in row[row != IGNORE]] for row in batch["labels"]]


def test_windows_are_examples_with_an_index_of_their_own(train: str) -> None:
    data = make(train)
    data.prepare()
    assert data.class_names == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert data.title == "LOC / PER"
    assert sum(data.sizes.values()) == data.num_examples == len(data.lengths) > 31
    assert data.model_arguments("student") == {
        "num_classes": 5, "vocab_size": len(data.student_tokenizer), "pad_token_id": 0, "per_token": True
    }  # fmt: skip
    batches = list(data.all_dataloader())
    index = torch.cat([batch["index"] for batch in batches])
    assert sorted(index.tolist()) == list(range(data.num_examples))
    cut = torch.cat([batch["window_of"] for batch in batches])
    assert int((cut >= 0).sum()) > 1  # the long text
    tags = [tag for batch in batches for row in words(data, batch) for tag in row]
    assert len(tags) == 30 * 6 + 60


def test_labels_stand_at_the_first_token_or_at_all(train: str) -> None:
    first, every = make(train, tokenizer="wordpiece:10"), make(train, tokenizer="wordpiece:10", label="all")
    one, other = (next(iter(data.test_dataloader())) for data in (first, every))
    assert one["index"].equal(other["index"])
    assert one["keep"].equal(other["begins"])
    assert one["labels"][one["keep"]].equal(other["labels"][other["begins"]])
    assert (one["labels"][~one["keep"]] == IGNORE).all()
    later = other["keep"] & ~other["begins"]
    names = {first.class_names[label] for label in other["labels"][later]}
    assert names == {"O", "I-LOC", "I-PER"}  # no entity begins within a word
    assert (other["labels"][~other["keep"]] == IGNORE).all()
    assert first.fingerprint != every.fingerprint


def test_everything_that_decides_the_batches_is_in_the_fingerprint(train: str, tmp_path: Path) -> None:
    transfer = tmp_path / "more.txt"
    transfer.write_text("Grace came to Rome.\nSo did Alan.\n")
    plain, more = make(train), make(train, transfer=[str(transfer)])
    for data in (plain, more):
        data.prepare()
    changed = [make(train, **option) for option in ({"stride": 5}, {"max_length": 24}, {"split_seed": 1})]
    for data in changed:
        data.prepare()
    assert len({data.fingerprint for data in (plain, more, *changed)}) == 5
    assert len({json.dumps(data.teacher_key) for data in (plain, more, *changed)}) == 5
    assert plain.labelled == more.labelled
    assert more.sizes["transfer"] == 2
    assert more.select(pool=False).fingerprint == plain.select(pool=False).fingerprint


def test_only_a_teacher_tags_the_transfer_texts(train: str, tmp_path: Path) -> None:
    transfer = tmp_path / "more.txt"
    transfer.write_text("Grace came to Rome.\n")
    data = make(train, transfer=str(transfer), batch_size=100)
    rows = [batch for batch in data.train_dataloader() if (batch["labels"] == IGNORE).all(1).any()]
    (batch,) = rows
    row = int((batch["labels"] == IGNORE).all(1).nonzero()[0, 0])
    assert int(batch["keep"][row].sum()) == 5
    alone = torch.cat([batch["labels"] for batch in data.select(pool=False).train_dataloader()])
    assert (alone != IGNORE).any(1).all()


def test_folds_leave_out_training_windows(train: str) -> None:
    data = make(train)
    folds = data.folds(3)
    assert sorted(set(folds.tolist())) == [-1, 0, 1, 2]
    kept = data.without_fold(1, 3)
    index = torch.cat([batch["index"] for batch in kept.train_dataloader()])
    assert not set(index.tolist()) & set((folds == 1).nonzero()[0].tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "frist"}, "data.label='frist' is unknown; did you mean 'first'"),
        ({"stride": -1}, "data.stride=-1: expected 0 or more"),
        ({"stride": 14}, "data.stride=14: expected less than the 14 tokens"),
        ({"scheme": "bilou"}, "data.scheme='bilou' is unknown"),
        (
            {"teacher_tokenizer": "wordpiece:10", "label": "all"},
            "data.label=all: the teacher's tokenizer 'wordpiece:10'",
        ),
        ({"name": "conll2003"}, "give data.train_file or data.name, one of the two"),
        ({"class_names": ["O", "PER"]}, "data.class_names: 'PER' is no tag of the scheme"),
    ],
)
def test_options_that_do_not_fit_are_refused(train: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        make(train, **options).prepare()


def begun(data: TokenFiles, batch: dict[str, torch.Tensor], role: Role) -> list[list[str]]:
    """The first tokens of each row's words, as text."""
    prefix, rows = ("teacher_", "teacher_rows") if role == "teacher" else ("", "keep")
    tokenizer = data.tokenizer_of(role)
    return [
        [str(token).removeprefix("##") for token in tokenizer.convert_ids_to_tokens(ids[keep])]
        for ids, keep in zip(batch[f"{prefix}input_ids"], batch[rows], strict=True)
    ]


def test_windows_of_two_tokenizers_have_the_same_words(train: str) -> None:
    data = make(train, teacher_tokenizer="wordpiece:10", max_length=24)  # the teacher's tokens are characters
    alone = make(train, max_length=24)
    data.prepare(), alone.prepare()
    assert data.num_examples > alone.num_examples
    seen = 0
    for batch in data.all_dataloader():
        assert batch["teacher_input_ids"].shape[1] <= 24
        assert batch["teacher_rows"].sum(1).equal(batch["keep"].sum(1))
        for own, others in zip(begun(data, batch, "student"), begun(data, batch, "teacher"), strict=True):
            assert [word[0] for word in own] == [word[0] for word in others]
            seen += len(own)
    assert seen == 30 * 6 + 60
    teacher = data.select(tokens="teacher", pool=False)
    for batch in teacher.test_dataloader():
        assert "teacher_rows" not in batch
        assert (batch["labels"] != IGNORE).equal(batch["keep"])  # what a teacher is fine-tuned on
    assert data.lengths.sum() > data.windows.lengths.sum()


def test_a_teacher_reads_the_students_tokens_or_its_own(train: str, tmp_path: Path) -> None:
    data = make(train, max_length=24)
    data.prepare()
    data.student_tokenizer.save_pretrained(tmp_path / "same")
    assert data.reading(str(tmp_path / "same")) is data
    other = make(train, tokenizer="wordpiece:10", max_length=128)
    other.prepare()
    other.student_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"more than data\.max_length=24 tokens are cut elsewhere"):
        data.reading(str(tmp_path / "other"))
    longer = make(train, max_length=512)
    read = longer.reading(str(tmp_path / "other"))
    assert read.has_two_tokenizers
    assert "teacher_rows" in next(iter(read.test_dataloader()))
    back = read.with_one_reader()
    assert not back.has_two_tokenizers
    assert "teacher_rows" not in next(iter(back.test_dataloader()))
    assert back.teacher_key == longer.teacher_key != read.teacher_key


def test_a_former_student_reads_the_windows_that_two_tokenizers_cut(train: str) -> None:
    """As a teacher of the next one; another first teacher cuts other windows, and is part of the key."""
    small, large = (make(train, teacher_tokenizer=f"wordpiece:{size}", max_length=24) for size in (10, 60))
    backs = [data.with_one_reader() for data in (small, large)]
    for back in backs:
        batches = list(back.select(tokens="teacher").train_dataloader())
        assert sum(int(batch["keep"].sum()) for batch in batches) > 100
        assert all((batch["labels"] != IGNORE).equal(batch["keep"]) for batch in batches)
    assert backs[0].windows.offsets.tolist() != backs[1].windows.offsets.tolist()
    assert backs[0].teacher_key != backs[1].teacher_key


@pytest.mark.parametrize("label", ["first", "all"])
def test_one_tokenizer_by_two_names_is_one(train: str, tmp_path: Path, label: str) -> None:
    data = make(train)
    data.prepare()
    folders = [str(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        data.student_tokenizer.save_pretrained(folder)
    both = make(train, tokenizer=folders[0], teacher_tokenizer=folders[1], label=label)
    batch = next(iter(both.train_dataloader()))
    assert not any(name.startswith("teacher_") for name in batch)
    assert not both.has_two_tokenizers


def test_a_teachers_logits_stand_at_the_students_words(train: str) -> None:
    data = make(train, teacher_tokenizer="wordpiece:10")
    batch = next(iter(data.train_dataloader()))
    network = BiLSTM(5, len(data.teacher_tokenizer), per_token=True)
    found = FrozenTeacher(network)(batch).logits
    own = {name.removeprefix("teacher_"): value for name, value in batch.items() if name.startswith("teacher_")}
    expected = network.eval()(own["input_ids"], own["attention_mask"]).logits
    assert found.shape == (*batch["input_ids"].shape, 5)
    torch.testing.assert_close(found[batch["keep"]], expected[own["rows"]].detach())
    assert not found[~batch["keep"]].any()


def test_a_folder_of_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional extra `hub` is not installed")
    split = {"tokens": [["Ada", f"came{i}"] for i in range(20)], "tags": [["B-PER", "O"]] * 20}
    table = datasets.Dataset.from_dict(split)
    datasets.DatasetDict({"train": table, "dev": table}).save_to_disk(str(tmp_path / "set"))
    data = TokenFiles(name=str(tmp_path / "set"), tokenizer="wordpiece:50", max_length=16, stride=2)
    data.prepare()
    assert data.sizes == {"train": 16, "transfer": 0, "validation": 20, "test": 4}


def test_a_bad_file_is_named_before_anything_is_encoded(tmp_path: Path) -> None:
    path = tmp_path / "train.conll"
    path.write_text(LINES + "x I-PER\n")
    with pytest.raises(DataError, match=r"train\.conll: line 8: I-PER follows O"):
        make(str(path)).prepare()
