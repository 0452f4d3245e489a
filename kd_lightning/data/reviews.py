"""Movie-review sentences rated by people, and three other kinds of sentences to transfer with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_lightning.assets import fetch
from kd_lightning.data.corpus import Corpus, RawExamples, Sentence, assemble
from kd_lightning.data.files import FileReader
from kd_lightning.data.text import TextData

TRANSFER = {"amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets", "tweets": "tweets"}


class Reviews(TextData):
    """Rotten Tomatoes sentences, negative or positive: the sign of the mean rating of about 20 people.

    10,568 sentences (37 of 10,605 are rated zero and left out), less exact duplicates. Split into 70% training, 10%
    validation and 20% test, stratified. `transfer` knows `amazon` (product reviews), `nyt` (editorials), `tweets`, and
    the user's own files. Hutto & Gilbert 2014; Pang & Lee 2005. MIT licence.

    Args:
        options: Those of `TextData`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def read(self) -> Corpus:
        """Fetch the sentences and split them."""
        folder = fetch("reviews")
        path = folder / "movieReviewSnippets_GroundTruth.txt"
        rated = [(text, rating) for text, rating in _rated(path) if rating != 0]
        raw = RawExamples(
            texts=[text for text, _ in rated],
            labels=["positive" if rating > 0 else "negative" for _, rating in rated],
            source="reviews",
            where=lambda i: f"{path}: sentence {i + 1}",
        )
        return assemble(
            raw,
            None,
            None,
            class_names=["negative", "positive"],
            validation_fraction=0.1,
            test_fraction=0.2,
            split_seed=self.split_seed,
            transfer=[text for name in self.transfer for text in _transfer(folder, name)],
        )


def _rated(path: Path) -> Iterator[tuple[Sentence, float]]:
    """Yield sentences with their mean ratings, -4 to 4."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            _, rating, text = line.strip().split("\t", 2)
            yield (text.strip(),), float(rating)


def _transfer(folder: Path, name: str) -> list[Sentence]:
    if name in TRANSFER:
        return [text for text, _ in _rated(folder / f"{TRANSFER[name]}_GroundTruth.txt")]
    return FileReader().sentences(name)
