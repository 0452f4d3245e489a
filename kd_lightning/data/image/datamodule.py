"""Images as a `LightningDataModule`: read, split, altered by shifts and flips, served as normalised batches."""

from __future__ import annotations

import hashlib
import json
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.classification import ClassificationData, check_probabilities
from kd_lightning.data.datamodule import BatchDataset, Role, check_least, stratified_order
from kd_lightning.data.image import store
from kd_lightning.data.image.store import ImageFormat, ImageStore
from kd_lightning.data.sampler import Positions, Turn
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE, Batch

VERSION = 1
"""Raised when an image has other views: what was made of them before is then not used any more."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What networks pretrained on ImageNet expect."""


@dataclass(frozen=True)
class ImageCorpus:
    """Everything a task has to train, select and test on.

    Attributes:
        class_names: In the order of the labels.
        images: All of them.
        labels: Their classes, `(N,)` int64.
        rows: Which of them are the parts `train` and, where the source has them, `validation`, `test` and `transfer`,
            whose labels mean nothing.
        held_out: Which share of `train` to hold out for a part that the source does not have.
    """

    class_names: list[str]
    images: ImageStore
    labels: NDArray[np.int64]
    rows: Mapping[str, range]
    held_out: Mapping[str, float] = field(default_factory=dict)


def make_image_view(
    image: NDArray[np.uint8], index: int, view: int, seed: int, *, crop_padding: int, flip_probability: float
) -> NDArray[np.uint8]:
    """Return one altered copy of an image: padded with black and cut out again somewhere, and perhaps mirrored.

    Args:
        image: `(C, H, W)`.
        index: The image's position in the data set.
        view: Which view of it, from 0.
        seed: Of the whole data set.
        crop_padding: The image moves by at most so many pixels in each direction.
        flip_probability: How often left and right are exchanged.

    Returns:
        The view: a function of the arguments alone, the same in any order and in any process.
    """
    rng = random.Random(f"{seed}/{index}/{view}")
    _, height, width = image.shape
    down, right = (rng.randint(0, 2 * crop_padding) for _ in range(2))
    padded = np.pad(image, ((0, 0), (crop_padding, crop_padding), (crop_padding, crop_padding)))
    cut = padded[:, down : down + height, right : right + width]
    return cut[:, :, ::-1] if rng.random() < flip_probability else cut


@dataclass(frozen=True)
class Mixing:
    """How often a view is mixed with a view of another image, and how.

    Attributes:
        mixup_probability: By mixup (Zhang et al. 2018, arXiv 1710.09412): `share x + (1 - share) x'`.
        cutmix_probability: By CutMix (Yun et al. 2019, arXiv 1905.04899): a rectangle of about `1 - share` of the area,
            anywhere, shows the other image.
        alpha: The share is drawn from Beta(alpha, alpha).
    """

    mixup_probability: float = 0.0
    cutmix_probability: float = 0.0
    alpha: float = 1.0

    @property
    def is_on(self) -> bool:
        """Whether any view is mixed."""
        return self.mixup_probability + self.cutmix_probability > 0

    def mixes(self, rng: random.Random) -> Literal["mixup", "cutmix"] | None:
        """Draw how a view is mixed, if it is."""
        drawn = rng.random()
        if drawn < self.mixup_probability:
            return "mixup"
        return "cutmix" if drawn < self.mixup_probability + self.cutmix_probability else None


def mixup(image: NDArray[np.uint8], other: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    """Return the mean of two images `(C, H, W)`, of which the first has the weight `share`."""
    mean: NDArray[np.uint8] = np.rint(share * image.astype(float) + (1 - share) * other).astype(np.uint8)
    return mean


def cutmix(image: NDArray[np.uint8], other: NDArray[np.uint8], share: float, rng: random.Random) -> NDArray[np.uint8]:
    """Return an image `(C, H, W)` with a rectangle of another: `1 - share` of its area, less where it leaves the image.

    The rectangle has the image's proportions and its centre anywhere.
    """
    mixed = image.copy()
    spans = []
    for size in image.shape[1:]:
        half, centre = size * (1 - share) ** 0.5 / 2, rng.uniform(0, size)
        spans.append(slice(max(round(centre - half), 0), min(round(centre + half), size)))
    mixed[:, spans[0], spans[1]] = other[:, spans[0], spans[1]]
    return mixed


@dataclass(frozen=True)
class ImageViews:
    """The views of all training images, numbered: set by set, in a set image by image; there is no last set.

    Attributes:
        images: How many images there are.
        count: Views of each in one set.
        seed: Of all of them.
        crop_padding: As in `make_image_view`.
        flip_probability: As in `make_image_view`.
        mixing: With other images' views.
    """

    images: int
    count: int
    seed: int
    crop_padding: int
    flip_probability: float
    mixing: Mixing = Mixing()

    @property
    def per_set(self) -> int:
        """How many views one set has."""
        return self.images * self.count

    def index(self, number: Any) -> Any:
        """Return which image a view is of; numbers or arrays of numbers."""
        return number % self.per_set // self.count

    def make(self, number: int, image_of: Callable[[int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return one view; `image_of` returns an image's pixels by its position in the data set."""
        one_set, place = divmod(number, self.per_set)
        index, view = divmod(place, self.count)
        view += one_set * self.count
        image = self._moved(image_of(index), index, view)
        if not self.mixing.is_on or self.images == 1:
            return image
        rng = random.Random(f"{self.seed}/{index}/{view}/mix")
        kind = self.mixing.mixes(rng)
        if kind is None:
            return image
        partner = rng.randrange(self.images - 1)
        partner += partner >= index
        other = self._moved(image_of(partner), partner, view)
        share = rng.betavariate(self.mixing.alpha, self.mixing.alpha)
        return mixup(image, other, share) if kind == "mixup" else cutmix(image, other, share, rng)

    def _moved(self, image: NDArray[np.uint8], index: int, view: int) -> NDArray[np.uint8]:
        return make_image_view(
            image, index, view, self.seed, crop_padding=self.crop_padding,
            flip_probability=self.flip_probability,
        )  # fmt: skip


class ImageDataset(BatchDataset):
    """A run of images. A view is made when a batch needs it, whether it has an `index` or not.

    Args:
        images: All of them.
        rows: Which of them each example shows, `(num_examples,)`.
        labels: Of all examples, `(num_examples,)` int64.
        span: Which examples these are. Positions beyond are fresh views, epoch after epoch, of index -1.
        views: What numbers the views.
        stored: The examples that are views, which the epochs take turns at; none where each epoch has fresh ones.
        format: What the images are made into.
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
        """Return the positions that an epoch takes: the images, one set of their views, what only a teacher labels."""
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
    """Images with one class each. A subclass says where they come from, in `read`, and sets `image_format`.

    A shift or a mirror image keeps the class, so that views have labels and every training, also the teacher's and the
    baseline's, goes through them beside the images themselves. Where views are mixed of two images, no view has a
    label: they are for the teacher to label, as for texts. Student and teacher read the same images: which tokens
    `select` chooses is one thing here.

    Batches have `pixel_values` `(B, C, H, W)` float32, `labels` and `index`. Images are kept on disk as bytes, read,
    scaled and cut once.

    Args:
        train_examples: Train on so many images only, evenly over the classes, whatever else stays the same; a smaller
            choice is part of a larger one. None: all.
        transfer_examples: Have the teacher label so many images more, which only the distillation trains on: first
            those that `train_examples` leaves out, then those that come without labels. None: all of them.
        crop_padding: A view is moved by at most so many pixels.
        flip_probability: How often a view is mirrored.
        mixup_probability: How often a view is the mean of two images; see `Mixing`.
        cutmix_probability: How often a view has a rectangle of another image.
        mix_alpha: Two images' shares are drawn from Beta(mix_alpha, mix_alpha): 1 is evenly, less is mostly one.
        cache_dir: Where the bytes are kept; by default under `$KD_LIGHTNING_HOME`.
        options: Those of `ClassificationData`.

    Raises:
        ConfigError: An option out of its range.
    """

    image_format: ImageFormat

    def __init__(
        self,
        train_examples: int | None = None,
        transfer_examples: int | None = 0,
        crop_padding: int = 4,
        flip_probability: float = 0.5,
        mixup_probability: float = 0.0,
        cutmix_probability: float = 0.0,
        mix_alpha: float = 1.0,
        cache_dir: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_least(0, crop_padding=crop_padding, transfer_examples=transfer_examples or 0)
        check_least(1, train_examples=1 if train_examples is None else train_examples)
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
        self.train_examples = train_examples
        self.transfer_examples = transfer_examples
        self.crop_padding = crop_padding
        self.flip_probability = flip_probability
        self.mixing = Mixing(mixup_probability, cutmix_probability, mix_alpha)
        self.cache_dir = Path(cache_dir) if cache_dir else home() / "images"

    @abstractmethod
    def read(self) -> ImageCorpus:
        """Return the class names and the images."""

    # -- getting ready ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read and split everything; a second call does nothing."""
        if self.fingerprint:
            return
        corpus = self.read()
        rows = self._split(corpus)
        count = len(rows["train"])
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
        """Return the rows of each part, ascending; what is held out does not depend on `train_examples`."""
        rows = {part: np.arange(run.start, run.stop) for part, run in corpus.rows.items()}
        train = rows["train"][stratified_order(corpus.labels[rows["train"]], self.split_seed)]
        shares = list(corpus.held_out.values())
        if any(not 0 < share < 1 for share in shares) or sum(shares) >= 1:
            raise ConfigError(
                f"cannot hold out the fractions {', '.join(f'{share:g}' for share in shares)} of the training images: "
                "each must lie between 0 and 1, their sum below 1; change data.validation_fraction or test_fraction"
            )
        sizes = {part: max(1, round(share * len(rows["train"]))) for part, share in corpus.held_out.items()}
        for part, size in sizes.items():
            rows[part], train = train[:size], train[size:]
        if self.train_examples is not None and self.train_examples > len(train):
            raise ConfigError(f"data.train_examples={self.train_examples}, but there are {len(train)} to train on")
        rows["train"] = train[: self.train_examples]
        rest = train[len(rows["train"]) :]
        unlabelled = np.concatenate([rest, rows.get("transfer", rest[:0])])
        if self.transfer_examples is not None and self.transfer_examples > len(unlabelled):
            raise ConfigError(
                f"data.transfer_examples={self.transfer_examples}, but there are {len(unlabelled)} images for the "
                "teacher to label: take fewer, or fewer to train on (data.train_examples)"
            )
        rows["transfer"] = unlabelled[: self.transfer_examples]
        return {part: np.sort(found) for part, found in rows.items()}

    def _name_content(self) -> None:
        """Name everything: as far as a teacher's answers depend on it, whole, and without the pool."""
        self.teacher_key = self._key(self.parts)
        self.fingerprint = self._name(self.parts)
        if not self.mixing.is_on:  # views have labels
            self._without_pool = ("train", "views", "validation", "test")
        self._fingerprints = {True: self.fingerprint, False: self._name(self._without_pool)}

    def _key(self, parts: Sequence[str]) -> dict[str, Any]:
        """Return what decides a teacher's answers about some parts."""
        views = {"version": VERSION, "sets": self.view_sets, **asdict(self._views)}
        if not self.mixing.is_on:
            del views["mixing"]
        shown = self._of(self._rows, parts)
        rows = hashlib.sha256(shown.astype("<i8").tobytes()).hexdigest()
        return {
            "images": hashlib.sha256(f"{self._images.digest}{rows}".encode()).hexdigest(),
            "examples": len(shown),
            "pixels": store.VERSION,
            "format": asdict(self.image_format),
            "views": views if self.views and "views" in parts else None,
        }

    def _name(self, parts: Sequence[str]) -> str:
        """Return the fingerprint of some parts."""
        content: list[Any] = [self._key(parts), self._of(self._labels, parts).tolist(), self.class_names]
        content.append(self._spans_of(parts))
        if self.pool_ratio is not None and "views" in parts:
            content.append({"pool_ratio": self.pool_ratio})
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def folds(self, count: int) -> NDArray[np.int64]:
        """Return which of `count` folds each example is in; see `ClassificationData`.

        Raises:
            ConfigError: As there, or views that show two images: no teacher may be without both.
        """
        if self.mixing.is_on and self.views:
            raise ConfigError(
                f"teacher.folds={count}: a mixed view shows images of two folds, and who has not seen the one has seen "
                "the other: set data.mixup_probability=0 and data.cutmix_probability=0, or teacher.folds=1"
            )
        return super().folds(count)

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def lengths(self) -> NDArray[np.int64]:
        """One for each example, `(num_examples,)`: images have no tokens."""
        return np.ones(self.num_examples, np.int64)

    def model_arguments(self, role: Role) -> dict[str, int]:
        """Return what the data decide about a network: `num_classes` and `channels`."""
        self.prepare()
        return {"num_classes": self.num_classes, "channels": self.image_format.channels}

    @property
    def input_format(self) -> dict[str, Any]:
        """What an image is made into."""
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
