"""Sequence-level distillation: the teacher generates texts once, from the training texts' prompts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kd_lightning.config.schema import GeneratedConfig
from kd_lightning.data.corpus.datamodule import GENERATED, CorpusData
from kd_lightning.data.corpus.generated import written
from kd_lightning.data.corpus.store import Source
from kd_lightning.evaluation.generation import text_ends
from kd_lightning.models.adapt import unwrap
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.continuation import VERSION, continuations
from kd_lightning.models.rebuild import describe, versions
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.clock import duration
from kd_lightning.runtime.console import Pace, say
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.files import alone
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.runtime.processes import first
from kd_lightning.runtime.seals import read_sealed, write_sealed
from kd_lightning.training.module import mixed_seed

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run

PIECE = 64
"""Texts in a file: the most that a kill loses."""


def check_generator(run: Run, teacher: nn.Module | None) -> None:
    """Refuse `generated` where no texts can come of it, before any training.

    Raises:
        ConfigError: Names the key to change.
    """
    settings, data = run.cfg.generated, run.data
    if not settings.texts:
        return
    given = f"generated.texts={settings.texts}"
    if not isinstance(data, CorpusData) or not isinstance(unwrap(teacher) if teacher else None, CausalLM):
        raise ConfigError(f"{given}: only a teacher that is a language model of transformers generates; set it to 0")
    if data.other_tokens:
        raise ConfigError(f"{given}: its texts are tokens of data.cross_tokenizer's other tokenizer; set it to 0")
    if settings.prompt_tokens + settings.new_tokens > data.block_size:
        raise ConfigError(
            f"generated.prompt_tokens={settings.prompt_tokens} and generated.new_tokens={settings.new_tokens}: "
            f"expected no more than data.block_size={data.block_size} together"
        )
    if GENERATED not in data.parts and not _prompts(data, settings)[0]:
        raise ConfigError(
            f"generated.new_tokens={settings.new_tokens}: no prompt leaves room for them in "
            f"data.block_size={data.block_size}; lower it, or raise that"
        )


def add_texts(run: Run, kept: bool = False) -> None:
    """Have what is distilled learn from texts that the teacher generates, or has generated before.

    Nothing is done where there are to be none, where they are there already, or while the teacher is not finished.

    Args:
        run: The run, whose data are replaced.
        kept: Only if all of them are kept from before.

    Raises:
        ConfigError: `teacher.cache=require`, and they are not kept.
    """
    settings, data = run.cfg.generated, run.data
    if not settings.texts or not isinstance(data, CorpusData) or GENERATED in data.parts:
        return
    if not all(part.has_teacher for part in run.parts.values()):
        return
    with first():
        prompts, too_long = _prompts(data, settings)
        texts = _texts(run, prompts, data)
        if kept and not all(texts.path(number).is_file() for number in range(texts.pieces)):
            if run.cfg.teacher.cache == "require":
                raise ConfigError("teacher.cache=require, but its generated texts are not kept; kd cache build does")
            return
        texts.complete(run)
        if too_long:
            room = data.block_size - settings.new_tokens
            say(run.console, f"teacher  left out {too_long} prompts of more than {room} tokens (data.block_size)")
        run.learn_from(data.with_texts(Source(texts.folder.name, texts.documents), settings.originals))


def _prompts(data: CorpusData, settings: GeneratedConfig) -> tuple[list[list[int]], int]:
    """Return the prompts that leave room, and how many do not."""
    found = data.prompts(settings.prompt_tokens)
    fit = [one for one in found if len(one) <= data.block_size - settings.new_tokens]
    return fit, len(found) - len(fit)


def _texts(run: Run, prompts: Sequence[Sequence[int]], data: CorpusData) -> _Texts:
    teacher, settings = run.providers[0].loaded, run.cfg.generated
    ends = text_ends(data.tokenizer_of("teacher"))
    key = {
        "version": VERSION, "weights": teacher.fingerprint, "network": describe(teacher.network),
        "precision": run.cfg.teacher.precision, "versions": versions(teacher.network),
        "tokenizer": data.teacher_key["tokenizer"], "prompts": digest(prompts), "count": len(prompts), "ends": ends,
        "new_tokens": settings.new_tokens, "temperature": settings.temperature, "texts": settings.texts,
        "seed": settings.seed if settings.temperature else None,
    }  # fmt: skip
    return _Texts(home() / "generated" / digest(key), [*prompts] * settings.texts, key)


@dataclass(frozen=True)
class _Texts:
    """Generated texts: files of `PIECE` each, written in one step with a checksum, beside their settings.

    Attributes:
        folder: Where they are, named after all that decides them.
        prompts: What each begins with.
        key: What decides them.
    """

    folder: Path
    prompts: Sequence[Sequence[int]]
    key: dict[str, Any]

    @property
    def pieces(self) -> int:
        return -(-len(self.prompts) // PIECE)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def read(self, number: int) -> list[str]:
        """Return the documents of a piece."""
        found = read_sealed(self.path(number), "it is generated anew")["texts"]
        return [written(*([int(token) for token in one[part].split()] for part in ("prompt", "new"))) for one in found]

    def documents(self) -> Iterator[str]:
        """Yield all documents."""
        return itertools.chain.from_iterable(map(self.read, range(self.pieces)))

    def complete(self, run: Run) -> None:
        """Generate the pieces that are missing or damaged; one process does, others wait for it."""
        with alone(self.folder / ".lock", lambda line: say(run.console, f"{line}, which generates {self.folder}")):
            todo = [number for number in range(self.pieces) if not self._intact(run, number)]
            count, begun = len(self.prompts), time.monotonic()
            if not todo:
                say(run.console, f"teacher  {count} generated texts are in {self.folder}")
                return
            write_sealed(self.folder / "settings.json", self.key)
            pace, tokens = Pace(), 0
            for done, number in enumerate(todo):
                tokens += self._generate(run, number)
                if pace.due:
                    left = pace.left(done + 1, len(todo))
                    say(run.console, f"teacher  generated {done + 1} of {len(todo)} times {PIECE} texts, {left}")
        new = min(len(todo) * PIECE, count)
        took = f"{tokens} tokens in {duration(time.monotonic() - begun)}"
        say(run.console, f"teacher  generated {new} of {count} texts, {took}, kept in {self.folder}")

    def _intact(self, run: Run, number: int) -> bool:
        if not self.path(number).is_file():
            return False
        try:
            self.read(number)
        except KDError as error:
            say(run.console, f"teacher  {error}")
            return False
        return True

    def _generate(self, run: Run, number: int) -> int:
        """Generate a piece, and return how many tokens that were."""
        size, teacher = run.cfg.teacher.predict_batch_size, run.provider_of(*run.parts.values()).generator()
        model: Any = unwrap(teacher.network)
        tokenizer: Any = run.data.tokenizer_of("teacher")
        found: list[dict[str, str]] = []
        tokens = 0
        for start in range(number * PIECE, min((number + 1) * PIECE, len(self.prompts)), size):
            chosen = self.prompts[start : min(start + size, (number + 1) * PIECE)]
            with teacher.autocast(run.device):
                drawn = continuations(
                    model, [torch.tensor(one) for one in chosen], self.key["new_tokens"], self.key["ends"],
                    self.key["temperature"], mixed_seed(self.key["seed"] or 0, start),
                )  # fmt: skip
            for prompt, new in zip(chosen, (one.tolist() for one in drawn), strict=True):
                ids = {"prompt": " ".join(map(str, prompt)), "new": " ".join(map(str, new))}
                found.append({**ids, "text": tokenizer.decode(new)})
                tokens += len(new)
        write_sealed(self.path(number), {"texts": found})
        return tokens
