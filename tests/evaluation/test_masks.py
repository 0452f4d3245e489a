"""Masks in the user's texts: none is left out in silence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.evaluation import masks
from kd_lightning.evaluation.evaluator import predict
from kd_lightning.models.masked_lm import masked_lm_small
from kd_lightning.runtime.errors import DataError
from kd_lightning.tasks import MaskedLanguageModeling
from kd_lightning.teachers import FrozenTeacher


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that reads 6 tokens of a text, two of them around it."""
    tokenizer = load_tokenizer("wordpiece:40", ["a b c d e f g"])
    network = FrozenTeacher(masked_lm_small(len(tokenizer), 12, hidden_size=8, num_layers=1))
    monkeypatch.setattr(masks, "model_of", lambda model: network)
    monkeypatch.setattr("kd_lightning.evaluation.evaluator.model_of", lambda model: network)
    task = MaskedLanguageModeling(len(tokenizer))
    return SimpleNamespace(
        tokenizer=tokenizer, task=task, max_length=6, class_names=[], folder=Path("run"), images=None, texts=1
    )


def test_every_mask_that_is_read_is_filled_in(model: Any) -> None:
    found = predict(model, [("a [MASK] [MASK] b",), None, ("[MASK] c d e f g",)])
    assert [len(one["masks"] or []) for one in found] == [2, 0, 1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[MASK] a b c [MASK] d [MASK]", r"text 3: 2 of its 3 \[MASK\] stand behind the 6 tokens that are read of "),
        ("a b c d e [MASK]", r"text 3: 1 of its 1 \[MASK\] stand behind the 6 tokens"),
        ("a b c", r"text 3: no \[MASK\] in 'a b c': write it where"),
    ],
)
def test_one_that_is_not_read_is_refused_with_its_line(model: Any, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        predict(model, [("a [MASK]",), None, (text,)])
