"""Evaluates models on a split batch by batch, keeping only scores and a small vector per example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import evaluating, run_network
from kd_lightning.tasks.base import Task
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
        correct: Whether each of them is predicted rightly, in the order of `index`; none where that is no matter of
            right and wrong.
    """

    scores: dict[str, float]
    examples: int
    correct: list[bool]


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
) -> dict[str, Evaluation]:
    """Score several models on a split, side by side on each batch, in this process alone.

    Args:
        task: What they predict.
        models: By name, on the device.
        batches: With whatever each of the models reads.
        device: Where they compute.
        reference: Which of them is the others' teacher; they are scored against its logits, too.

    Returns:
        What each comes to, by name.
    """
    against_labels = {name: task.scores().alone().to(device) for name in models}
    against_teacher = {name: task.fidelity().alone().to(device) for name in models} if reference is not None else {}
    index: list[Tensor] = []
    correct: dict[str, list[Tensor]] = {name: [] for name in models}
    with torch.inference_mode():
        for given in batches:
            batch = {key: value.to(device) for key, value in given.items()}
            rows = task.compared(batch)
            index.append(given["index"])
            logits = {name: model(batch).logits.float() for name, model in models.items()}
            for name, own in logits.items():
                against_labels[name].update(own, rows["labels"], rows)
                if reference is not None:
                    against_teacher[name].update(own, logits[reference], rows)
                if (right := task.correct(own, rows)) is not None:
                    correct[name].append(right.cpu())
    order = torch.cat(index).argsort()
    found = {}
    for name in models:
        scores = against_labels[name].compute() | (against_teacher[name].compute() if reference is not None else {})
        rights: list[bool] = torch.cat(correct[name])[order].tolist() if correct[name] else []
        found[name] = Evaluation({key: float(value) for key, value in scores.items()}, len(order), rights)
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
