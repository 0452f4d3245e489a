from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.data import PersonalData
from kd_lightning.data.sources.personal_data import _GAP, TEMPLATES, TYPES
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.entities import spans_of

pytest.importorskip("faker", reason="Faker is not installed (the extra faker)")


def made(**options: Any) -> PersonalData:
    small: dict[str, Any] = {"texts": 60, "transfer_texts": 30, "held_out_texts": 40, "tokenizer": "wordpiece:300"}
    return PersonalData(**(small | options))


def template_of(text: str) -> str:
    """The template that a text was made from."""
    patterns = {one: "(.+)".join(map(re.escape, _GAP.split(one)[::2])) for one in TEMPLATES}
    fits = [one for one, pattern in patterns.items() if re.fullmatch(pattern, text)]
    assert fits, text
    return max(fits, key=lambda one: len(_GAP.sub("", one)))


def test_every_template_is_of_one_split() -> None:
    corpus = made().read()
    parts = {
        name: {template_of(text.text) for text in getattr(corpus, name)} for name in ("train", "validation", "test")
    }
    assert sorted(map(len, parts.values())) == [10, 15, 25]
    assert len(set.union(*parts.values())) == len(TEMPLATES)
    words = {name: {word for one in of for word in re.findall(r"\b[a-z]{5,}\b", one)} for name, of in parts.items()}
    own = (words["validation"] | words["test"]) - words["train"]
    assert own
    assert not any(own & set(text.text.split()) for text in corpus.transfer)  # its pieces are of training templates
    assert [len(getattr(corpus, name)) for name in ("train", "transfer", "validation", "test")] == [60, 30, 40, 40]


def test_entities_are_the_gaps_of_the_template_and_nothing_else() -> None:
    corpus = made().read()
    assert corpus.tags[:5] == ["O", "B-GIVEN_NAME", "I-GIVEN_NAME", "B-SURNAME", "I-SURNAME"]
    assert {tag[2:] for tag in corpus.tags[1:]} == set(TYPES)
    for text in (*corpus.train, *corpus.validation, *corpus.test):
        assert text.tags is not None
        spans = spans_of(text.tags)
        gaps = _GAP.findall(template_of(text.text))
        assert [span.type for span in spans] == gaps, text.text
    assert all(text.tags is None for text in corpus.transfer)


def test_pieces_stand_among_the_sentences_of_other_texts(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("Rain fell all night long\nNobody had seen it coming\n")
    texts = [text.text for text in made(transfer=[str(tmp_path / "more.txt")]).read().transfer]
    assert len(texts) == 30
    assert all({"Rain", "Nobody"} & set(text.split()) for text in texts)
    assert not any("{" in text for text in texts)


def test_the_seed_of_the_split_makes_the_texts_again() -> None:
    one, again, other = (made(split_seed=seed).read() for seed in (0, 0, 1))
    assert one == again
    assert one.train != other.train
    assert {text.text for text in one.train}.isdisjoint(text.text for text in one.transfer)


def test_it_is_a_data_module(own_home: Path) -> None:
    data = made(batch_size=8)
    data.prepare()
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].max() < 35
    assert data.task.outputs == 35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": 0}, "data.texts=0: expected 1 or more"),
        ({"transfer_texts": -1}, "data.transfer_texts=-1: expected 0 or more"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave a split without any"),
        ({"validation_fraction": 0.005}, "data.validation_fraction=0.005"),
        ({"validation_fraction": 0.6, "test_fraction": 0.395}, "data.test_fraction=0.395"),
        ({"transfer": ["nyt"], "transfer_texts": 0}, "set data.transfer_texts"),
    ],
)
def test_options_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        made(**options)


def test_without_faker_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs Faker: pip install 'kd-lightning\[faker\]'"):
        made().read()
