"""A trimmed vocabulary writes any text, and the training text as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.data.text.trim import trim_tokenizer
from kd_lightning.models.causal_lm import CausalLM, causal_lm_small, trimmed
from kd_lightning.runtime.errors import ConfigError
from tests.data.corpus.texts import made

TEXTS = made(60)
TRAIN = TEXTS[:20]


@pytest.fixture(scope="module")
def whole() -> Any:
    """One whose texts begin with a special token, the last of its vocabulary."""
    tokenizer = load_tokenizer("bpe:2000", [*TEXTS, *("zebra quark fjord blitz jumbo waltz",) * 50])
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def small(whole: Any) -> tuple[Any, tuple[int, ...]]:
    return trim_tokenizer(whole, {one for text in TRAIN for one in whole(text)["input_ids"]})


def test_the_training_text_becomes_the_same_tokens(whole: Any, small: tuple[Any, tuple[int, ...]]) -> None:
    tokenizer, ids = small
    assert len(tokenizer) == len(ids) < len(whole)
    assert list(ids) == sorted(set(ids))
    for text in TRAIN:
        assert [ids[one] for one in tokenizer(text)["input_ids"]] == whole(text)["input_ids"]


def test_any_other_text_is_written_by_smaller_pieces(whole: Any, small: tuple[Any, tuple[int, ...]]) -> None:
    tokenizer, ids = small
    for text in (*TEXTS, "zebra quark é😀", "\x00\n"):
        found = tokenizer(text)["input_ids"]
        assert tokenizer.decode(found, skip_special_tokens=True) == text
        assert whole.decode([ids[one] for one in found], skip_special_tokens=True) == text
    assert len(tokenizer("zebra")["input_ids"]) > len(whole("zebra")["input_ids"])


def test_it_is_saved_and_loaded_by_transformers(small: tuple[Any, tuple[int, ...]], whole: Any, tmp_path: Path) -> None:
    tokenizer, ids = small
    write_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert ids[getattr(again, name)] == getattr(whole, name)
    assert again.chat_template == whole.chat_template


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer=trimmed:\.\.\.: only byte pairs can be trimmed, not WordPiece"):
        trim_tokenizer(load_tokenizer("wordpiece:100", TEXTS), [])


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_logits_are_the_whole_ones_of_these_tokens(
    tied: bool, whole: Any, small: tuple[Any, tuple[int, ...]]
) -> None:
    tokenizer, ids = small
    torch.manual_seed(0)
    inner = causal_lm_small(len(whole) + 3, 64, 16, 2, 2, tie_embeddings=tied).network
    inner.config.eos_token_id = whole.eos_token_id
    model = CausalLM(inner, len(whole)).eval()
    rows = torch.tensor([tokenizer(TRAIN[0])["input_ids"]])
    with torch.no_grad():
        expected = model(torch.tensor(ids)[rows]).logits[..., torch.tensor(ids)]
        found = trimmed(model, ids).eval()
        torch.testing.assert_close(found(rows).logits, expected)
    assert found.network.config.eos_token_id is None
    head: Any = found.network.get_output_embeddings()  # type: ignore[no-untyped-call]
    assert (head.weight is found.network.get_input_embeddings().weight) == tied
