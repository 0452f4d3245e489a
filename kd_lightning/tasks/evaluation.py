"""Evaluates models on a split batch by batch, keeping scores, and sums by example or document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import evaluating, run_network
from kd_lightning.tasks.base import Task
from kd_lightning.tasks.details import Details
from kd_lightning.tasks.scores import ByUnit, UnitSums
from kd_lightning.types import Batch, ModelOutput, is_labelled

Model = Callable[[Batch], ModelOutput]
"""A teacher, or anything from a batch to an output."""

MOST_ROWS, MOST_NUMBERS = 10_000, 2**27
"""How many rows of logits `labelled_rows` keeps at most, and how many numbers all of them have."""


@dataclass(frozen=True)
class Evaluation:
    """What a model comes to on a split.

    Attributes:
        scores: Against labels, and against the reference where there is one.
        examples: How many the split has.
        units: What single examples or documents add to the scores that are means, from which errors follow; of none
            that is nan.
    """

    scores: dict[str, float]
    examples: int
    units: dict[str, UnitSums]


def of_network(network: nn.Module, device: torch.device | str = "cpu") -> Model:
    """Return a network as a model: in eval mode for each batch, with its own mode restored after it."""
    network.to(device)

    def model(batch: Batch) -> ModelOutput:
        with evaluating(network):
            return run_network(network, batch)

    return model


def evaluate(task: Task, model: Model, batches: Iterable[Batch], device: torch.device | str = "cpu") -> Evaluation:
    """Score one model against the labels of a split."""
    return evaluate_all(task, {"model": model}, batches, device)["model"]


def evaluate_all(
    task: Task,
    models: Mapping[str, Model],
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    reference: str | None = None,
    details: Mapping[str, Mapping[str, Details]] | None = None,
) -> dict[str, Evaluation]:
    """Score several models on a split, side by side on each batch, in this process alone.

    Args:
        task: What they predict.
        models: By name, on the device.
        batches: With whatever each of the models reads.
        device: Where they compute.
        reference: Which of them is the others' teacher; they are scored against its logits, too.
        details: What is to be shown of some of them, by name: each batch is added.

    Returns:
        What each comes to, by name. Of a reference that gives some of its logits alone these are its scores against
        labels, nan where they do not follow from them; it is left out where these were drawn.
    """
    against_labels = {name: task.scores().alone().to(device) for name in models}
    against_teacher = {name: task.fidelity().alone().to(device) for name in models} if reference is not None else {}
    by_unit = {name: (ByUnit(), ByUnit()) for name in models}
    examples = 0
    with torch.inference_mode():
        for given in batches:
            batch = {key: value.to(device) for key, value in given.items()}
            rows = task.compared(batch)
            examples += len(given["index"])
            expected: Any = None
            if reference is not None:
                output = models[reference](batch)
                expected = output.logits.float() if output.sparse is None else output.sparse
                if output.sparse is not None:
                    against_teacher.pop(reference, None)
                    if output.sparse.drawn:
                        against_labels.pop(reference, None)
            for name in against_labels:  # one after the other: logits over a vocabulary are large
                own = expected if reference == name else models[name](batch).logits.float()
                by_unit[name][0].add(against_labels[name].update(own, rows["labels"], rows))
                if name in against_teacher:
                    by_unit[name][1].add(against_teacher[name].update(own, expected, rows))
                for one in (details or {}).get(name, {}).values() if isinstance(own, Tensor) else ():
                    taught = name != reference and isinstance(expected, Tensor)
                    one.update(own, expected if taught else None, rows)
    found = {}
    for name in against_labels:
        scores = against_labels[name].compute() | (against_teacher[name].compute() if name in against_teacher else {})
        by_unit[name][0].add(against_labels[name].values())
        if name in against_teacher:
            by_unit[name][1].add(against_teacher[name].values())
        units = by_unit[name][0].sums() | by_unit[name][1].sums()
        parts = {key: sums.totals.sum() / sums.weights.sum() for key, sums in units.items() if sums.weights.any()}
        whole = {**scores, **{key: value for key, value in parts.items() if key not in scores}}
        units = {key: sums for key, sums in units.items() if not np.isnan(sums.totals).any()}
        found[name] = Evaluation({key: float(value) for key, value in whole.items()}, examples, units)
    return found


def labels_of(task: Task, batches: Iterable[Batch]) -> Tensor:
    """Return the labels of a split's rows that count, `(N,)`."""
    rows = (task.compared(batch) for batch in batches)
    return torch.cat([one["labels"][one["keep"]] if "keep" in one else one["labels"] for one in rows])


def labelled_rows(
    task: Task, models: Sequence[Model], batches: Iterable[Batch], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return models' logits of labelled rows, to fit a temperature or the weights of an ensemble.

    Of a large split a subset is kept, spread over all of it: at most `MOST_ROWS` rows, and fewer where together they
    would have more than `MOST_NUMBERS` numbers.

    Returns:
        `(M, N, C)` float32 and `(N,)`, in the order of the examples' `index`, on the CPU.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    step = 1  # of that many rows one is kept
    with torch.inference_mode():
        for given in batches:
            batch = {key: value.to(device) for key, value in given.items()}
            rows = task.compared(batch)
            known = is_labelled(rows["labels"]) & rows.get("keep", torch.ones((), dtype=torch.bool, device=device))
            places = known.nonzero()[::step]
            at = tuple(places.unbind(1))
            logits = torch.stack([model(batch).logits[at].float() for model in models], dim=1)
            kept.append((logits.cpu(), rows["labels"][at].cpu(), rows["index"][places[:, 0]].cpu()))
            most = min(MOST_ROWS, MOST_NUMBERS // logits[0].numel() if len(logits) else MOST_ROWS)
            while sum(len(labels) for _, labels, _ in kept) > most:
                kept, step = [tuple(torch.cat(part)[::2] for part in zip(*kept, strict=True))], 2 * step  # type: ignore[list-item]
    logits, labels, index = (torch.cat(part) for part in zip(*kept, strict=True))
    order = index.argsort(stable=True)
    return logits[order].transpose(0, 1).contiguous(), labels[order]
