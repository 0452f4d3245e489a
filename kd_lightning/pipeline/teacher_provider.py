"""What gives a run's teacher outputs: the teacher itself, step by step, or its cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from kd_lightning.config.schema import CACHE_MODES
from kd_lightning.models.served import ServedLM
from kd_lightning.pipeline.calibration import temperature_of
from kd_lightning.pipeline.served_check import check_served
from kd_lightning.pipeline.serving import Serving
from kd_lightning.pipeline.teacher_key import nearest, outputs_key
from kd_lightning.pipeline.teacher_precision import check_precision
from kd_lightning.runtime.assets import outputs_home
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import CacheError, ConfigError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.runtime.memoize import shared
from kd_lightning.runtime.processes import first, rank
from kd_lightning.tasks.evaluation import labelled_rows
from kd_lightning.teachers import (
    AheadTeacher,
    CachedTeacher,
    CalibratedTeacher,
    CrossFittedTeacher,
    EnsembleTeacher,
    FrozenTeacher,
    SampledTeacher,
    Teacher,
    fit_weights,
)
from kd_lightning.teachers.cache.fill import fill, reported
from kd_lightning.teachers.cache.manifest import MANIFEST, Manifest
from kd_lightning.teachers.cache.reuse import Copying, contents_of, write_contents
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.cached import StoredForm
from kd_lightning.teachers.ensemble import check_scores

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData
    from kd_lightning.pipeline.teacher_loading import LoadedTeacher


class TeacherProvider:
    """Gives one teacher's outputs, or an ensemble's, to those that learn from it.

    Args:
        serving: How they are computed and kept.
        data: The data, with the teacher's tokens under the plain names and the transfer set.
        load: Returns the finished teacher.
        device: Where the teacher predicts before a training.
        console: The output for progress and sizes.
        needs: The features that the students' losses read. What the teacher outputs are these and `serving.features`,
            so that strategies that read different ones can share one cache.
        run: For which run, as noted with what is stored.
    """

    def __init__(
        self,
        serving: Serving,
        data: IndexedData,
        load: Callable[[], LoadedTeacher],
        device: torch.device,
        console: Console,
        needs: tuple[str, ...] = (),
        run: str = "",
    ) -> None:
        self.serving, self.data, self._load = serving, data, load
        self.device, self.console, self.needs, self.run = device, console, needs, run
        self._temperature: float | None = None
        self._measured: set[int] = set()

    @cached_property
    def loaded(self) -> LoadedTeacher:
        """The finished teacher."""
        return self._load()

    def forget(self) -> None:
        """Read the teacher again when it is needed next."""
        vars(self).pop("loaded", None)
        self._temperature = None
        self._measured.clear()  # another network may have the identity of one that is gone

    @property
    def members(self) -> list[LoadedTeacher]:
        """Those that have a cache each: an ensemble's; cross-fitted teachers predict as one."""
        return self.loaded.members if self.loaded.members and self.serving.folds == 1 else [self.loaded]

    def data_of(self, member: LoadedTeacher) -> IndexedData:
        """Return the data as a teacher reads it: an ensemble's members may have tokenizers of their own."""
        return self.data if member.tokenizer is None else self.data.reading(member.tokenizer)

    @property
    def reads_other_tokens(self) -> bool:
        """True for an ensemble whose members do not all read what the batches hold."""
        return any(self.data_of(member) is not self.data for member in self.loaded.members)

    @property
    def features(self) -> tuple[str, ...]:
        """What the teacher outputs besides logits, sorted."""
        return tuple(sorted({*self.needs, *self.serving.features}))

    # -- before any training ------------------------------------------------------------------------------------------

    def check(self, network: nn.Module, loaded: LoadedTeacher | None) -> Teacher:
        """Refuse what cannot be kept or predicted; return a teacher for the preflight.

        Args:
            network: The teacher's, fine-tuned or not yet.
            loaded: The finished teacher, if it is there already.
        """
        serving, task = self.serving, self.data.task
        if serving.cache != "off":
            self._check_cache(loaded)
        if serving.members > 1 and task.classes is None:
            check_scores(serving.weights, serving.combine)
        if serving.calibrate is True and task.classes is None:
            raise ConfigError("teacher.calibrate: a teacher that gives scores has no probabilities to calibrate")
        if serving.members > 1 and self.features:
            raise ConfigError(
                f"teacher.features, distillation: {', '.join(self.features)} of an ensemble's members may differ in "
                "shape: use one teacher, or a distillation that reads logits only"
            )
        if loaded is not None and self.reads_other_tokens:
            if serving.cache == "off":
                raise ConfigError(
                    "teacher.cache=off: the members of teacher.checkpoint have different tokenizers, and a batch holds "
                    "the tokens of one; their outputs must be kept (teacher.cache=auto)"
                )
            network = loaded.members[0].network  # for all: it reads the batch's tokens
        if serving.compile or serving.sharded:  # refuses what cannot be; compiles when called
            FrozenTeacher(network, serving.precision, self.features, serving.compile, serving.sharded)
        frozen = self._frozen(network, compile=False)
        if isinstance(network, ServedLM) and loaded is not None and self._is_stored(loaded):
            return CachedTeacher(self.cache(loaded), features=self.needs)  # the server need not run any more
        frozen.check(torch.device(serving.device or self.device))
        for member in self.members if loaded is not None else []:
            self._measure(member)
        if serving.precision in ("float16", "8bit"):  # the preflight is on a CPU, which does not compute in it
            frozen = FrozenTeacher(network, "bf16", self.features)
        teacher = self._drawing(frozen)
        return teacher if serving.cache == "off" else StoredForm(teacher, serving.storage)

    def _is_stored(self, member: LoadedTeacher) -> bool:
        """Return whether all outputs are stored and are to be used; nothing is written."""
        there = self.serving.cache not in ("off", "refresh") and (self._folder(self._key(member)) / MANIFEST).exists()
        return there and self.cache(member).complete

    def _check_cache(self, loaded: LoadedTeacher | None) -> None:
        self._check_repeatable()
        top_k, outputs = self.serving.storage.top_k, self.data.task.outputs
        key = "cache_top_k" if self.serving.cache_samples is None else "cache_samples"
        if top_k is not None and self.data.task.classes is None:
            raise ConfigError(
                f"teacher.{key}={top_k} stores the likeliest classes, and these data have none: leave it out"
            )
        if top_k is not None and top_k >= outputs:
            raise ConfigError(f"teacher.{key}={top_k} must be below the number of classes, {outputs}")
        if loaded is not None and self.serving.cache == "require":
            for member in self.members:
                self.cache(member)

    def _check_repeatable(self) -> None:
        if not self.data.repeatable:
            renewed, key = self.data.sets_by
            raise ConfigError(
                f"{renewed}=null makes new inputs in every epoch, and outputs for these cannot be kept: set {key}=K, "
                "to go through K sets of them, or teacher.cache=off"
            )

    # -- the teacher that a training calls ----------------------------------------------------------------------------

    def teacher(self) -> Teacher:
        """Return the teacher that a training calls: of an ensemble's members, each has its own cache.

        Raises:
            CacheError: `cache=require` and outputs are missing, or what is stored is damaged or of something else.
        """
        several = self.loaded.members and self.serving.folds == 1
        return self.calibrated(self._ensemble() if several else self._single(self.loaded))

    def calibrated(self, teacher: Teacher) -> Teacher:
        """Return a teacher with the temperature that fits its outputs, if it needs one.

        It is fitted once, to the validation split; of cross-fitted teachers, whose students read what one of them
        predicts, and not what all predict for the validation split, to the training examples. Of many a part counts
        (`labelled_rows`).
        """
        wanted, whole = self.serving.calibrate, not self.serving.sharded and self.serving.storage.top_k is None
        if not wanted or (wanted == "auto" and (self.data.task.calibration is None or not whole)):
            return teacher
        if self._temperature is None:
            unseen = self.data.val_dataloader() if self.serving.folds == 1 else self.data.labelled_dataloader()
            (logits,), labels = labelled_rows(self.data.task, [teacher.to(self.device)], unseen, self.device)
            self._temperature = temperature_of(logits, labels, wanted == "auto", self._say)
        return teacher if self._temperature == 1.0 else CalibratedTeacher(teacher, self._temperature)

    def _single(self, member: LoadedTeacher) -> Teacher:
        serving = self.serving
        if serving.sharded:  # each training shares a copy of its own: it cannot be made whole again
            self._measure(member)
            frozen = FrozenTeacher(member.network, serving.precision, self.features, sharded=True)
            return self._drawing(frozen)
        if serving.cache == "off":
            own = torch.device(serving.device) if serving.device else None
            return AheadTeacher(self._running(member), own)
        cache = self.cache(member)
        if cache.complete:
            return CachedTeacher(cache, features=self.needs)
        running = self._running(member)
        check_served(running, member.network, cache, self.data_of(member))
        return CachedTeacher(cache, running, self._lengths(member), self._say, self.needs)

    def _ensemble(self) -> EnsembleTeacher:
        teachers: list[Teacher] = []
        for member in self.loaded.members:
            if self.data_of(member) is not self.data:
                self._complete(member)  # a batch does not hold its tokens
            teachers.append(self._single(member))
        weights, combine = self.serving.weights, self.serving.combine
        if weights == "learned":
            teachers = [one.to(self.device) for one in teachers]
            found = labelled_rows(self.data.task, teachers, self.data.val_dataloader(), self.device)
            weights = fit_weights(*found, combine)
            pairs = zip(self.loaded.members, weights, strict=True)
            shares = ", ".join(f"{member.title} {weight:.2f}" for member, weight in pairs)
            self._say(f"teacher  weights of its members, learned on the validation split: {shares}")
        return EnsembleTeacher(teachers, weights, combine)

    def _running(self, member: LoadedTeacher) -> Teacher:
        self._measure(member)
        if not member.members:
            return self._drawing(self._frozen(member.network, self.serving.compile))
        teachers = [self._frozen(one.network, self.serving.compile) for one in member.members]
        folds = torch.from_numpy(self.data.folds(self.serving.folds))
        return CrossFittedTeacher(teachers, folds, self.serving.combine)

    def _measure(self, member: LoadedTeacher) -> None:
        """Hold the precision in which a teacher predicts against float32, once, in the first process.

        Raises:
            ConfigError: It predicts something else.
        """
        precision, device = self.serving.precision, torch.device(self.serving.device or self.device)
        for one in [] if precision == "float32" else member.members or [member]:
            if id(one) in self._measured:
                continue
            self._measured.add(id(one))

            def measured(one: LoadedTeacher = one) -> LoadedTeacher:
                teacher = self._frozen(one.network, compile=False)
                figures = check_precision(one.network, teacher, self.data_of(member), device)
                self._say(f"teacher  {figures}")
                return one

            with first():
                if rank() == 0:
                    shared("precision", (id(one.network), precision), measured)

    def generator(self) -> FrozenTeacher:
        """Return the teacher, which generates in its precision, on the device where it predicts."""
        self._measure(self.loaded)
        return self._frozen(self.loaded.network, compile=False).to(self.device)

    def _drawing(self, teacher: FrozenTeacher) -> Teacher:
        """Return a teacher that draws tokens from another's logits, if it is to."""
        count = self.serving.cache_samples
        return teacher if count is None else SampledTeacher(teacher, count)

    def _frozen(self, network: nn.Module, compile: bool) -> FrozenTeacher:
        """Return the network as a teacher; one copy in another precision serves a whole sweep."""
        precision, features = self.serving.precision, self.features
        kept, teacher = shared(
            "running", (id(network), precision, features, compile),
            lambda: (network, FrozenTeacher(network, precision, features, compile)),
        )  # fmt: skip
        assert kept is network  # it is kept too, so that no other can get its id
        return teacher

    # -- the cache ----------------------------------------------------------------------------------------------------

    def complete(self, share: tuple[int, int] = (0, 1)) -> None:
        """Have the teacher, or each member, predict whatever its cache lacks, or one of several shares of it."""
        if self.serving.cache != "off":
            for member in self.members:
                self._complete(member, share)

    def caches(self) -> list[TeacherCache]:
        """Return the teacher's cache, or each member's of an ensemble; none where outputs are not kept."""
        return [self.cache(member) for member in self.members] if self.serving.cache != "off" else []

    def stored(self) -> dict[Path, int]:
        """Return how many outputs are stored for use, by the cache of each member; nothing is written."""
        folders = [self._folder(self._key(member)) for member in self.members] if self.serving.cache != "off" else []
        kept = self.serving.cache != "refresh"
        return {
            place: Manifest.read(place / MANIFEST).known if kept and (place / MANIFEST).exists() else 0
            for place in folders
        }

    def cache(self, member: LoadedTeacher) -> TeacherCache:
        """Return a teacher's cache: opened, begun or, with `cache=refresh`, built anew."""
        self._check_repeatable()
        key, mode = self._key(member), self.serving.cache
        folder = self._folder(key)
        cache = shared("cache", (folder.absolute(), digest(key), mode), lambda: self._open(folder, key, member))
        cache.run = self.run
        return cache

    def _folder(self, key: dict[str, Any]) -> Path:
        """Return where the cache of this key is, or is to be."""
        if self.serving.cache in CACHE_MODES:
            return outputs_home() / digest(key)
        folder = Path(self.serving.cache).expanduser()
        several = self.serving.members > 1 and self.serving.folds == 1
        return folder / digest(key) if several else folder  # each member's own

    def _open(self, folder: Path, key: dict[str, Any], member: LoadedTeacher) -> TeacherCache:
        examples, mode, there = self.data.num_examples, self.serving.cache, (folder / MANIFEST).exists()
        title, data = member.title, type(self.data).__name__
        if mode == "require":
            if not there:
                raise CacheError(f"teacher.cache=require, but this teacher's outputs are not stored{nearest(key)}")
            cache = TeacherCache.open(folder, key, examples)
            if not cache.complete:
                missing = len(cache.missing())
                raise CacheError(f"teacher.cache=require, but {folder} lacks {missing} of {examples} outputs")
            return cache
        if mode == "refresh":
            begin = partial(self._begin, member, ())
            with TeacherCache.refreshing(
                folder, key, examples, self.serving.storage, teacher=title, data=data, begin=begin
            ) as cache:
                cache.run = self.run
                self._fill(cache, member)
            return cache
        if there:
            return TeacherCache.open(folder, key, examples, repair=True, say=self._say)
        begin = partial(self._begin, member, [path.parent for path in sorted(outputs_home().glob(f"*/{MANIFEST}"))])
        return TeacherCache.create(folder, key, examples, self.serving.storage, teacher=title, data=data, begin=begin)

    def _begin(self, member: LoadedTeacher, others: Sequence[Path], folder: Path, manifest: Manifest) -> None:
        """Note what the teacher reads of each example, and copy what other caches hold for it."""
        if member.members:  # what cross-fitted teachers predict depends on the fold, too
            return
        data = self.data_of(member).with_batches(eval_batch_size=self.serving.predict_batch_size)
        contents = contents_of(data.all_dataloader(), data.num_examples)
        manifest.contents = write_contents(folder, contents)
        Copying(folder, manifest, contents, self._say).take_all(others)

    def _complete(self, member: LoadedTeacher, share: tuple[int, int] = (0, 1)) -> None:
        if not (cache := self.cache(member)).complete:
            self._fill(cache, member, share)

    def _fill(self, cache: TeacherCache, member: LoadedTeacher, share: tuple[int, int] = (0, 1)) -> None:
        started = time.monotonic()
        data = self.data_of(member).with_batches(eval_batch_size=self.serving.predict_batch_size).with_share(*share)
        batches: Any = data.all_dataloader()
        if self.console.is_terminal:
            batches = track(batches, "teacher", console=self.console)
        else:
            own = torch.from_numpy(np.sort(np.concatenate(list(batches.sampler))))
            batches = reported(batches, own[~cache.known(own)], self._lengths(member), self._say)
        on_device = ({name: value.to(self.device) for name, value in batch.items()} for batch in batches)
        teacher = self._running(member).to(self.device)
        check_served(teacher, member.network, cache, self.data_of(member))
        alone = share[1] == 1
        count = fill(cache, teacher, on_device, lengths=self._lengths(member), say=self._say, alone=alone)
        what = "for all runs" if alone else f"share {share[0] + 1} of {share[1]}"
        self._say(f"teacher  predicted {count} examples in {time.monotonic() - started:.0f} s, {what}")

    def _lengths(self, member: LoadedTeacher) -> Tensor:
        return torch.from_numpy(self.data_of(member).lengths)

    def _say(self, line: str) -> None:
        say(self.console, line)

    def _key(self, member: LoadedTeacher) -> dict[str, Any]:
        return outputs_key(member, self.data_of(member), self.serving, self.features)
