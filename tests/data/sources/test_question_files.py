"""Questions of the user's files: all formats, and bad input with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.data import QuestionFiles
from kd_lightning.data.sources.question_reader import QuestionReader
from kd_lightning.data.text.questions import Answer
from kd_lightning.runtime.errors import ConfigError, DataError
from tests.toy_questions import records, write_jsonl

ROW = {
    "id": "a", "question": "Where is Ada ?", "context": "Ada is in Oslo .",
    "answers": {"text": ["Oslo"], "answer_start": [10]},
}  # fmt: skip


def squad(version: str = "v2.0") -> dict[str, Any]:
    qas = [
        {"id": "a", "question": "Where is Ada ?", "answers": [{"text": "Oslo", "answer_start": 10}]},
        {"id": "b", "question": "Where is Bob ?", "answers": [], "is_impossible": True,
         "plausible_answers": [{"text": "Oslo", "answer_start": 10}]},
    ]  # fmt: skip
    return {"version": version, "data": [{"title": "T", "paragraphs": [{"context": ROW["context"], "qas": qas}]}]}


def read(path: Path, **options: Any) -> list[Any]:
    return QuestionReader(**options).questions(str(path))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["squad.json", "squad.json.gz"])
def test_squads_own_format(tmp_path: Path, name: str, indent: int | None) -> None:
    content = json.dumps(squad(), indent=indent)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    first, second = read(path)
    assert (first.id, first.text, first.answers) == ("a", "Where is Ada ?", (Answer("Oslo", 10),))
    assert (second.id, second.answers) == ("b", ())
    assert second.place == f"{path}: article 1, paragraph 1, question 2"


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"answers": [{"text": "Oslo", "answer_start": 10}]}, "is_impossible is true, and there are answers"),
     ({"id": None}, "id: expected a text or a number, got null")],
)  # fmt: skip
def test_bad_entries_of_squads_format(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    content = squad()
    content["data"][0]["paragraphs"][0]["qas"][1] |= changed
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as found:
        read(path)
    assert str(found.value).startswith(f"{path}: article 1, paragraph 1, question 2")
    assert message in str(found.value)


def test_a_broken_file_of_squads_format_is_refused_with_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    lines = json.dumps(squad(), indent=2).splitlines()
    lines[7] += "?"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"squad\.json: line 8, character \d+: not JSON"):
        read(path)


def test_records_of_jsonl_json_and_parquet_are_the_same(tmp_path: Path) -> None:
    rows = records(12)
    expected = [(row["id"], row["question"], row["context"]) for row in rows]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    answers = []
    for name in ("rows.jsonl", "rows.json", "lines.json", "rows.parquet"):
        found = read(tmp_path / name)
        assert [(one.id, one.text, one.context) for one in found] == expected
        answers.append([one.answers for one in found])
    assert all(one == answers[0] for one in answers)


def test_a_data_set_of_datasets(tmp_path: Path, own_home: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional extra `hub` is not installed")
    rows = records(30)
    tables = datasets.DatasetDict({
        "train": datasets.Dataset.from_list(rows[:20]), "validation": datasets.Dataset.from_list(rows[20:]),
    })  # fmt: skip
    tables.save_to_disk(str(tmp_path / "stored"))
    found = QuestionFiles(name=str(tmp_path / "stored")).read()
    assert len(found.validation) == 10
    assert len(found.train) + len(found.test) == 20
    assert found.validation[0].place == f"{tmp_path / 'stored'}, split 'validation': row 1"


def test_white_space_around_an_answer_is_no_part_of_it(tmp_path: Path) -> None:
    row = {**ROW, "answers": [{"text": " Oslo ", "answer_start": 9}, {"text": "Oslo", "answer_start": 10}]}
    (found,) = read(write_jsonl(tmp_path / "one.jsonl", [row]))
    assert found.answers == (Answer("Oslo", 10),)


BAD = [
    ({"answers": {"text": ["Oslo"], "answer_start": [9]}},
     "line 1: the answer 'Oslo' is not at 9 of the context, where it stands at 10; there is ' Osl'"),
    ({"answers": {"text": ["Rome"], "answer_start": [10]}},
     "the answer 'Rome' is not at 10 of the context, which does not contain it; there is 'Oslo'"),
    ({"answers": {"text": ["Oslo"], "answer_start": [99]}},
     "the answer 'Oslo' at 99 lies beyond the context, which has 16 characters"),
    ({"answers": {"text": ["Oslo"], "answer_start": [-1]}}, "lies beyond the context"),
    ({"answers": {"text": [" "], "answer_start": [3]}}, "a question without an answer has an empty list of them"),
    ({"answers": {"text": ["Oslo"], "answer_start": []}}, "1 texts and 0 numbers of answer_start"),
    ({"answers": {"text": ["Oslo"], "answer_start": ["10"]}}, "got 'Oslo' and '10'"),
    ({"answers": "Oslo"}, "line 1, column 'answers': expected an object with the lists text and answer_start"),
    ({"answers": None}, "line 1, column 'answers': expected an object"),
    ({"context": " \u200b"}, "line 1: the context is empty"),
    ({"id": None}, "line 1, column 'id': expected a text or a number, got null"),
    ({"question": ""}, "line 1: the question is empty"),
    ({"question": 3}, "line 1, column 'question': expected a text, got '3'"),
    ({"context": "\ud800 x", "answers": []}, "half a character"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_bad_records_are_refused_with_their_place(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [{**ROW, **changed}])
    with pytest.raises(DataError) as found:
        read(path)
    assert message in str(found.value)
    assert str(found.value).startswith(f"{path}: line 1")
    assert "\n" not in str(found.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    row = {name: ROW[name] for name in ("question", "context", "answers")}
    missing = write_jsonl(tmp_path / "missing.jsonl", [row])
    with pytest.raises(DataError, match=r"missing\.jsonl: line 1: no column 'id'.*data\.id_column"):
        read(missing)
    assert read(missing, id_column=None)[0].id == f"{missing}: line 1"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="there are no questions"):
        read(empty)
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"cannot tell the format from '\.csv'; set data\.format to squad, jsonl"):
        read(tmp_path / "rows.csv")
    broken = squad()
    broken["data"][0]["paragraphs"][0].pop("qas")
    (tmp_path / "squad.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"squad\.json: article 1, paragraph 1: expected 'qas', a list of objects"):
        read(tmp_path / "squad.json")


def test_ids_that_come_again_and_data_without_answers_are_refused(tmp_path: Path, own_home: Path) -> None:
    rows = records(20)
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    test = write_jsonl(tmp_path / "test.jsonl", [{**ROW, "id": "q7"}])
    with pytest.raises(DataError) as found:
        QuestionFiles(train_file=str(train), test_file=str(test)).read()
    assert str(found.value) == f"{test}: line 1: the id 'q7' comes again, it is that of {train}: line 8, too"
    none = write_jsonl(tmp_path / "none.jsonl", [{**row, "answers": []} for row in rows])
    with pytest.raises(DataError, match="no training question has an answer"):
        QuestionFiles(train_file=str(none)).read()
    two = write_jsonl(tmp_path / "two.jsonl", rows[:2])
    with pytest.raises(DataError, match="2 different contexts are too few to split into 3 parts"):
        QuestionFiles(train_file=str(two)).read()


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"give data\.train_file or data\.name"):
        QuestionFiles()
    with pytest.raises(ConfigError, match=r"data\.format='squat' is unknown"):
        QuestionFiles("a", format="squat")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data\.max_answer_tokens=0"):
        QuestionFiles("a", max_answer_tokens=0)
