"""Views of two images: pure functions, for the teacher alone to label."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kd_lightning.data import FashionMNIST
from kd_lightning.data.image.views import ImageViews, Mixing, cutmix, make_image_view, mixup
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE
from tests.data.images import write_fashion

IMAGES = np.random.default_rng(0).integers(1, 255, (40, 1, 8, 10), np.uint8)


def image_of(index: int) -> NDArray[np.uint8]:
    return IMAGES[index]  # type: ignore[no-any-return]


def views(**mixing: float) -> ImageViews:
    return ImageViews(len(IMAGES), 2, 5, 1, 0.5, Mixing(**mixing))


def one(found: ImageViews, number: int) -> NDArray[np.uint8]:
    return found.make(number, image_of)


def made(found: ImageViews) -> list[NDArray[np.uint8]]:
    return [one(found, number) for number in range(3 * found.per_set)]


def plain() -> list[NDArray[np.uint8]]:
    return made(ImageViews(len(IMAGES), 2, 5, 1, 0.5))


def test_off_views_are_what_they_were() -> None:
    for number, view in enumerate(plain()):
        one_set, place = divmod(number, 80)
        expected = make_image_view(
            IMAGES[place // 2], place // 2, 2 * one_set + place % 2, 5, crop_padding=1, flip_probability=0.5
        )
        assert (view == expected).all()


@pytest.mark.parametrize("mixing", [{"mixup_probability": 0.3}, {"cutmix_probability": 0.3}])
def test_shares_and_purity(mixing: dict[str, float]) -> None:
    found = views(**mixing)
    forward = made(found)
    backward = [one(found, number) for number in reversed(range(len(forward)))]
    assert all((first == second).all() for first, second in zip(forward, backward[::-1], strict=True))
    changed = np.mean([(first != second).any() for first, second in zip(forward, plain(), strict=True)])
    assert changed == pytest.approx(0.3, abs=0.09)
    assert all(view.dtype == np.uint8 and view.shape == (1, 8, 10) for view in forward)


def test_a_mixed_view_shows_another_image_too() -> None:
    found = ImageViews(len(IMAGES), 2, 5, 0, 0.0, Mixing(mixup_probability=1, alpha=1e9))  # halves, and nothing moves
    partners = []
    for number in range(3 * found.per_set):
        index = found.index(number)
        others = [
            i
            for i, image in enumerate(IMAGES)
            if (np.abs(one(found, number) - (image_of(index) / 2 + image / 2)) <= 1).all()
        ]
        assert len(others) == 1
        partners += others
        assert others != [index]
    assert len(set(partners)) > len(IMAGES) / 2
    alone = ImageViews(1, 2, 5, 0, 0.0, Mixing(mixup_probability=1))
    assert (one(alone, 0) == IMAGES[0]).all()


def test_mixup_is_the_mean() -> None:
    first, second = IMAGES[0], IMAGES[1]
    assert (mixup(first, second, 1.0) == first).all()
    assert (mixup(first, second, 0.0) == second).all()
    np.testing.assert_allclose(mixup(first, second, 0.3), 0.3 * first + 0.7 * second.astype(float), atol=0.5)


def test_cutmix_is_a_rectangle_of_the_other() -> None:
    black, white = np.zeros((3, 30, 40), np.uint8), np.full((3, 30, 40), 255, np.uint8)
    areas = []
    for seed in range(300):
        mixed = cutmix(black, white, 0.75, random.Random(seed))
        down, right = np.nonzero(mixed[0])
        if len(down):
            assert (mixed[:, down.min() : down.max() + 1, right.min() : right.max() + 1] == 255).all()
            assert (np.ptp(down) + 1) * (np.ptp(right) + 1) == len(down)
        assert (mixed[0] == mixed[2]).all()
        areas.append(len(down) / 1200)
    assert max(areas) == pytest.approx(0.25, abs=0.02)
    assert (black == 0).all()
    assert (cutmix(black, white, 1.0, random.Random(0)) == black).all()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., FashionMNIST]:
    folder = str(write_fashion(tmp_path / "images", train=100))
    return lambda **options: FashionMNIST(**{"folder": folder, "views": 2, "batch_size": 10, **options})


@pytest.mark.parametrize("sets", [2, None])
def test_mixed_views_have_no_label_and_are_the_teachers(make: Callable[..., FashionMNIST], sets: int | None) -> None:
    data = make(view_sets=sets, mixup_probability=0.5)
    whole = [
        torch.cat(parts) for parts in zip(*((b["index"], b["labels"]) for b in data.train_dataloader()), strict=True)
    ]
    train = data.sizes["train"]
    is_view = (whole[0] >= train) | (whole[0] < 0)
    assert len(whole[0]) == 3 * train
    assert (whole[1][is_view] == IGNORE).all()
    assert (whole[1][~is_view] != IGNORE).all()
    labelled = data.select(pool=False).train_dataloader()
    found = torch.cat([batch["index"] for batch in labelled])
    assert sorted(found.tolist()) == list(range(train))
    assert all((batch["labels"] != IGNORE).all() for batch in labelled)


def test_no_teacher_is_without_both_images_of_a_mixed_view(make: Callable[..., FashionMNIST]) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.folds=2: a mixed view shows images of two folds"):
        make(cutmix_probability=0.5).folds(2)
    data = make(cutmix_probability=0.5, views=0)
    assert (data.folds(2) >= 0).sum() == data.sizes["train"]


def test_off_fingerprints_are_what_they_were(make: Callable[..., FashionMNIST]) -> None:
    prints, keys = [], []
    for options in ({}, {"mix_alpha": 0.2}, {"mixup_probability": 0.5}, {"mixup_probability": 0.5, "mix_alpha": 0.2}):
        data = make(**options)
        data.prepare()
        prints.append(data.fingerprint)
        keys.append(data.teacher_key)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert "mixing" not in keys[0]["views"]
    assert keys[2]["views"]["mixing"]["mixup_probability"] == 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mixup_probability": 2}, r"data\.mixup_probability=2: expected a probability"),
        ({"mixup_probability": 0.6, "cutmix_probability": 0.6}, "expected a sum of at most 1"),
        ({"mix_alpha": 0}, r"data\.mix_alpha=0: expected a positive number"),
        ({"mix_alpha": float("inf")}, r"data\.mix_alpha=inf: expected a positive number"),
    ],
)
def test_what_is_refused(make: Callable[..., FashionMNIST], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(**options)
