"""Views whose words are replaced, dropped, swapped or cut, and where the words that replace others come from."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_lightning.data import TextFiles
from kd_lightning.data.text.augment import MASK, Changes, Views, make_view
from kd_lightning.data.text.substitutes import ClassWords, Neighbours, nearest_words
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.seals import write_sealed

TEXTS = [" ".join(f"w{i}x{j}" for j in range(20)) for i in range(200)]
CHINESE = "这部电影的画面很美，但是故事太长了"
NEAR = Neighbours({f"w{i}x{j}": [f"n{i}x{j}", f"m{i}x{j}"] for i in range(200) for j in range(20)})


def view(text: str, index: int = 0, number: int = 0, mask: float = 0.0, ngram: float = 0.0, **changes: Any) -> str:
    return make_view(
        text, index, number, 0, mask_probability=mask, ngram_probability=ngram, changes=Changes(**changes)
    )  # fmt: skip


ALL = {
    "replace_probability": 0.2, "drop_probability": 0.1, "swap_probability": 0.1, "crop_probability": 0.3,
    "substitutes": NEAR,
}  # fmt: skip


def test_off_they_change_nothing() -> None:
    """The very views of before there were any."""
    made = [make_view(text, i, 1, 7, changes=Changes(substitutes=NEAR)) for i, text in enumerate(TEXTS)]
    assert hashlib.sha256("\n".join(made).encode()).hexdigest()[:16] == "6ccb289fd2cfa179"


def test_a_changed_view_is_a_function_of_its_arguments() -> None:
    forward = [view(text, i, 2, 0.1, 0.2, **ALL) for i, text in enumerate(TEXTS)]
    backward = [view(TEXTS[i], i, 2, 0.1, 0.2, **ALL) for i in reversed(range(len(TEXTS)))]
    assert forward == backward[::-1]
    chances = {"drop_probability": 0.3, "swap_probability": 0.3, "crop_probability": 0.5}
    program = (
        "from kd_lightning.data.text.augment import Changes, make_view\n"
        f"print(make_view({TEXTS[9]!r}, 9, 2, 7))\n"
        f"print(make_view({TEXTS[9]!r}, 9, 2, 0, mask_probability=0, changes=Changes(**{chances})))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert found == f"{make_view(TEXTS[9], 9, 2, 7)}\n{view(TEXTS[9], 9, 2, ngram=0.25, **chances)}\n"


def test_shares_are_those_asked_for() -> None:
    def share(count: Callable[[list[str], list[str]], int], **changes: Any) -> float:
        pairs = [(text.split(), view(text, i, **changes).split()) for i, text in enumerate(TEXTS)]
        return sum(count(before, after) for before, after in pairs) / (20 * len(TEXTS))

    assert share(lambda a, b: len(a) - len(b), drop_probability=0.2) == pytest.approx(0.2, abs=0.02)
    replaced = share(
        lambda a, b: sum(x != y for x, y in zip(a, b, strict=True)), replace_probability=0.2, substitutes=NEAR
    )
    assert replaced == pytest.approx(0.2, abs=0.02)
    # A word that moved is passed over, so that p / (1 + p) of the places begin a swap of two words.
    moved = share(lambda a, b: sum(x != y for x, y in zip(a, b, strict=True)), swap_probability=0.25)
    assert moved == pytest.approx(2 * 0.25 / 1.25 * 19 / 20, abs=0.03)
    cropped = share(lambda a, b: int(len(b) < len(a)), crop_probability=0.3) * 20
    assert cropped == pytest.approx(0.3, abs=0.08)


def test_what_each_change_does() -> None:
    for i, text in enumerate(TEXTS[:50]):
        before = text.split()
        dropped = view(text, i, drop_probability=0.3).split()
        assert dropped == [word for word in before if word in dropped]
        assert sorted(view(text, i, swap_probability=0.5).split()) == sorted(before)
        cropped = view(text, i, crop_probability=1.0, crop_share=0.4)
        assert cropped in text
        assert len(cropped.split()) == 8
        replaced = view(text, i, replace_probability=1.0, substitutes=NEAR).split()
        assert all(new[1:] == old[1:] and new[0] in "nm" for new, old in zip(replaced, before, strict=True))
    assert view("a b c d", swap_probability=1.0) == "b a d c"
    assert view(CHINESE, swap_probability=1.0).startswith("部这影电")
    assert sorted(view(CHINESE, swap_probability=1.0)) == sorted(CHINESE)


@pytest.mark.parametrize("text", ["word", "two words", "好", CHINESE, "  spaced   out  "])
@pytest.mark.parametrize("chance", [0.01, 0.5, 1.0])
def test_never_empty(text: str, chance: float) -> None:
    for number in range(40):
        made = view(
            text, 0, number, chance, chance, replace_probability=chance, drop_probability=chance,
            swap_probability=chance, crop_probability=chance, crop_share=0.01, substitutes=NEAR,
        )  # fmt: skip
        assert made.replace(MASK, "").strip()


@pytest.mark.parametrize(
    "changes",
    [{"drop_probability": 1e-9}, {"swap_probability": 1e-9}, {"replace_probability": 1e-9, "substitutes": NEAR}],
)
def test_never_unchanged(changes: dict[str, Any]) -> None:
    assert all(view(text, i, **changes) != text for i, text in enumerate(TEXTS))
    assert view("same same", swap_probability=1e-9) == "same same"  # nothing to swap
    assert view("no neighbours", replace_probability=1e-9, substitutes=NEAR) == "no neighbours"


def test_both_texts_of_a_pair() -> None:
    views = Views([("one two three", CHINESE)] * 5, 1, 0, 0.0, 0.0, Changes(drop_probability=0.5))
    assert all(first != "one two three" and second != CHINESE for first, second in map(views.make, range(5)))


def test_words_of_the_same_class() -> None:
    sentences = [(f"a{i} b{i}",) if i % 2 else (f"c{i} d{i}", f"e{i}") for i in range(20)]
    substitutes = ClassWords(sentences, [i % 2 for i in range(20)])
    rng = random.Random(0)
    found = {substitutes.of("a3", 3, rng) for _ in range(500)}
    assert found == {f"{letter}{i}" for letter in "ab" for i in range(1, 20, 2) if i != 3}
    assert {substitutes.of("x", 4, rng)[0] for _ in range(100)} == set("cde")
    assert ClassWords([("alone here",), ("other",)], [0, 1]).of("alone", 0, rng) == "alone"


def test_punctuation_and_capitals_stay() -> None:
    near = Neighbours({"good": ["fine"], "好": ["美"]})
    rng = random.Random(0)
    assert [near.of(word, 0, rng) for word in ("good", "Good!", '"good,"', "goods", "...", "好")] == [
        "fine", "Fine!", '"fine,"', "goods", "...", "美",
    ]  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    folder: str
    words: list[str]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A tokenizer of twenty words, and embeddings in which words lie on a circle in the order of their numbers."""
    words = [f"{chr(97 + i)}word" for i in range(20)]
    tokenizer = load_tokenizer("wordpiece:2000", [" ".join(words)] * 3)
    tokenizer.save_pretrained(str(tmp_path / "checkpoint"))
    angles = {word: 2 * np.pi * i / len(words) for i, word in enumerate(words)}
    table = torch.zeros(len(tokenizer) + 3, 2)
    for token, number in tokenizer.get_vocab().items():
        if token in angles:
            table[number] = torch.tensor([np.cos(angles[token]), np.sin(angles[token])])
    tensors = {"embeddings.position_embeddings.weight": torch.zeros(7, 2), "embeddings.word_embeddings.weight": table}
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    return Checkpoint(str(tmp_path / "checkpoint"), words)


def test_neighbours_are_the_nearest_words(checkpoint: Checkpoint) -> None:
    found = nearest_words(["Cword, and eword!", "unheard"], checkpoint.folder)
    assert set(found.table) == {"cword", "eword"}
    assert len(found.table["cword"]) == 10
    assert set(found.table["cword"][:4]) == {checkpoint.words[i] for i in (0, 1, 3, 4)}
    assert found.digest == nearest_words(["eword cword"], checkpoint.folder).digest
    assert found.digest != nearest_words(["eword"], checkpoint.folder).digest


def test_the_tokenizer_of_a_finished_run_has_its_networks_embeddings_above_it(checkpoint: Checkpoint) -> None:
    folder = Path(checkpoint.folder)
    tokenizer = load_tokenizer(checkpoint.folder)
    before = nearest_words(["cword eword"], checkpoint.folder)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    assert nearest_words(["cword eword"], str(folder / "tokenizer")).table == before.table
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model\.safetensors beside it"):
        nearest_words(["cword eword"], str(folder / "tokenizer"))


def test_the_tokenizer_of_a_fine_tuned_teacher_has_the_embeddings_that_it_started_from(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """So that a run with this teacher has the views of the run that trained it, and finds its outputs stored."""
    before, teacher = nearest_words(["cword eword"], checkpoint.folder), tmp_path / "run" / "teacher"
    load_tokenizer(checkpoint.folder).save_pretrained(str(teacher / "tokenizer"))
    tensors = load_file(Path(checkpoint.folder) / "model.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, teacher / "model.safetensors")
    assert nearest_words(["cword eword"], str(teacher / "tokenizer")).table != before.table, "another table"
    network = {"_target_": "kd_lightning.models.hf.pretrained", "name": checkpoint.folder}
    write_sealed(teacher / "settings.json", {"settings": {"network": network}})
    assert nearest_words(["cword eword"], str(teacher / "tokenizer")).digest == before.digest
    network["name"] = str(tmp_path / "moved away")
    write_sealed(teacher / "settings.json", {"settings": {"network": network}})
    assert nearest_words(["cword eword"], str(teacher / "tokenizer")).digest != before.digest, "what is there"


def test_a_checkpoint_out_of_reach_is_refused_and_not_taken_for_one_without_words(
    data: Callable[..., TextFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no connection\nto the hub")

    made = data(view_sets=None)
    made._neighbours_in = "someone/bert"
    monkeypatch.setattr("transformers.utils.hub.cached_file", unreachable)
    with pytest.raises(ConfigError, match=r"'someone/bert', .* could not be read for its word embeddings \(no connect"):
        made.prepare()


@pytest.fixture
def data(write_csv: Callable[..., Path], checkpoint: Checkpoint) -> Callable[..., TextFiles]:
    rng = random.Random(0)
    rows = [(" ".join(rng.choices(checkpoint.words[i % 2 :: 2], k=6)) + f" {i}", str(i % 2)) for i in range(90)]
    given = {
        "train_file": str(write_csv("rows.csv", rows)), "tokenizer": checkpoint.folder, "views": 2,
        "mask_probability": 0.0, "ngram_probability": 0.0,
    }  # fmt: skip
    return lambda **options: TextFiles(**(given | options))


def texts(data: TextFiles) -> list[set[str]]:
    data.prepare()
    tokens = data._stores["student"]
    decoded = data.student_tokenizer.batch_decode(tokens.batch(np.arange(data.num_examples))["input_ids"])
    return [{word for word in text.split() if word.endswith("word")} for text in decoded]


def test_data_of_the_same_class_stay_in_it(data: Callable[..., TextFiles], checkpoint: Checkpoint) -> None:
    made = data(replace_probability=1.0, replace_by="class")
    found, labels = texts(made), made._labels
    for number in range(made.sizes["train"] * 2):
        known = set(checkpoint.words[labels[number // 2] :: 2])
        assert found[made.sizes["train"] + number] <= known


def test_data_with_neighbours(data: Callable[..., TextFiles]) -> None:
    made, again = (data(replace_probability=1.0) for _ in range(2))
    found = texts(made)
    size = made.sizes["train"]
    assert sum(found[size + n] != found[n // 2] for n in range(2 * size)) == 2 * size
    again.prepare()
    assert made.fingerprint == again.fingerprint
    fresh = data(replace_probability=1.0, view_sets=None)
    fresh.prepare()
    other = data(replace_probability=1.0, view_sets=None, replace_by="class")
    other.prepare()
    assert len({made.fingerprint, fresh.fingerprint, other.fingerprint}) == 3


def test_off_the_fingerprint_is_what_it_was(data: Callable[..., TextFiles]) -> None:
    prints = []
    for change in ({}, {"crop_share": 0.3}, {"replace_by": "class"}, {"drop_probability": 0.1}):
        for sets in (1, None):
            off = {"replace_probability": 0.0, "drop_probability": 0.0}
            made = data(mask_probability=0.1, view_sets=sets, **off | change)
            made.prepare()
            prints.append(made.fingerprint)
    assert prints[:2] == prints[2:4] == prints[4:6]
    assert len(set(prints)) == 4


@pytest.mark.parametrize("sets", [1, None])
def test_auto_replaces_where_there_are_words_to_replace_by(
    data: Callable[..., TextFiles], checkpoint: Checkpoint, sets: int | None
) -> None:
    def fingerprint(**options: Any) -> str:
        made = data(view_sets=sets, **options)
        made.prepare()
        return made.fingerprint

    assert fingerprint() == fingerprint(replace_probability=0.1) != fingerprint(replace_probability=0.0)
    Path(checkpoint.folder, "model.safetensors").unlink()
    assert fingerprint() == fingerprint(replace_probability=0.0)
    by_class = {"replace_by": "class"}
    assert fingerprint(**by_class) == fingerprint(**by_class, replace_probability=0.1) != fingerprint()


def test_a_teacher_with_another_tokenizer_meets_the_same_views(
    data: Callable[..., TextFiles], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    load_tokenizer("wordpiece:35", [" ".join(checkpoint.words)]).save_pretrained(str(tmp_path / "other"))
    made = data(replace_probability=0.5)
    texts(made)
    other = made.reading(str(tmp_path / "other"))
    assert other is not made
    assert other.teacher_key["sentences"] == made.teacher_key["sentences"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_probability": 1.5}, r"data\.drop_probability=1\.5: expected a probability"),
        ({"crop_share": -1}, r"data\.crop_share=-1"),
        ({"replace_by": "neighbour"}, r"data\.replace_by='neighbour' is unknown.*neighbours"),
        (
            {"replace_probability": 0.1, "tokenizer": "wordpiece:100"},
            r"data\.replace_by=neighbours: 'wordpiece:100', the teacher's tokenizer, has no model\.safetensors",
        ),
    ],
)
def test_what_is_refused(data: Callable[..., TextFiles], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(**options).prepare()


def test_a_table_that_does_not_fit_is_refused(data: Callable[..., TextFiles], checkpoint: Checkpoint) -> None:
    save_file({"embeddings.weight": torch.zeros(5, 2)}, Path(checkpoint.folder) / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has no word embeddings of its \d+ tokens"):
        data(replace_probability=0.1).prepare()
