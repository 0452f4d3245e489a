from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kd_lightning.data.files import FileReader
from kd_lightning.errors import ConfigError, DataError

ROWS = [('good, "really" good', "yes"), ("很好，真的", "no"), ("two\nlines", "yes"), ("plain", "no")]


def written(path: Path, kind: str) -> Path:
    frame = pd.DataFrame(ROWS, columns=["text", "label"])
    if kind in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t", encoding="utf-8-sig")
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_all_formats_give_the_same(tmp_path: Path, kind: str) -> None:
    raw = FileReader().examples(written(tmp_path / f"rows.{kind}", kind))
    assert list(zip([text for (text,) in raw.texts], raw.labels, strict=True)) == ROWS
    last = {"csv": "line 6", "tsv": "line 6", "jsonl": "line 4", "parquet": "row 4"}[kind]
    assert raw.where(3) == f"{tmp_path / f'rows.{kind}'}: {last}, column 'label'"
    assert FileReader(format=kind).sentences(tmp_path / f"rows.{kind}") == raw.texts  # type: ignore[arg-type]


def test_plain_text_has_a_sentence_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\r\n\r\n  二\u2028三 \nlast".encode())
    assert FileReader().sentences(path) == [("one",), ("二\u2028三",), ("last",)]
    with pytest.raises(DataError, match=r"lines.txt: plain text has no labels"):
        FileReader().examples(path)
    with pytest.raises(DataError, match="one sentence a line, and this task has pairs"):
        FileReader(text_pair_column="other").sentences(path)


def test_unquoted_tab_separated(tmp_path: Path) -> None:
    path = tmp_path / "glue.tsv"
    path.write_text('text\tlabel\n"opens and never closes\t1\nfine\t0\n')
    assert FileReader(quotes=False).examples(path).texts == [('"opens and never closes',), ("fine",)]
    with pytest.raises(DataError, match=r"from line 2 on: .*data\.quotes=false"):
        FileReader().examples(path)


def test_encoding_is_the_users(tmp_path: Path) -> None:
    path = tmp_path / "gb.csv"
    path.write_bytes("text,label\n好,1\n坏,0\n".encode("gb18030"))
    assert FileReader(encoding="gb18030").sentences(path) == [("好",), ("坏",)]
    with pytest.raises(DataError, match=r"gb.csv: line 2: byte 0xba at offset 11 is not utf-8; set data\.encoding"):
        FileReader().sentences(path)
    with pytest.raises(ConfigError, match=r"data\.encoding='utf9'"):
        FileReader(encoding="utf9").sentences(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.csv: the file is empty"),
        ("sentence,label\nx,1\n", "a.csv: line 1: no column 'text'; valid: label, sentence (set data.text_column"),
        ("txet,label\nx,1\n", "a.csv: line 1: no column 'text'; did you mean 'txet'?"),
        ("text,labels\nx,1\n", "a.csv: line 1: no column 'label'; did you mean 'labels'?"),
        ("text,text,label\nx,y,1\n", "a.csv: line 1: there are several columns 'text'"),
        ("text,label\nx,1\n\n  ,1\n", "a.csv: line 4, column 'text': the text is empty"),
        ('text,label\n"x\ny",1\nz,\n', "a.csv: line 4, column 'label': the label is missing"),
        ("text,label\nx,1\na, b,1\n", "a.csv: line 3: 3 cells, but the header has 2; quote a text"),
        ("text,label\nx\n", "a.csv: line 2: 1 cells, but the header has 2; a cell is missing"),
        ('text,label\nx,1\n"y,1\nz,1\n', "a.csv: the record from line 3 on: unexpected end of data"),
    ],
)
def test_errors_of_csv(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        FileReader().examples(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "line 2, character 13: not JSON"),
        ('["x", 1]', "line 2: expected an object"),
        ('{"text": "x"}', "line 2: no column 'label'"),
        ('{"text": 5, "label": 1}', "line 2, column 'text': expected a text, got the int 5"),
        ('{"text": null, "label": 1}', "line 2, column 'text': the text is empty"),
        ('{"text": "x", "label": null}', "line 2, column 'label': the label is missing"),
        ('{"text": "x", "label": 0.5}', "line 2, column 'label': the label 0.5 is neither"),
        ('{"text": "x", "label": [1]}', "line 2, column 'label': the label [1] is neither"),
    ],
)
def test_errors_of_json_lines(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine", "label": 1.0}) + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        FileReader().examples(path)
    assert f"a.jsonl: {message}" in str(caught.value)


def test_errors_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("not parquet")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        FileReader().examples(path)
    pd.DataFrame({"text": ["x", None], "label": [1, 2]}).to_parquet(path)
    with pytest.raises(DataError, match=r"a\.parquet: row 2, column 'text': the text is empty"):
        FileReader().examples(path)
    with pytest.raises(DataError, match=r"a\.parquet: no column 'gold'; valid: label, text"):
        FileReader(label_column="gold").examples(path)


def test_files_that_are_not_there(tmp_path: Path, toy_csv: Callable[..., Path]) -> None:
    toy_csv("train.csv")
    with pytest.raises(DataError, match=r"trian\.csv: no such file; did you mean 'train\.csv'\?"):
        FileReader().examples(tmp_path / "trian.csv")
    with pytest.raises(DataError, match=r"no such file \(nor is there a folder"):
        FileReader().examples(tmp_path / "nowhere" / "train.csv")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"cannot tell the format from '\.xlsx'"):
        FileReader().examples(tmp_path / "a.xlsx")


def test_wide_characters_and_what_is_missing_of_them(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text("text\n好电影\n坏电影\n", encoding="utf-16")
    assert FileReader(encoding="utf-16").sentences(path) == [("好电影",), ("坏电影",)]
    path.write_bytes("text\n好\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"wide\.csv: there is no byte order mark, which utf-16 needs; set data\.enc"):
        FileReader(encoding="utf-16").sentences(path)


def test_a_bad_byte_far_into_the_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_bytes(b"text\n" + b"a sentence like any other\n" * 5000 + b"\xff\n")
    with pytest.raises(DataError, match=r"long\.csv: line 5002: byte 0xff at offset 130005 is not utf-8"):
        FileReader().sentences(path)
