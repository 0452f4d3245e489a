"""Whether memory and time per token stay the same from 1 million tokens of text to 100 million.

Files of synthetic documents of 200 to 2,000 words, of 5,000 words in all, read by a word tokenizer: documents become
token ids in a memory map, which is then read in blocks of 512 tokens in random order, once through. Each size runs in a
process of its own. Memory: the most that the process held meanwhile, less what it held after the imports, without
pages of mapped files, which the system may drop whenever another process needs room.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.common import Measure, fresh_process
from kd_lightning.data import LMTextData

SIZES = (1_000_000, 10_000_000, 100_000_000)
WORDS, BLOCK, BATCH = 5_000, 512, 16


def run(sizes: tuple[int, ...] = SIZES) -> list[Measure]:
    """Build and read each size; hold the largest against the smallest."""
    with tempfile.TemporaryDirectory(prefix="lm_corpus_") as name:
        folder = Path(name)
        _save_tokenizer(folder / "tokenizer")
        found: dict[int, dict[str, Any]] = {}
        for size in sizes:
            _write(folder / f"{size}.jsonl", size)
            found[size] = fresh_process("benchmarks.lm_corpus:one", folder=name, size=size)
    measures = []
    for size, one in found.items():
        for phase in ("build", "read"):
            measures.append(Measure(f"{phase}, {size:,} tokens", [1e6 * one[phase] / one["tokens"]], "µs/token"))
        measures.append(Measure(f"memory, {size:,} tokens", [one["memory_mb"]], "MB", note="beyond the imports"))
    small, large = found[min(sizes)], found[max(sizes)]
    for phase, title in (("build", "encoding"), ("read", "reading")):
        share = (large[phase] / large["tokens"]) / (small[phase] / small["tokens"])
        measures.append(
            Measure(f"{title} a token, of {_millions(large)} / of {_millions(small)}", [share], "ratio", "<= 1.1")
        )
    grown = large["memory_mb"] - small["memory_mb"]
    measures.append(
        Measure(f"memory for {_millions(large)} tokens less for {_millions(small)}", [grown], "MB", "<= 50")
    )
    return measures


def _millions(one: dict[str, Any]) -> str:
    return f"{one['tokens'] / 0.98e6:.0f}M"  # the others are held out


# -- in the fresh processes -------------------------------------------------------------------------------------------


def one(folder: str, size: int) -> dict[str, float]:
    """Build the store of a size, and read it."""
    place, before = Path(folder), _anonymous_mb()
    data = LMTextData(
        train_file=str(place / f"{size}.jsonl"), tokenizer=str(place / "tokenizer"), block_size=BLOCK, batch_size=BATCH,
        packing="concat", end_of_text=False, cache_dir=str(place / "store"), validation_fraction=0.01,
        test_fraction=0.01,
    )  # fmt: skip
    with _Sampled() as memory:
        started = time.perf_counter()
        data.prepare()
        built = time.perf_counter()
        loader = data.select(tokens="student", pool=False).train_dataloader()
        tokens = sum(batch["input_ids"].numel() for batch in loader)
        read = time.perf_counter()
    return {
        "build": built - started, "read": read - built, "tokens": float(tokens), "memory_mb": memory.most - before,
    }  # fmt: skip


class _Sampled:
    """The most memory, in MB and not of mapped files, that a process holds meanwhile; looked at 50 times a second."""

    def __init__(self) -> None:
        self.most, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> _Sampled:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.most = max(self.most, _anonymous_mb())


def _anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e6


# -- what they read ---------------------------------------------------------------------------------------------------


def _save_tokenizer(folder: Path) -> None:
    words = {"<unk>": 0} | {f"w{number}": number + 1 for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def _write(path: Path, tokens: int) -> None:
    generator = np.random.default_rng(0)
    names = np.array([f"w{number}" for number in range(WORDS)])
    with path.open("w", encoding="utf-8") as file:
        while tokens > 0:
            length = min(int(generator.integers(200, 2_001)), tokens)
            file.write(json.dumps({"text": " ".join(names[generator.integers(WORDS, size=length)])}) + "\n")
            tokens -= length
