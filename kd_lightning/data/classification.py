"""Labelled examples, their augmented views, and unlabelled examples for distillation."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kd_lightning.config.budget import Budget, views_and_sets
from kd_lightning.data.batches import Dataset_
from kd_lightning.data.datamodule import IndexedData
from kd_lightning.data.options import check_least
from kd_lightning.data.sampler import Share
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.tasks import Classification, Regression, Task

log = logging.getLogger(__name__)


class ClassificationData(IndexedData):
    """Labelled examples with one class each, and unlabelled examples for distillation.

    For a regression, labels are scores and `class_names` holds the name of the score.

    Every example has a stable `index`, in the order: training examples, their views (set by set), transfer examples,
    validation, test.

    Args:
        batch_size: As for `IndexedData`.
        eval_batch_size: As for `IndexedData`.
        views: Augmented views (altered copies) of each training example; `auto`: as many as `budget` allows.
        view_sets: How many different sets of views there are: epoch e trains on set `e % view_sets`. All have an
            `index`. None: a new set for every epoch, created on the fly with index -1, which cannot be cached. `auto`:
            as many as `budget` allows, where it decides the views too, else 1.
        budget: How much work `auto` stands for: `quick`, `standard` or `best`.
        pool_ratio: Views and transfer examples per training example in an epoch: others in each epoch, until all have
            been used. None: all of them in every epoch.
        train_examples: Train on this many labelled examples, evenly over the classes; drawn by `split_seed`, a smaller
            choice is a subset of a larger one. None: all.
        transfer_examples: How many of the examples that `train_examples` leaves out are transfer examples, without
            their labels. None: all of them.
        options: The others of `IndexedData`.

    Raises:
        ConfigError: An option out of its range.
    """

    parts = ("train", "views", "transfer", "validation", "test")

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        views: int | Literal["auto"] = 0,
        view_sets: int | Literal["auto"] | None = 1,
        budget: Budget = "standard",
        pool_ratio: float | None = None,
        train_examples: int | None = None,
        transfer_examples: int | None = 0,
        **options: Any,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, **options)
        check_least(1, view_sets=1 if view_sets is None or view_sets == "auto" else view_sets)
        check_least(1, train_examples=1 if train_examples is None else train_examples)
        check_least(0, views=0 if views == "auto" else views, transfer_examples=transfer_examples or 0)
        if budget not in get_args(Budget):
            raise ConfigError(f"data.budget={budget!r} is unknown{did_you_mean(str(budget), get_args(Budget))}")
        if pool_ratio is not None and not (pool_ratio > 0 and math.isfinite(pool_ratio)):
            raise ConfigError(f"data.pool_ratio={pool_ratio:g}: expected a positive number, or null for all")
        self._given_views, self._given_sets, self.budget = views, view_sets, budget
        self.views = 0 if views == "auto" else views
        self.view_sets = 1 if view_sets == "auto" else view_sets
        self.pool_ratio = pool_ratio
        self.train_examples = train_examples
        self.transfer_examples = transfer_examples
        self._without_pool = ("train", "validation", "test")
        self._labels: NDArray[Any]  # int64; float32 for a regression

    def _decide_views(self, labelled: int, transfer: int) -> None:
        """Settle the numbers of views and of their sets, where the budget decides them."""
        views, sets = views_and_sets(self.budget, self.modality, labelled, transfer, self.worth)
        if self._given_views == "auto":
            self.views = views
            if self._given_sets == "auto":
                self.view_sets = sets

    def _lay_out(self, sizes: Sequence[int]) -> None:
        super()._lay_out(sizes)
        if self.pool_ratio is not None and not (self.views or self.sizes["transfer"]):
            raise ConfigError(
                f"data.pool_ratio={self.pool_ratio:g}: no views or transfer data; set data.views or data.transfer"
            )

    def _draw(
        self, order: NDArray[np.int64], labels: NDArray[Any], unlabelled: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the positions of the training and of the transfer examples, ascending.

        Args:
            order: The positions of the labelled examples in the order in which they are drawn.
            labels: The labels by position.
            unlabelled: The positions of transfer examples after those that are left out.

        Raises:
            ConfigError: `train_examples` or `transfer_examples` is more than there are.
        """
        wanted, more = self.train_examples, self.transfer_examples
        if wanted is not None and wanted > len(order):
            raise ConfigError(f"data.train_examples={wanted}, but there are {len(order)} to train on")
        train, left = order[:wanted], order[len(order) if wanted is None else wanted :]
        if without := len(np.unique(labels[order])) - len(np.unique(labels[train])):
            log.warning("data.train_examples=%d leaves %d classes without a training example", wanted, without)
        found = left if unlabelled is None else np.concatenate([left, unlabelled])
        if more is not None and more > len(found):
            raise ConfigError(
                f"data.transfer_examples={more}, but {len(found)} examples are left for it: use fewer, or fewer to "
                "train on (data.train_examples)"
            )
        return np.sort(train), np.sort(found[:more])

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 for a regression."""
        return len(self.class_names)

    @property
    def task(self) -> Task:
        """The task: classification, or regression for float labels."""
        return Regression() if self._labels.dtype.kind == "f" else Classification(self.num_classes)

    @property
    def repeatable(self) -> bool:
        """Whether every training example has an `index`; fresh views (`view_sets=None`) have none."""
        return self.view_sets is not None or self.views == 0

    def folds(self, count: int) -> NDArray[np.int64]:
        """Return each example's fold of `count`; see `IndexedData`. Views belong to their example's fold.

        Raises:
            ConfigError: As there, or fresh views, whose fold is unknown.
        """
        self.prepare()
        train, views = self._spans["train"], self._spans["views"]
        if not self.repeatable:
            raise ConfigError(
                f"teacher.folds={count}: data.view_sets=null creates views without an index, whose fold is "
                "unknown: set teacher.cache_views=K"
            )
        found = super().folds(count)
        if len(views):
            found[views.start : views.stop] = found[np.arange(len(views)) % (len(train) * self.views) // self.views]
        return found

    def _strata(self) -> NDArray[np.int64]:
        return self.task.strata(self._labels[: self.sizes["train"]])

    def _trained_on(self, data: Dataset_) -> Dataset_:
        if self.pool_ratio is not None:
            data.share = Share(self.sizes["train"], self.pool_ratio, self.seed)
        return super()._trained_on(data)
