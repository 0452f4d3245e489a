"""Sequence-level distillation: the teacher generates texts once, from the training texts' prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kd_lightning.config.schema import GeneratedConfig
from kd_lightning.data.corpus.datamodule import GENERATED, CorpusData
from kd_lightning.data.corpus.generated import written
from kd_lightning.data.corpus.store import Source
from kd_lightning.data.kept_texts import KeptTexts
from kd_lightning.data.text.ends import text_ends
from kd_lightning.models.adapt import unwrap
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.continuation import VERSION, continuations
from kd_lightning.models.rebuild import describe, versions
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.runtime.mixing import mixed_seed
from kd_lightning.runtime.processes import first

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run


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
    if not settings.texts or not isinstance(data, CorpusData) or not data.task.generates or GENERATED in data.parts:
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
        _complete(run, texts)
        if too_long:
            room = data.block_size - settings.new_tokens
            say(run.console, f"teacher  left out {too_long} prompts of more than {room} tokens (data.block_size)")
        documents = Source(texts.folder.name, lambda: itertools.starmap(written, texts))
        run.learn_from(data.with_texts(documents, settings.originals))


def _prompts(data: CorpusData, settings: GeneratedConfig) -> tuple[list[list[int]], int]:
    """Return the prompts that leave room, and how many do not."""
    found = data.prompts(settings.prompt_tokens)
    fit = [one for one in found if len(one) <= data.block_size - settings.new_tokens]
    return fit, len(found) - len(fit)


def _texts(run: Run, prompts: Sequence[Sequence[int]], data: CorpusData) -> KeptTexts:
    teacher, settings = run.providers[0].loaded, run.cfg.generated
    ends = text_ends(data.tokenizer_of("teacher"))
    key = {
        "version": VERSION, "weights": teacher.fingerprint, "network": describe(teacher.network),
        "precision": run.cfg.teacher.precision, "versions": versions(teacher.network),
        "tokenizer": data.teacher_key["tokenizer"], "prompts": digest(prompts), "count": len(prompts), "ends": ends,
        "new_tokens": settings.new_tokens, "temperature": settings.temperature, "texts": settings.texts,
        "seed": settings.seed if settings.temperature else None,
        "batch": run.cfg.teacher.predict_batch_size if settings.temperature else None,  # what is drawn together
    }  # fmt: skip
    return KeptTexts(home() / "generated" / digest(key), [*prompts] * settings.texts, key, "teacher")


def _complete(run: Run, texts: KeptTexts) -> None:
    """Have the teacher generate what is missing."""
    teacher, key = run.provider_of(*run.parts.values()).generator, texts.key
    tokenizer: Any = run.data.tokenizer_of("teacher")

    def draw(prompts: Sequence[Sequence[int]], start: int) -> list[list[int]]:
        frozen = teacher()
        model: Any = unwrap(frozen.network)
        with frozen.autocast(run.device):
            drawn = continuations(
                model, [torch.tensor(one) for one in prompts], key["new_tokens"], key["ends"], key["temperature"],
                mixed_seed(key["seed"] or 0, start),
            )  # fmt: skip
        return [one.tolist() for one in drawn]

    texts.complete(draw, tokenizer.decode, run.cfg.teacher.predict_batch_size, partial(say, run.console))
