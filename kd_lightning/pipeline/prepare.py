"""From a stage to its training: the data, the networks, the teacher and the module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kd_lightning.config.instantiate import build
from kd_lightning.config.schema import OUTPUTS, Node
from kd_lightning.models.cohort import joined
from kd_lightning.models.rebuild import describe
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.networks import build_network, has_start, start_of, takes_from_teacher
from kd_lightning.pipeline.objectives import loss_settings, own_average, run_objective, student_texts
from kd_lightning.runtime.fingerprints import digest, file_digest, read_json
from kd_lightning.teachers.clock import PREDICTING
from kd_lightning.training.callbacks import CacheFilling, MeanTeacher, TeacherTime
from kd_lightning.training.distillation import DistillationModule, SupervisedModule, connecting_batch
from kd_lightning.training.run_folder import load_stage
from kd_lightning.training.stage import VERSION, Training

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData
    from kd_lightning.pipeline.stages import Stage
    from kd_lightning.tasks import Task
    from kd_lightning.teachers import Teacher
    from kd_lightning.training.module import NetworkModule


def training_data(run: Run, stage: Stage) -> IndexedData:
    """Return the data with the examples of a stage's training selected."""
    if stage.kind != "teacher":
        return run.student_data(stage.seed, transfer=stage.distils, teacher=stage.teacher or 0)
    return run.parts[stage.part].teacher_data(stage.member)


def prepare(run: Run, stage: Stage) -> Training:
    """Build a stage's networks, and return what `train` needs; the stages before it are finished."""
    data, cfg = training_data(run, stage), run.cfg
    network, network_settings, peers = new_networks(run, stage)
    settings = stage_settings(run, stage, network, network_settings)
    training = Training(
        name=stage.name, folder=kept_folder(run, stage, settings), settings=settings, network=network,
        network_settings=network_settings, module=partial(_supervised, run, stage), data=data, role=stage.role,
        trainer=stage.trainer, validations=stage.validations, checkpoint_every=cfg.checkpoint_every_n_steps,
        callbacks=cfg.callbacks, loggers=cfg.logger, steps=stage.steps, rate=stage.rate,
        compile=cfg.compile and stage.kind != "teacher",
    )  # fmt: skip
    if stage.distils:
        _add_teacher(run, stage, training, peers)
    return training


def stage_settings(run: Run, stage: Stage, network: nn.Module, network_settings: Node) -> dict[str, Any]:
    """Return everything that decides a stage's result; the stages before it are finished."""
    deciding = _deciding(run, stage, training_data(run, stage))
    return {"network": network_settings, **deciding, **_origins(run, stage, network)}


def settings_of(run: Run, stage: Stage) -> dict[str, Any]:
    """Return `stage_settings` of a stage that is not trained now: its network is built, and thrown away."""
    network, network_settings, _ = new_networks(run, stage)
    return stage_settings(run, stage, network, network_settings)


def new_networks(run: Run, stage: Stage) -> tuple[nn.Module, Node, list[nn.Module]]:
    """Return the network that is trained, its settings, and its peers: alike in every run of these seeds."""
    start = None if stage.start is None else run.folder / stage.start
    if start is not None and stage.role == "student":
        return load_stage(start).network.train(), read_json(start / "model.json"), []
    data = data_read_by(run, stage)
    taking = stage.role == "student" and any(map(takes_from_teacher, (stage.network, *stage.peers)))
    source = run.source.network if taking else None
    torch.manual_seed(stage.seed)
    network, settings = build_network(stage.network, data, stage.role, source)
    if start is not None:  # built anew, so that what its settings freeze stays frozen
        network.load_state_dict(load_stage(start).network.state_dict())
    return network, settings, [build_network(peer, data, "student", source)[0] for peer in stage.peers]


def data_read_by(run: Run, stage: Stage) -> IndexedData:
    """Return the data that a stage's network reads: of a teacher those of its task."""
    return run.parts[stage.part].data if stage.kind == "teacher" else run.data


def task_of_stage(run: Run, stage: Stage) -> Task:
    """Return what a stage's network learns to predict."""
    return run.parts[stage.part].data.task if stage.kind == "teacher" else run.task


def _deciding(run: Run, stage: Stage, data: IndexedData) -> dict[str, Any]:
    """Return what decides a stage's result, whatever it is for."""
    trainer = {key: value for key, value in stage.trainer.items() if key != "log_every_n_steps"}
    if trainer.get("strategy") == "ddp_spawn":  # who starts the processes decides nothing
        trainer["strategy"] = "ddp"
    weights = {name: own.weight for name, own in run.cfg.tasks.items()}
    return {
        "version": VERSION, "optimizer": stage.optimizer, "scheduler": stage.scheduler, "trainer": trainer,
        "batch_size": data.batch_size,
        "validations": stage.validations, "steps": stage.steps, "seed": stage.seed, "data": data.fingerprint,
        "callbacks": run.cfg.callbacks, **({"task_weights": weights} if weights else {}),
    }  # fmt: skip


def _origins(run: Run, stage: Stage, network: nn.Module) -> dict[str, Any]:
    """Return the other trainings that determine a stage: its initial weights and its teacher."""
    if stage.start is not None:
        return {"start": file_digest(run.folder / stage.start / "model.safetensors")}
    if stage.kind == "teacher":
        return {}
    taking, start = takes_from_teacher(stage.network), start_of(stage.network)
    if stage.kind == "baseline":
        more = {"architecture": describe(network)} if taking else {}  # its settings do not have its sizes
        return more | start | ({"teacher": run.source.fingerprint} if taking and has_start(stage.network) else {})
    ema, texts = {"ema": run.cfg.teacher.ema}, run.cfg.on_policy
    return {
        **({"on_policy": asdict(texts)} if texts.share else {}),
        "distillation": loss_settings(run), "balance": run.cfg.balance, "peers": run.cfg.peers,
        "teacher": ema if stage.teacher is None else run.providers[stage.teacher].loaded.fingerprint,
        "outputs": run.cfg.teacher.chosen(OUTPUTS), **start,
    }  # fmt: skip


def shared_place(run: Run, stage: Stage, settings: dict[str, Any]) -> Path | None:
    """Return where `shared_dir` has a stage; None where it is the run's own."""
    if run.cfg.shared_dir is None or stage.kind == "distill" or stage.start is not None:
        return None  # a teacher's further training is inside the teacher's
    return Path(run.cfg.shared_dir).absolute() / f"{Path(stage.path).name}-{digest(settings)}"


def kept_folder(run: Run, stage: Stage, settings: dict[str, Any]) -> Path:
    """Return a stage's folder; for stages shared by `shared_dir`, the run's folder links to it."""
    folder, place = run.folder / stage.path, shared_place(run, stage, settings)
    if place is None:
        return folder
    if not folder.exists():
        place.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process of this command was faster
            # relative, so that both can be moved together
            folder.symlink_to(os.path.relpath(place, folder.parent), target_is_directory=True)
    return folder.resolve()


def _supervised(run: Run, stage: Stage, network: nn.Module) -> NetworkModule:
    task = task_of_stage(run, stage)
    return SupervisedModule(network, build(stage.optimizer), build(stage.scheduler), task=task, seed=stage.seed)


def _add_teacher(run: Run, stage: Stage, training: Training, peers: Sequence[nn.Module]) -> None:
    """Have a training learn from its teacher, with its peers."""
    teacher = above = None
    if stage.teacher is not None:
        begun = PREDICTING.seconds
        teacher, provider = run.teacher_for_training(stage.teacher), run.providers[stage.teacher]
        unstored = 0.0 if provider.caches() else PREDICTING.seconds - begun
        above = provider.loaded.network
        if run.cfg.on_policy.share == 0:  # else no batch is known ahead of its step
            training.data.around = teacher.around
        training.notes = dict(teacher.notes)
        training.more_callbacks.append(TeacherTime(training.notes, unstored))
        if not run.shares(stage.teacher):
            training.more_callbacks.append(CacheFilling(teacher.flush, provider.complete))
    if run.cfg.teacher.ema is not None:
        training.more_callbacks.append(MeanTeacher())
    training.module = lambda network: _module(run, stage, joined(network, peers), above, teacher, training.data)


def _module(
    run: Run, stage: Stage, student: nn.Module, above: nn.Module | None, teacher: Teacher | None,
    data: IndexedData,
) -> DistillationModule:  # fmt: skip
    """Build the module of student, teacher (`above`, if any) and objective, with projectors."""
    objective = run_objective(run, student, above)
    if above is None:
        teacher = own_average(run, student, objective)
    module = DistillationModule(
        student, teacher, objective, build(stage.optimizer), build(stage.scheduler), task=run.task, seed=stage.seed,
        on_policy=student_texts(run),
    )  # fmt: skip
    if objective.connects:
        torch.manual_seed(stage.seed)
        if teacher is not None:
            teacher.to(torch.device("cpu"))  # where a new student is
        module.connect(connecting_batch(data), data.num_examples)
    return module
