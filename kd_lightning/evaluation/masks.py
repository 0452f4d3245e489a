"""The tokens that a masked language model predicts at the masks of the user's texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kd_lightning.runtime.errors import ConfigError, DataError
from kd_lightning.training.run_folder import model_of

if TYPE_CHECKING:
    from kd_lightning.training.run_folder import TrainedModel

BATCH = 64
"""Texts that are predicted together."""


def filled(model: TrainedModel, texts: Sequence[str], lines: Sequence[int]) -> list[dict[str, Any]]:
    """Return the likeliest tokens at each mask of each text, with their probabilities.

    Args:
        model: A masked language model.
        texts: The texts.
        lines: The number of each among those that the user gave, empty ones included: the line of a file.

    Raises:
        ConfigError: The model has no tokenizer, or that has no mask token.
        DataError: A text without a mask, or with one behind the tokens that the model reads.
    """
    import torch

    from kd_lightning.data.text.tokens import encode_batch

    tokenizer: Any = model.tokenizer
    if tokenizer is None or tokenizer.mask_token is None:
        raise ConfigError(f"the model in {model.folder} has no tokenizer with a mask token: it fills in no text")
    network, found = model_of(model), dict[int, dict[str, Any]]()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        rows = [(texts[i],) for i in chosen]
        batch = encode_batch(tokenizer, rows, None)
        whole = masks = batch["input_ids"] == tokenizer.mask_token_id
        if model.max_length is not None and masks.shape[1] > model.max_length:
            batch = encode_batch(tokenizer, rows, model.max_length)
            masks = batch["input_ids"] == tokenizer.mask_token_id
        lost = whole.sum(1) - masks.sum(1)
        if lost.any():
            row = int(lost.nonzero()[0, 0])
            raise DataError(
                f"text {lines[chosen[row]]}: {int(lost[row])} of its {int(whole[row].sum())} {tokenizer.mask_token} "
                f"stand behind the {model.max_length} tokens that are read of {texts[chosen[row]]!r:.80}: shorten it"
            )
        if not masks.any(1).all():
            number = chosen[int((~masks.any(1)).nonzero()[0, 0])]
            raise DataError(
                f"text {lines[number]}: no {tokenizer.mask_token} in {texts[number]!r:.80}: write it where a token is "
                "to be predicted"
            )
        keep = torch.arange(int(masks.sum(1).max())) < masks.sum(1, keepdim=True)
        places = torch.zeros(keep.shape, dtype=torch.int64)
        places[keep] = masks.nonzero()[:, 1]
        with torch.inference_mode():
            logits = network({**batch, "masked_places": places}).logits.float()
        found |= dict(zip(chosen, model.task.read(logits, {"keep": keep}, model.class_names), strict=True))
    for record in found.values():
        for mask in record["masks"]:
            mask["tokens"] = [tokenizer.decode([token]) for token in mask["tokens"]]
    return [found[number] for number in range(len(texts))]
