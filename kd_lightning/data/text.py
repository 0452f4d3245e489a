"""Sentences as a `LightningDataModule`: read, split, tokenised once, served in batches of like length."""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from kd_lightning.assets import home
from kd_lightning.data.augment import Views
from kd_lightning.data.corpus import Corpus, Sentence
from kd_lightning.data.dataset import FreshViews, TokenDataset
from kd_lightning.data.sampler import BucketBatchSampler, position, rank_and_world
from kd_lightning.data.tokens import (
    TokenStore,
    encode_batch,
    encode_store,
    load_tokenizer,
    mask_token,
    sentences_digest,
    tokenizer_fingerprint,
)
from kd_lightning.errors import ConfigError
from kd_lightning.types import IGNORE, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

Role = Literal["teacher", "student"]
ROLES: tuple[Role, Role] = ("student", "teacher")
PARTS = ("train", "views", "transfer", "validation", "test")


def _check_least(lowest: int, **options: int) -> None:
    for name, value in options.items():
        if value < lowest:
            raise ConfigError(f"data.{name}={value}: expected {lowest} or more")


class TextData(L.LightningDataModule, ABC):
    """Sentences or pairs of sentences with one class each, and sentences without that only a teacher labels.

    A subclass says where they come from, in `read`. Every example has a stable `index`: first the training sentences,
    then their views (set by set), then the transfer sentences, then validation, then test.

    Encoding is done once and kept on disk, so that a batch is a few array look-ups: worker processes seldom pay off.

    Args:
        tokenizer: `"minilm"`, a folder, a Hugging Face name, or `"wordpiece:8000"` to learn one from the data.
        teacher_tokenizer: The teacher's, where it differs.
        max_length: Longer sentences are cut to this many tokens.
        batch_size: Training examples in a batch of one process.
        eval_batch_size: Examples in a batch where nothing is trained.
        views: Altered copies of each training sentence, for the teacher to label.
        view_sets: How many different sets of views there are: epoch e trains on set `e % view_sets`. All are encoded
            beforehand and have an `index`. None: a set of its own for every epoch, made as it is trained on, of
            index -1, which nothing that is looked up by `index` can serve.
        mask_probability: How often a view's word is masked.
        ngram_probability: How often a view is cut to at most five words.
        transfer: More sentences for the teacher to label: files, or names that the source knows.
        seed: Of the order of training.
        split_seed: Of the split and the views. It is a seed of its own so that repeats with other seeds share their
            data, and with it the teacher's stored outputs.
        num_workers: Processes that prepare batches; 0 does it in the training process.
        cache_dir: Where encoded sentences are kept; by default under `$KD_LIGHTNING_HOME`.

    Raises:
        ConfigError: An option out of its range.

    Attributes:
        fingerprint: Of everything that decides the batches but for their sizes and order; set by `prepare`.
        around: Wraps the loader of training batches (`AheadTeacher.around`); None leaves it as it is.
        teacher_key: What decides a teacher's answer to each `index`, for people to compare; set by `prepare`.
    """

    def __init__(
        self,
        tokenizer: str = "minilm",
        teacher_tokenizer: str | None = None,
        max_length: int = 64,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        views: int = 0,
        view_sets: int | None = 1,
        mask_probability: float = 0.1,
        ngram_probability: float = 0.25,
        transfer: Sequence[str] = (),
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        sets = 1 if view_sets is None else view_sets
        _check_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size, view_sets=sets)
        _check_least(4, max_length=max_length)
        _check_least(0, views=views, seed=seed, split_seed=split_seed, num_workers=num_workers)
        for name, value in (("mask_probability", mask_probability), ("ngram_probability", ngram_probability)):
            if not 0 <= value <= 1:
                raise ConfigError(f"data.{name}={value}: expected a probability, 0 to 1")
        self.tokenizer_names = {"student": tokenizer, "teacher": teacher_tokenizer or tokenizer}
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.views = views
        self.view_sets = view_sets
        self.mask_probability = mask_probability
        self.ngram_probability = ngram_probability
        self.transfer = [transfer] if isinstance(transfer, str) else list(transfer)
        self.seed = seed
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir) if cache_dir else home() / "tokens"
        self.class_names: list[str] = []
        self.fingerprint = ""
        self.teacher_key: dict[str, Any] = {}
        self.around: Callable[[DataLoader[Batch]], Any] | None = None
        self._tokens: Literal["student", "teacher", "both"] = "both"
        self._pool = True
        self._resume: tuple[int, int] | None = None

    @abstractmethod
    def read(self) -> Corpus:
        """Return the class names and the labelled and unlabelled sentences."""

    # -- getting ready ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read, split and encode everything; a second call does nothing.

        Raises:
            DataError: The data cannot be used as they are.
            ConfigError: An option does not fit the data.
        """
        if self.fingerprint:
            return
        corpus = self.read()
        views = Views(corpus.train.texts, self.views, self.split_seed, self.mask_probability, self.ngram_probability)
        parts: dict[str, list[Sentence]] = {
            "train": corpus.train.texts,
            "views": [views.make(number) for number in range(views.per_set * (self.view_sets or 0))],
            "transfer": corpus.transfer,
            "validation": corpus.validation.texts,
            "test": corpus.test.texts,
        }
        ends = np.cumsum([len(parts[name]) for name in PARTS]).tolist()
        self._spans = {name: range(end - len(parts[name]), end) for name, end in zip(PARTS, ends, strict=True)}
        self._labels = np.full(ends[-1], IGNORE, np.int64)
        for name in ("train", "validation", "test"):
            self._labels[self._spans[name].start : self._spans[name].stop] = getattr(corpus, name).labels
        self._load_tokenizers([text for sentence in corpus.train.texts for text in sentence])
        self._fresh = None if self.repeatable else views
        self.texts_per_example = len(corpus.train.texts[0])
        self.class_names = corpus.class_names
        self._encode([text for name in PARTS for text in parts[name]])
        log.info("%s: %s", type(self).__name__, ", ".join(f"{len(self._spans[name])} {name}" for name in PARTS))

    def _load_tokenizers(self, training_texts: list[str]) -> None:
        names = self.tokenizer_names
        loaded = {name: load_tokenizer(name, training_texts) for name in sorted(set(names.values()))}
        self.student_tokenizer: PreTrainedTokenizerFast = loaded[names["student"]]
        self.teacher_tokenizer: PreTrainedTokenizerFast = loaded[names["teacher"]]
        for name, tokenizer in loaded.items():
            if self.max_length > tokenizer.model_max_length:
                longest = tokenizer.model_max_length
                raise ConfigError(f"data.max_length={self.max_length}, but {name!r} takes at most {longest} tokens")
            if mask_token(tokenizer) is None and self.views and self.mask_probability:
                message = f"{name!r} has no token to mask words with"
                raise ConfigError(f"{message}; set data.mask_probability=0 or data.views=0")

    def _encode(self, texts: list[Sentence]) -> None:
        """Encode everything, and name it: whole, and as far as a teacher's answers depend on it."""
        digest = sentences_digest(texts)
        sentences = digest.hexdigest()
        prints = {role: tokenizer_fingerprint(self._tokenizer(role)) for role in ROLES}
        self._stores: dict[str, TokenStore] = {}
        for role in ROLES[: 1 + self.has_two_tokenizers]:
            self._stores[role] = encode_store(self._tokenizer(role), texts, sentences, self.max_length, self.cache_dir)
        self._stores.setdefault("teacher", self._stores["student"])
        self.teacher_key = {
            "sentences": sentences,
            "examples": len(texts),
            "tokenizer": prints["teacher"],
            "max_length": self.max_length,
            "truncation": self.teacher_tokenizer.truncation_side,
        }
        spans = [[span.start, span.stop] for span in self._spans.values()]
        content: list[Any] = [self._labels.tolist(), self.class_names, spans, list(prints.values()), self.max_length]
        sides = [self._tokenizer(role).truncation_side for role in ROLES]
        if sides != ["right", "right"]:
            content.append(sides)
        if self.views and self.view_sets != 1:  # whose turns, or whose making, the texts do not show
            content.append([self.view_sets, self.views, self.split_seed, self.mask_probability, self.ngram_probability])
        digest.update(f", {json.dumps(content, ensure_ascii=False)[1:]}".encode("utf-8", "surrogatepass"))
        self.fingerprint = digest.hexdigest()

    def prepare_data(self) -> None:
        """Fill the caches on disk, in one process of each machine."""
        self.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read what `prepare_data` left."""
        self.prepare()

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def num_examples(self) -> int:
        """How many examples there are in all; every `index` is below."""
        return len(self._labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens each example has for the teacher, `(num_examples,)`."""
        return self._stores["teacher"].lengths

    @property
    def has_two_tokenizers(self) -> bool:
        """Whether the teacher reads other tokens than the student."""
        return self.tokenizer_names["student"] != self.tokenizer_names["teacher"]

    @property
    def repeatable(self) -> bool:
        """Whether every training example has an `index`; fresh views in each epoch (`view_sets=None`) have none."""
        return self.view_sets is not None or self.views == 0

    @property
    def sizes(self) -> dict[str, int]:
        """How many examples each part has: train, views (all sets), transfer, validation, test."""
        return {name: len(span) for name, span in self._spans.items()}

    def model_arguments(self, role: Role) -> dict[str, int]:
        """Return what the data decide about a network: `num_classes`, `vocab_size` and `pad_token_id`."""
        self.prepare()
        tokenizer = self._tokenizer(role)
        return {
            "num_classes": self.num_classes,
            "vocab_size": len(tokenizer),
            "pad_token_id": int(tokenizer.pad_token_id),
        }

    def encode(self, texts: Sequence[str] | Sequence[tuple[str, str]], role: Role = "student") -> Batch:
        """Return new texts (or pairs) as one batch, `(B, L)`, without labels."""
        self.prepare()
        sentences = [(text,) if isinstance(text, str) else text for text in texts]
        return encode_batch(self._tokenizer(role), sentences, self.max_length)

    def _tokenizer(self, role: str) -> PreTrainedTokenizerFast:
        return self.student_tokenizer if role == "student" else self.teacher_tokenizer

    # -- views of the same data ---------------------------------------------------------------------------------------

    def select(self, tokens: Literal["student", "teacher", "both"] = "both", pool: bool = True) -> Self:
        """Return the same data with other batches; the arrays are shared.

        Args:
            tokens: Whose tokens stand under the plain names. `"both"`: the student's and, where the tokenizers differ,
                the teacher's under `teacher_input_ids` and so on.
            pool: Whether views and transfer sentences are trained on too (without labels).
        """
        if tokens not in ("student", "teacher", "both"):
            raise ConfigError(f"tokens={tokens!r}: expected 'student', 'teacher' or 'both'")
        chosen = self._copy()
        chosen._tokens, chosen._pool = tokens, pool
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

    def _copy(self) -> Self:
        self.prepare()
        chosen = copy.copy(self)
        chosen.trainer = None
        chosen._resume = None
        return chosen

    # -- batches ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled batches of like length; the same for the same `seed` and epoch."""
        data = self._dataset("train", "transfer" if self._pool else "train")
        if self._pool:
            sets = self.view_sets or 1
            views, size = self._spans["views"], self.sizes["views"] // sets
            data.turns = [views[number * size : (number + 1) * size] for number in range(sets)]
            if self._fresh is not None:
                tokenizers = {prefix: self._tokenizer(role) for prefix, role in self._readers().items()}
                data.fresh = FreshViews(self._fresh, tokenizers, self.max_length)
        sampler = BucketBatchSampler(data.turn, self.batch_size, shuffle=True, seed=self.seed)
        if self._resume is not None:
            sampler.resume(*self._resume)
            self._resume = None
        elif self.trainer is not None and self.trainer.training:  # Lightning reloads it at the start of an epoch
            sampler.set_epoch(self.trainer.current_epoch)
        loader = self._loader(data, sampler)
        if self.around is not None:
            loader = self.around(loader)
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation examples, sorted by length."""
        return self._evaluation_loader("validation", "validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test examples, sorted by length."""
        return self._evaluation_loader("test", "test")

    def all_dataloader(self) -> DataLoader[Batch]:
        """Return every example of every part, sorted by length."""
        return self._evaluation_loader("train", "test")

    def _dataset(self, first: str, last: str) -> TokenDataset:
        self.prepare()
        stores = {prefix: self._stores[role] for prefix, role in self._readers().items()}
        return TokenDataset(stores, self._labels, range(self._spans[first].start, self._spans[last].stop))

    def _readers(self) -> dict[str, Role]:
        """Return whose tokens stand in a batch, by the prefix of their names."""
        if self._tokens == "both" and self.has_two_tokenizers:
            return {"": "student", "teacher_": "teacher"}
        return {"": "teacher" if self._tokens == "teacher" else "student"}

    def _evaluation_loader(self, first: str, last: str) -> DataLoader[Batch]:
        data = self._dataset(first, last)
        return self._loader(data, BucketBatchSampler(data.lengths, self.eval_batch_size, shuffle=False))

    def _loader(self, data: TokenDataset, sampler: BucketBatchSampler) -> DataLoader[Batch]:
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
            "global_batch_size": self.batch_size * rank_and_world()[1],
        }
