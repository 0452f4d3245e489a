"""The teacher of a run: read back or loaded, and as its students meet it: running, or answering from its cache."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from kd_lightning.models.rebuild import describe
from kd_lightning.pipeline.resolvers import tokenizer_beside
from kd_lightning.pipeline.validation import CACHE_MODES, number_of_teachers
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import CacheError, ConfigError
from kd_lightning.runtime.fingerprints import differences, digest, file_digest, network_digest, read_json
from kd_lightning.runtime.memoize import shared, stamps
from kd_lightning.tasks.predictions import answers
from kd_lightning.teachers import (
    AheadTeacher,
    CachedTeacher,
    CalibratedTeacher,
    CrossFittedTeacher,
    EnsembleTeacher,
    FrozenTeacher,
    Teacher,
    fit_temperature,
    fit_weights,
)
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.manifest import MANIFEST, Manifest
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.ensemble import EnsembleNetwork, check_scores
from kd_lightning.training.run_folder import LOGS, check_stage, is_finished, load_run, teacher_stage
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from kd_lightning.data import ClassificationData


@dataclass
class TeacherNetwork:
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
    members: list[TeacherNetwork] = field(default_factory=list)
    tokenizer: str | None = None


def load_teacher(checkpoint: str | list[str], data: ClassificationData, console: Console) -> TeacherNetwork:
    """Load a finished teacher: a run or stage folder of ours, else by Hugging Face's rules; of a list, an ensemble."""
    if isinstance(checkpoint, list):
        return ensemble([_load_member(one, data, console) for one in checkpoint])
    stage = teacher_stage(Path(checkpoint))
    if stage is not None:
        if stage == Path(checkpoint, "teacher") and is_finished(Path(checkpoint, "teacher_1")):
            say(
                console,
                f"teacher  {checkpoint} holds several: this is the first, a list takes all of them",
            )
        return read_teacher(stage, data)
    from kd_lightning.models.hf import finished

    padding = data.model_arguments("teacher").get("pad_token_id")

    def load() -> TeacherNetwork:
        network = finished(checkpoint, data.num_classes, padding).eval()
        return TeacherNetwork(network, network_digest(network), checkpoint, None)

    teacher = shared("teacher", (checkpoint, data.num_classes, padding, stamps(checkpoint)), load)
    _check_class_order(checkpoint, teacher.network, data, console)
    return teacher


def ensemble(members: list[TeacherNetwork]) -> TeacherNetwork:
    """Return several teachers as one."""
    title = " + ".join(member.title for member in members)
    fingerprint = digest([member.fingerprint for member in members])
    return TeacherNetwork(EnsembleNetwork([member.network for member in members]), fingerprint, title, None, members)


def _load_member(checkpoint: str, data: ClassificationData, console: Console) -> TeacherNetwork:
    tokenizer = tokenizer_beside(checkpoint)
    return replace(load_teacher(checkpoint, data.reading(tokenizer), console), tokenizer=tokenizer)


def read_teacher(folder: Path, data: ClassificationData) -> TeacherNetwork:
    """Read back a teacher that a run trained; its files must be whole, also the curves that a report draws."""
    check_stage(folder, LOGS)  # `load_run` checks the others
    fingerprint = file_digest(folder / "model.safetensors")
    model = shared("teacher", (folder.resolve(), fingerprint), lambda: load_run(folder))
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
    return TeacherNetwork(model.network, fingerprint, str(folder), folder)


def _check_class_order(checkpoint: str, network: nn.Module, data: ClassificationData, console: Console) -> None:
    """Refuse a Hugging Face teacher that has the data's classes in another order: class would not meet class."""
    config: Any = network.config
    names = [str(name) for _, name in sorted(config.id2label.items())]
    theirs, ours = [name.casefold() for name in names], [name.casefold() for name in data.class_names]
    if theirs != ours and sorted(theirs) == sorted(ours):
        raise ConfigError(
            f"the teacher {checkpoint} has the classes in the order {names}, the data {data.class_names}: "
            f"give the data the teacher's order, data.class_names={names}"
        )
    if theirs != ours and theirs != [f"label_{i}" for i in range(len(ours))]:
        say(console, f"teacher  calls its classes {names}, the data {data.class_names}: do they match?")


DECIDING = ("precision", "cache_dtype", "cache_top_k")
"""The keys below `teacher` that decide what the students read of its answers."""


@dataclass
class Answering:
    """How a run's students meet its teacher, as the keys below `teacher` in the configuration say.

    Attributes:
        settings: Those keys.
        data: The data, with the teacher's tokens under the plain names and the transfer sentences.
        device: Where the teacher answers before a training.
        console: Where it is said what is built, and how large it becomes.
        needs: The features that the students' losses read. What the teacher answers are these and `teacher.features`,
            so that strategies that read different ones can share one cache.
    """

    settings: dict[str, Any]
    data: ClassificationData
    device: torch.device
    console: Console
    needs: tuple[str, ...] = ()

    @property
    def members(self) -> int:
        """How many teachers answer together."""
        return number_of_teachers(self.settings)

    @property
    def folds(self) -> int:
        """How many of them were each trained without a fold; 1: none."""
        return int(self.settings["folds"])

    def asked_apart(self, teacher: TeacherNetwork) -> list[TeacherNetwork]:
        """Return those that have a cache each: cross-fitted teachers answer as one."""
        return teacher.members if teacher.members and self.folds == 1 else [teacher]

    def data_of(self, teacher: TeacherNetwork) -> ClassificationData:
        """Return the data as a teacher reads it: an ensemble's members may have tokenizers of their own."""
        return self.data if teacher.tokenizer is None else self.data.reading(teacher.tokenizer)

    def reads_other_tokens(self, teacher: TeacherNetwork) -> bool:
        """True for an ensemble whose members do not all read what the batches hold."""
        return any(self.data_of(member) is not self.data for member in teacher.members)

    @property
    def features(self) -> tuple[str, ...]:
        """What the teacher answers besides logits, sorted."""
        return tuple(sorted({*self.needs, *self.settings["features"]}))

    def check(self, network: nn.Module, teacher: TeacherNetwork | None) -> FrozenTeacher:
        """Refuse before any training what cannot be kept or answered; return a teacher to rehearse with.

        Args:
            network: The teacher's, fine-tuned or not yet.
            teacher: The finished teacher, if it is there already.
        """
        if self.settings["cache"] != "off":
            self._check_repeatable()
            top_k, classes = self._storage().top_k, self.data.task.outputs
            if top_k is not None and top_k >= classes:
                raise ConfigError(f"teacher.cache_top_k={top_k} must be below the number of classes, {classes}")
            if teacher is not None and self.settings["cache"] == "require":
                for member in self.asked_apart(teacher):
                    self.cache(member)
        if self.members > 1 and self.data.task.classes is None:
            check_scores(self.settings["weights"], self.settings["combine"])
        if self.settings["calibrate"] and self.data.task.classes is None:
            raise ConfigError("teacher.calibrate: a teacher that gives scores has no probabilities to calibrate")
        precision, features = self.settings["precision"], self.features
        if self.members > 1 and features:
            raise ConfigError(
                f"teacher.features, distillation: {', '.join(features)} of an ensemble's members may differ in shape: "
                "use one teacher, or a distillation that reads logits only"
            )
        if teacher is not None and self.reads_other_tokens(teacher):
            if self.settings["cache"] == "off":
                raise ConfigError(
                    "teacher.cache=off: the members of teacher.checkpoint have different tokenizers, and a batch holds "
                    "the tokens of one; their answers must be kept (teacher.cache=auto)"
                )
            network = teacher.members[0].network  # rehearses for all: it reads the batch's tokens
        compile, sharded = self.settings["compile"], self.settings["sharded"]
        if compile or sharded:  # refuses what cannot be; compiles when called
            FrozenTeacher(network, precision, features, compile, sharded)
        teacher_on_device = self._frozen(network, compile=False)
        device = torch.device(self.settings["device"] or self.device)
        teacher_on_device.check(device)
        if precision == "float16":  # the rehearsal is on a CPU, which does not compute in it
            return FrozenTeacher(network, "bf16", features)
        return teacher_on_device

    def calibrated(self, asked: Teacher) -> Teacher:
        """Return a teacher with the temperature that fits its answers, if that is asked for.

        It is fitted to the validation split; of cross-fitted teachers, whose students read what one of them says, and
        not what all say of the validation split, to the training examples.
        """
        if not self.settings["calibrate"]:
            return asked
        unseen = self.data.val_dataloader() if self.folds == 1 else self.data.labelled_dataloader()
        found = answers(asked.to(self.device), unseen, self.device)
        temperature = fit_temperature(found.logits, found.labels)
        before, after = (float(F.cross_entropy(found.logits / t, found.labels)) for t in (1.0, temperature))
        effect = f"its cross-entropy goes from {before:.3f} to {after:.3f}"
        say(self.console, f"teacher  calibrated: logits divided by {temperature:.3f}; {effect}")
        return CalibratedTeacher(asked, temperature)

    def teacher(self, teacher: TeacherNetwork) -> Teacher:
        """Return the teacher that a training calls: of an ensemble's members, each has its own cache.

        Raises:
            CacheError: `cache=require` and answers are missing, or what is stored is damaged or of something else.
        """
        return self.calibrated(self._asked(teacher))

    def _asked(self, teacher: TeacherNetwork) -> Teacher:
        if teacher.members and self.folds == 1:
            return self._ensemble(teacher.members)
        if self.settings["sharded"]:  # each training shares a copy of its own: it cannot be made whole again
            return FrozenTeacher(teacher.network, self.settings["precision"], self.features, sharded=True)
        if self.settings["cache"] == "off":
            own = self.settings["device"]
            return AheadTeacher(self._running(teacher), torch.device(own) if own else None)
        cache = self.cache(teacher)
        if cache.complete:
            return CachedTeacher(cache, features=self.needs)
        running = self._running(teacher)
        lengths = self._lengths(teacher)
        return CachedTeacher(cache, running, lengths, lambda line: say(self.console, line), self.needs)

    def _ensemble(self, members: list[TeacherNetwork]) -> EnsembleTeacher:
        asked: list[Teacher] = []
        for member in members:
            if self.data_of(member) is not self.data:
                self._complete(member)  # a batch does not hold its tokens
            asked.append(self._asked(member))
        weights = self.settings["weights"]
        if weights == "learned":
            found = [answers(one.to(self.device), self.data.val_dataloader(), self.device) for one in asked]
            weights = fit_weights(torch.stack([one.logits for one in found]), found[0].labels, self.settings["combine"])
            shares = ", ".join(f"{m.title} {weight:.2f}" for m, weight in zip(members, weights, strict=True))
            say(self.console, f"teacher  weights of its members, learned on the validation split: {shares}")
        return EnsembleTeacher(asked, weights, self.settings["combine"])

    def complete(self, teacher: TeacherNetwork) -> None:
        """Have the teacher, or each member, answer whatever its cache has no answer to."""
        for member in self.asked_apart(teacher):
            if self.settings["cache"] != "off":
                self._complete(member)

    def _complete(self, teacher: TeacherNetwork) -> None:
        if not (cache := self.cache(teacher)).complete:
            self._fill(cache, teacher)

    def cache(self, teacher: TeacherNetwork) -> TeacherCache:
        """Return the teacher's cache: opened, begun or, with `cache=refresh`, built anew."""
        self._check_repeatable()
        key, mode = self._key(teacher), self.settings["cache"]
        folder = _home() / digest(key)
        if mode not in CACHE_MODES:
            folder = Path(mode).expanduser()
            if self.members > 1 and self.folds == 1:
                folder /= digest(key)  # each member's own
        return shared("cache", (folder.absolute(), digest(key), mode), lambda: self._open(folder, key, teacher))

    def _open(self, folder: Path, key: dict[str, Any], teacher: TeacherNetwork) -> TeacherCache:
        examples, mode, there = self.data.num_examples, self.settings["cache"], (folder / MANIFEST).exists()
        title, data = teacher.title, type(self.data).__name__
        if mode == "require":
            if not there:
                raise CacheError(f"teacher.cache=require, but this teacher's answers are not stored{_nearest(key)}")
            cache = TeacherCache.open(folder, key, examples)
            if not cache.complete:
                missing = len(cache.missing())
                raise CacheError(f"teacher.cache=require, but {folder} lacks {missing} of {examples} answers")
            return cache
        if mode == "refresh":
            with TeacherCache.refreshing(folder, key, examples, self._storage(), teacher=title, data=data) as cache:
                self._fill(cache, teacher)
            return cache
        if there:
            return TeacherCache.open(folder, key, examples, repair=True, say=lambda line: say(self.console, line))
        return TeacherCache.create(folder, key, examples, self._storage(), teacher=title, data=data)

    def _fill(self, cache: TeacherCache, teacher: TeacherNetwork) -> None:
        started, hidden = time.monotonic(), not self.console.is_terminal
        data = self.data_of(teacher).with_batches(eval_batch_size=self.settings["answer_batch_size"])
        batches: Iterable[Batch] = track(data.all_dataloader(), "teacher", console=self.console, disable=hidden)
        on_device = ({name: value.to(self.device) for name, value in batch.items()} for batch in batches)
        asked = fill(
            cache, self._running(teacher).to(self.device), on_device, lengths=self._lengths(teacher),
            say=lambda line: say(self.console, line),
        )  # fmt: skip
        say(self.console, f"teacher  answered {asked} examples in {time.monotonic() - started:.0f} s, for all runs")

    def _lengths(self, teacher: TeacherNetwork) -> Tensor:
        return torch.from_numpy(self.data_of(teacher).lengths)

    def _storage(self) -> Storage:
        return Storage(self.settings["cache_dtype"], self.settings["cache_top_k"])

    def _check_repeatable(self) -> None:
        if not self.data.repeatable:
            raise ConfigError(
                "data.view_sets=null makes new views in every epoch, and answers to these cannot be kept: set "
                "teacher.cache_views=K, to go through K sets of views, or teacher.cache=off"
            )

    def _running(self, teacher: TeacherNetwork) -> FrozenTeacher | CrossFittedTeacher:
        if teacher.members:
            members = [self._frozen(member.network, self.settings["compile"]) for member in teacher.members]
            return CrossFittedTeacher(members, torch.from_numpy(self.data.folds(self.folds)), self.settings["combine"])
        return self._frozen(teacher.network, self.settings["compile"])

    def _frozen(self, network: nn.Module, compile: bool) -> FrozenTeacher:
        """Return the network as a teacher; one copy in another precision serves a whole sweep."""
        precision, features = self.settings["precision"], self.features
        kept, teacher = shared(
            "running", (id(network), precision, features, compile),
            lambda: (network, FrozenTeacher(network, precision, features, compile)),
        )  # fmt: skip
        assert kept is network  # it is kept too, so that no other can get its id
        return teacher

    def _key(self, teacher: TeacherNetwork) -> dict[str, Any]:
        """Return everything that decides the teacher's answers."""
        if teacher.members:
            members = [self._key(member)["teacher"] for member in teacher.members]
            folds = digest(self.data.folds(self.folds).tolist())
            together = {"members": members, "folds": folds, "combine": self.settings["combine"]}
            return {"teacher": together, "data": self.data.teacher_key}
        network, source = describe(teacher.network), None
        if network is None:  # a user's own: what it computes is what its file says
            network = read_json(teacher.folder / "model.json") if teacher.folder is not None else None
            source = digest(inspect.getsource(sys.modules[type(teacher.network).__module__]))
        settings = {**{name: self.settings[name] for name in DECIDING}, "features": list(self.features)}
        return {
            "teacher": {"weights": teacher.fingerprint, "network": network, "source": source, **settings},
            "data": self.data_of(teacher).teacher_key,
        }


def _home() -> Path:
    from kd_lightning.runtime.assets import home

    return home() / "teacher_outputs"


def _nearest(key: dict[str, Any]) -> str:
    """Say in what the stored answers that come nearest differ from those that are needed."""
    found = []
    for path in sorted(_home().glob(f"*/{MANIFEST}")):
        with contextlib.suppress(CacheError):  # a damaged one is none that could be used
            found.append((differences(Manifest.read(path).key, key), path.parent))
    if not found:
        return f": nothing is in {_home()}; kd-cache build makes it"
    changed, folder = min(found, key=lambda pair: len(pair[0]))
    return f": nearest is {folder}, where {'; '.join(sorted(changed)[:3])}"
