from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kd_lightning.data.sources.files import FileReader
from kd_lightning.data.sources.records import NAMED
from kd_lightning.runtime.errors import ConfigError, DataError

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
        ("txet,label\nx,1\n", "a.csv: line 1: no column 'text'; did you mean 'txet'?; it has txet, label (set data."),
        ("text;target;no\nx;1;2\n", "no column 'label'; valid: no, target, text (set data.label_column"),
        ("text,labels\nx,1\n", "a.csv: line 1: no column 'label'; did you mean 'labels'?"),
        ("text,text,label\nx,y,1\n", "a.csv: line 1: there are several columns 'text'"),
        ("text,label\nx,1\n\n  ,1\n", "a.csv: line 4, column 'text': the text is empty"),
        ("text,label\nx,1\n\u200b\ufeff,1\n", "a.csv: line 3, column 'text': the text is empty"),
        ('text,label\n"x\ny",1\nz,\n', "a.csv: line 4, column 'label': the label is missing"),
        ("text,label\nx,1\na, b,1\n", "a.csv: line 3: 3 cells, but the header has 2; quote a text"),
        ("text,label\nx\n", "a.csv: line 2: 1 cells, but the header has 2; a cell is missing"),
        ('text,label\nx,1\n"y,1\nz,1\n', "a.csv: the record from line 3 on: unexpected end of data"),
    ],
)
def test_errors_of_csv(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content, encoding="utf-8")
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
        ('{"text": "x", "label": NaN}', "line 2, column 'label': the label is missing (nan)"),
        ('{"text": "x", "label": Infinity}', "line 2, column 'label': the label inf is neither"),
        ('{"text": "x", "label": ' + "9" * 5000 + "}", "line 2: not JSON that can be read"),
        ("[" * 100_000, "line 2: not JSON that can be read"),
        ('{"text": "x", "label": [1]}', "line 2, column 'label': the label [1] is neither"),
    ],
)
def test_errors_of_json_lines(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine", "label": 1.0}) + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        FileReader().examples(path)
    assert f"a.jsonl: {message}" in str(caught.value)


def test_all_faulty_records_are_named_in_one_message(tmp_path: Path) -> None:
    """Whoever mends them one by one would read the file as often as it has faults."""
    path = tmp_path / "a.csv"
    path.write_text("text,label\n ,1\nx,1\ny,\n,0\n")
    message = r"a\.csv: line 2, column 'text': the text is empty; .* \(lines 4, 5 are faulty, too\)$"
    with pytest.raises(DataError, match=message):
        FileReader().examples(path)
    path.write_text("text,label\n" + " ,1\n" * (NAMED + 2))
    with pytest.raises(DataError, match=rf" \(lines 3, .*, {NAMED + 2}, \.\.\. are faulty, too\)$"):
        FileReader().sentences(path)
    path.write_text("text,label\n ,1\nx,1\n")
    with pytest.raises(DataError, match=r"remove the example$"):
        FileReader().examples(path)
    path.write_text("text,label\n ,1\n ,1\n")
    with pytest.raises(DataError, match=r" \(line 3 is faulty, too\)$"):
        FileReader().examples(path)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": ""}] * 3))
    with pytest.raises(DataError, match=r"a\.json: entry 1, .* \(entries 2, 3 are faulty, too\)$"):
        FileReader().sentences(path)


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


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_cells_may_be_separated_by_other_marks(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'\n"text"{delimiter}label\n"one, two{delimiter} three"{delimiter}neg\nfour, five{delimiter}pos\n')
    raw = FileReader().examples(path)
    assert raw.texts == [(f"one, two{delimiter} three",), ("four, five",)]
    assert raw.labels == ["neg", "pos"]
    assert raw.where(1).startswith(f"{path}: line 4")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_files_may_be_compressed(tmp_path: Path, kind: str) -> None:
    plain = written(tmp_path / f"rows.{kind}", kind)
    zipped = tmp_path / f"rows.{kind}.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert FileReader().examples(zipped).texts == FileReader().examples(plain).texts
    zipped.write_bytes(gzip.compress(plain.read_bytes())[:-20])
    with pytest.raises(DataError, match=r"rows\..*\.gz: cannot be read: "):
        FileReader().examples(zipped)
    zipped.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"rows\..*\.gz: cannot be read: Not a gzipped file"):
        FileReader().examples(zipped)
    zipped.write_bytes(gzip.compress(b"text,label\n\xff,1\n"))
    with pytest.raises(DataError, match="line 2: byte 0xff at offset 11 is not utf-8"):
        FileReader(format="csv").examples(zipped)


def test_json_may_be_an_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    pd.DataFrame(ROWS, columns=["text", "label"]).to_json(path, orient="records", indent=2)
    raw = FileReader().examples(path)
    assert list(zip([text for (text,) in raw.texts], raw.labels, strict=True)) == ROWS
    assert raw.where(3) == f"{path}: entry 4, column 'label'"


def test_a_text_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    text = "long " * 60_000
    path.write_text(f"text,label\n{text},1\n")
    assert FileReader().sentences(path) == [(text.strip(),)]


HALF = r"'\\ud83d' is half a character"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "x", "label": 1},\n 5]', r"entry 2: expected an object like .*, got 5"),
        ('{"rows": [\n1]}', r"line 1, character 11: not JSON: .*; expected an object a line, or one array"),
        ('[{"text": "x"},\n {"text": ]', r"line 2, character 11: not JSON"),
        (
            '{"text": "fine \\ud83d\\ude00", "label": "neg"}\n{"text": "cut \\ud83d", "label": "pos"}\n',
            f"line 2, column 'text': {HALF}",
        ),
        ('{"text": "fine", "label": "neg\\ud83d"}\n', f"line 1, column 'label': {HALF}"),
    ],
)
def test_damaged_json_is_refused_by_its_place(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"rows\.json: {message}"):
        FileReader().examples(path)


def test_sentences_line_up_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\u200b\nfour\n\n", encoding="utf-8")
    assert FileReader().sentences_and_gaps(path) == [("one",), None, None, ("four",), None]
    assert FileReader().sentences(path) == [("one",), ("four",)]
    path = tmp_path / "a.csv"
    path.write_text("text,label\none,1\n,2\nthree,3\n", encoding="utf-8")
    assert FileReader().sentences_and_gaps(path) == [("one",), None, ("three",)]


def test_a_list_of_second_texts_has_a_row_for_each_and_is_not_empty(tmp_path: Path) -> None:
    path, reader = tmp_path / "a.jsonl", FileReader(text_column="query", text_pair_column="found")
    rows = [{"query": "a", "found": ["b", "c"]}, {"query": "", "found": []}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert reader.sentences_and_gaps(path) == [("a", "b"), ("a", "c"), None]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"query": "d", "found": []}]))
    with pytest.raises(DataError, match=r"a\.jsonl: line 3, column 'found': the text is empty"):
        reader.sentences_and_gaps(path)


def test_whoever_reads_names_the_options_as_they_are_called(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sentence,label\n")
    with pytest.raises(DataError, match=r"set --text_column"):
        FileReader(key="--{}".format).examples(path)


def test_a_label_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,1\n")
    for reader in (FileReader(text_column="label"), FileReader(text_pair_column="label")):
        with pytest.raises(ConfigError, match=r"data\.label_column=label: each must name a column of its own"):
            reader.examples(path)
    assert FileReader(text_column="label").sentences(path) == [("1",)]


@pytest.mark.parametrize("name", ["", "folder", "folder.csv"])
def test_a_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name or "other").mkdir()
    with pytest.raises(DataError, match=r"is a folder: expected a file"):
        FileReader().examples(name)
