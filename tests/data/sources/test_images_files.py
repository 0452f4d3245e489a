"""Where images come from: the four files of Fashion-MNIST, folders of image files."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from kd_lightning.config.instantiate import conf_dir, parameters
from kd_lightning.data import FashionMNIST, ImageFolder
from kd_lightning.data.image.store import read_image
from kd_lightning.data.sources.fashion_mnist import read_idx
from kd_lightning.runtime import assets
from kd_lightning.runtime.errors import ConfigError, DataError, KDError
from kd_lightning.types import IGNORE
from tests.data.images import write_fashion, write_folder, write_idx

# -- Fashion-MNIST -----------------------------------------------------------------------------------------------------


def test_idx_files_are_read_as_they_are_defined(tmp_path: Path) -> None:
    content = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(range(6))
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    assert read_idx(tmp_path / "a.gz").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"plain", "cannot be read as a gzip file"),
        (gzip.compress(b"0123456789")[:-9], "cannot be read as a gzip file"),
        (gzip.compress(b""), "is not an IDX file of bytes"),
        (gzip.compress(bytes([0, 0, 13, 1, 0, 0, 0, 1, 5])), "is not an IDX file of bytes"),  # 13: floats
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5])), "is not an IDX file of bytes, or is cut off"),
        (gzip.compress(bytes([0, 0, 8, 9, 0, 0])), "is not an IDX file of bytes, or is cut off"),
    ],
    ids=["plain", "cut gzip", "empty", "floats", "too short", "too many axes"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_idx(tmp_path / "a.gz")


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    folder = write_fashion(tmp_path / "fashion")
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.zeros(49, np.uint8))
    with pytest.raises(DataError, match=r"t10k-images.*expected 49 pictures of 28 x 28.*found \(50, 28, 28\)"):
        FashionMNIST(str(folder)).prepare()
    assert not list((tmp_path / "home" / "images").iterdir()), "nothing half read stays"
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.full(50, 10, np.uint8))
    with pytest.raises(DataError, match="the labels are not those of Fashion-MNIST"):
        FashionMNIST(str(folder)).prepare()
    (folder / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"data\.folder=.* lacks train-images-idx3-ubyte\.gz"):
        FashionMNIST(str(folder)).prepare()


@pytest.fixture(scope="module")
def fetched() -> Path:
    """The machine's own copy: fetched at most once, while all else that a test writes stays in its own home."""
    try:
        return assets.fetch("fashion_mnist")
    except KDError as error:
        pytest.skip(str(error))


def test_the_real_pictures(fetched: Path) -> None:
    """60,000 and 10,000 pictures, every class alike, of the mean and deviation that the defaults say."""
    data = FashionMNIST(str(fetched))
    data.prepare()
    assert data.sizes == {"train": 54_000, "views": 0, "transfer": 0, "validation": 6_000, "test": 10_000}
    assert np.bincount(data._labels[-10_000:]).tolist() == [1_000] * 10
    assert np.bincount(data._labels[:54_000]).tolist() == [5_400] * 10
    assert data._images.pixels[:60_000].mean() / 255 == pytest.approx(0.286, abs=5e-4)
    assert data._images.pixels[:60_000].std() / 255 == pytest.approx(0.353, abs=5e-4)
    boots = data._images.pixels[60_000:, 0][data._labels[-10_000:] == 9]
    assert boots[:, 20:].mean() > 2 * boots[:, :8].mean(), "an ankle boot stands on its sole"


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., ImageFolder]:
    def make(parts: dict[str, int], **options: Any) -> ImageFolder:
        write_folder(tmp_path / "images", parts)
        return ImageFolder(str(tmp_path / "images"), image_size=8, **options)

    return make


def test_a_folder_a_class(make: Callable[..., ImageFolder]) -> None:
    data = make({"train": 10, "val": 2, "test": 3})
    data.prepare()
    assert data.class_names == ["blue", "red"]
    assert data.sizes == {"train": 20, "views": 0, "transfer": 0, "validation": 4, "test": 6}
    assert data.model_arguments("teacher") == {"num_classes": 2, "channels": 3}
    batch = next(iter(data.test_dataloader()))
    assert batch["pixel_values"].shape == (6, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    means, stds = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    colours = batch["pixel_values"].mean((2, 3)) * stds + means
    expected = [[0, 0, 250 - n] for n in range(3)] + [[250 - n, 0, 0] for n in range(3)]
    torch.testing.assert_close(colours, torch.tensor(expected) / 255, atol=1e-5, rtol=0)


def test_missing_parts_are_held_out(make: Callable[..., ImageFolder]) -> None:
    data = make({"train": 10}, validation_fraction=0.2, test_fraction=0.3)
    data.prepare()
    assert data.sizes == {"train": 10, "views": 0, "transfer": 0, "validation": 4, "test": 6}
    for part in ("train", "validation", "test"):
        span = data._spans[part]
        assert np.bincount(data._labels[span.start : span.stop]).tolist() == [len(span) // 2] * 2
    assert sorted(data._rows) == list(range(20))


def test_images_without_labels_are_for_the_teacher(make: Callable[..., ImageFolder], tmp_path: Path) -> None:
    none = make({"train": 6})
    none.prepare()
    for number, path in enumerate(sorted((tmp_path / "images" / "train").rglob("*.png"))[:3]):
        kept = tmp_path / "images" / "unlabelled" / f"from {number}" / path.name
        kept.parent.mkdir(parents=True)
        kept.write_bytes(path.read_bytes())
    again, some, all_of_them = (make({"train": 6}, transfer_examples=count) for count in (0, 2, None))
    for data in (again, some, all_of_them):
        data.prepare()
    assert again.fingerprint == none.fingerprint
    assert [data.sizes["transfer"] for data in (again, some, all_of_them)] == [0, 2, 3]
    labels = torch.cat([batch["labels"] for batch in all_of_them.train_dataloader()])
    assert (labels == IGNORE).sum() == 3
    with pytest.raises(ConfigError, match=r"data\.transfer_examples=4, but 3 examples are left for it"):
        make({"train": 6}, transfer_examples=4).prepare()


def test_grey(make: Callable[..., ImageFolder]) -> None:
    data = make({"train": 10}, channels=1, mean=[0.0], std=[1.0])
    batch = next(iter(data.val_dataloader()))
    assert batch["pixel_values"].shape == (2, 1, 8, 8)
    weights = {0: 0.114, 1: 0.299}  # of blue and red in grey (ITU-R 601)
    for image, label in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True):
        assert float(image.mean()) == pytest.approx(weights[label] * 0.96, abs=0.02)


def test_a_changed_image_is_read_again(make: Callable[..., ImageFolder], tmp_path: Path) -> None:
    first = make({"train": 10})
    first.prepare()
    again = make({})
    again.prepare()
    assert again.teacher_key == first.teacher_key
    Image.new("RGB", (9, 9), (0, 200, 0)).save(tmp_path / "images" / "train" / "red" / "03.png")
    changed = make({})
    changed.prepare()
    assert changed.teacher_key != first.teacher_key


def test_images_keep_their_proportions(tmp_path: Path) -> None:
    wide = Image.new("RGB", (30, 10), (255, 255, 255))
    wide.paste((0, 0, 0), (10, 0, 20, 10))  # a black square in the middle
    wide.save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", 10, 3).max() == 0
    turned = Image.new("L", (6, 6))
    turned.paste(255, (0, 0, 6, 3))  # white above
    exif = turned.getexif()
    exif[0x0112] = 3  # to be shown upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    found = read_image(tmp_path / "turned.png", 6, 1)
    assert found.shape == (1, 6, 6)
    assert found[0, :3].max() == 0
    assert found[0, 3:].min() == 255


def test_mistakes_in_folders_are_named(make: Callable[..., ImageFolder], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.folder=.* has no folder 'train'"):
        ImageFolder(str(tmp_path / "nothing")).prepare()
    data = make({"train": 4})
    (tmp_path / "images" / "train" / "red" / "00.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"train/red/00\.png cannot be read as an image"):
        data.prepare()
    assert not list((tmp_path / "home" / "images").iterdir())
    (tmp_path / "images" / "train" / "green").mkdir()
    with pytest.raises(DataError, match=r"train/green: there are no images"):
        data.prepare()
    (tmp_path / "images" / "train" / "green").rmdir()
    (tmp_path / "images" / "val" / "rde").mkdir(parents=True)
    with pytest.raises(DataError, match=r"val/rde: not a class of the training images; did you mean 'red'\?"):
        data.prepare()
    (tmp_path / "images" / "val" / "rde").rmdir()
    with pytest.raises(DataError, match=r"val/blue: there are no images"):
        data.prepare()


def test_one_class_is_none(tmp_path: Path) -> None:
    (tmp_path / "train" / "only").mkdir(parents=True)
    with pytest.raises(DataError, match=r"expected a folder for each of two classes or more, found \['only'\]"):
        ImageFolder(str(tmp_path)).prepare()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"channels": 2}, r"data\.channels=2: expected 1 \(grey\) or 3"),
        ({"channels": 1}, r"data\.mean=.*: expected one value for each of 1 channels"),
        ({"image_size": 0}, r"data\.image_size=0"),
        ({"validation_fraction": 0.6, "test_fraction": 0.5}, r"cannot hold out the fractions 0\.6, 0\.5"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    write_folder(tmp_path, {"train": 4})
    with pytest.raises(ConfigError, match=says):
        ImageFolder(str(tmp_path), **options).prepare()


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match="needs Pillow, which is missing: pip install"):
        read_image(tmp_path / "a.png", 8, 3)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "name"), [(FashionMNIST, "fashion_mnist"), (ImageFolder, "image_folder")])
def test_the_yaml_lists_every_option_with_its_default(source: type, name: str) -> None:
    given = yaml.safe_load((conf_dir() / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    parser = ArgumentParser()
    parser.add_class_arguments(source)
    assert "type: Any" not in parser.format_help()
    assert set(given) - {"_target_"} == set(parser.get_defaults().keys()) == set(parameters(source))


def image_folders(root: Path, **parts: list[str]) -> ImageFolder:
    for part, names in parts.items():
        for name in names:
            (root / part / name).mkdir(parents=True)
            for number in range(4):
                pixels = np.full((8, 8, 3), 40 * number, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return ImageFolder(str(root), image_size=8)


def test_folders_named_by_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    corpus = image_folders(tmp_path, train=["1", "2", "10"], val=["1.0", "02"], test=["10", "1"]).read()
    assert corpus.class_names == ["1", "2", "10"]
    assert {part: sorted(set(corpus.labels[run].tolist())) for part, run in corpus.rows.items()} == {
        "train": [0, 1, 2], "validation": [0, 1], "test": [0, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"train": ["a", "nan"]}, r"train/nan: the label is missing"),
        ({"train": ["0", "-1"]}, r"train/-1: -1 stands for a missing label; .* are put in .*unlabelled"),
        ({"train": ["0", "-100.0"]}, r"train/-100\.0: -100 stands for a missing label"),
        ({"train": ["1", "01"]}, r"train/1: .*train/01 is the same class"),
        ({"train": ["1", "2"], "val": ["3"]}, r"val/3: not a class of the training images"),
    ],
)
def test_folders_that_are_no_classes(tmp_path: Path, parts: dict[str, list[str]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        image_folders(tmp_path, **parts).read()
