"""How fast a run's networks are: on single examples and batches, or going on with texts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from kd_lightning.evaluation import profiling
from kd_lightning.runtime.console import say
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from kd_lightning.evaluation.generated import Draft, Generation
    from kd_lightning.pipeline.context import Run

TEACHER = "teacher"
LATENCY_EXAMPLES = 100
SPEED_PROMPTS, DRAFT_PROMPTS, SAMPLES, NEW_TOKENS = 4, 4, 3, 32
"""Of language models: prompts by which speed is measured, that are drafted for, that are shown; tokens after each."""
LEAST, TRIED = 2, 6
"""Tokens after a prompt by which `generation_seconds` tells a text's time from a token's."""


class Speed(NamedTuple):
    """How fast a model is, and what it drafts."""

    latency: profiling.Latency | None = None
    throughput: profiling.Throughput | None = None
    generation: Generation | None = None
    draft: Draft | None = None


def measured(run: Run, students: Mapping[str, nn.Module]) -> tuple[dict[str, Speed], list[dict[str, Any]]]:
    """Measure the first seed's networks side by side; of language models return samples, too.

    Args:
        run: The run.
        students: By stage; the teacher is added, where it reads the same tokens here.
    """
    if not run.task.generates:
        return _speeds(run, _with_teacher(run, students, torch.device("cpu"))), []
    networks = _with_teacher(run, students, run.device)
    long, short, new = _prompts(run)
    if not long:
        return {}, []
    say(run.console, f"report  networks go on with {len(long)} texts of the test split: speed, drafts, samples")
    generation, drafts, shown = _generated(run, networks, long, short, new)
    return {name: Speed(generation=generation.get(name), draft=drafts.get(name)) for name in networks}, shown


def generation_seconds(run: Run, networks: Mapping[str, nn.Module]) -> float:
    """Return about how long `measured` has language models generate, from a few tokens after one prompt.

    Args:
        run: The run.
        networks: Like those that it will have, the teacher under `TEACHER`.
    """
    long, short, new = _prompts(run)
    if not long:
        return 0.0
    networks = {name: network.to(run.device) for name, network in networks.items()}
    seconds: dict[int, float] = {}
    for tokens in (LEAST, LEAST, min(TRIED, new)):  # the first time warms up
        begun = time.perf_counter()
        _generated(run, networks, long[:1], short[:1], tokens)
        seconds[tokens] = time.perf_counter() - begun
    (least, text), (most, longer) = min(seconds.items()), max(seconds.items())
    each = max(longer - text, 0.0) / max(most - least, 1)
    return len(long) * (text + each * (new - least))


def _with_teacher(run: Run, students: Mapping[str, nn.Module], device: torch.device) -> dict[str, nn.Module]:
    """Return the students and, if there is one, the teacher, on a device."""
    networks = {stage: network.to(device) for stage, network in students.items()}
    here = run.compares and run.cfg.teacher.url is None
    if here and not run.providers[0].reads_other_tokens:  # no batch holds what each of its members reads
        networks[TEACHER] = run.teacher.network.to(device)
    return networks


def _speeds(run: Run, networks: Mapping[str, nn.Module]) -> dict[str, Speed]:
    """Time networks, each on its own inputs of the same validation examples."""
    batches = {
        name: list(run.data.select(tokens="teacher" if name == TEACHER else "student").val_dataloader())
        for name in networks
    }
    singles = {
        name: _spread(
            sorted(profiling.single_examples(own), key=lambda example: int(example["index"])), LATENCY_EXAMPLES
        )
        for name, own in batches.items()
    }
    latency = profiling.measure_latency(networks, singles)
    throughput = profiling.measure_throughput(networks, {name: _spread(own, 4) for name, own in batches.items()})
    return {name: Speed(latency[name], throughput[name]) for name in networks}


def _prompts(run: Run) -> tuple[list[list[int]], list[list[int]], int]:
    """Return long prompts for speed, short ones for drafts and samples, and how many tokens follow."""
    from kd_lightning.evaluation.generated import prompts_of

    data = run.data.select(tokens="student")
    size = int(data.input_format["max_length"])
    new = min(NEW_TOKENS, size // 2)
    long, short = (
        prompts_of(run.task, data.test_dataloader(), tokens, size - new, count)
        for tokens, count in ((size // 2, SPEED_PROMPTS), (min(NEW_TOKENS, max(size // 4, 1)), DRAFT_PROMPTS))
    )
    return long, short, new


def _generated(
    run: Run, networks: Mapping[str, nn.Module], long: Sequence[list[int]], short: Sequence[list[int]], new: int
) -> tuple[dict[str, Generation], dict[str, Draft], list[dict[str, Any]]]:
    """Return how fast networks generate, what the students draft for the teacher, and samples."""
    from kd_lightning.evaluation.generated import measure_drafts, measure_generation, samples

    generation, teacher = measure_generation(networks, long, new), networks.get(TEACHER)
    students = {name: network for name, network in networks.items() if name != TEACHER}
    drafts = {} if teacher is None else measure_drafts(teacher, students, short, new)
    shown = samples(networks, short[:SAMPLES], run.data.tokenizer_of("student"), new)
    return generation, drafts, shown


def _spread(items: list[Batch], count: int) -> list[Batch]:
    """Return about so many items, evenly spread: batches come ordered by length."""
    return items[:: max(len(items) // count, 1)][:count]
