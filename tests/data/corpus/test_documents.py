from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from kd_lightning.data.corpus.documents import DocumentReader
from kd_lightning.runtime.errors import DataError, KDError

TEXTS = ["One text.\n\nOf two paragraphs.\n", "Another, with ümlauts.", "  A third.  "]


def read(paths: list[Path], **options: str) -> list[str]:
    return list(DocumentReader(**options).source([str(path) for path in paths], "train_file").documents())  # type: ignore[arg-type]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text, encoding="utf-8")
    assert read(paths) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv"])
def test_a_record_is_one_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    records = [{"id": number, "body": text} for number, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if name.endswith("parquet"):
        pd.DataFrame(records).to_parquet(path)
    elif name.endswith("csv"):
        pd.DataFrame(records).to_csv(path, index=False)
    elif name.endswith("gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(records) if name == "a.json" else lines, encoding="utf-8")
    assert read([path], text_column="body") == TEXTS


def test_a_folder_is_all_its_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name, text in zip(("b/2.txt", "a/1.txt", "c.txt"), TEXTS, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "notes.md").write_text("of no known format", encoding="utf-8")
    assert read([tmp_path]) == [TEXTS[1], TEXTS[0], TEXTS[2]]


def test_a_source_is_named_after_content_and_column_not_after_places(tmp_path: Path) -> None:
    def key(name: str, text: str, column: str = "text") -> str:
        path = tmp_path / name
        path.write_text(json.dumps({"text": text, "other": "x"}), encoding="utf-8")
        return DocumentReader(column).source([str(path)], "train_file").key

    assert key("a.jsonl", "one") == key("b.jsonl", "one")
    assert len({key("a.jsonl", "one"), key("a.jsonl", "two"), key("a.jsonl", "one", "other")}) == 3


def test_what_is_wrong_is_named_with_its_place(tmp_path: Path) -> None:
    empty, latin, records = (tmp_path / name for name in ("empty.txt", "latin.txt", "a.jsonl"))
    empty.write_text(" \n", encoding="utf-8")
    latin.write_bytes("one\nzwölf\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"empty\.txt: the text is empty"):
        read([empty])
    with pytest.raises(DataError, match=r"latin\.txt: line 2: byte 0xf6 .* set data\.encoding"):
        read([latin])
    assert read([latin], encoding="latin-1") == ["one\nzwölf\n"]
    records.write_text('{"text": "good"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl: line 2, column 'text': expected a text, got the int 3"):
        read([records])
    records.write_text('{"text": "good"}\n{"text": ""}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl: line 2, column 'text': the text is empty"):
        read([records])
    with pytest.raises(DataError, match=r"no column 'txet'; did you mean 'text'\?"):
        read([records], text_column="txet")


def test_places_without_documents_are_refused_before_any_is_read(tmp_path: Path) -> None:
    reader = DocumentReader()
    with pytest.raises(KDError, match=r"data\.train_file: .*nowhere: no such file or folder"):
        reader.source([str(tmp_path / "nowhere")], "train_file")
    with pytest.raises(KDError, match=r"data\.test_file: the folder .* has no file of \.csv"):
        reader.source([str(tmp_path)], "test_file")
    (tmp_path / "a.md").write_text("text", encoding="utf-8")
    with pytest.raises(KDError, match=r"cannot tell the format from '\.md'"):
        reader.source([str(tmp_path / "a.md")], "train_file")
