"""Examples as people read them, for reports."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_lightning.data.datamodule import IndexedData

LETTERS = 500
"""The most of an example's text that is shown."""


def shown(data: IndexedData, index: Collection[int]) -> dict[int, dict[str, str]]:
    """Return test examples by `index`: `text`, as the student reads it, or `png` in base64, if either.

    No other examples are read.
    """
    data = data.select(tokens="student")
    tokenizer, images = data.tokenizer_of("student"), data.image_format
    examples: Any = data.test_dataloader().dataset
    found: dict[int, dict[str, str]] = {}
    for place in examples.places(index):
        batch = examples[[place]]
        number = int(batch["index"][0])
        if "pixel_values" in batch and images is not None:
            found[number] = {"png": images.png(batch["pixel_values"][0])}
        elif "input_ids" in batch and tokenizer is not None:
            text = str(tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True))
            found[number] = {"text": text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"}
    return found
