from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.data.sources.list_reader import ListReader
from kd_lightning.data.text.lists import RankedList
from kd_lightning.runtime.errors import ConfigError, DataError

GRADED = {"document_column": "text", "grade_column": "grade"}


def written(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_relevant_documents_and_others(tmp_path: Path) -> None:
    path = written(
        tmp_path / "queries.jsonl",
        {"query": "a", "yes": "b", "no": ["d", "c"]},
        {"query": "e ", "yes": ["g", "f"], "no": []},
    )
    reader = ListReader(positive_column="yes", negative_column="no")
    assert reader.lists(path, True) == [
        RankedList("a", ("b", "d", "c"), (1, 0, 0)),
        RankedList("e", ("g", "f"), (1, 1)),
    ]


def test_a_row_for_each_document_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("query,text,grade\na,z,0\nb,y,1\nA,x,2.5\na,w,0\n", encoding="utf-8")
    assert ListReader(**GRADED).lists(str(path), True) == [
        RankedList("a", ("z", "x", "w"), (0, 2.5, 0)),
        RankedList("b", ("y",), (1,)),
    ]


def test_lists_of_documents_and_grades(tmp_path: Path) -> None:
    path = written(tmp_path / "lists.jsonl", {"query": "a", "text": ["z", "x"], "grade": [0, 3]})
    assert ListReader(**GRADED).lists(path, True) == [RankedList("a", ("z", "x"), (0, 3))]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": [" ", "x"], "grade": [0, 1]}, "line 2, column 'text', text 1: the text is empty"),
        ({"text": [], "grade": []}, "line 2: the query 'q' has no documents"),
        ({"text": ["y", "x"], "grade": [0, 0]}, "line 2: the query 'q' has no relevant document"),
        ({"text": ["y", "x", "Y"], "grade": [0, 1, 0]}, "line 2: the query 'q' has the document 'Y' twice"),
        ({"query": "a", "text": "z", "grade": 1}, "line 2: the query 'a' has the document 'z' as in line 1"),
        ({"text": ["y", "x"], "grade": [0]}, "line 2: 2 documents and 1 grades"),
        ({"text": ["y", "x"], "grade": [0, -1]}, "line 2, column 'grade', text 2: the grade -1: expected a number"),
        ({"text": "y", "grade": "high"}, "line 2, column 'grade': the grade 'high'"),
        ({"text": "y", "grade": 1e39}, "line 2, column 'grade': the grade 1e+39: expected a number, 0 for an irr"),
        ({"text": "y", "grade": 10**400}, f"line 2, column 'grade': the grade 1{'0' * 39}: expected a number"),
        ({"text": "y", "grade": "1_0"}, "line 2, column 'grade': the grade '1_0': expected a number"),
        ({"text": "y", "grade": "\u0661"}, "line 2, column 'grade': the grade"),
        ({"text": "y", "grade": "1e999"}, "line 2, column 'grade': the grade '1e999'"),
        ({"text": "y", "grade": 2e6}, "line 2, column 'grade': the grade 2000000.0: expected a number, 0 for an irr"),
        ({"text": "y", "grade": 1e-46}, "line 2, column 'grade': the grade 1e-46: expected a number, 0 for an irr"),
        ({"text": "y", "grade": None}, "line 2, column 'grade': the grade None"),
        ({"query": None, "text": "y", "grade": 1}, "line 2, column 'query': the text is empty"),
        ({"text": [3], "grade": [1]}, "line 2, column 'text', text 1: expected a text, got the int 3"),
    ],
)
def test_bad_records_are_one_line_with_their_place(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "queries.jsonl", {"query": "a", "text": "z", "grade": 1}, {"query": "q", **record})
    with pytest.raises(DataError) as caught:
        ListReader(**GRADED).lists(path, True)
    assert f"{path}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_triplets_repeat_what_they_are_of(tmp_path: Path) -> None:
    rows = [{"query": "a", "yes": yes, "no": no} for yes in ("b", "c") for no in ("d", "e")]
    path = written(tmp_path / "triplets.jsonl", *rows, {"query": "A", "yes": "B ", "no": "d"})
    reader = ListReader(positive_column="yes", negative_column="no")
    assert reader.lists(path, True) == [RankedList("a", ("b", "d", "e", "c"), (1, 0, 0, 1))]
    path = written(tmp_path / "both.jsonl", *rows, {"query": "a", "yes": "d", "no": "f"})
    with pytest.raises(DataError, match="line 5: the query 'a' has the document 'd' as in line 1"):
        reader.lists(path, True)


def test_training_queries_need_no_relevant_document(tmp_path: Path) -> None:
    path = written(tmp_path / "queries.jsonl", {"query": "q", "text": ["y", "x"], "grade": [0, 0]})
    assert ListReader(**GRADED).lists(path, judged=False) == [RankedList("q", ("y", "x"), (0, 0))]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="there are no queries"):
        ListReader(**GRADED).lists(str(tmp_path / "empty.jsonl"), False)
    (tmp_path / "plain.txt").write_text("q")
    with pytest.raises(DataError, match="plain text has no documents"):
        ListReader(**GRADED).lists(str(tmp_path / "plain.txt"), False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"name data\.document_column and data\.grade_column, or data\.positive_column"),
        ({"document_column": "text"}, "one of the two ways"),
        ({**GRADED, "positive_column": "yes"}, "one of the two ways"),
        ({**GRADED, "negative_column": "no"}, "no column of negatives"),
        ({"positive_column": "query"}, "each must name a column of its own"),
    ],
)
def test_columns_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ListReader(**options)
