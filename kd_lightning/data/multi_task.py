"""Combines several tasks' data into mixed batches, sampled by size and a temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.batches import BatchDataset, merged
from kd_lightning.data.classification import ClassificationData
from kd_lightning.data.datamodule import Role
from kd_lightning.data.sampler import Positions, Turn, endless
from kd_lightning.data.text.tokens import tokenizer_fingerprint
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.tasks import MultiTask
from kd_lightning.types import Batch


class MultiTaskData(ClassificationData):
    r"""The data of several tasks for one network.

    An epoch draws as many examples as the tasks have together, of task k with n_k examples the share

    .. math:: p_k = \frac{n_k^{1 / \tau}}{\sum_j n_j^{1 / \tau}}

    At tau = 1 each task is drawn in proportion to its size; the larger tau, the more alike (Arivazhagan et al. 2019,
    arXiv 1907.05019). A task's examples come in passes, each in its own order, and an epoch continues where the
    previous one stopped: no example repeats before all have been used.

    In addition to the tasks' entries, a batch has `task`; `labels` are float32, and `index` is over all tasks.

    Args:
        tasks: Each task's data, by its name. All need the same student tokenizer and lengths.
            Their own batch sizes and seeds are not used.
        sampling_temperature: tau > 0.
        batch_size: As for `ClassificationData`.
        eval_batch_size: As for `ClassificationData`.
        seed: As for `ClassificationData`.
        num_workers: As for `ClassificationData`.

    Raises:
        ConfigError: Fewer than two tasks, or an option out of its range; in `prepare`, tasks that do not fit together.
    """

    def __init__(
        self,
        tasks: Mapping[str, ClassificationData],
        sampling_temperature: float = 1.0,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, num_workers=num_workers)
        if len(tasks) < 2:
            raise ConfigError(f"data.tasks={list(tasks)}: give two tasks or more, NAME: the data of the task")
        if not (sampling_temperature > 0 and math.isfinite(sampling_temperature)):
            raise ConfigError(f"data.sampling_temperature={sampling_temperature:g}: expected a positive number")
        self.tasks = dict(tasks)
        self.sampling_temperature = sampling_temperature

    # -- getting ready ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Prepare every task's data; a second call does nothing."""
        if self.fingerprint:
            return
        for data in self.tasks.values():
            data.prepare()
        self._check_readings()
        self.class_names = [f"{name}: {one}" for name, data in self.tasks.items() for one in data.class_names]
        sizes = [data.num_examples for data in self.tasks.values()]
        self.firsts = [sum(sizes[:number]) for number in range(len(sizes))]
        self.worth = max(data.worth for data in self.tasks.values())
        self.fingerprint = self._name()

    def _name(self) -> str:
        parts = {name: data.fingerprint for name, data in self.tasks.items()}
        return digest([list(parts), parts, self.sampling_temperature])

    def _check_readings(self) -> None:
        """Refuse tasks whose inputs differ for one student."""
        first, *others = self.tasks
        expected = _reading(self.tasks[first])
        for name in others:
            found = _reading(self.tasks[name])
            if other := [key for key in expected if found.get(key) != expected[key]]:
                raise ConfigError(
                    f"data.tasks: {name} has another {' and '.join(other)} than {first}, and the student has one "
                    "encoder for both: give all tasks the same tokenizer (a folder or a name) and max_length"
                )
        for name, data in self.tasks.items():
            if not data.repeatable:
                raise ConfigError(f"data.tasks.{name}.view_sets=null: several tasks need a number of sets of views")

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def task(self) -> MultiTask:
        """All tasks together."""
        return MultiTask({name: data.task for name, data in self.tasks.items()})

    @property
    def labelled(self) -> str:
        """Identifies the labelled examples of all tasks."""
        return digest({name: data.labelled for name, data in self.tasks.items()})

    def read_with(self, tokenizers: Mapping[Role, str]) -> None:
        """Use this student tokenizer for every task; teachers' differ by task."""
        for data in self.tasks.values():
            data.read_with({role: folder for role, folder in tokenizers.items() if role == "student"})

    @property
    def title(self) -> str:
        """The names of the tasks."""
        return ", ".join(self.tasks)

    @property
    def num_examples(self) -> int:
        """Number of all examples; every `index` is smaller."""
        return sum(data.num_examples for data in self.tasks.values())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of its teacher's tokens of each example, `(num_examples,)`."""
        return np.concatenate([data.lengths for data in self.tasks.values()])

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples in each split, over all tasks."""
        parts = [data.sizes for data in self.tasks.values()]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def model_arguments(self, role: Role) -> dict[str, int]:
        """Return the constructor arguments for a network of all tasks."""
        self.prepare()
        return {**self._first.model_arguments(role), "num_classes": self.num_classes}

    @property
    def input_format(self) -> dict[str, Any]:
        """The format of every task's inputs."""
        return self._first.input_format

    def tokenizer_of(self, role: Role) -> Any:
        """Return the student's tokenizer, or that of the first task's teacher."""
        return self._first.tokenizer_of(role)

    @property
    def _first(self) -> ClassificationData:
        return next(iter(self.tasks.values()))

    # -- views of the same data ---------------------------------------------------------------------------------------

    def select(self, tokens: Literal["student", "teacher", "both"] = "both", pool: bool = True) -> Self:
        """Return the same tasks with other batches; the arrays are shared."""
        chosen = super().select(tokens, pool)
        chosen.tasks = {name: data.select(tokens, pool) for name, data in self.tasks.items()}
        chosen.fingerprint = chosen._name()
        return chosen

    # -- batches ------------------------------------------------------------------------------------------------------

    def few(self) -> Batch:
        """Return a batch with two validation examples of every task."""
        data = self._dataset("validation", "validation")
        return data[[start + number for start in data.starts for number in range(2)]]

    def _training_dataset(self) -> MixedDataset:
        return self._mixed(lambda data: data._training_dataset(), self.sampling_temperature)

    def _dataset(self, first: str, last: str) -> MixedDataset:
        return self._mixed(lambda data: data._dataset(first, last))

    def _mixed(self, part_of: Callable[[ClassificationData], BatchDataset], temperature: float = 1.0) -> MixedDataset:
        self.prepare()
        parts, alike = ([part_of(data) for data in datas] for datas in (self.tasks.values(), self._read_alike()))
        counts = draws([len(part.turn(0)[0]) for part in parts], temperature)
        padding = [self._padding(data) for data in self.tasks.values()]
        return MixedDataset(parts, alike, self.firsts, padding, counts, self.seed)

    def _read_alike(self) -> list[ClassificationData]:
        """Return the tasks with only the student's tokens, if only those agree."""
        return [data.select("student", self._pool) if self._tokens == "both" else data for data in self.tasks.values()]

    def _padding(self, data: ClassificationData) -> dict[str, int]:
        """Return the padding values of a task's batch entries other than 0."""
        plain: Role = "teacher" if self._tokens == "teacher" else "student"
        readers: dict[str, Role] = {"input_ids": plain, "teacher_input_ids": "teacher"}
        found = {name: data.tokenizer_of(role) for name, role in readers.items()}
        return {name: int(tokenizer.pad_token_id) for name, tokenizer in found.items() if tokenizer is not None}


class MixedDataset(BatchDataset):
    """Runs of several tasks' examples, one after the other.

    Args:
        parts: Each task's.
        alike: The same with only the student's tokens, whose lengths form the batches: counting a teacher's own tokens
            would keep its task in separate batches.
        firsts: What is added to each task's `index`.
        padding: Each task's padding ids, if not 0.
        counts: The number of examples of each task in an epoch.
        seed: Of which these are.
    """

    def __init__(
        self,
        parts: Sequence[BatchDataset],
        alike: Sequence[BatchDataset],
        firsts: Sequence[int],
        padding: Sequence[Mapping[str, int]],
        counts: Sequence[int],
        seed: int,
    ) -> None:
        self.parts, self.alike, self.firsts, self.padding = list(parts), list(alike), list(firsts), list(padding)
        self.counts, self.seed = list(counts), seed
        ends = np.cumsum([0, *(len(part) for part in parts)])
        self.starts: list[int] = ends[:-1].tolist()
        self.span = range(int(ends[-1]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The lengths by which batches are formed."""
        return np.concatenate([part.lengths for part in self.alike])

    def places(self, index: Iterable[int]) -> list[int]:
        """Return the positions of the examples of these numbers, which are over all tasks."""
        numbers, runs = list(index), zip(self.parts, self.firsts, self.starts, strict=True)
        return [start + at for part, first, start in runs for at in part.places(number - first for number in numbers)]

    def _turn(self, epoch: int) -> Turn:
        """Return the positions of an epoch, `counts` of each task, and their lengths."""
        turns = [_drawn(part, count, epoch, [self.seed, number])
                 for number, (part, count) in enumerate(zip(self.alike, self.counts, strict=True))]  # fmt: skip
        positions = [taken + start for (taken, _), start in zip(turns, self.starts, strict=True)]
        return np.concatenate(positions), np.concatenate([lengths for _, lengths in turns])

    def __getitem__(self, positions: Positions | Sequence[int]) -> Batch:
        positions = np.asarray(positions, np.int64)
        owners = np.searchsorted(self.starts, positions, side="right") - 1
        found = []
        for number in np.unique(owners).tolist():
            rows = owners == number
            batch = self.parts[number][positions[rows] - self.starts[number]]
            batch |= {"labels": batch["labels"].float(), "index": batch["index"] + self.firsts[number]}
            found.append((torch.from_numpy(rows), batch, self.padding[number]))
        return merged(found, len(positions)) | {"task": torch.from_numpy(owners)}


def draws(sizes: Sequence[int], temperature: float) -> list[int]:
    """Divide `sum(sizes)` draws in proportion to `size ** (1 / temperature)`, at least 1 each.

    >>> draws([800, 100, 100], 1.0), draws([800, 100, 100], 1e9), draws([810, 90], 2.0)
    ([800, 100, 100], [333, 334, 333], [675, 225])
    """
    powers = np.asarray(sizes, float) / max(sizes)
    shares = powers ** (1 / temperature)
    ends = np.round(np.cumsum(shares) / shares.sum() * sum(sizes)).astype(int)
    return [max(int(count), 1) for count in np.diff(ends, prepend=0)]


def _drawn(part: BatchDataset, count: int, epoch: int, seed: list[int]) -> Turn:
    """Return an epoch's positions in one task: the next `count` of endless shuffled passes."""
    taken: list[Turn] = []
    for number, order in endless(len(part.turn(0)[0]), count, epoch, seed):
        positions, lengths = part.turn(number)
        taken.append((positions[order], lengths[order]))
    return np.concatenate([positions for positions, _ in taken]), np.concatenate([lengths for _, lengths in taken])


def _reading(data: ClassificationData) -> dict[str, Any]:
    """Return what determines the student's inputs for a task."""
    tokenizer = data.tokenizer_of("student")
    sizes = {name: size for name, size in data.model_arguments("student").items() if name != "num_classes"}
    return {"tokenizer": tokenizer and tokenizer_fingerprint(tokenizer), **sizes, **data.input_format}
