"""How long a run takes: a few steps of each network are timed before any training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_lightning.config.instantiate import build, in_sweep, processes
from kd_lightning.data import MultiTaskData
from kd_lightning.data.batches import spread
from kd_lightning.evaluation.profiling import single_examples
from kd_lightning.models.adapt import evaluating, run_network
from kd_lightning.pipeline.speeds import TEACHER, generation_seconds
from kd_lightning.pipeline.stages import SHORT
from kd_lightning.runtime.clock import Clock, duration
from kd_lightning.runtime.console import say
from kd_lightning.teachers import Teacher
from kd_lightning.training.optim import parameter_groups
from kd_lightning.training.run_folder import is_finished
from kd_lightning.types import Batch, ModelOutput

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run
    from kd_lightning.pipeline.stages import Stage

TIMED = 4
"""Batches that a step is timed on, of typical sizes."""
SEEN = 40
"""Batches among which those are chosen."""
LEAST = 200
"""Steps from which a run is worth estimating; fewer are soon done."""
Kind = tuple[str, str, int | None]
PROFILED = 220
"""How often the report has each network predict a single example, and what it takes besides."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A network that the preflight has tried.

    Attributes:
        stage: The stage that trains one like it.
        network: The network; it is thrown away.
        module: What is trained: the network and the loss's own weights.
        weights: Those of its weights that are trained, whatever froze them since.
        loss: The loss of a batch, given what the teacher predicts for it; None: what the network predicts itself.
        teacher: What a distilled student learns from, as its cache would give it.
    """

    stage: Stage
    network: nn.Module
    module: nn.Module
    weights: Sequence[nn.Parameter]
    loss: Callable[[Batch, ModelOutput | None], Tensor]
    teacher: Teacher | None = None


def estimate(run: Run, stages: Sequence[Stage], trials: Sequence[Trial]) -> Clock | None:
    """Print how long the unfinished stages take, and return the clock; None where it is unknown.

    It is left out for few steps, and in a sweep, whose points are many.
    """
    todo = [stage for stage in stages if not is_finished(run.folder / stage.path)]
    if sum(stage.steps for stage in todo) < LEAST or in_sweep():
        return None
    missing = partial(_missing, run, todo)
    clock = expected(run, stages, trials, missing)
    if clock is not None:
        say(run.console, _line(run, todo, clock, missing() if clock.outputs else 0))
    return clock


def expected(run: Run, stages: Sequence[Stage], trials: Sequence[Trial], missing: Callable[[], int]) -> Clock | None:
    """Return time and memory of the unfinished stages; None for several processes, a served teacher.

    Args:
        run: The run.
        stages: All of its stages.
        trials: What the preflight has tried.
        missing: Returns for how many examples the teacher is still to predict.
    """
    if processes(run.cfg.trainer) > 1 or run.cfg.teacher.url is not None:
        return None
    found = {_kind(trial.stage): trial for trial in trials}
    if taught := [trial for trial in trials if trial.stage.kind == "distill"]:
        found |= {_kind(stage): taught[0] for stage in stages if stage.kind == "finetune"}
    clock = Clock({})
    costs: dict[int, tuple[float, int]] = {}
    with torch.random.fork_rng(devices=[]):
        for stage in stages:
            if is_finished(run.folder / stage.path):
                continue
            trial = found.get(_kind(stage))
            if trial is None:
                return None
            if id(trial) not in costs:
                costs[id(trial)] = _training(run, trial)
            seconds, clock.memory[stage.path] = costs[id(trial)]
            clock.parts[stage.path] = seconds * stage.steps / trial.stage.steps
            if stage.distils and trial.teacher is not None:
                clock.memory[stage.path] += _teacher_bytes(run, trials)
                if not clock.outputs:
                    clock.outputs = _outputs(run, trial.teacher, missing())
                    clock.parts[stage.path] += clock.outputs
        clock.parts["report"] = sum(_profile(run, trial) for trial in trials) + _generation(run, stages, found)
    return clock


def _teacher_bytes(run: Run, trials: Sequence[Trial]) -> int:
    """Return the bytes of the weights of the teachers, finished or like those that are tried."""
    tried = [trial.network for trial in trials if trial.stage.kind == "teacher"]
    return sum(map(_bytes, tried or [run.teacher.network]))


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in (*module.parameters(), *module.buffers()))


def _kind(stage: Stage) -> Kind:
    """Return what stages have in common whose trainings take alike."""
    return stage.kind, stage.part, stage.teacher


def _line(run: Run, stages: Sequence[Stage], clock: Clock, missing: int) -> str:
    """Return what is done, for how many examples the teacher is still to predict, and how long it takes."""
    teachers = [stage for stage in stages if stage.kind == "teacher"]
    students = [stage for stage in stages if stage.kind != "teacher"]
    shares = []
    if teachers:
        seconds = sum(clock.parts[stage.path] for stage in teachers)
        shares.append(f"{_number(teachers, 'teacher')} {duration(seconds)}")
    if clock.outputs:
        shares.append(f"its outputs for {missing:,} examples {duration(clock.outputs)}")
    if students:
        seconds = sum(clock.parts[stage.path] for stage in students) - clock.outputs
        shares.append(f"{_number(students, 'student')} {duration(seconds)}")
    return f"about {duration(clock.total)} (budget={run.cfg.budget}): {', '.join(shares)}"


def _number(stages: Sequence[Stage], name: str) -> str:
    """Return how many trainings there are, and of how many steps."""
    steps = sorted({stage.steps for stage in stages})
    several = f"{len(stages)} {name}s" if len(stages) > 1 else name
    return f"{several} of {' to '.join(f'{number:,}' for number in {steps[0]: 0, steps[-1]: 0})} steps"


def _training(run: Run, trial: Trial) -> tuple[float, int]:
    """Return the seconds of a stage's steps and of its looks at the validation split, and its bytes."""
    from kd_lightning.pipeline.prepare import training_data

    stage, data = trial.stage, training_data(run, trial.stage)
    device = run.device
    for weight in trial.weights:
        weight.requires_grad_()
    optimizer = build(stage.optimizer)(parameter_groups(trial.module.to(device).train()))
    teacher = None if trial.teacher is None else trial.teacher.to(device)
    live = stage.teacher is None or run.cfg.teacher.cache == "off"
    seen = _seen(data.train_dataloader())
    chosen, largest = [on(batch, device) for batch in _typical(seen)], on(seen[-1], device)
    given = {id(batch): teacher(batch) for batch in (*chosen, largest)} if teacher is not None and not live else {}

    def step(batch: Batch) -> None:
        with _precision(stage.trainer.get("precision"), device):
            loss = trial.loss(batch, teacher(batch) if teacher is not None and live else given.get(id(batch)))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trial.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = _seconds(step, chosen)
    memory = _step_bytes(trial, optimizer, step, largest)
    looks = (stage.validations + 1) * _evaluation(trial.network, data.val_dataloader(), device)
    return stage.steps * int(stage.trainer.get("accumulate_grad_batches", 1)) * seconds + looks, memory


def _step_bytes(trial: Trial, optimizer: torch.optim.Optimizer, step: Callable[[Batch], None], batch: Batch) -> int:
    """Return what a step holds: weights, gradients, optimizer, and what gradients need of the batch."""
    own = {value.untyped_storage().data_ptr() for value in (*trial.module.parameters(), *trial.module.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and (place := tensor.untyped_storage()).data_ptr() not in own:
            kept[place.data_ptr()] = place.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(batch)
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    gradients = [weight for weight in trial.module.parameters() if weight.requires_grad]
    return _bytes(trial.module) + sum(value.nbytes for value in (*moments, *gradients)) + sum(kept.values())


def _evaluation(network: nn.Module, loader: Any, device: torch.device) -> float:
    """Return the seconds in which a network predicts a split, of which it is given a few batches."""
    with evaluating(network), torch.inference_mode():
        chosen = [on(batch, device) for batch in spread(loader, TIMED)]
        each = _seconds(lambda batch: run_network(network, batch), chosen)
    return each * len(loader)


def _missing(run: Run, todo: Sequence[Stage]) -> int:
    """Return how many examples the teacher is still to predict."""
    if run.cfg.teacher.cache in ("off", "refresh") or any(stage.kind == "teacher" for stage in todo):
        return run.data.num_examples
    found = [len(cache.missing()) for cache in run.providers[0].caches()]
    return sum(found) if isinstance(run.data, MultiTaskData) else max(found)


def _outputs(run: Run, teacher: Teacher, examples: int) -> float:
    """Return the seconds in which the teacher predicts so many examples."""
    if not examples:
        return 0.0
    size = run.cfg.teacher.predict_batch_size
    data = run.data.select(tokens="both", pool=True).with_batches(batch_size=size)
    device = run.device
    each = _seconds(teacher.to(device), [on(batch, device) for batch in _typical(data.train_dataloader())])
    return each * examples / size


def _profile(run: Run, trial: Trial) -> float:
    """Return the seconds in which the report scores a network and measures its speed."""
    data = run.data.select(tokens=trial.stage.role)
    device, network = run.device, trial.network
    test = 0.0 if trial.stage.kind == "teacher" else _evaluation(network, data.test_dataloader(), device)
    if run.task.generates:  # its speed is that of `_generation`
        return test
    with evaluating(network.cpu()), torch.inference_mode():
        singles = single_examples(_typical(data.val_dataloader()), TIMED)
        each = _seconds(lambda batch: run_network(network, batch), singles)
    return test + PROFILED * each


def _generation(run: Run, stages: Sequence[Stage], trials: Mapping[Kind, Trial]) -> float:
    """Return the seconds in which the report has language models generate, each student of the first seed."""
    if not run.task.generates:
        return 0.0
    students = [stage for stage in stages if stage.role == "student" and stage.seed == run.seeds[0]]
    networks = {
        Path(stage.path).name.removesuffix(SHORT): trials[_kind(stage)].network
        for stage in students if _kind(stage) in trials
    }  # fmt: skip
    teacher = next((trial.network for trial in trials.values() if trial.stage.kind == "teacher"), None)
    if teacher is None and run.compares:
        teacher = run.teacher.network
    return generation_seconds(run, networks if teacher is None else {**networks, TEACHER: teacher})


def _seen(loader: Iterable[Batch]) -> list[Batch]:
    """Return a loader's first batches, the largest last."""
    return sorted(islice(loader, SEEN), key=lambda batch: max(value.numel() for value in batch.values()))


def _typical(loader: Iterable[Batch]) -> list[Batch]:
    """Return some batches of typical sizes."""
    batches = _seen(loader)
    return [batches[(2 * number + 1) * len(batches) // (2 * TIMED)] for number in range(TIMED)]


def on(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def _seconds(call: Callable[[Batch], object], batches: Sequence[Batch]) -> float:
    """Return the mean time of a call, other than a batch's first, which prepares kernels for its shape."""
    found = []
    for batch in batches:
        call(batch)
        begun = time.perf_counter()
        call(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return statistics.fmean(found)


def _precision(name: object, device: torch.device) -> torch.autocast:
    """Return the context in which a trainer of this precision computes."""
    dtype = torch.float16 if str(name).startswith("16") else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled="16" in str(name))
