"""The preflight: builds the networks, compares them on one batch, and refuses what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_lightning.config.instantiate import build, processes
from kd_lightning.losses.cross_tokenizer import CrossTokenizerLoss
from kd_lightning.models.adapt import evaluating, run_network
from kd_lightning.models.cohort import joined
from kd_lightning.models.features import FeatureTap
from kd_lightning.models.fits import check_single
from kd_lightning.pipeline.estimate import Trial
from kd_lightning.pipeline.generate import add_texts, check_generator
from kd_lightning.pipeline.joint_provider import JointProvider
from kd_lightning.pipeline.networks import build_network, check_reads, takes_from_teacher
from kd_lightning.pipeline.objectives import own_average, run_objective, student_texts
from kd_lightning.pipeline.trainer_checks import named
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.teachers import EnsembleNetwork, SideBySide, Teacher
from kd_lightning.training.objective import Objective
from kd_lightning.training.optim import parameter_groups
from kd_lightning.types import Batch, ModelOutput

if TYPE_CHECKING:
    from kd_lightning.config.schema import Node, RunConfig
    from kd_lightning.data import IndexedData
    from kd_lightning.pipeline.context import Part, Run
    from kd_lightning.pipeline.stages import Stage
    from kd_lightning.pipeline.teacher_loading import LoadedTeacher
    from kd_lightning.tasks import Task


FIRST = 20
"""Training batches in which a distillation looks for what it compares."""

NOTHING = {
    "pairs": "contrast and margins are of pairs, margins of those without scores; set data.positive_column, or "
    "data.score_column=null, or use distillation=embed_distill",
    "grades": "scores are compared within a query, which needs two documents or more, and for margins a relevant one "
    "among them; set data.negative_column, or give more documents",
}
"""What data lack whose batches have nothing to compare, by what a network learns from without a teacher."""


def preflight(run: Run, stages: Sequence[Stage]) -> list[Trial]:
    """Build a run's networks, compare students with teachers on a batch, and try a training step.

    It settles which features each teacher's provider keeps.

    Returns:
        What was tried, a network of each kind.

    Raises:
        ConfigError: What does not fit, before any training.
    """
    cfg = run.cfg
    if not run.has_teacher and _needs_teacher(run):
        raise ConfigError(
            "there is no teacher: add teacher to stages, or set teacher.checkpoint to a finished one"
            if "" in run.parts else
            "a task lacks its teacher: add teacher to stages, or set tasks.NAME.teacher.checkpoint"
        )  # fmt: skip
    add_texts(run, kept=True)
    with torch.random.fork_rng(devices=[]):
        trials: list[Trial] = []
        teachers = [_teacher(run, part, stages, trials) for part in run.parts.values()] if run.has_teacher else []
        if cfg.stages == ["teacher"]:
            return trials
        check_monitors(cfg.callbacks, run.task)
        check_generator(run, next((network for network, _ in teachers), None))
        several = len(teachers) > 1
        first = SideBySide([network for network, _ in teachers]) if several else next((t for t, _ in teachers), None)
        chain: list[nn.Module | None] = [first]
        for stage in _of_one_seed(stages):
            network = build_network(stage.network, run.data, "student", first)[0]
            _check_batches(run, stage, network)
            if stage.kind == "baseline":
                trials.append(_step_alone(stage, run.data, run.task, network))
                continue
            peers = [build_network(peer, run.data, "student", first)[0] for peer in stage.peers]
            trials.append(_compare(run, stage, joined(network, peers), chain[-1], teachers))
            chain.append(network)
    return trials


def _of_one_seed(stages: Sequence[Stage]) -> list[Stage]:
    """Return the students' stages that train new networks, each once."""
    found: dict[tuple[str, int | None], Stage] = {}
    for stage in stages:
        if stage.kind in ("baseline", "assistant", "distill"):
            found.setdefault((stage.kind, stage.teacher), stage)
    return list(found.values())


def _teacher(
    run: Run, part: Part, stages: Sequence[Stage], trials: list[Trial]
) -> tuple[nn.Module, LoadedTeacher | None]:
    """Return a task's teacher, finished or an untrained one like it, after a training step."""
    teacher = part.cfg.teacher
    if teacher.checkpoint is not None:
        loaded = run.provider_of(part).loaded
        check_reads(loaded.network, part.data, "teacher")
        return loaded.network, loaded
    if teacher.folds > 1:
        part.data.folds(teacher.folds)  # refuses what cannot be
    network, _ = build_network(teacher.network, part.data, "teacher")
    if "teacher" in run.cfg.stages:
        data = part.data.select(tokens="teacher", pool=False).with_batches(batch_size=teacher.batch_size)
        workers = processes(part.cfg.teacher_trainer)
        check_single(network, data.few(), data.smallest_batch(workers), data.batch_size, "teacher.batch_size")
        stage = next(stage for stage in stages if stage.kind == "teacher" and stage.part == part.name)
        trials.append(_step_alone(stage, part.data, part.data.task, network))
    return network if teacher.number == 1 else EnsembleNetwork([network] * teacher.number), None


def _check_batches(run: Run, stage: Stage, network: nn.Module) -> None:
    """Refuse a student that cannot learn from the smallest of its batches.

    Raises:
        ConfigError: Names the key to change.
    """
    data = run.data.select(tokens="student", pool=stage.distils)
    smallest = data.smallest_batch(processes(run.cfg.trainer))
    check_single(network, data.few(), smallest, data.batch_size, "data.batch_size")


def _compare(
    run: Run, stage: Stage, student: nn.Module, above: nn.Module | None,
    teachers: Sequence[tuple[nn.Module, LoadedTeacher | None]],
) -> Trial:  # fmt: skip
    """Compare student and teacher on one batch, take a step, and select the teacher's features.

    Every term is compared, whatever its weight, so that models that do not fit are refused at once.
    """
    objective = run_objective(run, student, above)
    check_scheme(objective, run.cfg)
    check_tokens(objective, run)
    texts = student_texts(run)
    if stage.teacher is None:
        teacher: Teacher | None = own_average(run, student, objective)
    else:
        provider = run.providers[stage.teacher]
        if isinstance(provider, JointProvider):
            teacher = provider.check(teachers)
        else:
            assert above is not None
            provider.needs = objective.needs_teacher
            teacher = provider.check(above, teachers[0][1] if stage.teacher == 0 else None)
    data = run.data_of(stage.teacher or 0).select(tokens="both")
    batch = run.task.compared(data.few())
    if texts is not None:
        batch = run.task.compared(texts(data.few(), batch["keep"], student, stage.seed))
    _try_out(objective, student, teacher, batch, run.task, data.num_examples)
    if run.task.learns_from in NOTHING:
        check_pairs(objective, run.data.select(tokens="student"))
    return _step_taught(stage, objective, student, teacher, batch, run.task)


def check_monitors(callbacks: dict[str, Any], task: Task) -> None:
    """Refuse callbacks that monitor what no stage logs, which Lightning detects only at validation.

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


def check_scheme(objective: Objective, cfg: RunConfig) -> None:
    """Refuse peers and assistants that the distillation does not use, and missing peers.

    Raises:
        ConfigError: Names the key to change.
    """
    needs = objective.needs_student
    if cfg.teacher.ema is not None and not objective.uses_teacher:
        raise ConfigError("teacher.ema makes a teacher, and distillation reads none: set teacher.ema=null")
    if "peers" in needs and not cfg.peers:
        raise ConfigError(
            "distillation: students that learn from each other need peers beside the student: peers='[${student}]' "
            "(experiment=deep_mutual)"
        )
    if cfg.peers and set(needs) != {"peers"}:
        reads = f"reads {', '.join(needs)}" if needs else "does not read them"
        raise ConfigError(f"peers learn by their logits alone, and distillation {reads}: use distillation=deep_mutual")
    if "simkd_projector" in needs and cfg.student.get("initialise") == "random":
        raise ConfigError(
            "student.initialise=random makes a fresh classifier, which distillation=simkd does not train: set "
            "student.initialise=teacher, or another distillation"
        )
    if cfg.assistants and not objective.uses_teacher:
        raise ConfigError("assistants hand on what the teacher predicts, and distillation reads no teacher")


def check_pairs(objective: Objective, data: IndexedData) -> None:
    """Refuse a distillation that finds nothing to compare in the first training batches.

    Of terms that read the teacher one must: a student that learns from the pairs alone is the baseline.

    Raises:
        ConfigError: Names the keys to change.
    """
    terms: Any = objective.terms
    weighted = {name: term for name, term in terms.items() if objective.weights[name] != 0}
    read = {name: term for name, term in weighted.items() if term.uses_teacher} or weighted
    for batch in islice(data.train_dataloader(), FIRST):
        if any(term.counts(batch).any() for term in read.values()):
            return
    raise ConfigError(
        f"distillation: {', '.join(read)} finds nothing to compare in the training batches, so it would teach nothing: "
        f"{NOTHING[data.task.learns_from]}"
    )


def check_tokens(objective: Objective, run: Run) -> None:
    """Refuse what cannot be compared, or kept, of a teacher with other tokens.

    Raises:
        ConfigError: Names the key to change.
    """
    crosses = any(isinstance(term, CrossTokenizerLoss) for term in objective.terms.values())
    if crosses != run.data.other_tokens:
        raise ConfigError(
            "distillation=cross_tokenizer compares other tokens, and teacher and student have the same: use sparse_kd"
            if crosses else
            "data.cross_tokenizer: teacher and student have other tokens, and distillation compares the same ones: use "
            "distillation=cross_tokenizer"
        )  # fmt: skip
    teacher, share = run.cfg.teacher, run.cfg.on_policy.share
    cannot = {
        f"teacher.cache_samples={teacher.cache_samples}": (
            teacher.cache_samples is not None, "sorted probabilities are compared, and drawn tokens are not the "
            "likeliest: set teacher.cache_top_k, or teacher.cache=off, and cache_samples=null",
        ),
        "teacher.calibrate=true": (
            teacher.calibrate is True, "likelihoods of spans are compared as the teacher gives them: set it to auto",
        ),
        f"teacher.url={teacher.url}": (
            teacher.url is not None, "a server gives its likeliest tokens, and spans need each one's probability: use "
            "teacher.checkpoint",
        ),
        f"on_policy.share={share:g}": (
            share, "what the student writes has no tokens of the teacher's: set on_policy.share=0",
        ),
    }  # fmt: skip
    for given, (is_set, why) in cannot.items() if crosses else ():
        if is_set:
            raise ConfigError(f"data.cross_tokenizer=true with {given}: {why}")


def _needs_teacher(run: Run) -> bool:
    """Return whether there is nothing to train without a trained teacher."""
    cfg = run.cfg
    if cfg.assistants or any(map(takes_from_teacher, (cfg.student, *cfg.peers))):
        return True
    taught = "distill" in cfg.stages and cfg.teacher.ema is None
    return taught and any(build(part.cfg.distillation).uses_teacher for part in run.parts.values())


def _step_alone(stage: Stage, data: IndexedData, task: Task, network: nn.Module) -> Trial:
    """Take one training step from labels on the CPU, with a network that is thrown away.

    Raises:
        ConfigError: The network cannot read the data, predicts something else, or cannot be trained.
    """
    batch = task.compared(data.select(tokens=stage.role, pool=False).few())
    objective = Objective(*task.terms())

    def loss(batch: Batch, expected: ModelOutput | None) -> Tensor:
        output = run_network(network, batch)
        value: Tensor = objective(output, output, task.compared(batch))[0]
        return value

    with named(stage.role):
        output = run_network(network.train(), batch)
        task.check_logits(output.logits, batch)
        _step(network, objective(output, output, batch)[0], stage.optimizer)
    return Trial(stage=stage, network=network, module=network, weights=_trained(network), loss=loss)


def _step_taught(
    stage: Stage, objective: Objective, student: nn.Module, teacher: Teacher | None, batch: Batch, task: Task
) -> Trial:
    """Take one training step with a teacher on the CPU; student and objective are discarded.

    Raises:
        ConfigError: As `_step_alone`.
    """
    tap, module = FeatureTap(student, objective.needs_student), nn.ModuleList([student, objective])

    def loss(batch: Batch, expected: ModelOutput | None) -> Tensor:
        output = tap(batch)
        value: Tensor = objective(output, output if expected is None else expected, task.compared(batch))[0]
        return value

    if not objective.uses_teacher:
        teacher = None
    with named("distillation"):
        objective.train()
        student.train()
        output = tap(batch)
        expected = output if teacher is None else teacher(batch)
        _step(module, objective(output, expected, batch)[0], stage.optimizer)
    return Trial(
        stage=stage, network=student, module=module, weights=_trained(module), loss=loss, teacher=teacher
    )  # fmt: skip


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if weight.requires_grad]


def _step(module: nn.Module, loss: Tensor, optimizer: Node) -> None:
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


def _try_out(
    objective: Objective, student: nn.Module, teacher: Teacher | None, batch: Batch, task: Task, examples: int
) -> None:
    """Compare the two on one batch, in eval mode and without a gradient.

    Raises:
        ConfigError: What does not fit.
    """
    tap = FeatureTap(student, objective.needs_student)
    with evaluating(student), torch.no_grad():
        with named("student"):
            output = tap(batch)
            task.check_logits(output.logits, batch)
        with named("teacher"):
            expected = output if teacher is None else teacher(batch)
            if "spans" not in batch:
                sparse = expected.sparse
                whole = sparse and torch.empty(*sparse.rest.shape, sparse.classes, device="meta")
                task.check_logits(expected.logits if whole is None else whole, batch)
        if not all(x.isfinite().all() for x in (expected.logits, *expected.features.values())) and teacher is not None:
            raise ConfigError(
                "teacher: the teacher's outputs are not finite (NaN or infinite): its weights are damaged, or overflow "
                "in its precision; give another teacher.checkpoint, or set teacher.precision=float32"
            )
        with named("distillation"):
            objective.connect(output, expected, examples)
            objective.eval()(output, expected, batch)
