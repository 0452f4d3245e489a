"""Small queries with documents: the toy pairs, each with documents of other queries that share a word with it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.toy_pairs import pairs


def lists(others: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a query, its documents in a random order, and their grades; one of them has grade 2."""
    generator, known, found = random.Random(seed), pairs(seed), []
    for query, positive in known:
        near = [text for other, text in known if other != query and set(other.split()) & set(query.split())]
        documents = [(positive, 2), *((text, 0) for text in generator.sample(near, others))]
        generator.shuffle(documents)
        texts, grades = zip(*documents, strict=True)
        found.append({"query": query, "documents": list(texts), "grades": list(grades)})
    return found


def write_lists(path: Path, others: int = 3) -> Path:
    """A JSONL file with a query a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in lists(others)), encoding="utf-8")
    return path
