"""The teacher of a run: read back or loaded, and as its students meet it: running, or answering from its cache."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from kd_lightning.cache.fill import fill
from kd_lightning.cache.manifest import MANIFEST, Manifest
from kd_lightning.cache.outputs import Storage
from kd_lightning.cache.store import TeacherCache
from kd_lightning.checks import CACHE_MODES
from kd_lightning.errors import CacheError, ConfigError, KDError
from kd_lightning.models.rebuild import describe
from kd_lightning.runs import differences, digest, file_digest, load_run, network_digest, read_json
from kd_lightning.shared import shared, stamps
from kd_lightning.teachers import AheadTeacher, CachedTeacher, EnsembleTeacher, FrozenTeacher, Teacher
from kd_lightning.teachers.ensemble import EnsembleNetwork
from kd_lightning.training import say
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from kd_lightning.data import TextData


@dataclass
class TeacherNetwork:
    """The teacher after its stage.

    Attributes:
        network: Its network, with its final weights.
        fingerprint: Of those weights.
        title: What it is called where people look.
        folder: Its stage folder; None for one that was loaded from Hugging Face.
        members: The teachers of an ensemble; empty for a single one.
    """

    network: nn.Module
    fingerprint: str
    title: str
    folder: Path | None
    members: list[TeacherNetwork] = field(default_factory=list)


def load_teacher(checkpoint: str | list[str], data: TextData, console: Console) -> TeacherNetwork:
    """Load a finished teacher: a run or stage folder of ours, else by Hugging Face's rules; of a list, an ensemble."""
    if isinstance(checkpoint, list):
        members = [load_teacher(one, data, console) for one in checkpoint]
        title = " + ".join(member.title for member in members)
        fingerprint = digest([member.fingerprint for member in members])
        return TeacherNetwork(EnsembleNetwork([m.network for m in members]), fingerprint, title, None, members)
    folder = Path(checkpoint)
    if (folder / "teacher" / "stage.json").is_file():
        folder = folder / "teacher"
    if (folder / "stage.json").is_file():
        return read_teacher(folder, data)
    from kd_lightning.models.hf import finished

    def load() -> TeacherNetwork:
        network = finished(checkpoint, data.num_classes).eval()
        return TeacherNetwork(network, network_digest(network), checkpoint, None)

    teacher = shared("teacher", (checkpoint, data.num_classes, stamps(checkpoint)), load)
    _check_class_order(checkpoint, teacher.network, data, console)
    return teacher


def read_teacher(folder: Path, data: TextData) -> TeacherNetwork:
    """Read back a teacher that a run trained."""
    fingerprint = file_digest(folder / "model.safetensors")
    model = shared("teacher", (folder.absolute(), fingerprint), lambda: load_run(folder))
    if model.class_names != data.class_names:
        raise ConfigError(
            f"the teacher in {folder} knows the classes {model.class_names}, the data has {data.class_names}: "
            "teacher.checkpoint must be a teacher of the same classes"
        )
    if model.tokenizer is not None and model.tokenizer.get_vocab() != data.teacher_tokenizer.get_vocab():
        raise KDError(f"the teacher in {folder} reads another vocabulary than data.teacher_tokenizer gives it")
    return TeacherNetwork(model.network, fingerprint, str(folder), folder)


def _check_class_order(checkpoint: str, network: nn.Module, data: TextData, console: Console) -> None:
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
    data: TextData
    device: torch.device
    console: Console
    needs: tuple[str, ...] = ()

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
            top_k, classes = self._storage().top_k, self.data.num_classes
            if top_k is not None and top_k >= classes:
                raise ConfigError(f"teacher.cache_top_k={top_k} must be below the number of classes, {classes}")
            if teacher is not None and self.settings["cache"] == "require":
                for member in teacher.members or [teacher]:
                    self.cache(member)
        precision, features = self.settings["precision"], self.features
        if teacher is not None and teacher.members and features:
            raise ConfigError(
                f"the features {', '.join(features)} of an ensemble's members may differ in shape: use one teacher, or "
                "a distillation that reads logits only"
            )
        if self.settings["compile"]:
            FrozenTeacher(network, precision, features, compile=True)  # refuses what cannot be; compiles when called
        return self._frozen(network, compile=False)

    def teacher(self, teacher: TeacherNetwork) -> Teacher:
        """Return the teacher that a training calls: of an ensemble's members, each has its own cache.

        Raises:
            CacheError: `cache=require` and answers are missing, or what is stored is damaged or of something else.
        """
        if teacher.members:
            return EnsembleTeacher([self.teacher(member) for member in teacher.members])
        if self.settings["cache"] == "off":
            own = self.settings["device"]
            return AheadTeacher(self._running(teacher), torch.device(own) if own else None)
        cache = self.cache(teacher)
        if cache.complete:
            return CachedTeacher(cache, features=self.needs)
        running = self._running(teacher)
        return CachedTeacher(cache, running, self._lengths(), lambda line: say(self.console, line), self.needs)

    def complete(self, teacher: TeacherNetwork) -> None:
        """Have the teacher, or each member, answer whatever its cache has no answer to."""
        for member in teacher.members or [teacher]:
            if self.settings["cache"] != "off" and not (cache := self.cache(member)).complete:
                self._fill(cache, self._running(member))

    def cache(self, teacher: TeacherNetwork) -> TeacherCache:
        """Return the teacher's cache: opened, begun or, with `cache=refresh`, built anew."""
        self._check_repeatable()
        key, mode = self._key(teacher), self.settings["cache"]
        folder = _home() / digest(key)
        if mode not in CACHE_MODES:
            folder = Path(mode).expanduser()
            if isinstance(self.settings["checkpoint"], list):
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
                self._fill(cache, self._running(teacher))
            return cache
        if there:
            return TeacherCache.open(folder, key, examples, repair=True, say=lambda line: say(self.console, line))
        return TeacherCache.create(folder, key, examples, self._storage(), teacher=title, data=data)

    def _fill(self, cache: TeacherCache, teacher: FrozenTeacher) -> None:
        started, hidden = time.monotonic(), not self.console.is_terminal
        data = self.data.with_batches(eval_batch_size=self.settings["answer_batch_size"])
        batches: Iterable[Batch] = track(data.all_dataloader(), "teacher", console=self.console, disable=hidden)
        on_device = ({name: value.to(self.device) for name, value in batch.items()} for batch in batches)
        asked = fill(
            cache, teacher.to(self.device), on_device, lengths=self._lengths(), say=lambda line: say(self.console, line)
        )
        say(self.console, f"teacher  answered {asked} examples in {time.monotonic() - started:.0f} s, for all runs")

    def _lengths(self) -> Tensor:
        return torch.from_numpy(self.data.lengths)

    def _storage(self) -> Storage:
        return Storage(self.settings["cache_dtype"], self.settings["cache_top_k"])

    def _check_repeatable(self) -> None:
        if not self.data.repeatable:
            raise ConfigError(
                "data.view_sets=null makes new views in every epoch, and answers to these cannot be kept: set "
                "teacher.cache_views=K, to go through K sets of views, or teacher.cache=off"
            )

    def _running(self, teacher: TeacherNetwork) -> FrozenTeacher:
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
        network, source = describe(teacher.network), None
        if network is None:  # a user's own: what it computes is what its file says
            network = read_json(teacher.folder / "model.json") if teacher.folder is not None else None
            source = digest(inspect.getsource(sys.modules[type(teacher.network).__module__]))
        settings = {**{name: self.settings[name] for name in DECIDING}, "features": list(self.features)}
        return {
            "teacher": {"weights": teacher.fingerprint, "network": network, "source": source, **settings},
            "data": self.data.teacher_key,
        }


def _home() -> Path:
    from kd_lightning.assets import home

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
