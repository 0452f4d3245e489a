from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kd_lightning.data.sources.tagged_files import TaggedReader
from kd_lightning.data.text.tagged import assemble_tagged
from kd_lightning.runtime.errors import ConfigError, DataError
from kd_lightning.tasks.entities import Scheme

CONLL = """-DOCSTART- -X- O

Ada NNP B-PER
Lovelace NNP I-PER
met VBD O

Paris NNP B-LOC
. . O
"""


def written(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def lines(path: Path, *records: object) -> str:
    return written(path, "\n".join(json.dumps(record) for record in records))


def words(path: str, reader: TaggedReader | None = None) -> list[tuple[list[str], list[str] | None]]:
    texts = (reader or TaggedReader()).tagged(path)
    return [([text.text[start:stop] for start, stop in text.words], text.tags) for text in texts]


def corpus(path: str, reader: TaggedReader | None = None, scheme: Scheme | None = None) -> list[str]:
    texts = (reader or TaggedReader()).tagged(path)
    return assemble_tagged(
        texts, texts, texts, class_names=None, scheme=scheme, fractions=(0.1, 0.1), split_seed=0
    ).tags


def test_columns_of_conll(tmp_path: Path) -> None:
    expected = [(["Ada", "Lovelace", "met"], ["B-PER", "I-PER", "O"]), (["Paris", "."], ["B-LOC", "O"])]
    path = written(tmp_path / "train.conll", CONLL)
    assert words(path) == expected
    zipped = tmp_path / "train.bio.gz"
    zipped.write_bytes(gzip.compress(CONLL.replace("\n", "\r\n").encode()))
    assert words(str(zipped)) == expected
    assert words(written(tmp_path / "t.tsv", "New York\tB-LOC\n\n")) == [(["New York"], ["B-LOC"])]
    assert corpus(path) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_words_and_tags_of_jsonl(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"tokens": ["Ada", "met"], "tags": ["B-PER", "O"]})
    assert words(path) == [(["Ada", "met"], ["B-PER", "O"])]
    numbered = lines(tmp_path / "b.json", {"w": ["Ada", "met"], "t": [1, 0]})
    assert words(numbered, TaggedReader("w", "t", names=["O", "B-PER"])) == [(["Ada", "met"], ["B-PER", "O"])]


def test_spans_of_characters(tmp_path: Path) -> None:
    spans = [{"start": 10, "end": 18, "label": "LOC"}, {"start": 0, "end": 3, "label": "PER"}]
    path = lines(tmp_path / "a.jsonl", {"text": "Ada, from New York. 北京", "spans": spans})
    reader = TaggedReader(text_column="text", scheme="bioes")
    expected = ["Ada", ",", "from", "New", "York", ".", "北", "京"]
    assert words(path, reader) == [(expected, ["S-PER", "O", "O", "B-LOC", "E-LOC", "O", "O", "O"])]
    assert corpus(path, reader) == ["O", *(f"{prefix}-{kind}" for kind in ("LOC", "PER") for prefix in "BIES")]


BAD_COLUMNS = [
    ("a O\nb I-PER\n", "line 2: I-PER follows O: an entity begins with B-PER in BIO"),
    ("a B-PER\n\nb O\nc I-PER\n", "line 4: I-PER follows O"),
    ("a B-PER\nb PER\n", "line 2: 'PER' is no tag of BIO"),
    ("a B-PER\nb\n", "line 2: 'b' is one column; expected a word and its tag"),
    ("a NN B-PER\nb O\n", "line 2: 2 columns, but the lines before have 3"),
    ("a O\nb O\n", "line 1: no text has an entity, every tag is O"),
    ("\n\n", "there are no texts"),
    (" \tB-PER\n", "line 1: the word is empty"),
]


@pytest.mark.parametrize(("content", "message"), BAD_COLUMNS)
def test_bad_columns_are_named_with_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = written(tmp_path / "bad.conll", content)
    scheme: Scheme = "bio"
    with pytest.raises(DataError) as error:
        corpus(path, scheme=scheme)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def record(text: str, *spans: tuple[int, int]) -> dict[str, object]:
    return {"text": text, "spans": [{"start": start, "end": stop, "label": "PER"} for start, stop in spans]}


BAD_RECORDS = [
    ({"tokens": ["a"], "tags": ["B-PER", "O"]}, "line 2: 1 words and 2 tags; expected a tag for each word"),
    ({"tokens": [], "tags": []}, "line 2: there are no words"),
    ({"tokens": ["a", ""], "tags": ["O", "O"]}, "line 2, tag 2: the word is empty"),
    ({"tokens": ["a", 3], "tags": ["O", "O"]}, "line 2, column 'tokens': expected words, got 3"),
    ({"tokens": "a", "tags": ["O"]}, "line 2, column 'tokens': expected a list, got 'a'"),
    ({"tokens": ["a"], "tags": [7]}, "line 2, tag 1: the tag 7: expected a name, or data.class_names for numbers"),
    ({"tokens": ["a", "b"], "tags": ["O", "I-PER"]}, "line 2, tag 2: I-PER follows O"),
    ({"tokens": ["a"]}, "line 2: no column 'tags'"),
    (record("Ada", (0, 4)), "line 2: the span 0-4 (PER) lies outside of the text, which has 3 characters"),
    (record("Ada", (2, 2)), "line 2: the span 2-2 (PER) lies outside of the text"),
    (record("to Ada", (3, 5)), "line 2: the span 3-5 (PER), 'Ad', cuts the word 'Ada' (3-6)"),
    (record("to Ada", (4, 6)), "line 2: the span 4-6 (PER), 'da', cuts the word 'Ada' (3-6)"),
    (record("to  Ada", (2, 4)), "line 2: the span 2-4 (PER) holds no word"),
    (record("to Ada", (0, 6), (3, 6)), "line 2: the span 3-6 (PER), span 2 of the text, overlaps the one before"),
    (record(" ", (0, 1)), "line 2: there are no words in the text"),
    ({"text": "Ada", "spans": [{"start": 0, "end": "3", "label": "PER"}]}, "expected an object with start and end"),
    ({"text": None, "spans": []}, "line 2, column 'text': expected a text, got None"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_RECORDS)
def test_bad_records_are_named_with_file_and_line(tmp_path: Path, bad: dict[str, object], message: str) -> None:
    spans = "text" in bad
    good = record("Ada", (0, 3)) if spans else {"tokens": ["a"], "tags": ["B-PER"]}
    path = lines(tmp_path / "bad.jsonl", good, bad)
    with pytest.raises(DataError) as error:
        corpus(path, TaggedReader(text_column="text" if spans else None))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    written(tmp_path / "train.conll", CONLL)
    with pytest.raises(DataError, match=r"trian\.conll: no such file; did you mean 'train\.conll'"):
        TaggedReader().tagged(str(tmp_path / "trian.conll"))
    with pytest.raises(DataError, match=r"cannot tell the format from '\.csv'; set data\.format to conll, jsonl"):
        TaggedReader().tagged(written(tmp_path / "a.csv", "a"))


def test_unknown_tags_and_given_names(tmp_path: Path) -> None:
    train = TaggedReader().tagged(written(tmp_path / "a.conll", CONLL))
    other = TaggedReader().tagged(written(tmp_path / "b.conll", "Rome O\nACME B-ORG\n"))
    options = {"scheme": None, "fractions": (0.1, 0.1), "split_seed": 0}
    with pytest.raises(DataError, match=r"b\.conll: line 2: unknown tag 'B-ORG'; did you mean"):
        assemble_tagged(train, other, train, class_names=None, **options)  # type: ignore[arg-type]
    names = ["B-ORG", "I-ORG", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    assert assemble_tagged(train, other, train, class_names=names, **options).tags == names  # type: ignore[arg-type]
    for bad, message in ((["O", "PER"], "'PER' is no tag"), (["B-PER", "I-PER"], "O among them")):
        with pytest.raises(ConfigError, match=message):
            assemble_tagged(train, other, train, class_names=bad, **options)  # type: ignore[arg-type]


def test_parts_are_held_out_without_repeats(tmp_path: Path) -> None:
    content = "".join(f"word{i % 20} B-PER\n\n" for i in range(40))
    texts = TaggedReader().tagged(written(tmp_path / "a.conll", content))
    found = assemble_tagged(
        texts, None, None, class_names=None, scheme=None, fractions=(0.1, 0.2), split_seed=0, transfer=texts[:1]
    )
    parts = [[text.text for text in part] for part in (found.train, found.validation, found.test)]
    assert [len(part) for part in parts] == [14, 2, 4]
    assert len({text for part in parts for text in part}) == 20
    with pytest.raises(DataError, match="2 different texts are too few to split into 3 parts"):
        assemble_tagged(texts[:2], None, None, class_names=None, scheme=None, fractions=(0.1, 0.2), split_seed=0)


def test_texts_without_tags(tmp_path: Path) -> None:
    plain = TaggedReader().untagged(written(tmp_path / "a.txt", "Ada came.\n\nSo did I\n"))
    assert [(text.text, text.tags) for text in plain] == [("Ada came.", None), ("So did I", None)]
