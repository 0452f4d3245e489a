"""Images as a `LightningDataModule`: splits, views, normalised batches."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.batches import BatchDataset
from kd_lightning.data.classification import ClassificationData
from kd_lightning.data.datamodule import Role
from kd_lightning.data.image import store, views
from kd_lightning.data.image.store import ImageFormat, ImageStore
from kd_lightning.data.image.views import ImageViews, Mixing
from kd_lightning.data.options import check_fractions, check_least, check_probabilities
from kd_lightning.data.sampler import Positions, Turn
from kd_lightning.data.splits import stratified_order
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE, Batch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The normalisation of networks pretrained on ImageNet."""


@dataclass(frozen=True)
class ImageCorpus:
    """All images of a data set, by split.

    Attributes:
        class_names: In the order of the labels.
        images: All of them.
        labels: Their classes, `(N,)` int64.
        rows: The rows of the splits `train` and, if the source has them, `validation`, `test` and `transfer`, whose
            labels are ignored.
        held_out: The share of `train` to hold out for a missing split.
    """

    class_names: list[str]
    images: ImageStore
    labels: NDArray[np.int64]
    rows: Mapping[str, range]
    held_out: Mapping[str, float] = field(default_factory=dict)


class ImageDataset(BatchDataset):
    """A run of images; views are created on the fly, with or without an `index`.

    Args:
        images: All of them.
        rows: The image of each example, `(num_examples,)`.
        labels: Of all examples, `(num_examples,)` int64.
        span: The examples of this run. Positions beyond are fresh views with index -1.
        views: The numbering of views.
        stored: The examples that are views, one set per epoch in turn; none with fresh views.
        format: The preprocessing of images.
    """

    def __init__(
        self,
        images: ImageStore,
        rows: NDArray[np.int64],
        labels: NDArray[np.int64],
        span: range,
        views: ImageViews,
        stored: range,
        format: ImageFormat,
    ) -> None:
        self.images = images
        self.rows = rows
        self.labels = labels
        self.span = span
        self.views = views
        self.stored = stored
        self.format = format

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The same for all, `(len(self),)`."""
        return np.ones(len(self), np.int64)

    def _image(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels of a training image."""
        image: NDArray[np.uint8] = self.images.pixels[self.rows[index]]
        return image

    def _turn(self, epoch: int) -> Turn:
        """Return the positions of an epoch: images, one set of views, transfer examples."""
        size = self.views.per_set
        if self.stored:
            start, others = self.stored.start + size * (epoch % (len(self.stored) // size)), self.stored.stop
        else:
            start, others = len(self) + size * epoch, self.views.images
        runs = [range(self.views.images), range(start, start + size), range(others, len(self))]
        positions = np.concatenate([np.arange(run.start, run.stop) for run in runs])
        return positions, np.ones(len(positions), np.int64)

    def __getitem__(self, positions: Positions | Sequence[int]) -> Batch:
        example = np.asarray(positions, np.int64) + self.span.start
        fresh = example >= self.span.stop
        altered = fresh | ((example >= self.stored.start) & (example < self.stored.stop))
        numbers = (example - np.where(fresh, self.span.stop, self.stored.start))[altered]
        source = example.copy()
        if altered.any():
            source[altered] = self.views.index(numbers)
        pixels = self.images.pixels[self.rows[source]]
        for place, number in zip(np.flatnonzero(altered), numbers.tolist(), strict=True):
            pixels[place] = self.views.make(number, self._image)
        labels = self.labels[source]
        if self.views.mixing.is_on:
            labels[altered] = IGNORE
        return {
            "pixel_values": self.format.normalise(pixels),
            "labels": torch.from_numpy(labels),
            "index": torch.from_numpy(np.where(fresh, -1, example)),
        }


class ImageData(ClassificationData):
    """Images with one class each; subclasses implement `read` and set `image_format`.

    Shifting and mirroring keep the class, so views have labels and every training, also the teacher's and the
    baseline's, uses them. If views mix two images, no view has a label: the teacher labels them, as for texts. Student
    and teacher get the same images, whatever tokens `select` chooses.

    Batches have `pixel_values` `(B, C, H, W)` float32, `labels` and `index`. Images are loaded, scaled
    and cropped once, and stored on disk as bytes.

    Args:
        crop_padding: Largest shift of a view in pixels.
        flip_probability: How often a view is mirrored.
        mixup_probability: How often a view is the mean of two images; see `Mixing`.
        cutmix_probability: How often a view has a rectangle of another image.
        mix_alpha: Two images' shares are drawn from Beta(mix_alpha, mix_alpha): 1 is evenly, less is mostly one.
        cache_dir: Where the bytes are kept; by default under `$KD_LIGHTNING_HOME`.
        options: Those of `ClassificationData`; after the images that `train_examples` leaves out, `transfer_examples`
            takes unlabelled ones.

    Raises:
        ConfigError: An option out of its range.
    """

    image_format: ImageFormat

    def __init__(
        self,
        crop_padding: int = 4,
        flip_probability: float = 0.5,
        mixup_probability: float = 0.0,
        cutmix_probability: float = 0.0,
        mix_alpha: float = 1.0,
        cache_dir: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_least(0, crop_padding=crop_padding)
        check_probabilities(
            flip_probability=flip_probability, mixup_probability=mixup_probability,
            cutmix_probability=cutmix_probability,
        )  # fmt: skip
        if mixup_probability + cutmix_probability > 1:
            raise ConfigError(
                f"data.mixup_probability={mixup_probability:g} and data.cutmix_probability={cutmix_probability:g}: a "
                "view is mixed in one way only; expected a sum of at most 1"
            )
        if not (mix_alpha > 0 and math.isfinite(mix_alpha)):
            raise ConfigError(f"data.mix_alpha={mix_alpha:g}: expected a positive number")
        self.crop_padding = crop_padding
        self.flip_probability = flip_probability
        self.mixing = Mixing(mixup_probability, cutmix_probability, mix_alpha)
        self.cache_dir = Path(cache_dir) if cache_dir else home() / "images"

    @abstractmethod
    def read(self) -> ImageCorpus:
        """Return the class names and the images."""

    # -- getting ready ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Load and split everything; a second call does nothing."""
        if self.fingerprint:
            return
        corpus = self.read()
        rows = self._split(corpus)
        count = len(rows["train"])
        self._decide_views(count, len(rows["transfer"]))
        self._views = ImageViews(
            count, self.views, self.split_seed, self.crop_padding, self.flip_probability, self.mixing
        )
        stored = self._views.per_set * (self.view_sets or 0)
        viewed = rows["train"][self._views.index(np.arange(stored))] if stored else rows["train"][:0]
        parts = [rows["train"], viewed, rows["transfer"], rows["validation"], rows["test"]]
        self._rows = np.concatenate(parts)
        self._lay_out([len(part) for part in parts])
        self._images = corpus.images
        self._labels = corpus.labels[self._rows]
        self._labels[self._spans["transfer"].start : self._spans["transfer"].stop] = IGNORE
        if self.mixing.is_on:
            self._labels[self._spans["views"].start : self._spans["views"].stop] = IGNORE
        self.class_names = corpus.class_names
        self._name_content()

    def _split(self, corpus: ImageCorpus) -> dict[str, NDArray[np.int64]]:
        """Return the rows of each split, ascending; held-out rows do not depend on `train_examples`."""
        rows = {part: np.arange(run.start, run.stop) for part, run in corpus.rows.items()}
        train = rows["train"][stratified_order(corpus.labels[rows["train"]], self.split_seed)]
        check_fractions(list(corpus.held_out.values()), "the training images")
        sizes = {part: max(1, round(share * len(rows["train"]))) for part, share in corpus.held_out.items()}
        for part, size in sizes.items():
            rows[part], train = train[:size], train[size:]
        rows["train"], rows["transfer"] = self._draw(train, corpus.labels, rows.get("transfer"))
        return {part: np.sort(found) for part, found in rows.items()}

    def _name_content(self) -> None:
        """Set the fingerprints: for teacher outputs, of all data, and without the pool."""
        self.teacher_key = self._key(self.parts)
        self.fingerprint = self._name(self.parts)
        if not self.mixing.is_on:  # views have labels
            self._without_pool = ("train", "views", "validation", "test")
        self._fingerprints = {True: self.fingerprint, False: self._name(self._without_pool)}

    def _key(self, parts: Sequence[str]) -> dict[str, Any]:
        """Return what determines teacher outputs for some splits."""
        made = {"version": views.VERSION, "sets": self.view_sets, **asdict(self._views)}
        if not self.mixing.is_on:
            del made["mixing"]
        shown = self._of(self._rows, parts)
        rows = hashlib.sha256(shown.astype("<i8").tobytes()).hexdigest()
        return {
            "images": hashlib.sha256(f"{self._images.digest}{rows}".encode()).hexdigest(),
            "examples": len(shown),
            "pixels": store.VERSION,
            "format": asdict(self.image_format),
            "views": made if self.views and "views" in parts else None,
        }

    def _name(self, parts: Sequence[str]) -> str:
        """Return the fingerprint of some splits."""
        content: list[Any] = [self._key(parts), self._of(self._labels, parts).tolist(), self.class_names]
        content.append(self._spans_of(parts))
        if self.pool_ratio is not None and "views" in parts:
            content.append({"pool_ratio": self.pool_ratio})
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def folds(self, count: int) -> NDArray[np.int64]:
        """Return which of `count` folds each example is in; see `ClassificationData`.

        Raises:
            ConfigError: As there, or mixed views, which show two images of different folds.
        """
        if self.mixing.is_on and self.views:
            raise ConfigError(
                f"teacher.folds={count}: a mixed view shows images of two folds, so every teacher has seen "
                "one of them: set data.mixup_probability=0 and data.cutmix_probability=0, or teacher.folds=1"
            )
        return super().folds(count)

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def lengths(self) -> NDArray[np.int64]:
        """One for each example, `(num_examples,)`: images have no tokens."""
        return np.ones(self.num_examples, np.int64)

    def model_arguments(self, role: Role) -> dict[str, int]:
        """Return a network's arguments from the data: `num_classes` and `channels`."""
        self.prepare()
        return {"num_classes": self.num_classes, "channels": self.image_format.channels}

    @property
    def input_format(self) -> dict[str, Any]:
        """The preprocessing of images."""
        return {"images": asdict(self.image_format)}

    # -- batches ------------------------------------------------------------------------------------------------------

    def _training_dataset(self) -> ImageDataset:
        if self.mixing.is_on and not self._pool:
            data = self._dataset("train", "train")
            data.views, data.stored = replace(self._views, count=0), range(0)
            return self._trained_on(data)
        return self._trained_on(self._dataset("train", "transfer" if self._pool else "views"))

    def _dataset(self, first: str, last: str) -> ImageDataset:
        self.prepare()
        span = range(self._spans[first].start, self._spans[last].stop)
        stored = self._spans["views"]
        return ImageDataset(self._images, self._rows, self._labels, span, self._views, stored, self.image_format)
