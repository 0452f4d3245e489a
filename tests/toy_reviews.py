"""A reviews archive of a few hundred sentences: what they say, how they are rated and where they are from is easy."""

from __future__ import annotations

import random
from pathlib import Path

from kd_lightning.data.text.tokens import load_tokenizer

FILES = {
    "movieReviewSnippets": ["film", "actor", "scene"],
    "amazonReviewSnippets": ["battery", "cable", "price"],
    "nytEditorialSnippets": ["senate", "treaty", "election"],
    "tweets": ["lol", "omg", "hashtag"],
}
RATED = {"awful": -3.0, "dull": -1.5, "weak": -0.75, "decent": 0.75, "lovely": 1.5, "superb": 3.0}
FILLER = ["the", "a", "today", "very", "we", "saw", "it", "again", "and"]


def write_archive(folder: Path, movies: int = 120, others: int = 60) -> Path:
    """Write the four files: of movie sentences one is rated 0 and one is there twice."""
    generator = random.Random(0)
    folder.mkdir(parents=True)
    for file, markers in FILES.items():
        lines = []
        for i in range(movies if file.startswith("movie") else others):
            word = list(RATED)[i % 6]
            words = [*generator.choices(FILLER, k=generator.randint(2, 8)), *generator.choices(markers, k=2), word]
            generator.shuffle(words)
            lines.append(f"{i}\t{RATED[word] + generator.uniform(-0.2, 0.2):.2f}\t{' '.join(words)} {file} {i}")
        if file.startswith("movie"):
            lines += ["900\t0.0\ta film that nobody rates", lines[0]]
        (folder / f"{file}_GroundTruth.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_tokenizer(folder: Path, name: str = "wordpiece:400") -> Path:
    """Write a tokenizer that knows the archive's words."""
    words = [*(word for markers in FILES.values() for word in markers), *RATED, *FILLER]
    load_tokenizer(name, [" ".join(words)] * 5).save_pretrained(str(folder))
    return folder
