"""Base class of the data modules: splits, batches in a reproducible order, resumption."""

from __future__ import annotations

import copy
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from kd_lightning.config.budget import Modality
from kd_lightning.data.batches import BatchDataset, Dataset_, in_batches
from kd_lightning.data.options import check_least
from kd_lightning.data.resume import ResumableData
from kd_lightning.data.sampler import BucketBatchSampler, rank_and_world
from kd_lightning.data.splits import stratified_order
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import Task
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kd_lightning.data.image.store import ImageFormat

log = logging.getLogger(__name__)

Role = Literal["teacher", "student"]


class IndexedData(ResumableData, ABC):
    """Examples with a stable `index`, in batches of similar length, resumable.

    Subclasses define the examples and the task.

    Args:
        batch_size: Training examples in a batch of one process.
        eval_batch_size: Examples in a batch for evaluation.
        seed: Of the order of training.
        split_seed: Of the split and other random choices made once. Separate from `seed`, so that repeats with other
            seeds share their data and the teacher's cached outputs.
        num_workers: Processes that prepare batches; 0 does it in the training process.

    Raises:
        ConfigError: An option out of its range.

    Attributes:
        parts: The names of the splits, in the order of their `index`.
        class_names: Names of the classes, in the order of the labels; set by `prepare`. Empty for unnamed classes.
        fingerprint: Of everything that determines the batches except their sizes and order; set by `prepare`. Without
            the pool (see `select`) it does not depend on the pool, so that changed views do not retrain a teacher.
        teacher_key: What determines a teacher's outputs for each `index`, as readable values; set by `prepare`.
        around: Wraps the loader of training batches (`AheadTeacher.around`), if given.
        image_format: The preprocessing of images; None for other data.
        other_tokens: Whether the teacher's outputs are of other rows than the student's.
        modality: What an example is, which decides how much of it a budget is.
        sets_by: The key that is null where training inputs are made anew in every epoch, and the one that sets how many
            there are for the epochs to take turns with.
        worth: For how many short texts, or images, an example counts there; set by `prepare`.
    """

    parts: tuple[str, ...] = ("train", "validation", "test")
    image_format: ImageFormat | None = None
    other_tokens: bool = False
    modality: Modality = "text"
    sets_by: tuple[str, str] = ("data.view_sets", "teacher.cache_views")
    worth: float = 1.0

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
        self._without_pool = self.parts  # the splits outside of the pool
        self._fingerprints: dict[bool, str] = {}  # with the pool and without
        self._labelled = ""
        self.teacher_key: dict[str, Any] = {}
        self.around: Callable[[DataLoader[Batch]], Any] | None = None
        self._tokens: Literal["student", "teacher", "both"] = "both"
        self._pool = True
        self._share = (0, 1)
        self._left_out: NDArray[np.bool_] | None = None  # by `index`: a fold that is not trained on
        self._spans: dict[str, range]

    # -- preparation --------------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self) -> None:
        """Load and split everything, and set the attributes; a second call does nothing.

        Raises:
            DataError: The data cannot be used as they are.
            ConfigError: An option does not fit the data.
        """

    def prepare_data(self) -> None:
        """Fill the caches on disk, in one process per machine."""
        self.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Load the data; until `teardown` each process gets its share of the examples."""
        self.prepare()
        self._share = rank_and_world()

    def teardown(self, stage: str | None = None) -> None:
        """Return all examples again from now on."""
        self._share = (0, 1)

    def _lay_out(self, sizes: Sequence[int]) -> None:
        """Assign each split its range of `index`; `sizes` are in the order of `parts`."""
        ends = np.cumsum(sizes).tolist()
        self._spans = {name: range(end - size, end) for name, size, end in zip(self.parts, sizes, ends, strict=True)}
        log.info("%s: %s", type(self).__name__, ", ".join(f"{size} {name}" for name, size in self.sizes.items()))

    def _of(self, values: NDArray[Any], parts: Sequence[str]) -> NDArray[Any]:
        """Select the values of some splits from an array of all examples'."""
        return np.concatenate([values[self._spans[name].start : self._spans[name].stop] for name in parts])

    def _spans_of(self, parts: Sequence[str]) -> list[list[int]]:
        """Return each split's `[start, stop]` if there were only these splits."""
        ends = np.cumsum([len(span) if name in parts else 0 for name, span in self._spans.items()]).tolist()
        return [[start, end] for start, end in zip([0, *ends], ends, strict=False)]

    # -- what networks need -------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """A short description of the prediction."""
        return " / ".join(self.class_names)

    @property
    @abstractmethod
    def task(self) -> Task:
        """What is predicted."""

    @property
    def num_examples(self) -> int:
        """Number of all examples; every `index` is smaller."""
        return max(span.stop for span in self._spans.values())

    @property
    @abstractmethod
    def lengths(self) -> NDArray[np.int64]:
        """Number of the teacher's tokens of each example, `(num_examples,)`; 1 without tokens."""

    @property
    def repeatable(self) -> bool:
        """Whether every training example has an `index`."""
        return True

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples in each split."""
        return {name: len(span) for name, span in self._spans.items()}

    @property
    def labelled_examples(self) -> int:
        """Number of labelled examples that are trained on: an epoch, as settings count them."""
        left_out = 0 if self._left_out is None else int(self._left_out[: self.sizes["train"]].sum())
        return self.sizes["train"] - left_out

    @abstractmethod
    def model_arguments(self, role: Role) -> dict[str, Any]:
        """Return the constructor arguments that the data determine for a network."""

    @property
    @abstractmethod
    def input_format(self) -> dict[str, Any]:
        """What a saved network needs besides its weights, as JSON values (`task.json` of a run)."""

    @property
    def labelled(self) -> str:
        """Identifies the labelled examples, splits and classes, for any tokenizer and fold."""
        return self._labelled or self._fingerprints.get(False, self.fingerprint)

    def read_with(self, tokenizers: Mapping[Role, str]) -> None:
        """Use these tokenizers instead of those of the options; call it before `prepare`.

        Args:
            tokenizers: Folders by role, student or teacher.
        """

    def tokenizer_of(self, role: Role) -> PreTrainedTokenizerFast | None:
        """Return the tokenizer of a network's inputs; None without texts."""
        return None

    # -- views of the same data ---------------------------------------------------------------------------------------

    def select(self, tokens: Literal["student", "teacher", "both"] = "both", pool: bool = True) -> Self:
        """Return the same data with other batches; the arrays are shared.

        Args:
            tokens: Whose tokens have the plain names. `"both"`: the student's and, if the tokenizers differ, the
                teacher's as `teacher_input_ids` and so on.
            pool: Whether to train on views and transfer examples too.
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

    def with_share(self, number: int, count: int) -> Self:
        """Return the same data, of which evaluations go through one of several shares, 0 to `count` - 1."""
        chosen = self._copy()
        chosen._share = (number, count)
        return chosen

    def folds(self, count: int) -> NDArray[np.int64]:
        """Return each example's fold of `count`, by `index`, `(num_examples,)`.

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
        """Return the same data without one of `count` folds, with its views, in training."""
        chosen = self._copy()
        chosen._left_out, chosen._labelled = self.folds(count) == fold, self.labelled
        for pool, parts in ((True, self.parts), (False, self._without_pool)):
            bits = np.packbits(self._of(chosen._left_out, parts)).tobytes()
            marked = hashlib.sha256(self._fingerprints.get(pool, self.fingerprint).encode() + bits).hexdigest()
            chosen._fingerprints = chosen._fingerprints | {pool: marked}
        chosen.fingerprint = chosen._fingerprints[self._pool]
        return chosen

    def _trained_on(self, data: Dataset_) -> Dataset_:
        """Return a run of examples that starts with the training examples, without left-out ones."""
        if self._left_out is not None:
            data.left_out = self._left_out[: len(data)]
        return data

    def reading(self, tokenizer: str) -> Self:
        """Return the same data for a teacher with another tokenizer; itself without texts."""
        return self

    def with_one_reader(self) -> Self:
        """Return the same data for a teacher with the student's inputs, such as a former student."""
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
        elif self.trainer is not None and self.trainer.training:  # Lightning reloads it in each epoch
            sampler.set_epoch(self.trainer.current_epoch)
        loader = in_batches(data, sampler, self.num_workers, self.seed)
        if self.around is not None:
            loader = self.around(loader)
        return loader

    def smallest_batch(self, processes: int) -> int:
        """Return the size of a process's smallest training batch."""
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
        """Return the test examples; prediction ignores their labels."""
        return self.test_dataloader()

    def all_dataloader(self) -> DataLoader[Batch]:
        """Return every example of every split, sorted by length."""
        return self._evaluation_loader(self.parts[0], self.parts[-1])

    @abstractmethod
    def _training_dataset(self) -> BatchDataset:
        """Return the training examples, with the set of views of each epoch."""

    @abstractmethod
    def _dataset(self, first: str, last: str) -> BatchDataset:
        """Return the splits from `first` to `last`."""

    def _evaluation_loader(self, first: str, last: str) -> DataLoader[Batch]:
        data = self._dataset(first, last)
        rank, world = self._share
        sampler = BucketBatchSampler(
            lambda _: data.whole, self.eval_batch_size, shuffle=False, rank=rank, world_size=world
        )
        return in_batches(data, sampler, self.num_workers, self.seed)

    def _order(self) -> dict[str, Any]:
        """Return what determines the sequence of training batches."""
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
    """Return `data.with_one_reader()` if wanted, then `data.select(tokens, pool)`: for configurations."""
    return (data.with_one_reader() if one_reader else data).select(tokens, pool)
