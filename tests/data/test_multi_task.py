from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_lightning.data import MultiTaskData, TextFiles
from kd_lightning.data.multi_task import MixedDataset, draws
from kd_lightning.data.shown import shown
from kd_lightning.data.sources.reviews import Reviews
from kd_lightning.runtime.errors import ConfigError
from tests.data.conftest import toy_rows
from tests.toy_reviews import write_archive, write_tokenizer

Write = Callable[..., Path]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return str(write_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def make(
    write_csv: Write, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., MultiTaskData]:
    """Three tasks: a large classification, a small one with views, and a regression."""
    archive = write_archive(tmp_path / "archive", movies=30, others=6)
    monkeypatch.setattr("kd_lightning.data.sources.reviews.fetch", lambda name: archive)
    large = str(write_csv("large.csv", toy_rows(300)))
    small = str(
        write_csv(
            "small.csv",
            [(f"{text} {'nice' if i % 2 else 'bad'}", str(i % 2)) for i, (text, _) in enumerate(toy_rows(60, 1))],
        )
    )

    def build(own: dict[str, dict[str, Any]] | None = None, **options: Any) -> MultiTaskData:
        own = own or {}
        common = {"tokenizer": tokenizer}
        return MultiTaskData(
            {
                "large": TextFiles(large, **(common | own.get("large", {}))),
                "small": TextFiles(small, **(common | {"views": 1, "view_sets": 2} | own.get("small", {}))),
                "rating": Reviews("rating", **(common | own.get("rating", {}))),
            },
            **({"batch_size": 20} | options),
        )

    return build


def epoch(data: MultiTaskData, number: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return list(loader)


def drawn(data: MultiTaskData, number: int = 0) -> list[tuple[int, int]]:
    """Task and index of each example of an epoch, sorted."""
    return sorted(
        pair
        for batch in epoch(data, number)
        for pair in zip(batch["task"].tolist(), batch["index"].tolist(), strict=True)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 50.0])
def test_tasks_are_drawn_in_proportion_to_a_power_of_their_sizes(temperature: float) -> None:
    sizes = [7397, 16500, 210]
    powers = np.array(sizes, float) ** (1 / temperature)
    found = draws(sizes, temperature)
    assert sum(found) == sum(sizes)
    np.testing.assert_allclose(found, powers / powers.sum() * sum(sizes), atol=1)


def test_a_batch_mixes_tasks_and_holds_what_their_own_data_say(make: Callable[..., MultiTaskData]) -> None:
    data = make()
    data.prepare()
    mixed, checked = 0, 0
    alone = [
        {int(index): (batch, row) for batch in part.all_dataloader() for row, index in enumerate(batch["index"])}
        for part in data.tasks.values()
    ]
    for batch in epoch(data):
        assert set(batch) == {"input_ids", "attention_mask", "labels", "index", "task"}
        mixed += len(batch["task"].unique()) > 1
        for row, (task, index) in enumerate(zip(batch["task"].tolist(), batch["index"].tolist(), strict=True)):
            other, own = alone[task][index - data.firsts[task]]
            length = int(other["attention_mask"][own].sum())
            assert torch.equal(batch["input_ids"][row, :length], other["input_ids"][own, :length])
            assert batch["attention_mask"][row].sum() == length
            assert not batch["input_ids"][row, length:].any()
            assert batch["labels"][row] == other["labels"][own].float()
            checked += 1
    assert checked == 210 + 2 * 42 + 33  # the views of one set, among the 84 of the small task
    assert mixed > 10
    views = [batch["labels"][batch["index"] >= data.firsts[1] + 42] for batch in epoch(data)]
    assert data.task.outputs == data.num_classes == 3 + 2 + 1
    assert data.class_names[3:] == ["small: 0", "small: 1", "rating: rating"]
    assert data.sizes["train"] == 210 + 42 + 33
    assert data.num_examples == sum(part.num_examples for part in data.tasks.values())
    assert views
    assert data.model_arguments("student")["num_classes"] == 6


def test_sampling_by_temperature_repeats_small_tasks_evenly_and_takes_turns_with_large_ones(
    make: Callable[..., MultiTaskData],
) -> None:
    data = make({"small": {"views": 0}}, sampling_temperature=1e9)
    epochs = [drawn(data, number) for number in range(3)]
    for taken in epochs:
        assert len(taken) == 210 + 42 + 33
        assert Counter(task for task, _ in taken) == {0: 95, 1: 95, 2: 95}
    times = Counter(index for task, index in epochs[0] if task == 1)
    assert set(times.values()) == {2, 3}
    assert len(times) == 42
    large = [index for taken in epochs for task, index in taken if task == 0]
    assert len(set(large[:190])) == 190, "an epoch goes on where the one before it stopped"
    assert max(Counter(large).values()) == 2
    assert set(large) == set(range(210))
    assert drawn(data, 1) == drawn(make({"small": {"views": 0}}, sampling_temperature=1e9), 1)
    assert drawn(data, 1) != drawn(data.with_batches(seed=1), 1)


def test_view_sets_take_turns_by_passes(make: Callable[..., MultiTaskData]) -> None:
    data = make()
    data.prepare()
    first = data.firsts[1] + 42
    sets = [{index for task, index in drawn(data, number) if task == 1 and index >= first} for number in range(3)]
    assert sets[0] == set(range(first, first + 42))
    assert sets[1] == set(range(first + 42, first + 84))
    assert sets[2] == sets[0]


def test_trainings_without_the_pool_do_not_depend_on_it(make: Callable[..., MultiTaskData]) -> None:
    bare, many = make({"small": {"views": 0}}), make({"small": {"views": 2}})
    for data in (bare, many):
        data.prepare()
    assert bare.fingerprint != many.fingerprint
    assert bare.select(pool=False).fingerprint == many.select(pool=False).fingerprint


def test_evaluation_has_every_example_once_and_one_of_each_task_can_be_had(make: Callable[..., MultiTaskData]) -> None:
    data = make()
    for loader, part in ((data.val_dataloader(), "validation"), (data.test_dataloader(), "test")):
        indices = [int(index) for batch in loader for index in batch["index"]]
        assert len(indices) == len(set(indices)) == data.sizes[part]
        labels = torch.cat([batch["labels"] for batch in loader])
        assert labels.isfinite().all()
    assert data.few()["task"].tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(int(i) for batch in data.all_dataloader() for i in batch["index"]) == list(range(data.num_examples))


def test_resuming_in_an_epoch_goes_on_with_the_same_batches(make: Callable[..., MultiTaskData]) -> None:
    data = make(sampling_temperature=3.0)
    whole = epoch(data, 2)
    data.load_state_dict({**data._order(), "epoch": 2, "batches": 4, "between_epochs": False})
    rest = list(data.train_dataloader())
    assert len(rest) == len(whole) - 4
    for one, two in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(value.nan_to_num(7), two[name].nan_to_num(7)) for name, value in one.items())
    with pytest.raises(ConfigError, match="cannot resume: the data's fingerprint"):
        make(sampling_temperature=2.0).load_state_dict({**data._order(), "epoch": 2, "batches": 4})


def test_ranks_share_a_step(make: Callable[..., MultiTaskData]) -> None:
    from kd_lightning.data.sampler import BucketBatchSampler

    turn = make()._training_dataset().turn
    whole = list(BucketBatchSampler(turn, 20, shuffle=True))
    halves = [list(BucketBatchSampler(turn, 10, shuffle=True, rank=rank, world_size=2)) for rank in range(2)]
    assert len(halves[0]) == len(halves[1]) == len(whole)
    assert set(np.concatenate(whole)) == set(np.concatenate([*halves[0], *halves[1]]))


def test_a_teachers_own_tokens_are_given_for_all_tasks(make: Callable[..., MultiTaskData], tmp_path: Path) -> None:
    other = str(write_tokenizer(tmp_path / "other", "wordpiece:50"))
    data = make({"large": {"teacher_tokenizer": other}})
    batches = epoch(data.select(tokens="both"))
    assert all("teacher_input_ids" in batch for batch in batches if (batch["task"] == 0).any())
    order = [batch["index"].tolist() for batch in epoch(data.select(tokens="student"))]
    assert [batch["index"].tolist() for batch in batches] == order, "a second tokenizer does not keep tasks apart"
    batch = next(batch for batch in batches if len(batch["task"].unique()) == 3)
    one = batch["task"] != 0
    width = batch["input_ids"].shape[1]
    assert torch.equal(batch["teacher_input_ids"][one, :width], batch["input_ids"][one])
    assert "teacher_input_ids" not in epoch(data.select(tokens="student", pool=False))[0]
    assert sum(len(batch["index"]) for batch in epoch(data.select(tokens="student", pool=False))) == 210 + 42 + 33


def test_tasks_that_one_student_cannot_read_are_refused(make: Callable[..., MultiTaskData], tmp_path: Path) -> None:
    other = str(write_tokenizer(tmp_path / "other", "wordpiece:50"))
    with pytest.raises(ConfigError, match=r"small has another tokenizer and vocab_size than large"):
        make({"small": {"tokenizer": other}}).prepare()
    with pytest.raises(ConfigError, match=r"rating has another max_length than large"):
        make({"rating": {"max_length": 20}}).prepare()
    with pytest.raises(ConfigError, match=r"data\.tasks\.small\.view_sets=null"):
        make({"small": {"view_sets": None}}).prepare()
    with pytest.raises(ConfigError, match=r"data\.sampling_temperature=-1: expected a positive number"):
        make(sampling_temperature=-1)
    with pytest.raises(ConfigError, match="give two tasks or more"):
        MultiTaskData({})


def test_domain_and_rating_share_the_split_of_sentiment(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_archive(tmp_path / "archive")
    monkeypatch.setattr("kd_lightning.data.sources.reviews.fetch", lambda name: archive)
    sentiment, domain, rating = (
        Reviews(labels, tokenizer=tokenizer).read() for labels in ("sentiment", "domain", "rating")
    )  # type: ignore[arg-type]
    for part in ("train", "validation", "test"):
        movies, every, rated = (getattr(corpus, part) for corpus in (sentiment, domain, rating))
        assert every.texts == rated.texts
        assert every.texts[: len(movies)] == movies.texts
        assert len(set(every.texts)) == len(every.texts)
        for text, label, score in zip(every.texts, every.labels, rated.labels, strict=True):
            assert ["movieReview", "amazonReview", "nytEditorial", "tweets"][label] in text[0] or score == 0
        for text, label in zip(movies.texts, movies.labels, strict=True):
            assert (rated.labels[every.texts.index(text)] > 0) == label
    assert ("a film that nobody rates",) in rating.train.texts
    assert (rating.class_names, rating.regression, domain.regression) == (["rating"], True, False)
    with pytest.raises(ConfigError, match="did you mean 'domain'"):
        Reviews("domains", tokenizer=tokenizer)  # type: ignore[arg-type]


def test_labels_of_a_regression_are_floats_and_none_is_nan(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_archive(tmp_path / "archive")
    monkeypatch.setattr("kd_lightning.data.sources.reviews.fetch", lambda name: archive)
    data = Reviews("rating", tokenizer=tokenizer, views=1, transfer=["tweets"])
    data.prepare()
    labels = torch.cat([batch["labels"] for batch in data.train_dataloader()])
    assert labels.dtype == torch.float32
    assert int(labels.isnan().sum()) == data.sizes["views"] + data.sizes["transfer"]
    assert data.num_classes == 1
    fresh = Reviews("rating", tokenizer=tokenizer, views=1, view_sets=None)
    assert any((batch["labels"] == -100).any() for batch in fresh.train_dataloader())


def test_examples_are_shown_as_the_student_reads_them(
    make: Callable[..., MultiTaskData], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make({"small": {"views": 1, "view_sets": 2}}, eval_batch_size=7)
    index = [int(batch["index"][0]) for batch in data.test_dataloader()]
    fetched: list[int] = []
    real = MixedDataset.__getitem__
    monkeypatch.setattr(MixedDataset, "__getitem__", lambda *given: fetched.extend(given[1]) or real(*given))
    found = shown(data, [*index, 0])  # which is no test example
    assert len(fetched) == len(index) < data.sizes["test"], "others were read"
    monkeypatch.undo()
    assert set(found) == set(index)
    assert all(shown(one, [one._spans["test"][2]]).keys() == {one._spans["test"][2]} for one in data.tasks.values())
    tokens = {int(batch["index"][0]): batch["input_ids"][0] for batch in data.select("student").test_dataloader()}
    tokenizer = data.tokenizer_of("student")
    for number, one in found.items():
        assert one == {"text": tokenizer.decode(tokens[number], skip_special_tokens=True)}
    assert shown(data, []) == {}
