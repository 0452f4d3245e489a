from __future__ import annotations

from pathlib import Path

import pytest

from kd_lightning.data import DebianPairs
from kd_lightning.data.sources.debian_index import INDEX, Described, fetch_descriptions, read_index
from kd_lightning.data.sources.debian_pairs import pairs_of
from kd_lightning.runtime.errors import ConfigError, DataError
from tests.data.sources.test_debian_sections import archive

__all__ = ["archive"]  # a fixture


@pytest.mark.usefixtures("archive", "own_home")
def test_a_query_is_the_short_description_and_its_positive_the_long_one() -> None:
    corpus = DebianPairs(validation_fraction=0.1, test_fraction=0.2).read()
    parts = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    groups = {group.texts: group for part in parts.values() for group in part}
    # the long descriptions of a section differ in the role alone, so that all but two of each are repeats
    assert ("tool 0 of games", "It does games v1.2 well. And more. This is the tool.") in groups
    assert len(groups) == 2 * 26
    assert groups["tool 0 of games", "It does games v1.2 well. And more. This is the tool."].source == "games0"
    sources = [{group.source for group in part} for part in parts.values()]
    assert not sources[0] & sources[1]
    assert not (sources[0] | sources[1]) & sources[2]


@pytest.mark.usefixtures("archive", "own_home")
def test_the_descriptions_are_kept_and_pinned(tmp_path: Path) -> None:
    folder = fetch_descriptions()
    kept = read_index(folder / INDEX, Described)
    assert kept[0]._fields == ("name", "source", "summary", "text")
    copied = tmp_path / "copy.tsv"
    copied.write_bytes((folder / INDEX).read_bytes())
    assert DebianPairs(index_file=str(copied)).read() == DebianPairs().read()
    with pytest.raises(ConfigError, match=r"data\.sha256=0a, but .*copy\.tsv has"):
        DebianPairs(index_file=str(copied), sha256="0a").read()
    copied.write_text("name\tsource\n")
    with pytest.raises(DataError, match="line 1: expected the columns name, source, summary, text"):
        DebianPairs(index_file=str(copied)).read()


def test_each_text_comes_once() -> None:
    packages = [
        Described("a", "a", "one", "first"), Described("b", "b", "ONE ", "second"), Described("c", "c", "two", "First"),
        Described("d", "d", "three", "Three"), Described("e", "e", "four", "fourth"),
    ]  # fmt: skip
    assert [group.texts for group in pairs_of(packages)] == [("one", "first"), ("four", "fourth")]
