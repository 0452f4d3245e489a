"""Trims a byte-pair vocabulary to the tokens that texts use."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kd_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIX = "trimmed:"
"""Before a tokenizer's name: its vocabulary, trimmed to the training text."""


def trim_tokenizer(tokenizer: Any, used: Iterable[int]) -> tuple[PreTrainedTokenizerFast, tuple[int, ...]]:
    """Return a tokenizer with the used tokens, and each of its tokens' old id, ascending.

    It keeps what no merge makes (bytes, characters), added and special tokens, the used ones and all that merges make
    them of, with the merges in their old order. A text whose tokens are all kept becomes the same tokens: each merge
    that is applied to it is kept, and none comes before it that did not. Any other text becomes smaller pieces, down to
    bytes.

    Raises:
        ConfigError: It is no byte-pair tokenizer.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"data.tokenizer={PREFIX}...: only byte pairs can be trimmed, not {model['type']}")
    merges = [tuple(one if isinstance(one, list) else one.split(" ")) for one in model["merges"]]
    added = {one["content"]: one["id"] for one in content["added_tokens"]}
    old = {**model["vocab"], **added}
    kept = _closure(model["vocab"], merges, set(added), set(used))
    order = sorted(kept, key=old.__getitem__)
    new = {token: number for number, token in enumerate(order)}
    model["vocab"] = {token: new[token] for token in order if token in model["vocab"]}
    model["merges"] = [[a, b] for a, b in merges if {a, b, a + b} <= kept]
    for one in content["added_tokens"]:
        one["id"] = new[one["content"]]
    _renumber(content["post_processor"], new)
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    found = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), model_input_names=tokenizer.model_input_names, **named
    )
    found.chat_template = tokenizer.chat_template
    return found, tuple(old[token] for token in order)


def _closure(vocabulary: dict[str, int], merges: list[Any], added: set[str], used: set[int]) -> set[str]:
    """Return the tokens to keep."""
    parts: dict[str, list[str]] = {}
    for a, b in merges:
        parts.setdefault(a + b, []).extend((a, b))
    kept = added | (vocabulary.keys() - parts.keys())
    todo = [token for token, number in vocabulary.items() if number in used]
    while todo:
        token = todo.pop()
        if token not in kept:
            kept.add(token)
            todo += parts[token]
    return kept


def _renumber(node: Any, new: dict[str, int]) -> None:
    """Give the tokens that a post-processor adds their new numbers."""
    if isinstance(node, list):
        for one in node:
            _renumber(one, new)
    elif isinstance(node, dict):
        if "ids" in node and "tokens" in node:
            node["ids"] = [new[token] for token in node["tokens"]]
        for key, value in node.items():
            if key in ("sep", "cls") and isinstance(value, list):
                node[key] = [value[0], new[value[0]]]
            else:
                _renumber(value, new)
