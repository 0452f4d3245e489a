"""What a source of tagged texts delivers, and the checks and splits that all such sources share."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kd_lightning.data.labels import check_unicode
from kd_lightning.data.options import check_fractions
from kd_lightning.data.text.corpus import is_blank, normalise
from kd_lightning.runtime.errors import ConfigError, DataError, did_you_mean
from kd_lightning.tasks.entities import OUTSIDE, Scheme, Span, scheme_of, split_tag, tag_problem, tags_from, tags_of

log = logging.getLogger(__name__)

_IDEOGRAPH = r"[぀-ヿ㐀-䶿一-鿿豈-﫿]"
_WORD = re.compile(rf"{_IDEOGRAPH}|(?:(?!{_IDEOGRAPH})\w)+|[^\w\s]")


@dataclass(frozen=True)
class Place:
    """Where a text stands.

    Attributes:
        source: What has it, and what it is counted by: `train.conll: line`.
        number: Of the text; in a file of columns of its first word.
        columns: Each word has a line of its own.
    """

    source: str
    number: int
    columns: bool = False

    def __str__(self) -> str:
        return f"{self.source} {self.number}"

    def word(self, i: int) -> str:
        """Return where the tag of its word i stands."""
        return f"{self.source} {self.number + i}" if self.columns else f"{self}, tag {i + 1}"


@dataclass(frozen=True)
class TaggedText:
    """A text, its words and, where anybody knows them, their tags.

    Attributes:
        text: The text.
        words: Where each word begins and ends in it.
        tags: One a word; None where only a teacher tags it.
        place: Where it stands.
    """

    text: str
    words: list[tuple[int, int]]
    tags: list[str] | None
    place: Place


@dataclass(frozen=True)
class TaggedCorpus:
    """Everything a task has to train, select and test on.

    Attributes:
        tags: In the order of the classes.
        train: Tagged texts to train on.
        validation: Tagged texts to select on.
        test: Tagged texts to report on, once.
        transfer: Texts that only the teacher tags.
    """

    tags: list[str]
    train: list[TaggedText]
    validation: list[TaggedText]
    test: list[TaggedText]
    transfer: list[TaggedText] = field(default_factory=list)


def split_words(text: str) -> list[tuple[int, int]]:
    """Return the bounds of a text's words: runs of letters and digits, ideographs, punctuation marks.

    >>> [text[start:stop] for text in ["Dr. Li: 北京!"] for start, stop in split_words(text)]
    ['Dr', '.', 'Li', ':', '北', '京', '!']
    """
    return [match.span() for match in _WORD.finditer(text)]


def from_words(words: Sequence[str], tags: list[str] | None, place: Place) -> TaggedText:
    """Return a text of words with a space between them.

    Raises:
        DataError: No words, an empty word, or another number of tags.
    """
    if not words:
        raise DataError(f"{place}: there are no words; fill them in or remove the example")
    if tags is not None and len(tags) != len(words):
        raise DataError(f"{place}: {len(words)} words and {len(tags)} tags; expected a tag for each word")
    found = TaggedText(" ".join(words), [], tags, place)
    start = 0
    for i, word in enumerate(words):
        if not word.strip():
            raise DataError(f"{place.word(i)}: the word is empty; remove it and its tag")
        found.words.append((start, start + len(word)))
        start += len(word) + 1
    check_unicode(found.text, str(place))
    return found


def from_spans(text: str, spans: Sequence[tuple[int, int, str]], place: Place, scheme: Scheme) -> TaggedText:
    """Return a text whose words are tagged by entities given as runs of characters.

    Args:
        text: The text.
        spans: Of each entity its first character, the one after its last, and its type.
        place: Where it stands.
        scheme: In which the tags are written.

    Raises:
        DataError: A text without words; a span outside of it, that cuts a word, or that overlaps another.
    """
    check_unicode(text, str(place))
    words = split_words(text)
    if not words or is_blank(text):
        raise DataError(f"{place}: there are no words in the text; fill it in or remove the example")
    found: list[Span] = []
    for number, (start, stop, kind) in enumerate(sorted(spans, key=lambda span: span[:2]), start=1):
        what = f"{place}: the span {start}-{stop} ({kind})"
        if not 0 <= start < stop <= len(text):
            raise DataError(f"{what} lies outside of the text, which has {len(text)} characters")
        inside = [i for i, (begin, end) in enumerate(words) if begin < stop and end > start]
        if not inside:
            raise DataError(f"{what} holds no word")
        for i in (inside[0], inside[-1]):
            if words[i][0] < start or words[i][1] > stop:
                begin, end = words[i]
                raise DataError(f"{what}, {text[start:stop]!r}, cuts the word {text[begin:end]!r} ({begin}-{end})")
        if found and inside[0] < found[-1].stop:
            raise DataError(f"{what}, span {number} of the text, overlaps the one before")
        found.append(Span(inside[0], inside[-1] + 1, kind))
    return TaggedText(text, words, tags_from(found, len(words), scheme), place)


def assemble_tagged(
    train: list[TaggedText],
    validation: list[TaggedText] | None,
    test: list[TaggedText] | None,
    *,
    class_names: Sequence[str] | None,
    scheme: Scheme | None,
    fractions: tuple[float, float],
    split_seed: int,
    transfer: Sequence[TaggedText] = (),
) -> TaggedCorpus:
    """Check tags and build the corpus; a split that was not given is held out of the training texts.

    Where something has to be held out, texts that come again are dropped from the training texts first. Texts of
    `transfer` that are also validation or test texts are dropped.

    Args:
        train: Texts to train on.
        validation: Texts to select on.
        test: Texts to report on.
        class_names: The tags in the order of the classes; None: those of the types found in `train`, sorted.
        scheme: The scheme of the tags; None: inferred from `class_names` or the tags.
        fractions: How much to hold out for a missing validation, and for a missing test.
        split_seed: Of what is held out.
        transfer: Texts without tags.

    Raises:
        DataError: A tag that is unknown or breaks the scheme; no entity at all; too few texts to split.
        ConfigError: Impossible fractions or class names.
    """
    given = [part for part in (train, validation, test) if part is not None]
    written = [tag for part in given for text in part for tag in text.tags or ()]
    scheme = scheme or scheme_of(written if class_names is None else class_names)
    names = None if class_names is None else _given_names(class_names, scheme)
    for part in given:
        _check_tags(part, scheme)
    names = names or _names(train, scheme)
    for part in given:
        _check_known(part, names)
    parts = {"validation": validation, "test": test}
    missing = [(name, part) for (name, found), part in zip(parts.items(), fractions, strict=True) if found is None]
    if missing:
        train = _without_repeats(train)
        train, *held = _held_out(train, [fraction for _, fraction in missing], split_seed)
        parts |= {name: texts for (name, _), texts in zip(missing, held, strict=True)}
    validation, test = parts["validation"] or [], parts["test"] or []
    seen = {normalise((text.text,)) for text in (*validation, *test)}
    kept = [replace(text, tags=None) for text in transfer if normalise((text.text,)) not in seen]
    if len(kept) < len(transfer):
        log.info("left out %d transfer texts that are validation or test texts", len(transfer) - len(kept))
    return TaggedCorpus(names, train, validation, test, kept)


def _check_tags(texts: Iterable[TaggedText], scheme: Scheme) -> None:
    """Refuse texts whose tags break a scheme.

    Raises:
        DataError: Names the place of the first.
    """
    for text in texts:
        if text.tags is not None and (problem := tag_problem(text.tags, scheme)) is not None:
            word, what = problem
            raise DataError(f"{text.place.word(word)}: {what}; mend it, or set data.scheme to bio, bioes or io")


def _names(train: Iterable[TaggedText], scheme: Scheme) -> list[str]:
    """Return the tags of all types found."""
    texts = list(train)
    types = {parts[1] for text in texts for tag in text.tags or () if (parts := split_tag(tag)) and parts[1]}
    if not types:
        where = str(texts[0].place) if texts else "the training data"
        raise DataError(f"{where}: no text has an entity, every tag is {OUTSIDE}; nothing can be learned from that")
    return tags_of(types, scheme)


def _given_names(class_names: Sequence[str], scheme: Scheme) -> list[str]:
    names = [str(name) for name in class_names]
    if len(set(names)) < len(names) or OUTSIDE not in names or len(names) < 2:
        raise ConfigError(f"data.class_names={names}: expected different tags, {OUTSIDE} among them")
    for name in names:
        if (parts := split_tag(name)) is None or name not in tags_of([parts[1]], scheme):
            raise ConfigError(f"data.class_names: {name!r} is no tag of the scheme {scheme}, as {OUTSIDE} or I-PER are")
    return names


def _check_known(texts: Iterable[TaggedText], names: Sequence[str]) -> None:
    known = set(names)
    for text in texts:
        for word, tag in enumerate(text.tags or ()):
            if tag not in known:
                raise DataError(f"{text.place.word(word)}: unknown tag {tag!r}{did_you_mean(tag, names)}")


def _without_repeats(texts: list[TaggedText]) -> list[TaggedText]:
    first: dict[str, TaggedText] = {}
    for text in texts:
        first.setdefault(normalise((text.text,)), text)
    if len(first) < len(texts):
        log.info("dropped %d training texts that come again", len(texts) - len(first))
    return list(first.values())


def _held_out(texts: list[TaggedText], fractions: Sequence[float], seed: int) -> list[list[TaggedText]]:
    """Return the rest and a part for each fraction, at random."""
    check_fractions(fractions, "the training texts")
    sizes = [max(1, round(fraction * len(texts))) for fraction in fractions]
    if sum(sizes) >= len(texts):
        raise DataError(
            f"{texts[0].place}: {len(texts)} different texts are too few to split into {len(sizes) + 1} parts; add "
            "texts, or give data.validation_file and data.test_file"
        )
    order = np.random.default_rng(seed).permutation(len(texts))
    cuts = np.cumsum([len(texts) - sum(sizes), *sizes])[:-1]
    return [[texts[i] for i in sorted(piece)] for piece in np.split(order, cuts)]
