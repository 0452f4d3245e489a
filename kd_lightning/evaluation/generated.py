"""What language models generate: how fast, what they draft for others, and samples.

A draft model (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318) proposes some tokens, and
its target checks them in one pass. Those before the first that the target would not have chosen are accepted, and the
target adds one of its own, so that the text is as if from the target alone. Where R passes gave N new tokens, and D
were proposed, N - R are accepted, and the rate is (N - R) / D. Tokens behind the first one that is not accepted count
as proposed: where each is accepted with probability b, the rate of k a pass is (b + b^2 + ... + b^k) / k.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from kd_lightning.evaluation.clusters import clustered_error, residuals
from kd_lightning.evaluation.generation import generator_of
from kd_lightning.evaluation.profiling import inference
from kd_lightning.models.adapt import unwrap
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.hf import quiet_loading
from kd_lightning.tasks import Task
from kd_lightning.tasks.scores import UnitSums
from kd_lightning.types import Batch

Ids = list[int]

PROPOSED = 5
"""Tokens that a draft model proposes for each pass of its target."""


@dataclass(frozen=True)
class Generation:
    """How fast a language model generates one text at a time, as `transformers` does with its cache.

    Attributes:
        first_token_ms: From the call to the first token, the median.
        prefill_per_second: Tokens of prompts by the time to the first token.
        decode_per_second: Tokens after the first by the time that they take.
        prompt_tokens: Of a prompt, the median.
        new_tokens: Generated after each.
        prompts: How many there were.
        threads: CPU threads torch was allowed.
        device: Where it ran.
    """

    first_token_ms: float
    prefill_per_second: float
    decode_per_second: float
    prompt_tokens: float
    new_tokens: int
    prompts: int
    threads: int
    device: str


@dataclass(frozen=True)
class Acceptance:
    """How much of what a draft model proposes its target accepts.

    Attributes:
        rate: Accepted by proposed tokens.
        standard_error: Of the rate, over prompts.
        per_pass: New tokens for each pass of the target: what a draft that costs nothing would speed it up by.
    """

    rate: float
    standard_error: float
    per_pass: float


@dataclass(frozen=True)
class Draft:
    """What a language model is worth as the draft model of another.

    Attributes:
        greedy: Of the likeliest tokens.
        sampled: Of tokens drawn at temperature 1.
        speed_up: Seconds of the target alone by seconds with the draft, of the likeliest tokens.
        proposed: Tokens proposed for each pass.
        prompts: How many there were.
        new_tokens: Generated after each.
        seed: Of what was drawn.
    """

    greedy: Acceptance
    sampled: Acceptance
    speed_up: float
    proposed: int
    prompts: int
    new_tokens: int
    seed: int


def prompts_of(task: Task, batches: Iterable[Batch], tokens: int, most: int, count: int) -> list[Ids]:
    """Return how the first texts of a split begin, as `Task.prompts` cuts them.

    Args:
        task: A task that generates; of others there are none.
        batches: The split's.
        tokens: The most of a prompt that is cut from a text.
        most: Those that are longer are left out.
        count: The most prompts.
    """
    found: list[Ids] = []
    for batch in batches if task.generates else ():
        found += [prompt.tolist() for prompt in task.prompts(batch, tokens) if len(prompt) <= most]
        if len(found) >= count:
            break
    return found[:count]


def measure_generation(
    networks: Mapping[str, nn.Module], prompts: Sequence[Ids], new_tokens: int, threads: int | None = None
) -> dict[str, Generation]:
    """Time how networks go on with prompts, taking turns on each.

    Each generates its likeliest tokens, and no end ends a text.

    Args:
        networks: By name; those that are no language models of `transformers` are left out.
        prompts: One or more.
        new_tokens: Generated after each, two or more.
        threads: CPU threads to use; None keeps `torch.get_num_threads()`.
    """
    models = _models(networks)
    runs: dict[str, list[_Steps]] = {name: [] for name in models}
    with ExitStack() as stack:
        stack.enter_context(inference([model.network for model in models.values()], threads))
        for model in models.values():
            stack.enter_context(_bare(model))
            _generate(model, prompts[0], 2)
        for prompt in prompts:
            for name, model in models.items():
                runs[name].append(_generate(model, prompt, new_tokens))
        used = torch.get_num_threads()
    lengths = [len(prompt) for prompt in prompts]
    found = {}
    for name, timed in runs.items():
        first = [one.first for one in timed]
        found[name] = Generation(
            first_token_ms=1000 * statistics.median(first),
            prefill_per_second=sum(lengths) / sum(first),
            decode_per_second=len(prompts) * (new_tokens - 1) / sum(one.rest for one in timed),
            prompt_tokens=statistics.median(lengths), new_tokens=new_tokens, prompts=len(prompts), threads=used,
            device=str(models[name].network.device),
        )  # fmt: skip
    return found


def measure_drafts(
    target: nn.Module, drafts: Mapping[str, nn.Module], prompts: Sequence[Ids], new_tokens: int,
    proposed: int = PROPOSED, seed: int = 0,
) -> dict[str, Draft]:  # fmt: skip
    """Measure language models as draft models of a target, in the assisted generation of `transformers`.

    Target and drafts take turns on each prompt. A draft always proposes `proposed` tokens, however sure it is, and no
    end ends a text, so that what is accepted depends on nothing else than the two models.

    Args:
        target: The large model.
        drafts: Other models of the same tokens, by name; those that cannot draft for it are left out.
        prompts: One or more.
        new_tokens: Generated after each, two or more.
        proposed: Tokens proposed for each pass of the target.
        seed: Of what is drawn.
    """
    large, found = _models({"": target}).get(""), {}
    if large is None or getattr(large.network, "_is_stateful", False):  # its cache cannot go back
        return {}
    models = {name: model for name, model in _models(drafts).items() if model.size == large.size}
    alone: list[_Steps] = []
    greedy: dict[str, list[_Steps]] = {name: [] for name in models}
    sampled: dict[str, list[_Steps]] = {name: [] for name in models}
    with ExitStack() as stack:
        stack.enter_context(inference([one.network for one in (large, *models.values())], None))
        stack.enter_context(_bare(large))
        for model in models.values():
            stack.enter_context(_bare(model, proposed))
            _generate(large, prompts[0], proposed + 2, model)
        for number, prompt in enumerate(prompts):
            alone.append(_generate(large, prompt, new_tokens))
            for name, model in models.items():
                greedy[name].append(_generate(large, prompt, new_tokens, model))
                sampled[name].append(_generate(large, prompt, new_tokens, model, seed + number))
    for name in models:
        seconds = [sum(one.first + one.rest for one in runs) for runs in (alone, greedy[name])]
        rates = _acceptance(greedy[name]), _acceptance(sampled[name])
        found[name] = Draft(*rates, seconds[0] / seconds[1], proposed, len(prompts), new_tokens, seed)
    return found


def samples(
    networks: Mapping[str, nn.Module], prompts: Sequence[Ids], tokenizer: Any, new_tokens: int
) -> list[dict[str, Any]]:
    """Return how networks go on with prompts, each with the likeliest tokens up to the first special one.

    Returns:
        For each prompt its text as `prompt`, and under `models` the generated texts by network.
    """
    models, special, found = _models(networks), set(tokenizer.all_special_ids), []
    with ExitStack() as stack:
        stack.enter_context(inference([model.network for model in models.values()], None))
        for model in models.values():
            stack.enter_context(_bare(model))
        for prompt in prompts if models else ():
            texts = {}
            for name, model in models.items():
                new = _generate(model, prompt, new_tokens).tokens
                end = next((place for place, token in enumerate(new) if token in special), len(new))
                texts[name] = tokenizer.decode(new[:end])
            found.append({"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "models": texts})
    return found


class _Model(NamedTuple):
    """What generates with `transformers`, and how many tokens its tokenizer has."""

    network: Any
    size: int


def _models(networks: Mapping[str, nn.Module]) -> dict[str, _Model]:
    """Return the language models among networks, by name."""
    found = {name: (generator_of(network), unwrap(network)) for name, network in networks.items()}
    return {
        name: _Model(inner, whole.vocab_size if isinstance(whole, CausalLM) else inner.config.vocab_size)
        for name, (inner, whole) in found.items()
        if inner is not None
    }


class _Steps(BaseStreamer):
    """What a generation does, step by step.

    Attributes:
        tokens: What was generated.
        first: Seconds to the first token.
        rest: Seconds from there to the last one.
        passes: Of the model: each gave one token or, with a draft, more.
        proposed: Tokens proposed by a draft.
    """

    def __init__(self) -> None:
        self.tokens: Ids = []
        self.passes, self.proposed, self.times = -1, 0, [time.perf_counter()]

    def put(self, value: Any) -> None:
        """Take the prompt, then what each pass gave."""
        self.passes += 1
        if self.passes:
            self.times.append(time.perf_counter())
            self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """Do nothing."""

    @property
    def first(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def rest(self) -> float:
        return self.times[-1] - self.times[1]


def _acceptance(runs: Sequence[_Steps]) -> Acceptance:
    tokens, passes, proposed = (
        np.array(column, np.float64)
        for column in zip(*((len(one.tokens), one.passes, one.proposed) for one in runs), strict=True)
    )
    error = clustered_error(residuals(UnitSums(tokens - passes, proposed)))
    return Acceptance(float((tokens - passes).sum() / proposed.sum()), error, float(tokens.sum() / passes.sum()))


def _generate(model: _Model, prompt: Ids, new: int, draft: _Model | None = None, seed: int | None = None) -> _Steps:
    """Generate so many tokens, with a draft or alone; a seed draws them at temperature 1."""
    network = model.network
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new, use_cache=True, pad_token_id=0,
        **({"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}),
    )  # fmt: skip
    rows = torch.tensor([prompt], device=network.device)
    given: dict[str, Any] = {"attention_mask": torch.ones_like(rows), "generation_config": config}
    cuda = [network.device] if network.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(quiet_loading(hide_bar=False))
        torch.manual_seed(seed or 0)
        steps = _Steps()
        if draft is not None:
            given["assistant_model"] = draft.network

            def count(*_: Any) -> None:
                steps.proposed += 1  # a token each

            stack.callback(draft.network.register_forward_pre_hook(count).remove)
        network.generate(rows, streamer=steps, **given)
    return steps


@contextmanager
def _bare(model: _Model, proposed: int | None = None) -> Iterator[None]:
    """Leave out what a checkpoint sets of generation, and rows of logits that no token has."""
    network = model.network
    config, before = network.config.get_text_config(), network.generation_config
    rows = config.vocab_size

    def cut(_: Any, __: Any, output: Any) -> Any:
        output.logits = output.logits[..., : model.size]
        return output

    drafting: dict[str, Any] = {} if proposed is None else {
        "num_assistant_tokens": proposed, "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }  # fmt: skip
    handle = network.register_forward_hook(cut)
    network.generation_config = GenerationConfig(**drafting)  # type: ignore[no-untyped-call]
    config.vocab_size = model.size
    try:
        yield
    finally:
        handle.remove()
        network.generation_config, config.vocab_size = before, rows
