from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers import CachedTeacher, FrozenTeacher
from kd_lightning.teachers.cache.fill import attention_mask, check_repeatable, estimate, fill
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.clock import PREDICTING
from kd_lightning.types import Batch, ModelOutput
from tests.teachers.cache.examples import KEY, SMALL, Known, reads_back


class Asked:
    """A teacher that notes what it is asked."""

    def __init__(self, known: Known) -> None:
        self.known, self.index = known, []  # type: ignore[var-annotated]

    def __call__(self, batch: Batch) -> ModelOutput:
        self.index += batch["index"].tolist()
        return self.known.ask(batch)


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return TeacherCache.create(tmp_path / "cache", KEY, 60, limits=SMALL)


def test_every_example_is_asked_about_once_and_the_first_batch_twice(cache: TeacherCache) -> None:
    known = Known(60)
    ask, said = Asked(known), list[str]()
    batches = known.batches()
    assert fill(cache, ask, batches, say=said.append) == 60
    assert ask.index == batches[0]["index"].tolist() + [i for batch in batches for i in batch["index"].tolist()]
    assert len(said) == 1
    assert said[0].startswith("teacher outputs: ")
    assert "for all 60, in " in said[0]
    reads_back(cache.folder, known)
    assert fill(cache, Asked(known), batches, say=said.append) == 0
    assert len(said) == 1


def test_what_the_teacher_takes_is_noted_with_who_had_it_predict(tmp_path: Path) -> None:
    network = nn.Linear(4, 3)

    def slow(pixel_values: Tensor) -> Tensor:
        time.sleep(0.02)
        return nn.functional.linear(pixel_values, network.weight)

    network.forward = slow
    teacher, cache = FrozenTeacher(network), TeacherCache.create(tmp_path / "cache", KEY, 6)
    cache.run = "first"
    index = torch.arange(6)
    batches = [{"pixel_values": torch.ones(2, 4), "index": rows} for rows in index.split(2)]
    before = PREDICTING.seconds
    CachedTeacher(cache, teacher)(batches[0])
    cache.flush()
    assert 0.04 <= cache.manifest.seconds() == PREDICTING.seconds - before, "twice, to see that it repeats itself"
    again = TeacherCache.open(tmp_path / "cache")
    again.run = "second"
    fill(again, teacher, batches)
    found = TeacherCache.open(tmp_path / "cache").manifest
    assert found.seconds() == pytest.approx(PREDICTING.seconds - before)
    assert found.seconds("first") == cache.manifest.seconds()
    assert found.seconds("second") >= 0.06


def test_only_missing_rows_are_asked_about(cache: TeacherCache) -> None:
    known = Known(60)
    there = torch.arange(0, 60, 3)
    cache.add(there, known.say(there, known.mask(there)), known.mask(there))
    ask = Asked(known)
    assert fill(cache, ask, known.batches()) == 40
    assert set(ask.index) == set(range(60)) - set(there.tolist())
    assert len(ask.index) < 40 + 8
    reads_back(cache.folder, known)


def test_examples_that_are_not_shown_are_counted(cache: TeacherCache) -> None:
    known = Known(60)
    with pytest.raises(CacheError, match="the batches had 52 of 60 examples"):
        fill(cache, known.ask, known.batches()[1:])
    assert len(TeacherCache.open(cache.folder).missing()) == 8  # and the others are kept


def test_a_teacher_in_train_mode_is_refused(cache: TeacherCache) -> None:
    known = Known(60)
    network = nn.Dropout(0.1)

    def ask(batch: Batch) -> ModelOutput:
        said = known.ask(batch)
        return ModelOutput(said.logits, {"hidden": network(said.features["hidden"])})

    with pytest.raises(
        CacheError, match=r"same batch differ in their hidden: .*dropout in train mode.*teacher.cache=off"
    ):
        fill(cache, ask, known.batches())
    assert len(cache.missing()) == 60
    network.eval()
    fill(cache, ask, known.batches())
    assert cache.complete


def test_rounding_and_nan_in_padding_are_no_difference() -> None:
    times = iter((0.0, 1e-6))

    def ask(batch: Batch) -> ModelOutput:
        hidden = torch.ones(2, 3, 4) + next(times)
        hidden[1, 2] = float("nan")
        return ModelOutput(torch.ones(2, 3), {"hidden": hidden})

    check_repeatable(ask, {})
    shapes = iter(((2, 3), (2, 4)))
    with pytest.raises(CacheError, match="differ in their logits"):
        check_repeatable(lambda batch: ModelOutput(torch.zeros(next(shapes))), {})


@pytest.mark.parametrize("storage", [Storage(), Storage("float16"), Storage("bfloat16", 2)])
def test_the_estimate_is_what_it_comes_to(tmp_path: Path, storage: Storage) -> None:
    known = Known(2000)
    cache = TeacherCache.create(tmp_path / "cache", KEY, 2000, storage)
    first = known.batches()[0]
    size = estimate(cache, known.ask(first), first["attention_mask"], known.lengths)
    assert size.missing == 2000
    fill(cache, known.ask, known.batches(100))
    written = sum(record.bytes for record in cache.manifest.shards)
    assert written == pytest.approx(size.bytes_per_example * 2000, rel=0.02)
    assert "for all 2,000" in str(size)


def test_without_lengths_the_first_batch_stands_for_all(cache: TeacherCache) -> None:
    known = Known(60)
    batch = {"index": torch.arange(2), "attention_mask": known.mask(torch.arange(2))}  # both of 9 tokens
    size = estimate(cache, known.ask(batch), batch["attention_mask"])
    assert size.bytes_per_example == 4 * (3 + 8 + 9 * 5 + 2 * 81) + 4
    assert estimate(cache, ModelOutput(torch.zeros(2, 3))).bytes_per_example == 4 * 3


def test_too_small_a_disk_is_refused_before_anything_is_written(
    cache: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known(60)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    with pytest.raises(
        CacheError, match=r"would take .* for each of 60 examples\) and its disk has 10.0 kB free: .*top_k"
    ):
        fill(cache, known.ask, known.batches())
    assert [path.name for path in cache.folder.iterdir()] == ["manifest.json"]


def test_the_mask_is_the_teachers_where_it_has_entries_of_its_own() -> None:
    mask, own = torch.ones(1, 2), torch.ones(1, 3)
    assert attention_mask({"attention_mask": mask, "labels": own}) is mask
    assert attention_mask({"attention_mask": mask, "teacher_input_ids": own, "teacher_attention_mask": own}) is own
    assert attention_mask({"attention_mask": mask, "teacher_pixel_values": own}) is None
    assert attention_mask({"pixel_values": own}) is None
