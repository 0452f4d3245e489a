from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from kd_lightning.data import DebianPairs, DebianRanking, GeneralDocuments, GeneralText
from kd_lightning.data.sources import general_text
from kd_lightning.data.sources.general_text import glosses, wordnet
from kd_lightning.data.text.corpus import normalise
from kd_lightning.runtime.assets import WORDNET_FILES, fetch
from kd_lightning.runtime.errors import ConfigError, KDError
from tests.data.sources.test_debian_sections import archive

__all__ = ["archive"]  # a fixture

LINES = """  1 This is the licence | of what follows.
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is known (living or nonliving)
00002684 03 n 02 object 0 000 | a tangible entity; an entity that casts a shadow; "it was full of balls"; "an object"
00002685 03 n 01 odd 0 000 | "only an example"
"""


def test_glosses_are_definitions_and_examples(tmp_path: Path) -> None:
    path = tmp_path / "data.noun"
    path.write_text(LINES)
    assert list(glosses(path)) == [
        "that which is known (living or nonliving)", "a tangible entity; an entity that casts a shadow",
        "it was full of balls", "an object", "only an example",
    ]  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path, own_home: Path) -> None:
    """Debian's descriptions as in its own tests, one file of WordNet, one speech and one chapter."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "data.noun").write_text(LINES)
    (folder / "chapter_1.txt").write_text("CHAPTER 1. Loomings.\n\nCall me Ishmael. " + "It is a way I have. " * 9)
    (folder / "1790_name_n.txt").write_text("The same. " * 40 + "The law is here. It is good. " * 3)
    monkeypatch.setattr(general_text, "fetch", lambda name: folder)
    monkeypatch.setattr(general_text, "WORDNET_FILES", ("data.noun",))
    monkeypatch.setattr(general_text, "addresses", lambda chosen: [(1790, folder / "1790_name_n.txt")])


@pytest.mark.usefixtures("small")
def test_all_texts_are_trained_on_once_and_none_that_is_held_out() -> None:
    options = {"validation_fraction": 0.1, "test_fraction": 0.2}
    pairs, corpus = DebianPairs(**options).read(), GeneralText(passage_words=12, **options).read()
    assert (corpus.validation, corpus.test) == (pairs.validation, pairs.test)
    texts = [text for group in corpus.train for text in group.texts]
    assert {len(group.texts) for group in corpus.train} == {1}
    keys = [normalise((text,)) for text in texts]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & {normalise((text,)) for group in (*corpus.validation, *corpus.test) for text in group.texts}
    assert {text for group in pairs.train for text in group.texts} <= set(texts)
    assert "an object" in texts
    assert texts.index("an object") > texts.index(pairs.train[0].texts[0])  # in the order of the sources
    assert any(text.startswith("CHAPTER 1. Loomings. Call me Ishmael. It is a way I have.") for text in texts)
    assert sum(text.startswith("The same. The same.") for text in texts) <= 2  # repeats are left out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(4))
def test_no_text_is_trained_on_that_a_ranking_holds_out(seed: int) -> None:
    """At the default fractions, which differ: a student that starts from general text is scored by `DebianRanking`."""
    ranking = DebianRanking(split_seed=seed).read()
    held_out = {(one.query, *one.documents) for one in (*ranking.validation, *ranking.test)}
    assert held_out
    assert held_out <= {group.texts for group in DebianPairs(split_seed=seed).read().test}
    trained = {normalise(group.texts) for group in GeneralText(passage_words=12, split_seed=seed).read().train}
    assert not trained & {normalise((text,)) for texts in held_out for text in texts}


@pytest.mark.usefixtures("small")
def test_single_texts_and_pairs_to_select_by_make_batches() -> None:
    data = GeneralText(
        passage_words=12, validation_fraction=0.1, test_fraction=0.2, tokenizer="wordpiece:200", batch_size=8
    )
    data.prepare()
    assert data.labelled_examples == data.sizes["train"] > 2 * 26
    batch = next(iter(data.train_dataloader()))
    assert set(batch["place"].tolist()) == {0}
    assert set(next(iter(data.test_dataloader()))["place"].tolist()) == {0, 1}


@pytest.mark.usefixtures("small")
def test_as_documents_each_text_is_one_masked_for_a_network() -> None:
    given = {"tokenizer": "wordpiece:200", "packing": "none", "mask_probability": 0.15, "block_size": 24}
    data = GeneralDocuments(passage_words=12, **given)  # type: ignore[arg-type]
    data.prepare()
    texts = {group.texts[0] for group in GeneralText(passage_words=12).read().train}
    assert set(data.sources()["train"].documents()) == texts
    assert sum(data._blocks.store.counts.values()) == len(texts)
    assert data.sources()["train"].key == data.sources()["train"].key
    batch = next(iter(data.test_dataloader()))
    assert batch["keep"].any(1).all()
    assert data.task.settings["_target_"] == "kd_lightning.tasks.MaskedLanguageModeling"


def test_a_passage_has_a_word() -> None:
    for kind in (GeneralText, partial(GeneralDocuments, tokenizer="minilm")):
        with pytest.raises(ConfigError, match=r"data\.passage_words=0"):
            kind(passage_words=0)


def test_the_definitions_are_wordnets() -> None:
    try:
        fetch("wordnet")
    except KDError as error:
        pytest.skip(f"wordnet cannot be fetched: {error}")
    found = list(wordnet())
    assert len(found) > 160_000  # 117,659 synsets, and their examples
    assert (
        "that which is perceived or known or inferred to have its own distinct existence (living or nonliving)" in found
    )
    assert all(text.strip() == text and text for text in found)
    assert len(WORDNET_FILES) == 4
