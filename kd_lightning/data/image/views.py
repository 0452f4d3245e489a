"""Views of images: shifted, mirrored, mixed with others."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

VERSION = 1
"""Raised when an image has other views: what was made of them before is then not used any more."""


def make_image_view(
    image: NDArray[np.uint8], index: int, view: int, seed: int, *, crop_padding: int, flip_probability: float
) -> NDArray[np.uint8]:
    """Return one augmented view of an image: padded, cropped at random, and perhaps mirrored.

    Args:
        image: `(C, H, W)`.
        index: The image's position in the data set.
        view: Which view of it, from 0.
        seed: Of the whole data set.
        crop_padding: Largest shift in pixels, in each direction.
        flip_probability: How often the image is mirrored.

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
    """Paste a rectangle of another image `(C, H, W)`, `1 - share` of the area before clipping.

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
    """The views of all training images, numbered set by set, then image by image, without end.

    Attributes:
        images: Number of images.
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
        """Number of views in a set."""
        return self.images * self.count

    def index(self, number: Any) -> Any:
        """Return the image of a view; for numbers or arrays."""
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
