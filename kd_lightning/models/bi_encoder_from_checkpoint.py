"""Bi-encoders of a pretrained sentence encoder: all of it, some of its layers, or its tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.models.from_teacher import from_teacher
from kd_lightning.models.sentence_encoder import sentence_encoder
from kd_lightning.models.static_embedding import static_embedding


def bi_encoder(
    name: str,
    vocab_size: int,
    pad_token_id: int = 0,
    special_tokens: Sequence[int] = (),
    single_token: Sequence[int] = (),
    layers: int | float | Sequence[int] | None = None,
    scale: float = 20.0,
) -> BiEncoder:
    """Load a sentence encoder as a bi-encoder, whole, with some of its layers, or without any.

    Args:
        name: As for `sentence_encoder`.
        vocab_size: Number of token ids V.
        pad_token_id: The padding id.
        special_tokens: Ids that the tokenizer puts around every text.
        single_token: A text of one token as the tokenizer writes it, -1 in that token's place.
        layers: Which of its layers, as for `from_teacher`; 0: none, one vector a token (`static_embedding`); None: all.
        scale: As for `BiEncoder`.

    Raises:
        ConfigError: There is no such encoder, or no such layer.
    """
    network: Any = sentence_encoder(name)
    width = network.num_classes
    if layers == 0:
        network = static_embedding(network, width, vocab_size, pad_token_id, special_tokens, single_token)
    elif layers is not None:
        network = from_teacher(network, width, layers)
    return BiEncoder(network, pad_token_id, scale)
