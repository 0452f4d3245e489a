"""Fashion-MNIST: 70,000 grey images of clothes in ten classes, 28 x 28."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.image.datamodule import ImageCorpus, ImageData
from kd_lightning.data.image.store import ImageFormat, store_images
from kd_lightning.runtime.assets import FASHION_MNIST_FILES, fetch
from kd_lightning.runtime.errors import DataError
from kd_lightning.runtime.memoize import stamps

CLASS_NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


class FashionMNIST(ImageData):
    """Images of clothes, 60,000 for training and 10,000 for testing (arXiv 1708.07747).

    Xiao, Rasul & Vollgraf 2017. A share of the training images is held out for validation. MIT licence.

    Args:
        folder: Where the four files are (`train-images-idx3-ubyte.gz` and so on); by default fetched with apt, as the
            Debian package `dataset-fashion-mnist`.
        validation_fraction: Share of the training images to hold out.
        mean: Subtracted from values in [0, 1].
        std: Divided by.
        options: Those of `ImageData`.
    """

    def __init__(
        self,
        folder: str | None = None,
        validation_fraction: float = 0.1,
        mean: Sequence[float] = (0.286,),
        std: Sequence[float] = (0.353,),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder = folder
        self.validation_fraction = validation_fraction
        self.image_format = ImageFormat(28, 1, list(mean), list(std))

    def read(self) -> ImageCorpus:
        """Read the four files."""
        folder = Path(self.folder).expanduser() if self.folder else fetch("fashion_mnist")
        if missing := [name for name in FASHION_MNIST_FILES if not (folder / name).is_file()]:
            raise DataError(f"data.folder={folder} lacks {', '.join(missing)}")
        train_labels, test_labels = (read_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k"))
        labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
        if labels.ndim != 1 or not len(train_labels) or labels.max() >= len(CLASS_NAMES):
            raise DataError(f"{folder}: the labels are not those of Fashion-MNIST, ten classes numbered from 0")
        key = stamps([str(folder / name) for name in FASHION_MNIST_FILES])
        counts = {"train": len(train_labels), "t10k": len(test_labels)}
        pictures = (picture for part, count in counts.items() for picture in _pictures(folder, part, count))
        images = store_images(self.cache_dir, key, (len(labels), 1, 28, 28), pictures)
        rows = {"train": range(len(train_labels)), "test": range(len(train_labels), len(labels))}
        return ImageCorpus(CLASS_NAMES, images, labels, rows, {"validation": self.validation_fraction})


def _pictures(folder: Path, part: str, count: int) -> NDArray[np.uint8]:
    path = folder / f"{part}-images-idx3-ubyte.gz"
    pictures = read_idx(path)
    if pictures.shape != (count, 28, 28):
        raise DataError(f"{path}: expected {count} pictures of 28 x 28, as there are labels, found {pictures.shape}")
    return pictures


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped array of bytes in the IDX format of MNIST.

    Raises:
        DataError: Another kind of file, or a damaged one.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as a gzip file: {error}") from error
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0  # 8: unsigned bytes
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    if not axes or len(content) != start + math.prod(shape):
        raise DataError(f"{path} is not an IDX file of bytes, or is cut off")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
