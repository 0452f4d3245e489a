"""Before the first stage: the networks are built and compared on one batch, and what does not fit is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_lightning.config.instantiate import build, lookup, parameters, processes
from kd_lightning.models.adapt import evaluating, run_network
from kd_lightning.models.cohort import joined
from kd_lightning.models.features import FeatureTap
from kd_lightning.models.fits import check_length, check_single
from kd_lightning.pipeline.trainer_checks import named
from kd_lightning.pipeline.validation import number_of_teachers
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.teachers import EnsembleNetwork, SideBySide, Teacher
from kd_lightning.training.objective import Objective
from kd_lightning.training.optim import parameter_groups
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from kd_lightning.data import ClassificationData
    from kd_lightning.data.datamodule import Role
    from kd_lightning.pipeline.run import Pipeline
    from kd_lightning.tasks import Task


def rehearse(pipeline: Pipeline) -> None:
    """Build the networks of a run, compare those that meet on a batch, and take a step with each that is trained.

    Raises:
        ConfigError: What does not fit, before any training.
    """
    with torch.random.fork_rng(devices=[]):
        _rehearse(pipeline)


def _rehearse(pipeline: Pipeline) -> None:
    cfg, given = pipeline.cfg, {}
    if cfg["teacher"]["folds"] > 1:
        pipeline.data.folds(cfg["teacher"]["folds"])  # refuses what cannot be
    trained = cfg["teacher"]["checkpoint"] is not None
    if pipeline.has_teacher:
        given["teacher"] = pipeline.teacher.network if trained else _untrained(pipeline)
        check_length(given["teacher"], pipeline.data.input_format.get("max_length"), "teacher")
        if "teacher" in pipeline.stages and not trained:
            step_teacher(pipeline, given["teacher"])
    elif needs_teacher(cfg):
        raise ConfigError("there is no teacher: add teacher to stages, or set teacher.checkpoint to a finished one")
    if pipeline.stages == ["teacher"]:
        return
    check_monitors(cfg["callbacks"], pipeline.task)
    student, _ = pipeline.build_network(cfg["student"], "student", **given)
    check_batches(pipeline, student)
    if "baseline" in pipeline.stages:
        step_alone("student", pipeline, student, cfg["optimizer"])
    if "distill" not in pipeline.stages:
        return
    peers = [pipeline.build_network(peer, "student", **given)[0] for peer in cfg["peers"]]
    assistants = [pipeline.build_network(assistant, "student", **given)[0] for assistant in cfg["assistants"]]
    below: list[nn.Module] = [*assistants, joined(student, peers)]
    for number, (above, network) in enumerate(zip([given.get("teacher"), *assistants], below, strict=True)):
        objective = pipeline.objective(network, above)
        check_scheme(objective, cfg)
        if above is None:
            teacher: Teacher | None = pipeline.own_average(network, objective)
        else:
            answering = pipeline.answerings[number]
            answering.needs = objective.needs_teacher
            teacher = answering.check(above, pipeline.teacher if trained and number == 0 else None)
        data = pipeline.data_of(number).select(tokens="both")
        batch = pipeline.task.compared(_few(data))
        try_out(objective, network, teacher, batch, pipeline.task, data.num_examples)
        step_taught(objective, network, teacher, batch, cfg["optimizer"])


def _untrained(pipeline: Pipeline) -> nn.Module:
    """Return a network as the teacher's will be; one member stands for all of an ensemble."""
    settings = pipeline.cfg["teacher"]
    network, _ = pipeline.build_network(settings["network"], "teacher")
    if "teacher" in pipeline.stages:
        data = pipeline.data.select(tokens="teacher", pool=False).with_batches(batch_size=settings["batch_size"])
        workers = processes({**pipeline.cfg["trainer"], **settings["trainer"]})
        check_single(network, _few(data), data.smallest_batch(workers), data.batch_size, "teacher.batch_size")
    members = number_of_teachers(settings)
    return network if members == 1 else EnsembleNetwork([network] * members)


def _few(data: ClassificationData) -> Batch:
    """Return some examples."""
    few: Batch = next(iter(data.with_batches(eval_batch_size=4).val_dataloader()))
    return few


def check_batches(pipeline: Pipeline, student: nn.Module) -> None:
    """Refuse a student that cannot learn from the smallest of its batches.

    Raises:
        ConfigError: Names the key to change.
    """
    for pool in (False, True):
        if pool and "distill" not in pipeline.stages:
            return
        data = pipeline.data.select(tokens="student", pool=pool)
        smallest = data.smallest_batch(processes(pipeline.cfg["trainer"]))
        check_single(student, _few(data), smallest, data.batch_size, "data.batch_size")


def needs_teacher(cfg: dict[str, Any]) -> bool:
    """Return whether there is nothing to train without a trained teacher."""
    if cfg["assistants"] or any(takes_from_teacher(node) for node in (cfg["student"], *cfg["peers"])):
        return True
    taught = "distill" in cfg["stages"] and cfg["teacher"]["ema"] is None
    return taught and bool(build(cfg["distillation"]).uses_teacher)


def takes_from_teacher(settings: dict[str, Any]) -> bool:
    """Return whether a network of these settings is made from the teacher."""
    return "teacher" in parameters(lookup(settings["_target_"]))


def source_of(teacher: nn.Module) -> nn.Module:
    """Return the network that a student is made from: of several teachers, or of several tasks', the first one."""
    while isinstance(teacher, EnsembleNetwork | SideBySide):
        teacher = teacher.members[0] if isinstance(teacher, EnsembleNetwork) else teacher.networks[0]
    return teacher


def has_start(settings: dict[str, Any]) -> bool:
    """Return whether a network of these settings starts from trained weights, and could do without them."""
    takes = parameters(lookup(settings["_target_"]))
    return "initialise" in takes and settings.get("initialise", "teacher") == "teacher"


def check_monitors(callbacks: dict[str, Any], task: Task) -> None:
    """Refuse callbacks that watch what no stage logs, which Lightning notices at the first look at validation.

    Where a callback is the user's own, it may log what others watch, and nothing is refused.

    Raises:
        ConfigError: Names the callback's key, and what there is to watch.
    """
    logged = ["train/loss", "val/loss", *(f"val/{name}" for name in task.scores().names)]
    made = {name: build(node) for name, node in callbacks.items()}
    if not all(type(one).__module__.startswith(("lightning.", "kd_lightning.")) for one in made.values()):
        return
    for name, one in made.items():
        if (watched := getattr(one, "monitor", None)) not in (None, *logged):
            near = did_you_mean(str(watched), logged, limit=1)
            raise ConfigError(f"callbacks.{name}.monitor={watched} is logged by no stage{near}")


def check_scheme(objective: Objective, cfg: dict[str, Any]) -> None:
    """Refuse peers and assistants that the distillation has no use for, and a distillation that lacks its peers.

    Raises:
        ConfigError: Names the key to change.
    """
    needs = objective.needs_student
    if cfg["teacher"]["ema"] is not None and not objective.uses_teacher:
        raise ConfigError("teacher.ema makes a teacher, and distillation reads none: set teacher.ema=null")
    if "peers" in needs and not cfg["peers"]:
        raise ConfigError(
            "distillation: students that learn from each other need peers beside the student: peers='[${student}]' "
            "(experiment=deep_mutual)"
        )
    if cfg["peers"] and set(needs) != {"peers"}:
        reads = f"reads {', '.join(needs)}" if needs else "does not read them"
        raise ConfigError(f"peers learn by their logits alone, and distillation {reads}: use distillation=deep_mutual")
    if "simkd_projector" in needs and cfg["student"].get("initialise") == "random":
        raise ConfigError(
            "student.initialise=random makes a fresh classifier, which distillation=simkd does not train: set "
            "student.initialise=teacher, or another distillation"
        )
    if cfg["assistants"] and not objective.uses_teacher:
        raise ConfigError("assistants hand on what the teacher says, and distillation reads no teacher")


def step_teacher(pipeline: Pipeline, network: nn.Module) -> None:
    """Take a step with a teacher that is to be trained; see `step_alone`."""
    step_alone("teacher", pipeline, source_of(network), pipeline.cfg["teacher"]["optimizer"])


def step_alone(role: Role, pipeline: Pipeline, network: nn.Module, optimizer: dict[str, Any]) -> None:
    """Take one training step from labels on the CPU, with a network that is thrown away.

    Raises:
        ConfigError: The network cannot read the data, predicts something else, or cannot be trained.
    """
    batch = pipeline.task.compared(_few(pipeline.data.select(tokens=role, pool=False)))
    objective = Objective(*pipeline.task.terms())
    with named(role):
        said = run_network(network.train(), batch)
        pipeline.task.check_logits(said.logits, batch)
        _step(network, objective(said, said, batch)[0], optimizer)


def step_taught(
    objective: Objective, student: nn.Module, teacher: Teacher | None, batch: Batch, optimizer: dict[str, Any]
) -> None:
    """Take one training step from a teacher on the CPU, with a student and an objective that are thrown away.

    Raises:
        ConfigError: As `step_alone`.
    """
    with named("distillation"):
        said = FeatureTap(student.train(), objective.needs_student)(batch)
        expected = said if teacher is None or not objective.uses_teacher else teacher(batch)
        loss, _ = objective.train()(said, expected, batch)
        _step(nn.ModuleList([student, objective]), loss, optimizer)


def _step(module: nn.Module, loss: Tensor, optimizer: dict[str, Any]) -> None:
    if not loss.isfinite():
        raise ConfigError(f"the loss of a first batch is {float(loss)}, before any step")
    if not loss.requires_grad:
        raise ConfigError("nothing in it can be trained: its loss reaches no weight")
    loss.backward()  # type: ignore[no-untyped-call]
    build(optimizer)(parameter_groups(module)).step()
    if not all(weight.isfinite().all() for weight in module.parameters()):
        raise ConfigError(
            f"a step at lr={optimizer.get('lr')} makes weights that are no numbers: lower the optimizer's lr"
        )


def try_out(
    objective: Objective, student: nn.Module, teacher: Teacher | None, batch: Batch, task: Task, examples: int
) -> None:
    """Compare the two on one batch, every term whatever its weight, so that models that do not fit are refused at once.

    Raises:
        ConfigError: What does not fit.
    """
    ask = FeatureTap(student, objective.needs_student)
    with evaluating(student), torch.no_grad():
        with named("student"):
            said = ask(batch)
            task.check_logits(said.logits, batch)
        with named("teacher"):
            expected = said if teacher is None else teacher(batch)
            task.check_logits(expected.logits, batch)
        if not all(x.isfinite().all() for x in (expected.logits, *expected.features.values())) and teacher is not None:
            raise ConfigError(
                "teacher: the teacher's outputs are not finite (NaN or infinite): its weights are damaged, or overflow "
                "in its precision; give another teacher.checkpoint, or set teacher.precision=float32"
            )
        with named("distillation"):
            objective.connect(said, expected, examples)
            objective.eval()(said, expected, batch)
