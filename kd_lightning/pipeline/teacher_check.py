"""Checks before students are trained whether the teacher has learned, and trains it on if not."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.config.instantiate import lookup
from kd_lightning.data.batches import spread
from kd_lightning.evaluation.report import read_curves
from kd_lightning.losses.term import masked_mean
from kd_lightning.models.hf import pretrained
from kd_lightning.pipeline.networks import build_network
from kd_lightning.pipeline.prepare import prepare, task_of_stage, training_data
from kd_lightning.runtime.console import say
from kd_lightning.runtime.processes import first, rank
from kd_lightning.runtime.seals import read_sealed, write_sealed
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.fit import train
from kd_lightning.training.run_folder import (
    FURTHER,
    read_stage,
    remove_it,
    trainings_of,
    validation_score,
)
from kd_lightning.types import Batch, is_labelled

if TYPE_CHECKING:
    from kd_lightning.config.schema import Node
    from kd_lightning.data import IndexedData
    from kd_lightning.pipeline.context import Run
    from kd_lightning.pipeline.stages import Stage
    from kd_lightning.tasks import Task
    from kd_lightning.tasks.scores import ScoreSpec

MOST_FURTHER = 2
"""A teacher is trained on at most so often, each time for half of its steps."""
MOST_EXAMPLES = 4000
"""The linear classifier is fitted to, and scored on, at most so many examples."""
RIDGE = 5.0
"""Its penalty, on the sum of squared weights, for the sum of the examples' losses."""
FILE = "check.json"
"""In the teacher's folder: what the check found."""


def finish_teacher(run: Run, stage: Stage) -> None:
    """Train a teacher on that has not finished learning, and report what is wrong with it.

    It has not finished where its validation score still improves at the end, or is below that of a linear classifier on
    the embeddings of the network that it started from. It is trained on where the budget decides its epochs; the number
    of steps that a user gives is kept, and it is only reported.
    """
    linear = _linear(run, stage)
    reason, last = _unlearned(run, stage, linear), stage
    if not by_budget(stage.trainer):
        _keep(run, stage, linear, [] if reason is None else [f"{reason}. {_remedy(stage)}"])
        return
    steps = math.ceil(read_stage(run.folder / stage.path)["steps"] / 2)
    lines: list[str] = []
    while reason is not None and len(lines) < MOST_FURTHER:
        lines.append(f"{reason}: it is trained on for {steps} steps")
        say(run.console, f"{stage.name}  {lines[-1]}")
        number = len(lines)
        last = replace(
            stage, path=f"{stage.path}/{FURTHER}{number}", name=f"{stage.name}, further {number}", start=last.path,
            steps=steps,
        )  # fmt: skip
        train(prepare(run, last), run.console)
        reason = _unlearned(run, last, linear)
    if lines:
        scores = [validation_score(read_stage(one)) for one in trainings_of(run.folder / stage.path)]
        title = _title(task_of_stage(run, stage))
        lines.append(f"trained on, its validation {title} went {' -> '.join(f'{one:.3f}' for one in scores)}")
    if reason is not None:
        lines.append(f"{reason}. {_remedy(stage)}")
    _keep(run, stage, linear, lines)


def findings_of(folder: Path) -> list[str]:
    """Return what the check of a teacher found, for the report."""
    return [str(line) for line in _read_check(folder).get("lines", [])]


def is_checked(folder: Path) -> bool:
    """Return whether a finished teacher has been checked, and so will not be trained on any more."""
    return bool(_read_check(folder).get("done"))


def _read_check(folder: Path) -> dict[str, Any]:
    """Return what a teacher's folder keeps of its check; nothing before that."""
    path = folder / FILE
    return read_sealed(path, remove_it(path)) if path.is_file() else {}


def by_budget(trainer: Node) -> bool:
    """Return whether the budget decides how long a network is trained, and not the user."""
    return trainer.get("max_steps") in (-1, None) and trainer.get("max_epochs") == "auto"


def still_improving(looks: Sequence[float], spec: ScoreSpec, examples: int) -> bool:
    """Return whether a score still rises at the end, the last look in four or eight, by more than noise.

    Noise is the standard error of a share of `examples` that are right; for other scores 1% of the score.

    >>> from kd_lightning.tasks.scores import ScoreSpec
    >>> still_improving([0.5, 0.7, 0.8, 0.9], ScoreSpec("accuracy", share=True), examples=100)
    True
    >>> still_improving([0.5, 0.7, 0.89, 0.9], ScoreSpec("accuracy", share=True), examples=100)
    False
    """
    if len(looks) < 3:
        return False
    sign, last = 1 if spec.mode == "max" else -1, max(len(looks) // 4, 1)
    best, before = (max(sign * look for look in part) for part in (looks[-last:], looks[:-last]))
    return best - before > (share_error(best, examples) if spec.share else 0.01 * abs(best))


def share_error(share: float, examples: int) -> float:
    """Return the standard error of a share of so many examples."""
    return math.sqrt(share * (1 - share) / examples)


def linear_accuracy(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int) -> float:
    """Return the share of validation examples that a linear classifier gets right.

    Args:
        train: Embeddings `(N, D)` and labels `(N,)` to fit it to, by L-BFGS with a small ridge.
        validation: The same of the examples to score it on.
        classes: C.
    """
    (x, y), (unseen, expected) = ((one.double(), labels) for one, labels in (train, validation))
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x, unseen = (x - mean) / scale, (unseen - mean) / scale
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + RIDGE * weight.square().sum() / len(x)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return float(((unseen @ weight + bias).argmax(1) == expected).double().mean())


# -- one teacher ------------------------------------------------------------------------------------------------------


def _unlearned(run: Run, stage: Stage, linear: dict[str, Any] | None) -> str | None:
    """Return in words why a teacher's last training has not finished learning; None where it has."""
    task, folder = task_of_stage(run, stage), run.folder / stage.path
    spec, title = task.specs[task.monitor], _title(task)
    looks = list(read_curves(folder, stage.seed, task.monitor).score.values())
    examples = run.parts[stage.part].data.sizes["validation"]
    if still_improving(looks, spec, examples):
        return f"its validation {title} was still improving at the end ({looks[-2]:.3f}, then {looks[-1]:.3f})"
    root = folder.parent if folder.name.startswith(FURTHER) else folder
    until = trainings_of(root)
    scores = [validation_score(read_stage(one)) for one in until[: until.index(folder) + 1]]  # as it was then
    score = max(scores)
    if linear is None:
        return None
    noise = math.hypot(share_error(score, examples), share_error(linear["score"], linear["validation"]))
    if score > linear["score"] - 2 * noise:
        return None
    return (
        f"its validation {title} ({score:.3f}) is below that of a linear classifier on the embeddings of the network "
        f"that it started from ({linear['score']:.3f}, fitted to {linear['train']} examples)"
    )


def _title(task: Task) -> str:
    return task.specs[task.monitor].title


def _remedy(stage: Stage) -> str:
    own = f"tasks.{stage.part}.teacher" if stage.part else "teacher"
    return f"Train it for longer ({own}.trainer.max_epochs), or at another learning rate ({own}.optimizer.lr)"


def _keep(run: Run, stage: Stage, linear: dict[str, Any] | None, lines: Sequence[str]) -> None:
    """Print and write what was found; what led to a further training is printed before that."""
    with first():
        if rank() == 0:
            write_sealed(run.folder / stage.path / FILE, {"linear": linear, "lines": list(lines), "done": True})
    for line in lines:
        if "it is trained on for" not in line:
            say(run.console, f"{stage.name}  {line}")


# -- the linear classifier --------------------------------------------------------------------------------------------


def _linear(run: Run, stage: Stage) -> dict[str, Any] | None:
    """Return the score of a linear classifier on the pretrained network's embeddings, if it has any.

    It is fitted once: the finished teacher's folder keeps it.
    """
    task, path = task_of_stage(run, stage), run.folder / stage.path / FILE
    comparable = task.classes is not None and task.specs[task.monitor].share
    if not comparable or not is_pretrained(stage.network):
        return None
    with first():
        if rank() == 0 and not path.is_file():
            say(run.console, f"{stage.name}  is held against a linear classifier")
            write_sealed(path, {"linear": _fitted(run, stage, task), "lines": []})
    kept: dict[str, Any] | None = _read_check(path.parent)["linear"]
    return kept


def is_pretrained(settings: Node) -> bool:
    """Return whether a network of these settings starts from pretrained weights."""
    return lookup(settings["_target_"]) is pretrained or settings.get("pretrained") is True


def _fitted(run: Run, stage: Stage, task: Task) -> dict[str, Any]:
    started, data = time.monotonic(), training_data(run, stage)
    assert task.classes is not None
    with torch.random.fork_rng(devices=[]):
        network, _ = build_network(stage.network, data, "teacher")
    name = "hidden[-1]" if "attention_mask" in data.few() else "pooled"
    own = FrozenTeacher(network, run.parts[stage.part].cfg.teacher.precision, [name]).to(run.device)
    train = _embedded(own, name, data.train_dataloader(), run.device)
    validation = _embedded(own, name, _few(data), run.device)
    score = linear_accuracy(train, validation, task.classes)
    seconds = time.monotonic() - started
    return {"score": score, "train": len(train[1]), "validation": len(validation[1]), "seconds": seconds}


def _embedded(
    teacher: FrozenTeacher, name: str, batches: Iterable[Batch], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the pooled embeddings of labelled examples, and their labels, on the CPU."""
    pooled: list[Tensor] = []
    labels: list[Tensor] = []
    for given in batches:
        if sum(map(len, labels)) >= MOST_EXAMPLES:
            break
        batch = {key: value.to(device) for key, value in given.items()}
        mask = batch.get("attention_mask")
        one = masked_mean(teacher(batch).features[name], None if mask is None else mask.bool())
        known = is_labelled(batch["labels"])
        pooled.append(one[known].float().cpu())
        labels.append(batch["labels"][known].cpu())
    return torch.cat(pooled), torch.cat(labels)


def _few(data: IndexedData) -> Iterator[Batch]:
    """Return about `MOST_EXAMPLES` validation examples, in batches of all lengths."""
    return spread(data.val_dataloader(), math.ceil(MOST_EXAMPLES / data.eval_batch_size))
