from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = {
    "bad": ["dull", "slow", "broken", "ugly", "cold", "empty", "boring", "weak"],
    "fine": ["plain", "usual", "normal", "average", "steady", "mild", "even", "fair"],
    "good": ["bright", "warm", "clever", "lovely", "sharp", "funny", "brave", "rich"],
}


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows under a header and returns the path."""

    def write(name: str, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return tmp_path / name

    return write


def toy_rows(count: int = 120, seed: int = 0) -> list[tuple[str, ...]]:
    """Distinct sentences of 4 to 15 words, some with quoted commas, in three classes told apart by their words."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = sorted(WORDS)[i % 3]
        chosen = [rng.choice(WORDS[label]) for _ in range(rng.randint(2, 13))]
        rows.append((f"film {seed}x{i}, {' '.join(chosen)}", label))
    return rows


@pytest.fixture
def toy_csv(write_csv: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes a three-class CSV and returns its path."""
    return lambda name="toy.csv", count=120, seed=0: write_csv(name, toy_rows(count, seed))


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test's caches to itself."""
    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path / "home"))
