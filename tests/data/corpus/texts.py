"""Made-up documents."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_lightning.data import LMTextData
from kd_lightning.data.corpus.store import CorpusStore, Source, TextEncoder, encode_corpus
from kd_lightning.data.text.tokens import load_tokenizer

TEXT = "the people of this country have built a great union and its laws protect every citizen in peace"
WORDS = TEXT.split()


def made(count: int, seed: int = 0, words: tuple[int, int] = (5, 40)) -> list[str]:
    """Return documents of random words, with numbers, so that no two are alike."""
    rng = random.Random(seed)
    return [
        f"{number}. " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(*words))) + "." for number in range(count)
    ]


def source(texts: Sequence[str]) -> Source:
    return Source(json.dumps(list(texts)), lambda: iter(texts))


def stored(texts: Sequence[str], folder: Path, end: bool = True) -> tuple[CorpusStore, Any]:
    """Return documents encoded by byte pairs that are learned from them, and the tokenizer."""
    tokenizer = load_tokenizer("bpe:300", texts)
    encoder = TextEncoder(tokenizer, tokenizer.eos_token_id if end else None)
    return encode_corpus(encoder, {"train": source(texts)}, folder), tokenizer


def written(folder: Path, texts: Sequence[str]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def data(folder: Path, texts: Sequence[str], **options: Any) -> LMTextData:
    given: dict[str, Any] = {"tokenizer": "bpe:300", "block_size": 16, "cache_dir": str(folder / "cache"), **options}
    return LMTextData(str(written(folder, texts)), **given)
