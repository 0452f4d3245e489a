"""What all data share: parts, batches in an order of their own, positions to resume from."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from kd_lightning.data.sampler import BucketBatchSampler, Share, Turn, position, rank_and_world
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import Task
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kd_lightning.data.image.store import ImageFormat

log = logging.getLogger(__name__)

Role = Literal["teacher", "student"]


def check_least(lowest: int, **options: int) -> None:
    """Refuse options of the data that are below `lowest`."""
    for name, value in options.items():
        if value < lowest:
            raise ConfigError(f"data.{name}={value}: expected {lowest} or more")


def stratified_order(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return positions in a random order of which every run has the classes in their proportion.

    >>> labels = np.array([0] * 6 + [1] * 3)
    >>> labels[stratified_order(labels, seed=0)]
    array([0, 1, 0, 0, 1, 0, 0, 1, 0])
    """
    generator = np.random.default_rng(seed)
    share = np.empty(len(labels))
    for label in np.unique(labels):
        positions = generator.permutation(np.flatnonzero(labels == label))
        share[positions] = (np.arange(len(positions)) + 0.5) / len(positions)
    return np.argsort(share, kind="stable")


class BatchDataset(Dataset[Batch], ABC):
    """A run of examples, fetched a whole batch at a time.

    Attributes:
        span: Which of all examples these are.
        share: How many of those behind the labelled ones an epoch takes; None: all.
        left_out: Which positions no epoch takes, `(len(self),)` bool; None: there are none.
    """

    span: range
    share: Share | None = None
    left_out: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.span)

    @property
    @abstractmethod
    def lengths(self) -> NDArray[np.int64]:
        """What batches of like examples are formed by, `(len(self),)`."""

    def turn(self, epoch: int) -> Turn:
        """Return the positions that an epoch takes, and their lengths."""
        turn = self._turn(epoch)
        if self.left_out is not None:
            kept = ~self.left_out[turn[0]]
            turn = turn[0][kept], turn[1][kept]
        return turn if self.share is None else self.share.of(turn, epoch)

    @abstractmethod
    def _turn(self, epoch: int) -> Turn:
        """Return the positions from which an epoch takes its share, and their lengths."""


Dataset_ = TypeVar("Dataset_", bound=BatchDataset)


class IndexedData(L.LightningDataModule, ABC):
    """Examples that each have a stable `index`, in batches of like length, which go on where a run was stopped.

    What an example is, and what is predicted of it, is for subclasses to say.

    Args:
        batch_size: Training examples in a batch of one process.
        eval_batch_size: Examples in a batch where nothing is trained.
        seed: Of the order of training.
        split_seed: Of the split and whatever else is drawn once. It is a seed of its own so that repeats with other
            seeds share their data, and with it the teacher's stored outputs.
        num_workers: Processes that prepare batches; 0 does it in the training process.

    Raises:
        ConfigError: An option out of its range.

    Attributes:
        parts: The names of the runs that the `index` counts through, in their order.
        class_names: Of what is predicted, in the order of the labels; set by `prepare`. Empty where classes have none.
        fingerprint: Of everything that decides the batches but for their sizes and order; set by `prepare`. Without the
            pool (see `select`) it is the same whatever is in the pool: a teacher outlives a change of views.
        teacher_key: What decides a teacher's outputs for each `index`, for people to compare; set by `prepare`.
        around: Wraps the loader of training batches (`AheadTeacher.around`); None leaves it as it is.
        image_format: How images become inputs; None for data of another kind.
    """

    parts: tuple[str, ...] = ("train", "validation", "test")
    image_format: ImageFormat | None = None

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_least(0, seed=seed, split_seed=split_seed, num_workers=num_workers)
        for name, number in (("seed", seed), ("split_seed", split_seed)):
            if number >= 2**63:
                raise ConfigError(f"data.{name}={number}: expected a number below 2**63")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.class_names: list[str] = []
        self.fingerprint = ""
        self._without_pool = self.parts  # the parts that are no pool
        self._fingerprints: dict[bool, str] = {}  # with the pool and without
        self._labelled = ""
        self.teacher_key: dict[str, Any] = {}
        self.around: Callable[[DataLoader[Batch]], Any] | None = None
        self._tokens: Literal["student", "teacher", "both"] = "both"
        self._pool = True
        self._resume: tuple[int, int] | None = None
        self._share = (0, 1)
        self._left_out: NDArray[np.bool_] | None = None  # by `index`: a fold that is not trained on
        self._spans: dict[str, range]

    # -- getting ready ------------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self) -> None:
        """Read and split everything, and set what the attributes describe; a second call does nothing.

        Raises:
            DataError: The data cannot be used as they are.
            ConfigError: An option does not fit the data.
        """

    def prepare_data(self) -> None:
        """Fill the caches on disk, in one process of each machine."""
        self.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read what `prepare_data` left; from here to `teardown` each process gets its share of the examples."""
        self.prepare()
        self._share = rank_and_world()

    def teardown(self, stage: str | None = None) -> None:
        """Give whoever asks all examples again."""
        self._share = (0, 1)

    def _lay_out(self, sizes: Sequence[int]) -> None:
        """Give each part its run of the `index`; `sizes` are in the order of `parts`."""
        ends = np.cumsum(sizes).tolist()
        self._spans = {name: range(end - size, end) for name, size, end in zip(self.parts, sizes, ends, strict=True)}
        log.info("%s: %s", type(self).__name__, ", ".join(f"{size} {name}" for name, size in self.sizes.items()))

    def _of(self, values: NDArray[Any], parts: Sequence[str]) -> NDArray[Any]:
        """Return the values of some parts' examples, of an array that holds all examples'."""
        return np.concatenate([values[self._spans[name].start : self._spans[name].stop] for name in parts])

    def _spans_of(self, parts: Sequence[str]) -> list[list[int]]:
        """Return each part's `[start, stop]` if there were no others than these."""
        ends = np.cumsum([len(span) if name in parts else 0 for name, span in self._spans.items()]).tolist()
        return [[start, end] for start, end in zip([0, *ends], ends, strict=False)]

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """What is predicted, in a few words."""
        return " / ".join(self.class_names)

    @property
    @abstractmethod
    def task(self) -> Task:
        """What is predicted."""

    @property
    def num_examples(self) -> int:
        """How many examples there are in all; every `index` is below."""
        return max(span.stop for span in self._spans.values())

    @property
    @abstractmethod
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens each example has for the teacher, `(num_examples,)`; 1 where there are no tokens."""

    @property
    def repeatable(self) -> bool:
        """Whether every training example has an `index`."""
        return True

    @property
    def sizes(self) -> dict[str, int]:
        """How many examples each part has."""
        return {name: len(span) for name, span in self._spans.items()}

    @abstractmethod
    def model_arguments(self, role: Role) -> dict[str, int]:
        """Return what the data decide about a network, by the names of its constructor's arguments."""

    @property
    @abstractmethod
    def input_format(self) -> dict[str, Any]:
        """What a saved network must be given besides its weights, as JSON-able values (`task.json` of a run)."""

    @property
    def labelled(self) -> str:
        """Names the labelled examples, their splits and classes, whoever reads them and whatever fold is left out."""
        return self._labelled or self._fingerprints.get(False, self.fingerprint)

    def read_with(self, tokenizers: Mapping[Role, str]) -> None:
        """Read texts with these tokenizers instead of those that the options name; to be called before `prepare`.

        Args:
            tokenizers: Folders, by who reads with them.
        """

    def tokenizer_of(self, role: Role) -> PreTrainedTokenizerFast | None:
        """Return the tokenizer of a network's inputs; None where they are no texts."""
        return None

    # -- views of the same data ---------------------------------------------------------------------------------------

    def select(self, tokens: Literal["student", "teacher", "both"] = "both", pool: bool = True) -> Self:
        """Return the same data with other batches; the arrays are shared.

        Args:
            tokens: Whose tokens stand under the plain names. `"both"`: the student's and, where the tokenizers differ,
                the teacher's under `teacher_input_ids` and so on.
            pool: Whether what only a teacher can label is trained on too.
        """
        if tokens not in ("student", "teacher", "both"):
            raise ConfigError(f"tokens={tokens!r}: expected 'student', 'teacher' or 'both'")
        chosen = self._copy()
        chosen._tokens, chosen._pool = tokens, pool
        chosen.fingerprint = self._fingerprints.get(pool, self.fingerprint)
        return chosen

    def with_batches(
        self, batch_size: int | None = None, eval_batch_size: int | None = None, seed: int | None = None
    ) -> Self:
        """Return the same data in batches of another size or order; the arrays are shared."""
        chosen = self._copy()
        chosen.batch_size = batch_size or self.batch_size
        chosen.eval_batch_size = eval_batch_size or self.eval_batch_size
        chosen.seed = self.seed if seed is None else seed
        return chosen

    def folds(self, count: int) -> NDArray[np.int64]:
        """Return which of `count` folds each example is in, by `index`, `(num_examples,)`.

        The training examples are dealt out at random, alike in what `_strata` tells apart; what no teacher is trained
        on is in the fold -1.

        Raises:
            ConfigError: More folds than training examples.
        """
        self.prepare()
        train = self._spans["train"]
        if count > len(train):
            raise ConfigError(f"teacher.folds={count}, but there are {len(train)} training examples")
        found = np.full(self.num_examples, -1, np.int64)
        found[stratified_order(self._strata(), self.split_seed)] = np.arange(len(train)) * count // len(train)
        return found

    def _strata(self) -> NDArray[np.int64]:
        """Return what folds have in the same proportion: a number for each training example."""
        return np.zeros(self.sizes["train"], np.int64)

    def without_fold(self, fold: int, count: int) -> Self:
        """Return the same data of which one of `count` folds, with its views, is not trained on."""
        chosen = self._copy()
        chosen._left_out, chosen._labelled = self.folds(count) == fold, self.labelled
        for pool, parts in ((True, self.parts), (False, self._without_pool)):
            bits = np.packbits(self._of(chosen._left_out, parts)).tobytes()
            marked = hashlib.sha256(self._fingerprints.get(pool, self.fingerprint).encode() + bits).hexdigest()
            chosen._fingerprints = chosen._fingerprints | {pool: marked}
        chosen.fingerprint = chosen._fingerprints[self._pool]
        return chosen

    def _trained_on(self, data: Dataset_) -> Dataset_:
        """Return a run of examples that begins with the training examples, of which some are not taken."""
        if self._left_out is not None:
            data.left_out = self._left_out[: len(data)]
        return data

    def reading(self, tokenizer: str) -> Self:
        """Return the same data for a teacher with another tokenizer; this very object where there is none to change."""
        return self

    def with_one_reader(self) -> Self:
        """Return the same data for a teacher that reads what the student reads, as one that was a student does."""
        return self._copy()

    def _copy(self) -> Self:
        self.prepare()
        chosen = copy.copy(self)
        chosen.trainer = None
        chosen._resume, chosen._share = None, (0, 1)
        return chosen

    # -- batches ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled batches of like length; the same for the same `seed` and epoch."""
        data = self._training_dataset()
        rank, world = self._share
        sampler = BucketBatchSampler(
            data.turn, self.batch_size, shuffle=True, seed=self.seed, rank=rank, world_size=world
        )
        if self._resume is not None:
            sampler.resume(*self._resume)
            self._resume = None
        elif self.trainer is not None and self.trainer.training:  # Lightning reloads it at the start of an epoch
            sampler.set_epoch(self.trainer.current_epoch)
        loader = self._loader(data, sampler)
        if self.around is not None:
            loader = self.around(loader)
        return loader

    def smallest_batch(self, processes: int) -> int:
        """Return how many examples the smallest training batch of a process has."""
        data = self._training_dataset()
        sampler = BucketBatchSampler(data.turn, self.batch_size, shuffle=True, rank=0, world_size=processes)
        return sampler.smallest

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation examples, sorted by length."""
        return self._evaluation_loader("validation", "validation")

    def few(self) -> Batch:
        """Return a batch of a few validation examples."""
        batch: Batch = next(iter(self.with_batches(eval_batch_size=4).val_dataloader()))
        return batch

    def labelled_dataloader(self) -> DataLoader[Batch]:
        """Return the training examples, without views, sorted by length."""
        return self._evaluation_loader("train", "train")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test examples, sorted by length."""
        return self._evaluation_loader("test", "test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test examples, whose labels a prediction does not read."""
        return self.test_dataloader()

    def all_dataloader(self) -> DataLoader[Batch]:
        """Return every example of every part, sorted by length."""
        return self._evaluation_loader("train", "test")

    @abstractmethod
    def _training_dataset(self) -> BatchDataset:
        """Return what is trained on, with the turns of its epochs."""

    @abstractmethod
    def _dataset(self, first: str, last: str) -> BatchDataset:
        """Return the parts from `first` to `last`."""

    def _evaluation_loader(self, first: str, last: str) -> DataLoader[Batch]:
        data = self._dataset(first, last)
        rank, world = self._share
        sampler = BucketBatchSampler(data.lengths, self.eval_batch_size, shuffle=False, rank=rank, world_size=world)
        return self._loader(data, sampler)

    def _loader(self, data: BatchDataset, sampler: BucketBatchSampler) -> DataLoader[Batch]:
        if self.num_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else each forked worker prints a warning
        return DataLoader(
            data,
            sampler=sampler,
            batch_size=None,  # the sampler's items are whole batches
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else each iterator draws from the global one
        )

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in training as the trainer counts it (workers may have fetched further)."""
        if self.trainer is None:
            return {}
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        epoch, batches = position(self.trainer)
        between = epochs.ready == epochs.processed
        return {**self._order(), "epoch": epoch, "batches": batches, "between_epochs": between}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training batches go on where a checkpoint was made.

        Raises:
            ConfigError: The data or the batches are not those of the checkpoint, or Lightning cannot go on from it.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # an evaluation may use other batches
        for name, now in self._order().items():
            if state_dict.get(name) != now:
                given = f"{now!r}, but the checkpoint was trained with {state_dict.get(name)!r}"
                raise ConfigError(f"cannot resume: the data's {name} is {given}; restore it or start a new run")
        if self.trainer is not None and self.trainer.max_steps != -1 and state_dict["between_epochs"]:
            # Lightning 2.6 then counts one batch of the next epoch to the finished one and leaves out the others.
            message = "cannot resume: the checkpoint was made after an epoch's end, which Lightning gets wrong"
            raise ConfigError(f"{message} with trainer.max_steps; limit by trainer.max_epochs, or save at a step")
        self._resume = (state_dict["epoch"], state_dict["batches"])
        # Lightning looks for a position in the loader only and warns, wrongly, that there is none.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")

    def _order(self) -> dict[str, Any]:
        """Return what the sequence of training batches follows from."""
        self.prepare()
        return {
            "fingerprint": self.fingerprint,
            "tokens": self._tokens,
            "pool": self._pool,
            "seed": self.seed,
            "global_batch_size": self.batch_size * self._share[1],
        }


def selected(
    data: IndexedData,
    tokens: Literal["student", "teacher", "both"] = "both",
    pool: bool = True,
    one_reader: bool = False,
) -> IndexedData:
    """Return `data.select(tokens, pool)`, and before it `data.with_one_reader()`: for a configuration to name."""
    return (data.with_one_reader() if one_reader else data).select(tokens, pool)
