"""Images as one array of bytes, stored on disk and memory-mapped."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.runtime.assets import discard_folder, new_folder
from kd_lightning.runtime.errors import ConfigError, DataError, KDError
from kd_lightning.runtime.seals import check_seal, read_sealed, write_sealed

log = logging.getLogger(__name__)

VERSION = 2
"""Raised when an image becomes other numbers, or these other files: what was made before is then not used any more."""

SHOWN = 96
"""The most pixels a side of an image in a report."""


@dataclass(frozen=True)
class ImageFormat:
    """The preprocessing of images.

    Attributes:
        size: Height and width in pixels.
        channels: 1 (grey) or 3 (red, green, blue).
        mean: Of each channel, subtracted from values in [0, 1].
        std: Of each channel, divided by.

    Raises:
        ConfigError: A value out of its range, or not one mean and deviation a channel.
    """

    size: int
    channels: int
    mean: list[float]
    std: list[float]

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"data.image_size={self.size}: expected 1 or more")
        if self.channels not in (1, 3):
            raise ConfigError(f"data.channels={self.channels}: expected 1 (grey) or 3 (colour)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ConfigError(f"data.{name}={values}: expected one value for each of {self.channels} channels")
        if min(self.std) <= 0:
            raise ConfigError(f"data.std={self.std}: expected values above 0")

    def normalise(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Return bytes `(B, C, H, W)` as float32, less `mean`, over `std`."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return torch.from_numpy(pixels).float().div_(255).sub_(mean).div_(std)

    def png(self, image: Tensor) -> str:
        """Return a normalised image `(C, H, W)` as a PNG of at most `SHOWN` pixels a side, in base64."""
        from PIL import Image

        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        pixels = (image.cpu() * std + mean).mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        picture, file = Image.fromarray(pixels.squeeze(-1) if self.channels == 1 else pixels), io.BytesIO()
        picture.thumbnail((SHOWN, SHOWN))
        picture.save(file, format="PNG")
        return base64.b64encode(file.getvalue()).decode()


def read_image(path: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """Load an image file, scaled and centre-cropped to a square; `(channels, size, size)`.

    Raises:
        DataError: There is no such file, or it is not an image.
        ConfigError: Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ConfigError("reading image files needs Pillow, which is missing: pip install pillow") from error
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow raises several types, all with one meaning for the user
        raise DataError(f"{path} cannot be read as an image: {error}") from error
    square = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).reshape(size, size, channels).transpose(2, 0, 1)


@dataclass(frozen=True)
class ImageStore:
    """Stored images.

    Attributes:
        folder: Where they are stored.
        pixels: `(N, C, H, W)`.
        digest: A sha256 of the pixels.
    """

    folder: Path
    pixels: NDArray[np.uint8]
    digest: str

    def __reduce__(self) -> tuple[Any, ...]:
        return open_images, (self.folder, False)  # processes share the file, not copies of the array


def open_images(folder: Path, checked: bool = True) -> ImageStore:
    """Open stored images.

    Args:
        folder: Where they are stored.
        checked: Whether to verify the pixels' checksum.

    Raises:
        KDError: A file is missing or damaged.
    """
    meta = read_sealed(folder / "meta.json", "it is written again")
    if checked:
        check_seal(folder, {"pixels.uint8": meta["digest"]}, ["pixels.uint8"], "it is written again")
    pixels = np.memmap(folder / "pixels.uint8", np.uint8, "r", shape=tuple(meta["shape"]))
    return ImageStore(folder, np.asarray(pixels), meta["digest"])  # plain arrays are indexed faster


def store_images(cache: Path, key: Any, shape: tuple[int, ...], images: Iterable[NDArray[np.uint8]]) -> ImageStore:
    """Return images as one array from the cache, or load and store them.

    Args:
        cache: The folder of all stored images.
        key: Everything that determines the images, as JSON-able values; the cache's folder is named after it.
        shape: `(N, C, H, W)`.
        images: The N images, `(C, H, W)` each; not touched when they are stored already.
    """
    folder = cache / hashlib.sha256(json.dumps([VERSION, shape, key]).encode()).hexdigest()
    try:
        return open_images(folder)
    except (KDError, OSError, ValueError, KeyError) as error:
        if folder.exists():
            log.warning("%s; reading the images again", error)
            discard_folder(folder)
    log.info("reading %d images into %s", shape[0], folder)
    with new_folder(folder) as temporary:
        digest = hashlib.sha256()
        with (temporary / "pixels.uint8").open("wb") as file:
            for image in images:
                content = image.tobytes()
                digest.update(content)
                file.write(content)
        meta = {"shape": shape, "digest": digest.hexdigest()}
        write_sealed(temporary / "meta.json", meta)
    return open_images(folder)
