"""A small file of tagged texts, made of few names."""

from __future__ import annotations

import random
from pathlib import Path

NAMES, FAMILIES = ["Ada", "Lin", "Omar", "Zoe", "Mia"], ["Byron", "Chen", "Haddad"]
CITIES = ["Paris", "Oslo", "Cairo", "New York"]
FILLER = ["today", "we", "saw", "that", "the", "old", "train", "was", "late", "and", "nobody", "minded", "it"]


def tagged_words(generator: random.Random, parts: int) -> list[tuple[str, str]]:
    """Words and tags of a text that mentions so many people and places."""
    found: list[tuple[str, str]] = []
    for _ in range(parts):
        found += [(word, "O") for word in generator.choices(FILLER, k=generator.randint(1, 4))]
        if generator.random() < 0.6:
            found.append((generator.choice(NAMES), "B-PER"))
            found += [(generator.choice(FAMILIES), "I-PER")] * (generator.random() < 0.5)
        else:
            first, *more = generator.choice(CITIES).split()
            found += [("in", "O"), (first, "B-LOC"), *((word, "I-LOC") for word in more)]
    return [*found, (".", "O")]


def write_conll(path: Path, texts: int = 160, seed: int = 0) -> Path:
    """Texts of one to three entities, and every tenth of nine: longer than a window."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(texts):
            parts = 9 if number % 10 == 9 else generator.randint(1, 3)
            file.writelines(f"{word} {tag}\n" for word, tag in tagged_words(generator, parts))
            file.write("\n")
    return path
