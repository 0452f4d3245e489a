"""Small synthetic images: ten classes of stripes, lying or standing and of five widths."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def striped(count: int, seed: int, size: int = 28) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Stripes under noise, moved by chance, `(count, size, size)`, and the classes 0 to 9 in turn."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 60, (count, size, size), np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        width = 1 + label % 5
        bright = (np.arange(size) + generator.integers(2 * width)) // width % 2 == 1
        image[bright if label < 5 else (slice(None), bright)] += 180
    return pixels, labels


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Write bytes in the IDX format, gzipped: 0, 0, the type, the number of axes, their lengths, the content."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    with gzip.open(path, "wb") as file:
        file.write(head + array.tobytes())


def write_fashion(folder: Path, train: int = 200, test: int = 50) -> Path:
    """Write the four files of a small Fashion-MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count, seed in (("train", train, 0), ("t10k", test, 1)):
        pixels, labels = striped(count, seed)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def write_folder(folder: Path, parts: dict[str, int], size: tuple[int, int] = (20, 12)) -> Path:
    """Write PNG files of one colour a class, red or blue, under PART/CLASS/."""
    from PIL import Image

    for part, count in parts.items():
        for name, colour in (("blue", (0, 0, 250)), ("red", (250, 0, 0))):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                shade = tuple(max(value - number, 0) for value in colour)
                Image.new("RGB", size, shade).save(folder / part / name / f"{number:02}.png")
    return folder
