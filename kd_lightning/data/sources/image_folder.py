"""The user's own images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_lightning.data.image.datamodule import IMAGENET_MEAN, IMAGENET_STD, ImageCorpus, ImageData
from kd_lightning.data.image.store import ImageFormat, read_image, store_images
from kd_lightning.data.labels import key_of, label_of, number_of, sort_names
from kd_lightning.runtime.errors import DataError, did_you_mean
from kd_lightning.runtime.memoize import stamps
from kd_lightning.types import IGNORE

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}


class ImageFolder(ImageData):
    """Images in folders named after their classes: `train/CLASS/*.jpg`, and `val/`, `test/` likewise.

    Without `val/` or `test/`, a stratified share of the training images is held out. Images in `unlabelled/` and its
    subfolders are the transfer set (`transfer_examples`). Images are scaled and centre-cropped to squares. Needs
    Pillow.

    Args:
        folder: The one that holds `train`.
        image_size: Height and width in pixels.
        channels: 3 for colour, 1 for grey.
        mean: Of each channel, subtracted from values in [0, 1]; by default ImageNet's.
        std: Of each channel, divided by; by default ImageNet's.
        validation_fraction: Share to hold out without `val`.
        test_fraction: Share to hold out without `test`.
        options: Those of `ImageData`.
    """

    def __init__(
        self,
        folder: str,
        image_size: int = 64,
        channels: int = 3,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder = Path(folder).expanduser()
        self.image_format = ImageFormat(image_size, channels, list(mean), list(std))
        self.fractions = {"validation": validation_fraction, "test": test_fraction}

    def read(self) -> ImageCorpus:
        """Find the images and read them."""
        folders = {part: [self.folder / name for name in names] for part, names in _FOLDERS.items()}
        there = {part: next((path for path in paths if path.is_dir()), None) for part, paths in folders.items()}
        if there["train"] is None:
            raise DataError(f"data.folder={self.folder} has no folder 'train' with a folder of images for each class")
        class_names = sort_names(_folders(there["train"]))
        if len(class_names) < 2:
            raise DataError(f"{there['train']}: expected a folder for each of two classes or more, found {class_names}")
        files: list[Path] = []
        labels: list[int] = []
        rows = {}
        for part, path in there.items():
            if path is not None:
                start = len(files)
                for label, found in enumerate(_files(path, class_names, must_have_all=part == "train")):
                    files += found
                    labels += [label] * len(found)
                rows[part] = range(start, len(files))
        if self.transfer_examples != 0:
            unlabelled = _images(self.folder / "unlabelled")
            rows["transfer"] = range(len(files), len(files) + len(unlabelled))
            files += unlabelled
            labels += [IGNORE] * len(unlabelled)
        size, channels = self.image_format.size, self.image_format.channels
        key = [[str(path.relative_to(self.folder)), *stamps(str(path))[0][1:]] for path in files]
        images = store_images(
            self.cache_dir, key, (len(files), channels, size, size),
            (read_image(path, size, channels) for path in files),
        )  # fmt: skip
        held_out = {part: share for part, share in self.fractions.items() if part not in rows}
        return ImageCorpus(class_names, images, np.array(labels, np.int64), rows, held_out)


def _folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the classes by class name."""
    found: dict[str, Path] = {}
    keys: dict[object, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            name = label_of(path.name, str(path))
            if number_of(name) in (-1, IGNORE):
                raise DataError(
                    f"{path}: {name} stands for a missing label; images without one are put in "
                    f"{folder.parent / 'unlabelled'} (data.transfer_examples)"
                )
            if (other := keys.setdefault(key_of(name), path)) != path:
                raise DataError(f"{path}: {other} is the same class; put their images in one folder")
            found[name] = path
    return found


def _files(folder: Path, class_names: Sequence[str], must_have_all: bool) -> list[list[Path]]:
    """Return the sorted image files of each class; only `train` needs all classes."""
    folders = {key_of(name): path for name, path in _folders(folder).items()}
    keys = [key_of(name) for name in class_names]
    if unknown := [path for key, path in folders.items() if key not in keys]:
        raise DataError(f"{unknown[0]}: not a class of the training images{did_you_mean(unknown[0].name, class_names)}")
    found = [_images(folders[key]) if key in folders else [] for key in keys]
    empty = [
        folders.get(key, folder / name) for key, name, files in zip(keys, class_names, found, strict=True) if not files
    ]
    if empty and (must_have_all or len(empty) == len(found)):
        raise DataError(f"{empty[0]}: there are no images ({', '.join(SUFFIXES)})")
    return found


def _images(folder: Path) -> list[Path]:
    """Return the sorted image files below a folder; none if it does not exist."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
