"""Loads a run's teacher: from its stage, a finished run, Hugging Face, or an ensemble of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from kd_lightning.models.onnx import OnnxNetwork
from kd_lightning.models.served import ServedLM, Server
from kd_lightning.pipeline.resolvers import tokenizer_beside
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.fingerprints import digest, file_digest, network_digest, read_json
from kd_lightning.runtime.memoize import shared, stamps
from kd_lightning.runtime.onnx_files import near, onnx_file, weight_files
from kd_lightning.teachers.ensemble import EnsembleNetwork
from kd_lightning.training.run_folder import LOGS, best_training, check_stage, is_finished, load_stage, teacher_stage

if TYPE_CHECKING:
    from kd_lightning.config.schema import TeacherConfig
    from kd_lightning.data import IndexedData


@dataclass
class LoadedTeacher:
    """The teacher after its stage.

    Attributes:
        network: Its network, with its final weights.
        fingerprint: Of those weights.
        title: What it is called where people look.
        folder: Its stage folder; None for one that was loaded from Hugging Face.
        members: The teachers of an ensemble; empty for a single one.
        tokenizer: Where an ensemble's member has its tokenizer; None for a single teacher, who reads the data's.
    """

    network: nn.Module
    fingerprint: str
    title: str
    folder: Path | None
    members: list[LoadedTeacher] = field(default_factory=list)
    tokenizer: str | None = None


def load_teacher(checkpoint: str | list[str], data: IndexedData, console: Console) -> LoadedTeacher:
    """Load a finished teacher: of a run, an ONNX file, of Hugging Face; a list is an ensemble."""
    if isinstance(checkpoint, list):
        return ensemble([_load_member(one, data, console) for one in checkpoint])
    if (file := onnx_file(checkpoint)) is not None:
        return _in_onnx(checkpoint, file, data, console)
    stage = teacher_stage(Path(checkpoint))
    if stage is not None:
        if stage.is_relative_to(Path(checkpoint, "teacher")) and is_finished(Path(checkpoint, "teacher_1")):
            say(
                console,
                f"teacher  {checkpoint} holds several: this is the first, a list takes all of them",
            )
        return read_teacher(stage, data)
    sizes = data.model_arguments("teacher")

    def load() -> LoadedTeacher:
        network = data.task.finished(checkpoint, sizes).eval()
        return LoadedTeacher(network, network_digest(network), checkpoint, None)

    key = (checkpoint, type(data.task), data.task.outputs, data.task.kept, sorted(sizes.items()), stamps(checkpoint))
    teacher = shared("teacher", key, load)
    if data.class_names:
        config: Any = teacher.network.config
        _check_class_order(checkpoint, config.id2label, data, console)
    return teacher


def _in_onnx(checkpoint: str, file: Path, data: IndexedData, console: Console) -> LoadedTeacher:
    """Return a teacher that onnxruntime runs.

    Raises:
        ConfigError: The data are for a language model, or have other classes.
    """
    if data.task.generates:
        raise ConfigError(f"teacher.checkpoint={checkpoint}: an ONNX file teaches classifiers, taggers and regressions")
    weights = weight_files(file)

    def load() -> LoadedTeacher:
        return LoadedTeacher(OnnxNetwork(file).eval(), digest([file_digest(one) for one in weights]), checkpoint, None)

    teacher = shared("teacher", (str(file.resolve()), stamps([str(one) for one in weights])), load)
    if data.class_names and (names := _names_beside(file)):
        _check_class_order(checkpoint, names, data, console)
    return teacher


def _names_beside(file: Path) -> dict[int, str]:
    """Return the classes that `config.json` or `export.json` near an ONNX file names."""
    for place in near(file):
        for name, key in (("config.json", "id2label"), ("export.json", "class_names")):
            content = read_json(place / name) if (place / name).is_file() else None
            classes = content.get(key) if isinstance(content, dict) else None
            numbered = enumerate(classes) if isinstance(classes, list) else (classes or {}).items()
            try:
                found = {int(code): str(one) for code, one in numbered}
            except (TypeError, ValueError) as error:
                raise KDError(f"{place / name}: expected numbered classes in {key}") from error
            if found:
                return found
    return {}


def served_teacher(teacher: TeacherConfig, data: IndexedData) -> LoadedTeacher:
    """Return the teacher that a server runs, under the name of its model.

    Raises:
        ConfigError: The data are not for a language model, or not for the whole of its vocabulary.
    """
    tokenizer, count = data.tokenizer_of("teacher"), teacher.cache_top_k
    assert teacher.url is not None
    assert teacher.model is not None
    assert count is not None
    if not data.task.generates or tokenizer is None:
        raise ConfigError("teacher.url: a server gives the tokens that follow a text; use data=lm_text or data=chat")
    if data.task.kept is not None:
        raise ConfigError(
            "data.tokenizer=trimmed:NAME with teacher.url: a trimmed vocabulary's probabilities follow from all, and a "
            "server gives the likeliest alone; use NAME"
        )
    names = ("url", "model", "dialect", "timeout", "retries", "parallel")
    network = ServedLM(Server(**teacher.chosen(names)), tokenizer, count).eval()
    return LoadedTeacher(network, digest(["served", teacher.model]), f"{teacher.model}, served", None)


def ensemble(members: list[LoadedTeacher]) -> LoadedTeacher:
    """Return several teachers as one."""
    title = " + ".join(member.title for member in members)
    fingerprint = digest([member.fingerprint for member in members])
    return LoadedTeacher(EnsembleNetwork([member.network for member in members]), fingerprint, title, None, members)


def _load_member(checkpoint: str, data: IndexedData, console: Console) -> LoadedTeacher:
    tokenizer = tokenizer_beside(checkpoint)
    return replace(load_teacher(checkpoint, data.reading(tokenizer), console), tokenizer=tokenizer)


def read_teachers(folders: Sequence[Path], data: IndexedData) -> LoadedTeacher:
    """Read back the teacher that a run trained, or its several as an ensemble."""
    members = [read_teacher(folder, data) for folder in folders]
    return members[0] if len(members) == 1 else ensemble(members)


def read_teacher(folder: Path, data: IndexedData) -> LoadedTeacher:
    """Load a teacher that a run trained, after verifying its files and learning curves."""
    folder = best_training(folder)
    check_stage(folder, LOGS)  # `load_stage` checks the others
    fingerprint = file_digest(folder / "model.safetensors")
    model = shared("teacher", (folder.resolve(), fingerprint), lambda: load_stage(folder))
    if model.class_names != data.class_names:
        raise ConfigError(
            f"the teacher in {folder} knows the classes {model.class_names}, the data has {data.class_names}: "
            "teacher.checkpoint must be a teacher of the same classes"
        )
    tokenizer = data.tokenizer_of("teacher")
    if model.tokenizer is not None and (tokenizer is None or model.tokenizer.get_vocab() != tokenizer.get_vocab()):
        raise ConfigError(f"the teacher in {folder} reads another vocabulary than data.teacher_tokenizer gives it")
    if model.images != data.image_format:
        raise ConfigError(f"the teacher in {folder} reads {model.images}, the data give it {data.image_format}")
    return LoadedTeacher(model.network, fingerprint, str(folder), folder)


def _check_class_order(checkpoint: str, classes: dict[int, str], data: IndexedData, console: Console) -> None:
    """Refuse a teacher with the data's classes in another order."""
    names = [str(name) for _, name in sorted(classes.items())]
    theirs, ours = [name.casefold() for name in names], [name.casefold() for name in data.class_names]
    if theirs != ours and sorted(theirs) == sorted(ours):
        raise ConfigError(
            f"the teacher {checkpoint} has the classes in the order {names}, the data {data.class_names}: "
            f"give the data the teacher's order, data.class_names={names}"
        )
    unnamed = theirs == [f"label_{i}" for i in range(len(ours))]
    if theirs != ours and data.task.per_token and not unnamed:
        raise ConfigError(
            f"the teacher {checkpoint} has the tags {names}, the data {data.class_names}: give another teacher, or the "
            f"data the teacher's tags, data.class_names={names}"
        )
    if theirs != ours and not unnamed:
        say(console, f"teacher  calls its classes {names}, the data {data.class_names}: do they match?")
