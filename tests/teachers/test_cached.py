from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.losses import SoftTargetLoss
from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers import CachedTeacher, FrozenTeacher
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.types import Batch, ModelOutput

INPUTS = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


def batch(*rows: int) -> Batch:
    index = torch.tensor(rows)
    return {"pixel_values": INPUTS[index], "index": index, "labels": index * 0}


class Counting(FrozenTeacher):
    """A teacher that remembers what it was asked about."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)))
        self.asked: list[list[int]] = []

    def forward(self, batch: Batch) -> ModelOutput:
        self.asked.append(batch["index"].tolist())
        return super().forward(batch)


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return TeacherCache.create(tmp_path / "cache", {"teacher": "a"}, 10)


def lock_is_free(cache: TeacherCache) -> bool:
    code = f"from kd_lightning.teachers.cache.upkeep import locked\nfrom pathlib import Path\nwith locked(Path({str(cache.folder)!r}), wait=False): pass"  # noqa: E501
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120).returncode == 0


def test_each_example_is_asked_about_once_and_answered_as_the_running_teacher_answers(cache: TeacherCache) -> None:
    teacher = Counting()
    cached = CachedTeacher(cache, teacher)
    first = [cached(batch(3, 1, 0)), cached(batch(2, 9, 8, 7)), cached(batch(6, 5, 4))]
    asked = len(teacher.asked)
    assert asked == 4, "the first batch twice, to see that the teacher repeats itself"
    again = cached(batch(7, 0, 7))
    assert len(teacher.asked) == asked
    assert torch.equal(again.logits, torch.stack([first[1].logits[3], first[0].logits[2], first[1].logits[3]]))
    assert torch.equal(first[0].logits, FrozenTeacher(teacher.network)(batch(3, 1, 0)).logits), "float32: bit by bit"
    cached.flush()
    assert CachedTeacher(TeacherCache.open(cache.folder))(batch(*range(10))).logits.shape == (10, 3)


def test_without_a_teacher_missing_answers_are_an_error(cache: TeacherCache) -> None:
    CachedTeacher(cache, Counting())(batch(0, 1))
    with pytest.raises(CacheError, match="no teacher to run"):
        CachedTeacher(cache)(batch(1, 2))


def test_nobody_waits_for_a_training_that_fills_and_flush_shows_others_what_it_has(cache: TeacherCache) -> None:
    cached = CachedTeacher(cache, Counting())
    cached(batch(0, 1, 2))
    assert lock_is_free(cache)
    assert len(TeacherCache.open(cache.folder).missing()) == 10
    cached.flush()
    assert TeacherCache.open(cache.folder).missing().tolist() == list(range(3, 10))


def test_the_estimate_is_said_once_and_counts_all_examples(cache: TeacherCache) -> None:
    said: list[str] = []
    cached = CachedTeacher(cache, Counting(), say=said.append)
    cached(batch(0, 1, 2))
    cached(batch(3, 4))
    assert len(said) == 1
    assert "for all 10" in said[0]


def test_the_first_epoch_reads_what_later_ones_read(tmp_path: Path) -> None:
    cache = TeacherCache.create(tmp_path / "half", {"teacher": "a"}, 10, Storage("float16"))
    cached = CachedTeacher(cache, Counting())
    first = cached(batch(*range(10))).logits
    exact = Counting()(batch(*range(10))).logits
    assert torch.equal(cached(batch(*range(10))).logits, first)
    assert torch.equal(first, exact.half().float())
    assert not torch.equal(first, exact)


def test_a_teacher_that_draws_at_random_is_refused(cache: TeacherCache) -> None:
    class Dropping(Counting):
        def forward(self, batch: Batch) -> ModelOutput:
            return ModelOutput(nn.functional.dropout(super().forward(batch).logits, 0.5, training=True))

    with pytest.raises(CacheError, match="differ in their logits"):
        CachedTeacher(cache, Dropping())(batch(*range(10)))
    assert cache.missing().tolist() == list(range(10))


def test_its_answers_can_be_trained_from_and_it_can_be_sent_to_another_process(cache: TeacherCache) -> None:
    fill(cache, Counting(), [batch(*range(10))])
    teacher = CachedTeacher(cache)
    student: Tensor = torch.zeros(10, 3, requires_grad=True)
    with torch.inference_mode():
        output = teacher(batch(*range(10)))
    (SoftTargetLoss(2.0)(ModelOutput(student), output, batch(*range(10))) + (student * output.logits).sum()).backward()
    assert student.grad is not None
    assert torch.equal(pickle.loads(pickle.dumps(teacher))(batch(4, 2)).logits, output.logits[[4, 2]])


def test_a_training_in_16_bits_stores_what_any_other_does(tmp_path: Path) -> None:
    found = []
    for name, enabled in (("wide", False), ("narrow", True)):
        storage = Storage("float16", 2)
        cached = CachedTeacher(TeacherCache.create(tmp_path / name, {"teacher": "a"}, 10, storage), Counting())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(cached(batch(1, 2)).logits)
    assert torch.equal(*found)
