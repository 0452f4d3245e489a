"""A student's provenance from its run's files, for the model card: teachers, weights, data, licences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.evaluation.report import load_report
from kd_lightning.runtime.borders import code, markdown
from kd_lightning.training.run_folder import (
    FURTHER,
    find_stage,
    is_finished,
    read_config,
    read_stage,
    run_root,
    teacher_stage,
)

if TYPE_CHECKING:
    from kd_lightning.export.source import Source


@dataclass(frozen=True)
class Known:
    """Title and licence of an asset that this package downloads.

    Attributes:
        title: Its full name.
        licence: Its SPDX name.
        hub: Its name on the Hugging Face hub; None if it is not there.
        language: Of its texts.
    """

    title: str
    licence: str
    hub: str | None = None
    language: str | None = None


KNOWN = {
    "minilm": Known("all-MiniLM-L6-v2", "Apache-2.0", "sentence-transformers/all-MiniLM-L6-v2", "en"),
    "smollm2": Known(
        "SmolLM2-135M-Instruct, dequantised from 4 bits", "Apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct", "en"
    ),
    "gemma3_270m": Known("Gemma 3 270M, dequantised from 4 bits", "gemma", "google/gemma-3-270m"),
    "Sotu": Known("State of the Union addresses, 1790 to 2021", "public domain", None, "en"),
    "Chatterbot": Known("conversations of chatterbot-corpus 1.3.3", "BSD-3-Clause", None, "en"),
    "Reviews": Known(
        "Hutto & Gilbert 2014 and Pang & Lee 2005, as distributed with vaderSentiment 3.3.2", "MIT", None, "en"
    ),
    "FashionMNIST": Known("Fashion-MNIST (Xiao, Rasul & Vollgraf 2017)", "MIT", "zalando-datasets/fashion_mnist"),
}

UNKNOWN = "licence not recorded: look it up at its source before you distribute this model"


@dataclass(frozen=True)
class Origin:
    """The origin of weights or data.

    Attributes:
        text: For people, with the licence.
        names: The pretrained assets or hub models it derives from; empty for random weights.
        first: The first of several teachers, from which students are built.
    """

    text: str
    names: tuple[str, ...] = ()
    first: Origin | None = None


class History:
    """The provenance of a run's student.

    Args:
        source: The student.

    Attributes:
        distilled: Whether it was trained with a teacher.
        teacher: The run's teacher, also for a student trained from labels; None without one.
        start: The origin of its initial weights; None if they were random.
    """

    def __init__(self, source: Source) -> None:
        self.stage, self.data = source.stage, source.data
        root = run_root(self.stage)
        assert root is not None
        self.root, self.config = root, read_config(root)
        self.record: dict[str, Any] = read_stage(self.stage)
        report = self.root / "report.json"
        self.report: dict[str, Any] = load_report(report) if report.is_file() else {}
        self.teacher = teacher_of(self.config, self.root)
        self.distilled = not self.from_labels and self.teacher is not None
        self.start = start_of(first_stage(self.stage), self.teacher)

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name", self.root.name))

    @property
    def from_labels(self) -> bool:
        """Whether it is a baseline of its run."""
        return self.stage.name.startswith("baseline")

    @property
    def summary(self) -> str:
        """Its training, in a few words."""
        if self.from_labels:
            return f"trained from labels alone, {'from weights of a teacher' if self.start else 'without a teacher'},"
        how = "distilled" if self.distilled else "trained without a teacher"
        return f"{how}, then fine-tuned from labels," if self.stage.name == "finetune" else how

    @property
    def sources(self) -> list[Origin]:
        """The data sets: one, or one for each task."""
        given = self.config["data"]
        nodes = given["tasks"].values() if "tasks" in given else [given]
        return list(dict.fromkeys(_data_of(node) for node in nodes))

    def test_scores(self, name: str) -> dict[str, float]:
        """Return a model's test scores for this student's seed; empty without a report."""
        entry = self.report.get("models", {}).get(name)
        number = self.stage.parent.name.removeprefix("seed_")
        if entry is None or not number.isdecimal() or int(number) not in self.report["seeds"]:
            return {}
        which = self.report["seeds"].index(int(number))
        found = {}
        for score, described in entry["test"].items():
            values = described["values"]
            found[score] = values[0] if len(values) == 1 else values[which]
        return {score: value for score, value in found.items() if value is not None}

    @property
    def own_name(self) -> str:
        """The report's name for this student."""
        return {"distill": "distilled", "finetune": "finetuned"}.get(self.stage.name, self.stage.name)

    @property
    def recipe(self) -> list[str]:
        """How the student was trained, a line of Markdown each."""
        first = first_stage(self.stage)
        lines = [_training(stage) for stage in dict.fromkeys((first, self.stage)) if is_finished(stage)]
        objective = self.config.get("distillation") or {}
        terms = markdown(", ".join(objective.get("terms", {}))) if isinstance(objective, dict) else ""
        if terms and not self.from_labels:
            lines.append(
                f"loss terms: {terms}; temperature "
                f"{markdown(self.config.get('temperature'))}, alpha {markdown(self.config.get('alpha'))}"
            )
        return [*lines, f"made by {code(self.report['command'])}"] if self.report else lines


def first_stage(stage: Path) -> Path:
    """Return the stage that a stage's weights started in: `distill` for a fine-tuning."""
    return stage.parent / "distill" if stage.name == "finetune" else stage


def _training(stage: Path) -> str:
    record = read_stage(stage)
    settings = record["settings"]
    return (
        f"stage `{stage.name}`: {record['steps']} optimizer steps, weights of step {record['best_step']}, selected by "
        f"{markdown(record['monitor'])} on validation; batches of "
        f"{settings.get('batch_size')}, learning rate {settings.get('optimizer', {}).get('lr')}"
    )


def _network(stage: Path) -> dict[str, Any]:
    settings: dict[str, Any] = read_stage(first_stage(stage))["settings"].get("network", {})
    return settings


def teacher_of(config: Mapping[str, Any], root: Path) -> Origin | None:
    """Return the teacher of a run's students; None without one."""
    given = config.get("teacher") or {}
    if given.get("ema") is not None:
        return Origin("the average of the student's own weights")
    if "tasks" in config.get("data", {}):
        parts = {name: _with_own(given, config.get("tasks", {}).get(name)) for name in config["data"]["tasks"]}
        found = {name: _one_teacher(own, root) for name, own in parts.items()}
        names = tuple(dict.fromkeys(name for origin in found.values() for name in origin.names))
        text = "one for each task. " + "; ".join(f"{name}: {one.text}" for name, one in found.items())
        first = next(iter(found.values()))
        return Origin(text, names, first.first or first)
    has_one = given.get("checkpoint") or "teacher" in config.get("stages", ()) or (root / "teacher").is_dir()
    if not has_one:
        peers = len(config.get("peers") or ())
        return Origin(f"{peers} other student(s), trained together with it") if peers else None
    teacher, between = _one_teacher(given, root), len(config.get("assistants") or ())
    return replace(teacher, text=f"{teacher.text}; through {between} assistant(s)") if between else teacher


def _with_own(given: Mapping[str, Any], task: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the teacher's settings, overridden by a task's own."""
    own = (task or {}).get("teacher", {})
    network = own.get("network", {})
    merged = network if "_target_" in network else {**(given.get("network") or {}), **network}
    return {**given, **own, "network": merged}


def _one_teacher(given: Mapping[str, Any], root: Path) -> Origin:
    """Return the origin of one task's teacher: checkpoints, or what the run fine-tuned."""
    checkpoint = given.get("model") or given.get("checkpoint")  # a served one by its name
    if checkpoint:
        listed = checkpoint if isinstance(checkpoint, list) else [checkpoint]
        members = [followed(str(one), root) for one in listed]
        if len(members) == 1:
            return members[0]
        names = tuple(dict.fromkeys(name for member in members for name in member.names))
        text = f"an ensemble of {len(members)}: " + "; ".join(member.text for member in members)
        return Origin(text, names, members[0].first or members[0])
    network, seeds, folds = _built(given.get("network") or {}), given.get("seeds") or 1, given.get("folds") or 1
    if folds > 1:
        text = f"an ensemble of {folds}, each without one of {folds} folds of the training examples: {network.text}"
    elif seeds > 1:
        text = f"an ensemble of {seeds}, trained with {seeds} seeds: {network.text}"
    else:
        return network
    return Origin(text, network.names, network)


def located(checkpoint: str, root: Path) -> Path:
    """Return a folder named relative to a run's working directory: here, or above the run."""
    places = (Path(checkpoint), *(above / checkpoint for above in root.absolute().parents))
    return next((place for place in places if place.is_dir()), places[0])


def followed(checkpoint: str, root: Path) -> Origin:
    """Return the origin of a run, one of its stages, or a hub model, back to its pretraining."""
    folder = located(checkpoint, root)
    stage = teacher_stage(folder)
    if stage is None:
        return Origin(*_named(checkpoint))
    network = _built(_network(stage))
    if stage.name.startswith(("teacher", FURTHER)):
        return Origin(f"{checkpoint}, which is {network.text}", network.names)
    own = run_root(stage.parent)
    above = None if own is None or stage.name.startswith("baseline") else teacher_of(read_config(own), own)
    text = f"{checkpoint}, which is {network.text}" + (f", itself distilled from {above.text}" if above else "")
    start = start_of(stage, above)
    return Origin(text, network.names if start is None else start.names)


def _built(settings: Mapping[str, Any]) -> Origin:
    """Return the origin of a network by its settings."""
    if settings.get("name") and settings.get("pretrained", True):
        text, names = _named(str(settings["name"]))
        return Origin(f"{text}, fine-tuned", names)
    return Origin(f"{str(settings.get('_target_')).rpartition('.')[2]}, trained from random weights")


def start_of(stage: Path, teacher: Origin | None) -> Origin | None:
    """Return the origin of a student's initial weights: pretrained, another student, or its teacher."""
    network = _network(stage)
    if network.get("initialise") == "teacher":
        if "checkpoint" not in network:
            if teacher is None:
                return None
            source, which = (teacher.first, "the first of its teachers") if teacher.first else (teacher, "its teacher")
            return Origin(f"weights of {which} ({source.text})", source.names)
        run = located(network["checkpoint"], stage)
        before = followed(str(find_stage(run) if run.is_dir() else run), stage)
        return Origin(f"the student of {before.text}", before.names)
    pretrained = _built(network)
    return pretrained if pretrained.names else None


def _named(name: str) -> tuple[str, tuple[str, ...]]:
    known = KNOWN.get(name)
    return (f"{known.title}, {known.licence}" if known else f"{name} ({UNKNOWN})"), (name,)


def _data_of(node: Mapping[str, Any]) -> Origin:
    kind = str(node.get("_target_")).rpartition(".")[2]
    known = KNOWN.get(kind)
    name = str(node.get("name", kind)) if kind == "HFDataset" else kind
    return Origin(f"{name} ({f'{known.title}, {known.licence}' if known else UNKNOWN})", (name,))


def hub_names(names: tuple[str, ...]) -> list[str]:
    """Return the names that exist on the hub, without local folders."""
    found = []
    for name in names:
        if name in KNOWN:
            found += [hub] if (hub := KNOWN[name].hub) else []
        elif name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists():
            found.append(name)
    return found
