"""The texts of other data, for a language model that learns to write such texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_lightning.data.corpus.datamodule import CorpusData
from kd_lightning.data.corpus.store import Source
from kd_lightning.data.text.corpus import Corpus, Examples
from kd_lightning.data.text.datamodule import TextData
from kd_lightning.data.text.generated import class_prompt
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import digest


class TrainingTexts(CorpusData):
    """The sentences of labelled data as documents, in the splits that they have there.

    A language model that learns from the training texts alone writes further ones, which a teacher labels
    (`data.generator`); nothing of the validation and test texts reaches it.

    Args:
        of: The data. Its unlabelled sentences are trained on as well, unless they need a class.
        classes: Whether each text begins with its class and a colon, so that the model writes texts of a class.
        options: Those of `CorpusData`; its fractions and `split_seed` do not matter here, those of `of` do.

    Raises:
        ConfigError: An option out of its range, or examples of two texts.
    """

    def __init__(self, of: TextData, classes: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if not isinstance(of, TextData):
            raise ConfigError(
                f"data.of: expected data of labelled sentences (data@data.of=text_files), got {type(of).__name__}"
            )
        self.of, self.classes = of, classes

    def sources(self) -> Mapping[str, Source]:
        """Return the texts of each split."""
        corpus = self.of.drawn()
        if len(corpus.train.texts[0]) > 1:
            raise ConfigError("data.of has examples of two texts, which are no document: give data of single texts")
        if self.classes and corpus.regression:
            raise ConfigError("data.classes=true: a regression has no classes; set it to false")
        texts = {name: self._written(getattr(corpus, name), corpus) for name in ("train", "validation", "test")}
        if not self.classes:
            texts["train"] += [sentence[0] for sentence in corpus.transfer]
        return {name: Source(digest(part), part.__iter__) for name, part in texts.items()}

    def _written(self, examples: Examples, corpus: Corpus) -> list[str]:
        pairs = zip(examples.texts, examples.labels, strict=True)
        if not self.classes:
            return [text for (text,), _ in pairs]
        return [f"{class_prompt(corpus.class_names[int(label)])} {text}" for (text,), label in pairs]
