"""The fingerprints themselves: what a user's teacher answers, teachers and baselines are found by after an update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.data import FashionMNIST, TextFiles
from tests.data.images import write_fashion

CHANGED = (
    "data that were this are something else now, and everything that users keep of theirs is made anew: "
    "was that meant? (a new version of tokenizers may do it too)"
)

KEPT = {"replace_probability": 0, "drop_probability": 0}
"""Words stay, and in their number."""


@pytest.mark.parametrize(
    ("options", "whole", "without_pool"),
    [
        ({}, "c8cb8b2b83d1324b", "fd743e6106024f4c"),
        ({"views": 2, **KEPT}, "90fbe41ec1f63c5d", "fd743e6106024f4c"),
        ({"views": 2, "view_sets": 3, "mask_probability": 0.3, **KEPT}, "de137b11de00cd6c", "fd743e6106024f4c"),
        (
            {
                "views": 2,
                "view_sets": None,
                "pool_ratio": 0.5,
                **KEPT,
                "replace_probability": 0.1,
                "replace_by": "class",
            },
            "420658013b13d8a0",
            "fd743e6106024f4c",
        ),
    ],
    ids=["plain", "views", "sets of views", "replaced words"],
)
def test_texts(
    toy_csv: Callable[..., Path], tmp_path: Path, options: dict[str, Any], whole: str, without_pool: str
) -> None:
    (tmp_path / "more.txt").write_text("more of the same\nand still more\n")
    data = TextFiles(str(toy_csv()), tokenizer="wordpiece:200", transfer=[str(tmp_path / "more.txt")], **options)
    data.prepare()
    found = [data.fingerprint[:16], data.select(pool=False).fingerprint[:16]]
    assert found == [whole, without_pool], CHANGED


@pytest.mark.parametrize(
    ("options", "whole", "without_pool"),
    [
        ({}, "985e3681b6a60157", "985e3681b6a60157"),
        ({"views": 2, "view_sets": 3, "transfer_examples": 20}, "d5593ce3a8b572f7", "ca9cd9a8a7739a71"),
        ({"views": 1, "mixup_probability": 0.5, "pool_ratio": 0.5}, "5253c621dfea61f2", "985e3681b6a60157"),
    ],
    ids=["plain", "sets of views", "mixed"],
)
def test_images(tmp_path: Path, options: dict[str, Any], whole: str, without_pool: str) -> None:
    data = FashionMNIST(str(write_fashion(tmp_path / "fashion")), train_examples=100, **options)
    data.prepare()
    found = [data.fingerprint[:16], data.select(pool=False).fingerprint[:16]]
    assert found == [whole, without_pool], CHANGED
