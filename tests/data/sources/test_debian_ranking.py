from __future__ import annotations

import pytest

from kd_lightning.data import DebianPairs, DebianRanking
from tests.data.sources.test_debian_sections import archive

__all__ = ["archive"]  # a fixture


@pytest.mark.usefixtures("archive", "own_home")
def test_queries_are_the_short_descriptions_of_pairs_and_split_likewise() -> None:
    corpus = DebianRanking(validation_fraction=0.1, test_fraction=0.2).read()
    pairs = DebianPairs(validation_fraction=0.1, test_fraction=0.2).read()
    for name in ("train", "validation", "test"):
        expected = [(group.texts, group.source) for group in getattr(pairs, name)]
        assert [((one.query, *one.documents), one.source) for one in getattr(corpus, name)] == expected
        assert {one.grades for one in getattr(corpus, name)} == {(1.0,)}
