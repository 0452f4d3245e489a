"""A step of a small language model: from the sparse cache and beside a running teacher, against the least it can cost.

The student is `experiment=lm_sotu`'s (6 layers x 288), on batches of 16 blocks of 128 tokens, its vocabulary trimmed to
150,000 tokens of speeches. Everything runs under Lightning with the pipeline's loggers and callbacks, but what is named
"by hand".

* from the sparse cache, top-32 and tail, against the same student from text alone; both leave the output layer to the
  loss
* beside a running teacher of SmolLM2's size in float32, batches of 8, dense soft targets, against the teacher's forward
  pass and the student's step written by hand
* what trimming the vocabulary from 49,152 tokens is worth: the step from text alone
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import Measure, ratios
from benchmarks.lm_task import (
    FULL,
    STUDENT,
    addresses,
    network,
    smollm2_shaped,
    sparse_objective,
    stored_training_blocks,
)
from benchmarks.task import ALPHA, CLIP, optimizer, scheduler, silence, take_turns, train_ours
from kd_lightning.data import Sotu
from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.distillation import DistillationModule, SupervisedModule
from kd_lightning.training.objective import Objective
from kd_lightning.training.optim import parameter_groups

WARM, STEPS, ROUNDS = 2, 12, 5
LIVE_BATCH, LIVE_WARM, LIVE_STEPS = 8, 1, 7


def run() -> list[Measure]:
    """Return all three."""
    silence()
    return [*_cached(), *_live(), *_trimmed()]


def _cached() -> list[Measure]:
    data = addresses()
    with tempfile.TemporaryDirectory() as folder:
        teacher = stored_training_blocks(data, Path(folder))

        def distilled() -> float:
            module = DistillationModule(
                network(STUDENT, data), teacher, sparse_objective(), optimizer(), scheduler, task=data.task
            )
            return _train(module, data)

        seconds = take_turns({"distilled": distilled, "text alone": lambda: _alone(data)}, ROUNDS)
    return [
        Measure("a step from the sparse cache / from text alone", ratios(*seconds.values()), "ratio", "<= 1.03"),
        Measure("a step from the sparse cache", _per_step(seconds["distilled"]), "ms"),
    ]


def _alone(data: Sotu) -> float:
    return _train(SupervisedModule(network(STUDENT, data), optimizer(), scheduler, task=data.task), data)


def _live() -> list[Measure]:
    data = addresses(batch_size=LIVE_BATCH)
    above = smollm2_shaped(len(data.tokenizer_of("student"))).requires_grad_(False)
    objective = Objective({"ce": CrossEntropyLoss(), "kd": SoftTargetLoss()}, {"ce": 1 - ALPHA, "kd": ALPHA})

    def ours() -> float:
        student = network(STUDENT, data, logits_in_training=True)
        module = DistillationModule(student, FrozenTeacher(above), objective, optimizer(), scheduler, task=data.task)
        return _train(module, data, LIVE_WARM, LIVE_STEPS)

    seconds = take_turns({"ours": ours, "by hand": lambda: _by_hand(above, data)}, ROUNDS)
    note = f"the teacher of 30 layers x 576 in float32 on both sides; batches of {LIVE_BATCH} x 128 tokens"
    return [
        Measure("a step beside a running teacher: ours / by hand", ratios(*seconds.values()), "ratio", "<= 1.03", note)
    ]


def _by_hand(teacher: nn.Module, data: Sotu) -> float:
    """Train in a minimal loop and return the seconds of the steps behind the first ones."""
    student = network(STUDENT, data, logits_in_training=True).train()
    adamw = optimizer()(parameter_groups(student))
    schedule, started = scheduler(adamw, LIVE_STEPS), 0.0
    loader = data.select(tokens="student", pool=False).train_dataloader()
    for done, batch in enumerate(itertools.islice(loader, LIVE_STEPS)):
        if done == LIVE_WARM:
            started = time.perf_counter()
        given = {name: batch[name] for name in ("input_ids", "position_ids", "document_ids")}
        with torch.inference_mode():
            above = teacher(**given).logits[:, :-1]
        loss = _textbook(student(**given).logits[:, :-1], above.clone(), batch["labels"][:, 1:])
        adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        adamw.step()
        schedule.step()
    return time.perf_counter() - started


def _textbook(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    counted = labels != -100
    z_s, z_t, y = student[counted], teacher[counted], labels[counted]
    soft = nn.functional.kl_div(z_s.log_softmax(-1), z_t.log_softmax(-1), reduction="batchmean", log_target=True)
    return (1 - ALPHA) * nn.functional.cross_entropy(z_s, y) + ALPHA * soft


def _trimmed() -> list[Measure]:
    whole, cut = addresses(FULL), addresses()
    work: dict[str, Callable[[], float]] = {
        "whole": lambda: _alone(whole),
        "trimmed": lambda: _alone(cut),
    }
    seconds = take_turns(work, ROUNDS)
    sizes = [len(data.tokenizer_of("student")) for data in (whole, cut)]
    note = f"{sizes[0]:,} and {sizes[1]:,} tokens; text alone, output layer in the loss"
    return [
        Measure("a step with the whole vocabulary / with a trimmed one", ratios(*seconds.values()), "ratio", None, note)
    ]


def _train(module: DistillationModule | SupervisedModule, data: Sotu, warm: int = WARM, steps: int = STEPS) -> float:
    return train_ours(module, warm, steps, logging=True, data=data.select(tokens="student", pool=False))


def _per_step(seconds: list[float]) -> list[float]:
    return [1000 * value / (STEPS - WARM) for value in seconds]
