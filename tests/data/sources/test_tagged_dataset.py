from __future__ import annotations

from typing import Any

import pytest

from kd_lightning.data.sources.tagged_dataset import tagged_split
from kd_lightning.data.sources.tagged_files import TaggedReader
from kd_lightning.runtime.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets", reason="the optional extra `hub` is not installed")


def table(tags: list[list[int]]) -> Any:
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"])),
        }
    )
    return datasets.Dataset.from_dict({"tokens": [["Ada", "came"]] * len(tags), "ner_tags": tags}, features=features)


def test_numbers_go_by_the_stored_names() -> None:
    reader = TaggedReader(tags_column="ner_tags")
    texts = tagged_split({"train": table([[1, 0], [1, 2]])}, "train", "people", reader)
    assert [text.tags for text in texts] == [["B-PER", "O"], ["B-PER", "I-PER"]]
    assert texts[1].place.word(1) == "people, split 'train': row 2, tag 2"


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'trian' is no split of people; did you mean 'train'"):
        tagged_split({"train": table([[1, 0]])}, "trian", "people", TaggedReader())
    with pytest.raises(DataError, match=r"people, split 'train': no column 'tags'; did you mean 'ner_tags'"):
        tagged_split({"train": table([[1, 0]])}, "train", "people", TaggedReader())
    with pytest.raises(DataError, match=r"row 1: 2 words and 1 tags"):
        tagged_split({"train": table([[1]])}, "train", "people", TaggedReader(tags_column="ner_tags"))
