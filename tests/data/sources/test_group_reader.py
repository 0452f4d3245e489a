from __future__ import annotations

from pathlib import Path

import pytest

from kd_lightning.data.sources.group_reader import GroupReader
from kd_lightning.runtime.errors import ConfigError, DataError

PAIRS = GroupReader("query", "found")


def test_formats(tmp_path: Path) -> None:
    expected = [("a b", "c, d"), ("e", "f")]
    (tmp_path / "a.csv").write_text('query,found\na b,"c, d"\ne,f\n')
    (tmp_path / "a.tsv").write_text("query\tfound\na b\tc, d\ne\tf\n")
    (tmp_path / "a.jsonl").write_text('{"query": "a b", "found": "c, d"}\n\n{"query": "e", "found": "f", "x": 1}\n')
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        assert [group.texts for group in PAIRS.groups(str(tmp_path / name))] == expected
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert [group.texts for group in PAIRS.groups(str(tmp_path / "a.txt"))] == [("one",), ("two",)]
    assert PAIRS.texts(str(tmp_path / "a.csv")) == ["a b", "e"]


def test_parquet(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"query": ["a", "b"], "found": ["c", "d"], "wrong": [["x", "y"], ["z", "w"]]})
    frame.to_parquet(tmp_path / "a.parquet")
    reader = GroupReader("query", "found", "wrong")
    groups = reader.groups(str(tmp_path / "a.parquet"))
    assert [group.texts for group in groups] == [("a", "c", "x", "y"), ("b", "d", "z", "w")]


def test_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"query": ["a", "b"], "found": ["c", ""]})
    assert [group.texts for group in PAIRS.split({"train": table}, "train", "mine")] == [("a", "c"), ("b",)]
    with pytest.raises(DataError, match="mine, split 'train': no column 'wrong'"):
        GroupReader("query", "found", "wrong").split({"train": table}, "train", "mine")


@pytest.mark.parametrize(
    ("content", "reader", "message"),
    [
        ('{"query": "a"}', PAIRS, r"line 1: no column 'found'"),
        ('{"query": "", "found": "b"}', PAIRS, r"line 1, column 'query': the text is empty"),
        ('{"query": "a", "found": "b"}\n{"query": "a", "found": 3}', PAIRS, r"line 2, column 'found': expected a text"),
        ('{"query": "a", "found": " A "}', PAIRS, r"line 1: the positive 'A' is the text itself"),
        (
            '{"query": "a", "found": "b", "no": ["c", "B"]}', GroupReader("query", "found", "no"),
            r"line 1: the positive 'b' is a negative, too",
        ),
        (
            '{"query": "a", "found": "b", "no": null}', GroupReader("query", "found", "no"),
            r"line 1, column 'no': the text is empty",
        ),
        (
            '{"query": "a", "found": "b", "like": 1.5}', GroupReader("query", "found", score_column="like"),
            r"line 1, column 'like': the score 1.5: expected a number from 0 to 1 \(data.most_score\)",
        ),
        (
            '{"query": "a", "found": "b", "like": "good"}', GroupReader("query", "found", score_column="like"),
            r"line 1, column 'like': the score 'good'",
        ),
        (
            f'{{"query": "a", "found": "b", "like": 1{"0" * 400}}}',
            GroupReader("query", "found", score_column="like"), r"line 1, column 'like': the score 10000",
        ),
        (
            '{"query": "a", "found": "b", "like": "0_1"}', GroupReader("query", "found", score_column="like"),
            r"line 1, column 'like': the score '0_1'",
        ),
        ("", PAIRS, r"there are no texts"),
        ('{"query": "a", "found": "b"', PAIRS, r"line 1, character \d+: not JSON"),
    ],
)  # fmt: skip
def test_bad_input_names_file_and_line(tmp_path: Path, content: str, reader: GroupReader, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        reader.groups(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "a", "positive_column": "a"}, "each must name a column of its own"),
        ({"negative_column": "n"}, "name data.positive_column"),
        ({"positive_column": "p", "negative_column": "n", "score_column": "s"}, "a triplet has no score"),
        ({"most_score": 0.0}, "data.most_score=0: expected a number above 0"),
    ],
)
def test_columns_that_exclude_each_other(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroupReader(**options)  # type: ignore[arg-type]
