"""Rated movie-review sentences, and three other domains, for transfer or as tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from kd_lightning.data.sources.files import FileReader
from kd_lightning.data.sources.hf_dataset import unlabelled
from kd_lightning.data.text.corpus import Corpus, Examples, RawExamples, Sentence, assemble, normalise
from kd_lightning.data.text.datamodule import TextData
from kd_lightning.runtime.assets import fetch
from kd_lightning.runtime.errors import ConfigError, did_you_mean

Labels = Literal["sentiment", "domain", "rating"]

TRANSFER = {"amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets", "tweets": "tweets"}


class Reviews(TextData):
    """Rotten Tomatoes sentences, labelled with the sign of the mean rating of about 20 people.

    10,568 sentences (37 of 10,605 are rated zero and left out), without exact duplicates. Split into 70% training, 10%
    validation and 20% test, stratified. `transfer` knows `amazon` (product reviews), `nyt` (editorials), `tweets`, and
    the user's own files and data sets. Hutto & Gilbert 2014; Pang & Lee 2005. MIT licence.

    Sentences of all four domains are rated, which gives two more tasks. They share one split with the sentiment task,
    so that students of several tasks do not train on test sentences.

    Args:
        labels: The task: `sentiment`, of movie sentences only; `domain` (movie, amazon, nyt
            or tweets); or `rating`, -4 to 4, a regression.
        options: Those of `TextData`.

    Raises:
        ConfigError: Unknown `labels`, or an option out of its range.
    """

    def __init__(self, labels: Labels = "sentiment", **options: Any) -> None:
        super().__init__(**options)
        if labels not in get_args(Labels):
            raise ConfigError(f"data.labels={labels!r} is unknown{did_you_mean(str(labels), get_args(Labels))}")
        self.labels = labels

    def read(self) -> Corpus:
        """Download the sentences and split them."""
        folder = fetch("reviews")
        path = folder / "movieReviewSnippets_GroundTruth.txt"
        movie = list(_rated(path))
        rated = [(text, rating) for text, rating in movie if rating != 0]
        raw = RawExamples(
            texts=[text for text, _ in rated],
            labels=["positive" if rating > 0 else "negative" for _, rating in rated],
            source="reviews",
            where=lambda i: f"{path}: sentence {i + 1}",
        )
        transfer = [text for name in self.transfer for text in transfer_sentences(name)]
        sentiment = self._split(raw, ["negative", "positive"], transfer)
        return sentiment if self.labels == "sentiment" else self._all_kinds(folder, movie, sentiment)

    def _split(self, raw: RawExamples, class_names: list[str], transfer: list[Sentence]) -> Corpus:
        return assemble(
            raw,
            None,
            None,
            class_names=class_names,
            validation_fraction=0.1,
            test_fraction=0.2,
            split_seed=self.split_seed,
            transfer=transfer,
        )

    def _all_kinds(self, folder: Path, movie: list[tuple[Sentence, float]], sentiment: Corpus) -> Corpus:
        """Return the sentences of all domains, with domains or ratings as labels, in the same split."""
        known = {
            normalise(text): ("movie", rating) for text, rating in reversed(movie)
        }  # keeps the first of duplicates
        others: list[tuple[Sentence, str]] = []
        for name, file in TRANSFER.items():
            for text, rating in _rated(folder / f"{file}_GroundTruth.txt"):
                if known.setdefault(normalise(text), (name, rating)) == (name, rating):
                    others.append((text, name))
        texts, names = [text for text, _ in others], [name for _, name in others]
        corpus = self._split(RawExamples(texts, names, "reviews", str), list(TRANSFER), [])
        unrated = [text for text, rating in movie if rating == 0 and known[normalise(text)] == ("movie", 0)]
        classes = ["movie", *TRANSFER]

        def joined(part: str, more: Sequence[Sentence] = ()) -> Examples:
            sentences = [*getattr(sentiment, part).texts, *more, *getattr(corpus, part).texts]
            facts = [known[normalise(text)] for text in sentences]
            if self.labels == "rating":
                return Examples(sentences, [rating for _, rating in facts])
            return Examples(sentences, [classes.index(domain) for domain, _ in facts])

        parts = {"train": joined("train", unrated), "validation": joined("validation"), "test": joined("test")}
        regression = self.labels == "rating"
        return Corpus(
            ["rating"] if regression else classes, **parts, transfer=sentiment.transfer, regression=regression
        )


def _rated(path: Path) -> Iterator[tuple[Sentence, float]]:
    """Yield sentences with their mean ratings, -4 to 4."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            _, rating, text = line.strip().split("\t", 2)
            yield (text.strip(),), float(rating)


def transfer_sentences(name: str) -> list[Sentence]:
    """Return the sentences of one of the other kinds, or of a file or data set."""
    if name in TRANSFER:
        return [text for text, _ in _rated(fetch("reviews") / f"{TRANSFER[name]}_GroundTruth.txt")]
    return unlabelled(name, FileReader())
