"""Debian packages to rank: a short description, its long one, and those of packages that resemble it."""

from __future__ import annotations

from typing import Any

from kd_lightning.data.sources.debian_pairs import described, pairs_of
from kd_lightning.data.text.lists import ListCorpus, RankedList, assemble_lists
from kd_lightning.data.text.ranking import RankingData


class DebianRanking(RankingData):
    """Short descriptions of Debian 12's packages (main, amd64), each with long ones to rank.

    A query is a short description. Its own long one is relevant; the others are the `hard_negatives` long ones that a
    sentence encoder finds for it in its split. The descriptions are those of `DebianPairs`, split likewise by source
    package, so the hardest are of packages built from one source. At the default fractions all that is held out is of
    the test split of `DebianPairs`, so that `GeneralText` has none of it to train on.

    Args:
        index_file: Kept descriptions, such as another machine's; by default those fetched here.
        sha256: Refuse descriptions with another sha256.
        validation_fraction: Share of the source packages for validation.
        test_fraction: Share of the source packages for the test.
        options: Those of `RankingData`.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(
        self,
        index_file: str | None = None,
        sha256: str | None = None,
        validation_fraction: float = 0.01,
        test_fraction: float = 0.03,
        hard_negatives: int = 7,
        **options: Any,
    ) -> None:
        super().__init__(hard_negatives=hard_negatives, **options)
        self.index_file, self.sha256 = index_file, sha256
        self.fractions = validation_fraction, test_fraction

    def read(self) -> ListCorpus:
        """Read the descriptions, fetching them if need be, and split their packages."""
        lists = [
            RankedList(group.texts[0], group.texts[1:], (1.0,), group.source)
            for group in pairs_of(described(self.index_file, self.sha256)[1])
        ]
        return assemble_lists(
            lists, None, None, fractions=self.fractions, split_seed=self.split_seed, origin="debian_ranking"
        )
