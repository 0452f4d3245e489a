"""Sentences that a language model writes: drawn once, kept, without copies, in the transfer set."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_lightning.data import Corpus, Examples, TextFiles, TrainingTexts
from kd_lightning.data.text import generated
from kd_lightning.data.text.generated import is_copy, original
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.models.causal_lm import causal_lm
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.errors import ConfigError
from tests.conftest import write_toy_csv
from tests.end_to_end.test_lm_experiments import language_model


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model that has learned from some sentences, so that it writes words."""
    folder = tmp_path_factory.mktemp("writer")
    texts = [text for (text,) in TextFiles(str(write_toy_csv(folder / "toy.csv"))).read().train.texts]
    language_model(folder / "model", 300, texts)
    tokenizer = load_tokenizer(str(folder / "model"))
    network = causal_lm(str(folder / "model"), len(tokenizer)).network
    batch = tokenizer([text + str(tokenizer.eos_token) for text in texts], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    network.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def data(toy_csv: Callable[..., Path], writer: Path, own_home: Path) -> Callable[..., TextFiles]:
    """Data of toy sentences, for which that model writes."""
    given = {"train_file": str(toy_csv()), "tokenizer": "wordpiece:200", "max_length": 12}
    writing = {"generate": 150, "generator": str(writer)}
    return lambda **options: TextFiles(**(given | writing | options))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of texts that are drawn together, in turn."""
    calls: list[int] = []

    def counted(model: Any, prompts: Any, *options: Any) -> Any:
        calls.append(len(prompts))
        return generated_continuations(model, prompts, *options)

    generated_continuations = generated.continuations
    monkeypatch.setattr(generated, "continuations", counted)
    return calls


def test_they_join_the_transfer_set_once_and_are_kept(
    data: Callable[..., TextFiles], drawn: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        made = data(transfer=[])
        made.prepare()
    assert drawn == [64, 64, 64], "whole pieces, of which 150 are taken"
    [line] = [line for line in caplog.messages if "join the transfer set" in line]
    assert line.startswith(f"{made.sizes['transfer']} generated texts join the transfer set; left out: ")
    assert sum(int(word) for word in line.replace(":", " ").split() if word.isdigit()) == 150
    again = data(batch_size=16)
    again.prepare()
    assert drawn == [64, 64, 64], "kept, whatever else is set"
    assert again.fingerprint == made.fingerprint
    assert data(generate=0).read().transfer == []
    alone = data(generate=0)
    alone.prepare()
    assert alone.select(pool=False).fingerprint == made.select(pool=False).fingerprint, "no teacher is trained anew"


def test_a_kill_or_damage_loses_a_piece(data: Callable[..., TextFiles], drawn: list[int]) -> None:
    whole = data()
    whole.prepare()
    [folder] = (home() / "generated").iterdir()
    _, second, third = sorted(folder.glob("0*.json"))
    second.unlink()
    third.write_bytes(third.read_bytes()[:-20])
    drawn.clear()
    again = data()
    again.prepare()
    assert drawn == [64, 64]
    assert again.fingerprint == whole.fingerprint


def texts_of(data: TextFiles) -> list[Any]:
    return data.generated.write(data.drawn(), data.max_length, data.split_seed)


@pytest.mark.parametrize(
    "change",
    [
        {"generate_temperature": 0.7}, {"generate_top_p": 0.5}, {"max_length": 9}, {"split_seed": 1},
        {"generate_from": "classes"},
    ],
    ids=str,
)  # fmt: skip
def test_what_decides_them_makes_others(data: Callable[..., TextFiles], drawn: list[int], change: Any) -> None:
    texts = [texts_of(made) for made in (data(), data(**change))]
    assert drawn == [64, 64, 64] * 2
    assert texts[0] != texts[1]


def test_the_same_model_writes_others_for_other_data(
    data: Callable[..., TextFiles], drawn: list[int], tmp_path: Path
) -> None:
    for change in ({}, {"train_examples": 30}, {"test_fraction": 0.3}):
        texts_of(data(generate=64, **change))
    assert drawn == [64] * 3, "other training texts, though they may begin alike"
    drawn.clear()
    lines = (tmp_path / "toy.csv").read_text(encoding="utf-8").splitlines()
    other = tmp_path / "other.csv"
    other.write_text("\n".join([lines[0], *(line.replace(",good", ",fair") for line in lines[1:])]), encoding="utf-8")
    by_class = {"generate_from": "classes", "generate": 64}
    found = [texts_of(data(**by_class, **more)) for more in ({}, {"train_file": str(other)})]
    assert drawn == [64, 64]
    assert found[0] != found[1], "begun with other classes"


def test_more_of_them_begin_with_those_there_are(data: Callable[..., TextFiles], drawn: list[int]) -> None:
    few, many = (texts_of(data(generate=count)) for count in (70, 140))
    assert drawn == [64, 64, 64], "two pieces, and a third"
    assert many[: len(few)] == few
    assert texts_of(data(generate=70)) == few


def test_another_model_at_the_same_place_writes_others(
    data: Callable[..., TextFiles], writer: Path, drawn: list[int], tmp_path: Path
) -> None:
    place = tmp_path / "model"
    shutil.copytree(writer, place)
    same = texts_of(data(generator=str(place)))
    weights = load_file(place / "model.safetensors")
    save_file({name: 1.1 * weight for name, weight in weights.items()}, place / "model.safetensors", {"format": "pt"})
    assert texts_of(data(generator=str(place))) != same
    assert texts_of(data()) == same
    assert drawn == [64, 64, 64] * 2, "the same weights elsewhere are the same model"


def test_words_begin_as_training_texts_do_and_classes_are_left_out(data: Callable[..., TextFiles]) -> None:
    made = data(generate=40)
    corpus = made.drawn()
    begins = {text[0] for (text,) in corpus.train.texts}
    assert {text[0] for (text,) in made.generated.write(corpus, 12, 0)} <= begins
    by_class = data(generate=40, generate_from="classes")
    tokenizer, _ = by_class.generated._load()
    prompts = by_class.generated._prompts(corpus, tokenizer, 0)
    begun = {f"{name}:" for name in corpus.class_names}
    assert {tokenizer.decode(prompt) for prompt in prompts} == begun
    assert not any(text.startswith(tuple(begun)) for (text,) in by_class.generated.write(corpus, 12, 0))


def corpus_of(train: list[str], test: list[str], transfer: list[str]) -> Corpus:
    def some(texts: list[str]) -> Examples:
        return Examples([(text,) for text in texts], [0] * len(texts))

    return Corpus(["a", "b"], some(train), some([]), some(test), [(text,) for text in transfer])


def test_copies_repeats_and_empty_texts_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    corpus = corpus_of(
        ["one two three four five six seven", "今天我们看了一部很好的电影"],
        ["Alpha, beta; gamma delta epsilon zeta"],
        ["a short one"],
    )
    texts = [
        "one two three four five six eight",  # two of its three runs
        "zero one two three four nine ten eleven",  # none of its runs is whole
        "ALPHA beta gamma delta epsilon zeta!",
        "A  short one.",
        "a short one more",
        "something new",
        "Something  new",
        " \u200b ",
        "half a character \ufffd",
        "今天我们看了一部很好的电影吗",
    ]  # fmt: skip
    with caplog.at_level(logging.INFO):
        found = original(texts, corpus)
    assert found == [("zero one two three four nine ten eleven",), ("a short one more",), ("something new",)]
    assert "left out: 1 empty, 1 with half a character, 4 copies of the data's own, 1 repeats" in caplog.text


def test_half_of_the_runs_is_no_copy() -> None:
    known = {("a", "b", "c", "d", "e")}
    assert is_copy("a b c d e", known)
    assert not is_copy("a b c d e f", known)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": None}, r"data\.generate=150: set data\.generator"),
        ({"generate": -1}, r"data\.generate=-1: expected 0 or more"),
        ({"generate_from": "class"}, r"data\.generate_from='class' is unknown.*classes"),
        ({"generate_temperature": 0.0}, r"data\.generate_temperature=0.*above 0"),
        ({"generate_top_p": 1.5}, r"data\.generate_top_p=1\.5"),
        ({"generate_top_p": 0.0}, r"data\.generate_top_p=0.*above 0"),
        ({"generate_temperature": float("inf")}, r"data\.generate_temperature=inf.*finite"),
        ({"generate": 4.5}, r"data\.generate=4\.5: expected a whole number"),
        ({"generate": "4"}, r"data\.generate='4': expected a whole number"),
        ({"generator": "no_such_folder/at_all"}, r"^data\.generator=no_such_folder/at_all: expected a language model"),
        ({"generator": "bpe:300"}, r"^data\.generator=bpe:300: expected a language model"),
        ({"max_length": 64}, r"^data\.max_length=64: data\.generator has positions for 64 tokens, .* up to 1"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_refused_by_its_key(
    data: Callable[..., TextFiles], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        data(**options).prepare()


def test_pairs_and_classes_of_scores_are_refused(data: Callable[..., TextFiles]) -> None:
    pair, score = [("a", "b")], [("a",)]
    pairs = Corpus(["x", "y"], Examples(pair, [0]), Examples(pair, [0]), Examples(pair, [1]))
    scores = Corpus(["score"], Examples(score, [0.5]), Examples(score, [0.5]), Examples(score, [1.0]), regression=True)
    with pytest.raises(ConfigError, match=r"data\.generate=150: examples of two texts cannot be generated"):
        data().generated.write(pairs, 12, 0)
    with pytest.raises(ConfigError, match=r"data\.generate_from=classes: a regression has no classes"):
        data(generate_from="classes").generated.write(scores, 12, 0)
    of = data(generate=0)
    for corpus, classes, message in ((pairs, False, "examples of two texts"), (scores, True, "no classes")):
        of.drawn = lambda corpus=corpus: corpus  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match=message):
            TrainingTexts(of, classes=classes, tokenizer="bpe:300").sources()
    with pytest.raises(ConfigError, match=r"data\.of: expected data of labelled sentences .*, got NoneType"):
        TrainingTexts(None, tokenizer="bpe:300")  # type: ignore[arg-type]


class Around:
    """A tokenizer of two special tokens before a text and one behind it; a word is a token, its length."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: bool) -> dict[str, list[int]]:
        words = [len(word) for word in text.split()]
        if not add_special_tokens:
            return {"input_ids": words}
        return {"input_ids": [101, 102, *words, 103], "special_tokens_mask": [1, 1, *[0] * len(words), 1]}


def test_a_text_goes_on_before_its_end(data: Callable[..., TextFiles]) -> None:
    corpus = corpus_of(["four five"], [], [])
    assert data(generate=1).generated._prompts(corpus, Around(), 0) == [[101, 102, 4]] * 64
    by_class = data(generate=1, generate_from="classes").generated._prompts(corpus, Around(), 0)
    assert by_class == [[101, 102, 2]] * 64, "a: and no end"


def test_a_language_model_learns_from_the_training_texts_alone(
    data: Callable[..., TextFiles], toy_csv: Callable[..., Path], tmp_path: Path
) -> None:
    of = data(generate=0, train_examples=30, transfer_examples=10)
    corpus = of.drawn()
    texts = TrainingTexts(of, tokenizer="bpe:300", block_size=16)
    parts = {name: list(source.documents()) for name, source in texts.sources().items()}
    assert parts["train"] == [text for (text,) in [*corpus.train.texts, *corpus.transfer]]
    assert not set(parts["train"]) & {*parts["validation"], *parts["test"]}
    assert parts["test"] == [text for (text,) in corpus.test.texts]
    with_classes = TrainingTexts(of, classes=True, tokenizer="bpe:300", block_size=16).sources()["train"]
    labels = [corpus.class_names[int(label)] for label in corpus.train.labels]
    expected = [f"{label}: {text}" for label, (text,) in zip(labels, corpus.train.texts, strict=True)]
    assert list(with_classes.documents()) == expected, "a text without a label has no class to begin with"
    texts.prepare()
    assert texts.sizes["train"] > 0
