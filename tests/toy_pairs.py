"""Small pairs of texts: a query names a thing and what it does, its positive says the same in other words."""

from __future__ import annotations

import json
import random
from pathlib import Path

THINGS = ["mail", "sound", "game", "font", "map", "clock", "chess", "photo", "text", "shell", "music", "disk"]
DEEDS = {"reader": "shows", "editor": "changes", "player": "plays", "server": "offers", "checker": "tests"}
SIZES = ["small", "fast", "old", "new", "free"]


def pairs(seed: int = 0, negatives: bool = False) -> list[tuple[str, ...]]:
    """All things with all deeds, in a random order; a negative has another deed."""
    generator, found = random.Random(seed), []
    for thing in THINGS:
        for deed, verb in DEEDS.items():
            size = generator.choice(SIZES)
            other = generator.choice([one for name, one in DEEDS.items() if name != deed])
            texts = f"{thing} {deed}", f"it {verb} every {thing} and is {size}"
            found.append((*texts, f"it {other} every {thing} and is {size}") if negatives else texts)
    generator.shuffle(found)
    return found


def write_pairs(path: Path, seed: int = 0) -> Path:
    """A JSONL file of pairs, every fifth with a negative that is a list."""
    with path.open("w", encoding="utf-8") as file:
        for query, positive in pairs(seed):
            file.write(json.dumps({"query": query, "found": positive}) + "\n")
    return path
