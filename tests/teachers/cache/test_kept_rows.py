"""Logits per token are stored at the rows that a batch keeps, and nowhere else."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers import CachedTeacher, Teacher
from kd_lightning.teachers.cache.fill import estimate, fill
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.types import Batch, ModelOutput
from tests.teachers.cache.examples import KEY, MAPPED, SMALL, Known, dense_top_k

NUMBER = 60
KNOWN = Known(NUMBER, classes=7)


def keep(index: Tensor, mask: Tensor) -> Tensor:
    """Which tokens count: another pattern for each example, the padding never."""
    places = torch.arange(mask.shape[1]) + index[:, None]
    return (places % 3 != 0) & mask.bool()


class Tagger(Teacher):
    """Answers for every token, with no number where none counts."""

    asked = 0

    def __call__(self, batch: Batch) -> ModelOutput:
        self.asked += len(batch["index"])
        mask = batch["attention_mask"].bool()
        scores = torch.full((*mask.shape, 7), torch.nan)
        scores[mask] = torch.cat([KNOWN.scores[i] for i in batch["index"]])
        scores[~batch["keep"]] = torch.nan
        return ModelOutput(scores, {"hidden": KNOWN.ask(batch).features["hidden"]})

    def flush(self) -> None:
        """Nothing is waiting."""

    def to(self, device: torch.device) -> Tagger:
        return self


def batches(padded: int = 0) -> list[Batch]:
    found = []
    for rows in torch.randperm(NUMBER, generator=torch.Generator().manual_seed(padded)).split(8):
        mask = KNOWN.mask(rows, padded)
        found.append({"index": rows, "attention_mask": mask, "keep": keep(rows, mask)})
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("limits", [SMALL, MAPPED])
def test_what_is_read_back_is_what_the_teacher_said_to_the_bit(folder: Path, limits: object) -> None:
    teacher = Tagger()
    cache = TeacherCache.create(folder, KEY, NUMBER, limits=limits)  # type: ignore[arg-type]
    cached = CachedTeacher(cache, teacher)
    for batch in [*batches(), *batches(padded=15)]:  # asked in the first epoch, looked up in the second
        live, found = Tagger()(batch), cached(batch)
        assert found.logits.shape == live.logits.shape
        assert torch.equal(found.logits[batch["keep"]], live.logits[batch["keep"]])
        assert (found.logits[~batch["keep"]] == 0).all()
        assert torch.equal(found.features["hidden"], live.features["hidden"])
    assert teacher.asked == NUMBER + 8  # the first batch twice
    cached.flush()
    again = CachedTeacher(pickle.loads(pickle.dumps(cache)))
    (batch, *_) = batches(padded=20)
    assert torch.equal(again(batch).logits, cached(batch).logits)


def test_only_kept_rows_take_room(folder: Path) -> None:
    cache = TeacherCache.create(folder, KEY, NUMBER)
    (first, *_) = batches()
    output = ModelOutput(Tagger()(first).logits)
    size = estimate(cache, output, first["attention_mask"], keep=first["keep"])
    assert size.bytes_per_example == pytest.approx(4 * 7 * float(first["keep"].sum()) / 8 + 4, rel=1e-6)
    fill(cache, lambda batch: ModelOutput(Tagger()(batch).logits), batches())
    stored = sum(segment.parts["logits"].nbytes for segment in cache._segments.values())
    assert stored == sum(4 * 7 * int(batch["keep"].sum()) for batch in batches())


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_the_largest_logits_of_kept_rows(folder: Path, dtype: str, rounding: float) -> None:
    cache = TeacherCache.create(folder, KEY, NUMBER, Storage(dtype, 3), limits=SMALL)  # type: ignore[arg-type]
    fill(cache, Tagger(), batches())
    (batch, *_) = batches(padded=12)
    found, said = CachedTeacher(cache)(batch).logits[batch["keep"]], Tagger()(batch).logits[batch["keep"]]
    np.testing.assert_allclose(found.numpy(), dense_top_k(said.numpy(), 3), rtol=max(rounding, 1e-6), atol=1e-5)


def test_other_kept_rows_are_refused(folder: Path) -> None:
    cache = TeacherCache.create(folder, KEY, NUMBER)
    fill(cache, Tagger(), batches())
    (batch, *_) = batches()
    with pytest.raises(CacheError, match=r"has \d kept tokens in this batch and \d in the cache"):
        CachedTeacher(cache)({**batch, "keep": batch["attention_mask"].bool()})
    with pytest.raises(CacheError, match="its batches need `keep`"):
        cache.lookup(batch["index"], batch["attention_mask"])
