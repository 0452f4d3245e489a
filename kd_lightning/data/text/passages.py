"""Long texts in passages of whole sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def passages(text: str, words: int) -> Iterator[str]:
    """Yield runs of whole sentences, each ended by the one with which it has so many words; not the rest.

    >>> list(passages("One two. Three four! Five. Six seven eight. Nine.", 3))
    ['One two. Three four!', 'Five. Six seven eight.']
    """
    found: list[str] = []
    for sentence in SENTENCE_END.split(text):
        found += sentence.split()
        if len(found) >= words:
            yield " ".join(found)
            found = []
