"""The tokens that end a text, or a turn of a conversation."""

from __future__ import annotations

from typing import Any


def text_ends(tokenizer: Any, chat: bool = True) -> list[int]:
    """Return the tokens that end a text, with `chat` also the one that ends a turn."""
    found = [tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id]
    if chat and tokenizer.chat_template:
        found.append(_turn_end(tokenizer))
    return sorted({int(end) for end in found if end is not None})


def _turn_end(tokenizer: Any) -> int | None:
    """Return the special token that ends a reply in the chat template, often another than that of texts."""
    from jinja2 import TemplateError

    reply = "reply"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": reply}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError):  # a template for users' turns alone
        return None
    after = tokenizer(text.rpartition(reply)[2].strip(), add_special_tokens=False)["input_ids"]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return after[0] if after and after[0] in special else None
