"""A few made questions about where people live, which their contexts tell or do not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

NAMES = ["Ada", "Lin", "Omar", "Zoe", "Mia", "Ivo", "Noor", "Kai"]
TOWNS = ["Paris", "Oslo", "Cairo", "New York", "Lima"]
THINGS = ["tea", "rain", "chess", "old trains", "maps"]


def records(count: int = 120, seed: int = 0, without: float = 0.2) -> list[dict[str, Any]]:
    """Questions with contexts of a few sentences, every tenth of twelve: longer than a window."""
    generator = random.Random(seed)
    found = []
    for number in range(count):
        about, town = generator.choice(NAMES), generator.choice(TOWNS)
        size = 12 if number % 10 == 9 else generator.randint(1, 3)
        sentences = [f"{generator.choice(NAMES)} likes {generator.choice(THINGS)} ." for _ in range(size)]
        answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
        if there := generator.random() >= without:
            sentences.insert(generator.randint(0, size), f"{about} lives in {town} .")
        context = " ".join([*sentences, f"This is text {number} ."])
        if there:
            answers = {"text": [town], "answer_start": [context.index(f" lives in {town}") + len(" lives in ")]}
        found.append({"id": f"q{number}", "question": f"Where does {about} live ?", "context": context,
                      "answers": answers})  # fmt: skip
    return found


def write_jsonl(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write them, an object a line."""
    lines = [json.dumps(row) for row in (records() if rows is None else rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
