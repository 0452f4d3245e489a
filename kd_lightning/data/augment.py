r"""Views of a sentence: the masking and n-gram sampling of Tang et al. 2019, as pure functions.

Tang, Lu, Liu, Mou, Vechtomova, Lin: Distilling Task-Specific Knowledge from BERT into Simple Neural Networks, 2019
(arXiv 1903.12136), section 3.3. Their part-of-speech replacement needs a tagger and is left out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

MASK = "\ufdd0"
"""Stands for a masked word until the tokenizer's own mask is known; a code point that Unicode bars from texts."""

MAX_NGRAM = 5
"""The longest n-gram sampled, as in the paper."""

# Chinese and Japanese are written without spaces: there each character counts as a word.
_CHARACTER = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"(\s*)([{_CHARACTER}]|[^\s{_CHARACTER}]+)")


def words(text: str) -> list[tuple[bool, str]]:
    """Split a text into words, each with whether white space stands before it.

    >>> words("a fine 好片")
    [(False, 'a'), (True, 'fine'), (True, '好'), (False, '片')]
    """
    return [(bool(space), word) for space, word in _WORD.findall(text)]


def make_view(
    text: str, index: int, view: int, seed: int, *, mask_probability: float = 0.1, ngram_probability: float = 0.25
) -> str:
    """Return one altered copy of a text: words masked, and sometimes cut to a short n-gram.

    Each word becomes `MASK` with probability `mask_probability`; then, with probability `ngram_probability`, only a
    random n-gram of the words is kept, n drawn evenly from 1 to 5. At least one word is never masked, and a text of
    several words never comes back unchanged while `mask_probability` is above zero.

    Args:
        text: The sentence.
        index: The sentence's position in the data set.
        view: Which view of it, from 0.
        seed: Of the whole data set.
        mask_probability: In [0, 1].
        ngram_probability: In [0, 1].

    Returns:
        The view: a function of the arguments alone, the same in any order and in any process.
    """
    rng = random.Random(f"{seed}/{index}/{view}/{text}")
    original = words(text)
    altered = [(space, MASK if rng.random() < mask_probability else word) for space, word in original]
    if rng.random() < ngram_probability:
        length = min(rng.randint(1, MAX_NGRAM), len(altered))
        start = rng.randint(0, len(altered) - length)
        original, altered = original[start : start + length], altered[start : start + length]
    elif altered == original and mask_probability > 0 and len(altered) > 1:
        position = rng.randrange(len(altered))
        altered[position] = (altered[position][0], MASK)
    if all(word == MASK for _, word in altered):
        position = rng.randrange(len(altered))
        altered[position] = original[position]
    return "".join((" " if space else "") + word for space, word in altered).strip()


@dataclass(frozen=True)
class Views:
    """The views of all sentences, numbered: set by set, in a set sentence by sentence; there is no last set.

    Attributes:
        sentences: What is altered; both texts of a pair are.
        count: Views of each sentence in one set.
        seed: Of all of them.
        mask_probability: As in `make_view`.
        ngram_probability: As in `make_view`.
    """

    sentences: Sequence[tuple[str, ...]]
    count: int
    seed: int
    mask_probability: float
    ngram_probability: float

    @property
    def per_set(self) -> int:
        """How many views one set has."""
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
            )
            for text in self.sentences[index]
        )
