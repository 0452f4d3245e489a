"""Debian packages for retrieval: a package's short description, and the long one that belongs to it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kd_lightning.data.labels import folded
from kd_lightning.data.sources.debian_index import INDEX, Described, fetch_descriptions, kept_index, read_index
from kd_lightning.data.sources.group_reader import GroupReader
from kd_lightning.data.text.embedding import EmbeddingData
from kd_lightning.data.text.groups import GroupCorpus, TextGroup, assemble_texts
from kd_lightning.runtime.seals import sha256

log = logging.getLogger(__name__)


class DebianPairs(EmbeddingData):
    """Short and long descriptions of Debian 12's packages (main, amd64), about 59,000 pairs.

    A query is a short description, and its positive the long one, which does not repeat it. Of packages with a short or
    a long description in common the first counts, and packages of one source package are in one split, since their
    descriptions are alike; those are also each other's hardest negatives.

    The descriptions are fetched with apt once and kept with their sha256 (`index.tsv` under `$KD_LIGHTNING_HOME`);
    Debian changes them with every point release. They have their packages' licences.

    Args:
        index_file: Kept descriptions, such as another machine's; by default those fetched here.
        sha256: Refuse descriptions with another sha256.
        validation_fraction: Share of the source packages for validation.
        test_fraction: Share of the source packages for the test.
        options: Those of `EmbeddingData`; `transfer` takes files.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(
        self,
        index_file: str | None = None,
        sha256: str | None = None,
        validation_fraction: float = 0.02,
        test_fraction: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.index_file = index_file
        self.sha256 = sha256
        self.fractions = validation_fraction, test_fraction

    def read(self) -> GroupCorpus:
        """Read the descriptions, fetching them if need be, and split their packages."""
        return assemble_texts(
            pairs_of(described(self.index_file, self.sha256)[1]), None, None,
            fractions=self.fractions, split_seed=self.split_seed, origin="debian_pairs",
            transfer=[text for name in self.transfer for text in GroupReader().texts(name)],
        )  # fmt: skip


def described(index_file: str | None, wanted: str | None) -> tuple[Path, list[Described]]:
    """Return the file of kept descriptions, or of those that are fetched, and its packages.

    Args:
        index_file: Where they are kept; None: fetch them if need be.
        wanted: The sha256 that they have; None: any.

    Raises:
        ConfigError: They have another one.
        DataError: They cannot be read.
    """
    path = Path(index_file).expanduser() if index_file else fetch_descriptions() / INDEX
    packages = read_index(path, Described)
    kept_index(path, wanted)
    log.info("%s: %d packages, sha256 %s", path, len(packages), sha256(path))
    return path, packages


def pairs_of(packages: list[Described]) -> list[TextGroup]:
    """Return the pairs of packages, each short and each long description once."""
    seen: set[str] = set()
    found = []
    for package in packages:
        keys = {folded(package.summary), folded(package.text)}
        if len(keys) == 2 and not keys & seen:
            found.append(TextGroup((package.summary, package.text), source=package.source))
            seen |= keys
    return found
