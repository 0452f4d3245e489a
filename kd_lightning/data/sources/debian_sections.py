"""Debian packages by section: which of 24 a package is filed under, from its description."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kd_lightning.data.sources.debian_index import INDEX, Package, fetch_index, kept_index, read_index
from kd_lightning.data.sources.files import FileReader
from kd_lightning.data.sources.hf_dataset import unlabelled
from kd_lightning.data.text.corpus import Corpus, assemble_groups
from kd_lightning.data.text.datamodule import TextData
from kd_lightning.runtime.errors import DataError
from kd_lightning.runtime.seals import sha256

log = logging.getLogger(__name__)

SECTIONS = [
    "admin", "devel", "doc", "fonts", "games", "gnu-r", "golang", "graphics", "haskell", "java", "javascript",
    "libdevel", "libs", "net", "perl", "php", "python", "ruby", "rust", "science", "sound", "text", "utils", "x11",
]  # fmt: skip
"""Those of 600 packages and more in Debian 12, but for `misc`, which says nothing about a package."""


class DebianSections(TextData):
    """Packages of Debian 12 (main, amd64), about 52,000, in 24 sections of 600 to 6,700 packages.

    A text is the short description and the first sentence of the long one, 22 words in the middle: the short one alone
    has seven, and with all of the long one the texts of a source package differ in their last sentence only. The
    package's name, which often tells the section, is left out, and so are smaller sections and `misc`. Exact duplicates
    are dropped, and packages of one source package are in one split, since their descriptions are alike.

    The index is fetched with apt once and kept with its sha256 (`index.tsv` under `$KD_LIGHTNING_HOME`); Debian changes
    its own with every point release. The descriptions have their packages' licences.

    Args:
        index_file: A kept index, such as another machine's; by default the one fetched here.
        sha256: Refuse an index with another sha256.
        validation_fraction: Share of the source packages for validation.
        test_fraction: Share of the source packages for the test.
        options: Those of `TextData`; `transfer` takes files and data sets.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(
        self,
        index_file: str | None = None,
        sha256: str | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.15,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.index_file = index_file
        self.sha256 = sha256
        self.fractions = [validation_fraction, test_fraction]

    def read(self) -> Corpus:
        """Read the index, fetching it if need be, and split its packages."""
        path = Path(self.index_file).expanduser() if self.index_file else fetch_index() / INDEX
        packages = read_index(path, Package)
        kept_index(path, self.sha256)
        log.info("%s: %d packages, sha256 %s", path, len(packages), sha256(path))
        chosen = [package for package in packages if package.section in SECTIONS]
        if absent := set(SECTIONS) - {package.section for package in chosen}:
            raise DataError(f"{path}: there are no packages of {', '.join(sorted(absent))}: this is not Debian's index")
        return assemble_groups(
            [((package.text,), package.section, package.source) for package in chosen],
            class_names=SECTIONS,
            fractions=self.fractions,
            split_seed=self.split_seed,
            source="debian_sections",
            transfer=[text for name in self.transfer for text in unlabelled(name, FileReader())],
        )
