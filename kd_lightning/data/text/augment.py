r"""Augmented views of a sentence, as pure functions: masked, cropped to an n-gram, or changed further.

Tang, Lu, Liu, Mou, Vechtomova, Lin: Distilling Task-Specific Knowledge from BERT into Simple Neural Networks, 2019
(arXiv 1903.12136), section 3.3: masking and n-gram sampling. Their part-of-speech replacement needs a tagger; words are
replaced by those of the same class or by the teacher's neighbours instead (`kd_lightning.data.text.substitutes`).
Wei, Zou: EDA: Easy Data Augmentation Techniques, 2019 (arXiv 1901.11196): dropping and swapping words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

VERSION = 1
"""Raised when a sentence has other views: what was made of them before is then not used any more."""

MASK = "\ufdd0"
"""Placeholder for a masked word until the tokenizer is known; a Unicode noncharacter."""

MAX_NGRAM = 5
"""The longest n-gram sampled, as in the paper."""

# Chinese and Japanese are written without spaces: there each character counts as a word.
_CHARACTER = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"(\s*)([{_CHARACTER}]|[^\s{_CHARACTER}]+)")


def words(text: str) -> list[tuple[bool, str]]:
    """Split a text into words, each with whether white space precedes it.

    >>> words("a fine 好片")
    [(False, 'a'), (True, 'fine'), (True, '好'), (False, '片')]
    """
    return [(bool(space), word) for space, word in _WORD.findall(text)]


Words = list[tuple[bool, str]]
"""As `words` returns them."""


class Substitutes(Protocol):
    """Source of replacements for words."""

    def of(self, word: str, index: int, rng: random.Random) -> str:
        """Return a replacement for a word of sentence `index`, or the word itself."""


@dataclass(frozen=True)
class Changes:
    """Changes to a view's words before masking, in this order, with their probabilities; default none.

    Attributes:
        replace_probability: A word is replaced by one of its `substitutes`.
        drop_probability: A word is dropped; at least one stays.
        swap_probability: A word, unless just moved, is swapped with the next one.
        crop_probability: After masking, the view is cropped to a random run of its words.
        crop_share: How long that run is, as a share of the words; at least one, and not all of several.
        substitutes: Source of replacements; needed for `replace_probability`.
    """

    replace_probability: float = 0.0
    drop_probability: float = 0.0
    swap_probability: float = 0.0
    crop_probability: float = 0.0
    crop_share: float = 0.5
    substitutes: Substitutes | None = None

    def apply(self, sentence: Words, index: int, rng: random.Random) -> Words:
        """Return the words with some replaced, dropped and swapped. Disabled changes draw no random numbers."""
        changed = list(sentence)
        if self.replace_probability:
            for place in range(len(changed)):
                if rng.random() < self.replace_probability:
                    self._replace(changed, place, index, rng)
        if self.drop_probability:
            kept = [word for word in changed if rng.random() >= self.drop_probability]
            changed = kept or [rng.choice(changed)]
        if self.swap_probability:
            place = 0
            while place < len(changed) - 1:
                if rng.random() < self.swap_probability:
                    _swap(changed, place)
                    place += 1
                place += 1
        return changed

    def apply_one(self, sentence: Words, index: int, rng: random.Random) -> Words:
        """Return the words with one change, the first enabled one that is possible."""
        changed = list(sentence)
        if self.drop_probability:
            del changed[rng.randrange(len(changed))]
            return changed
        places = [i for i in range(len(changed) - 1) if changed[i][1] != changed[i + 1][1]]
        if self.swap_probability and places:
            _swap(changed, rng.choice(places))
            return changed
        for place in rng.sample(range(len(changed)), len(changed)) if self.replace_probability else ():
            self._replace(changed, place, index, rng)
            if changed != sentence:
                break
        return changed

    def crop(self, length: int, rng: random.Random) -> slice:
        """Return which words are kept, usually all."""
        if length < 2 or not self.crop_probability or rng.random() >= self.crop_probability:
            return slice(None)
        kept = min(max(round(self.crop_share * length), 1), length - 1)
        start = rng.randint(0, length - kept)
        return slice(start, start + kept)

    def _replace(self, sentence: Words, place: int, index: int, rng: random.Random) -> None:
        if self.substitutes is not None:
            space, word = sentence[place]
            sentence[place] = (space, self.substitutes.of(word, index, rng))


def _swap(sentence: Words, place: int) -> None:
    """Exchange two neighbouring words; the spaces stay where they are."""
    (space, word), (next_space, next_word) = sentence[place : place + 2]
    sentence[place : place + 2] = [(space, next_word), (next_space, word)]


UNCHANGED = Changes()


def make_view(
    text: str, index: int, view: int, seed: int, *, mask_probability: float = 0.1, ngram_probability: float = 0.25,
    changes: Changes = UNCHANGED,
) -> str:  # fmt: skip
    """Return one augmented view of a text: words masked, cropped to an n-gram, or changed further.

    After `changes`, each word becomes `MASK` with probability `mask_probability`; then, with probability
    `ngram_probability`, only a random n-gram of the words is kept, n drawn evenly from 1 to 5. At least one word is
    never masked. A text of several words never comes back unchanged if any change is enabled and possible
    (it is not for swaps of equal words, or words without a substitute).

    Args:
        text: The sentence.
        index: The sentence's position in the data set.
        view: Which view of it, from 0.
        seed: Of the whole data set.
        mask_probability: In [0, 1].
        ngram_probability: In [0, 1].
        changes: Further changes of the words.

    Returns:
        The view: a function of the arguments alone, the same in any order and in any process.
    """
    rng = random.Random(f"{seed}/{index}/{view}/{text}")
    sentence = words(text)
    original = changes.apply(sentence, index, rng)
    altered = [(space, MASK if rng.random() < mask_probability else word) for space, word in original]
    kept = changes.crop(len(altered), rng)
    original, altered = original[kept], altered[kept]
    if rng.random() < ngram_probability:
        length = min(rng.randint(1, MAX_NGRAM), len(altered))
        start = rng.randint(0, len(altered) - length)
        original, altered = original[start : start + length], altered[start : start + length]
    elif altered == sentence and len(altered) > 1:
        if mask_probability > 0:
            position = rng.randrange(len(altered))
            altered[position] = (altered[position][0], MASK)
        else:
            altered = changes.apply_one(sentence, index, rng)
    if all(word == MASK for _, word in altered):
        position = rng.randrange(len(altered))
        altered[position] = original[position]
    return "".join((" " if space else "") + word for space, word in altered).strip()


@dataclass(frozen=True)
class Views:
    """The views of all sentences, numbered set by set, then sentence by sentence, without end.

    Attributes:
        sentences: The sentences; both texts of a pair are altered.
        count: Views of each sentence in one set.
        seed: Of all of them.
        mask_probability: As in `make_view`.
        ngram_probability: As in `make_view`.
        changes: As in `make_view`.
    """

    sentences: Sequence[tuple[str, ...]]
    count: int
    seed: int
    mask_probability: float
    ngram_probability: float
    changes: Changes = UNCHANGED

    @property
    def per_set(self) -> int:
        """Number of views in a set."""
        return len(self.sentences) * self.count

    def make(self, number: int) -> tuple[str, ...]:
        """Return one view: of the sentence `number % per_set // count`, in the set `number // per_set`."""
        one_set, place = divmod(number, self.per_set)
        index, view = divmod(place, self.count)
        return tuple(
            make_view(
                text,
                index,
                one_set * self.count + view,
                self.seed,
                mask_probability=self.mask_probability,
                ngram_probability=self.ngram_probability,
                changes=self.changes,
            )
            for text in self.sentences[index]
        )
