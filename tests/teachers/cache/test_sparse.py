"""A language model's outputs, kept sparse, teach what the running model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kd_lightning.losses.sparse import Divergence, SparseKDLoss
from kd_lightning.models.causal_lm import causal_lm_small, trimmed
from kd_lightning.runtime.errors import CacheError, ConfigError
from kd_lightning.tasks.rows import next_tokens
from kd_lightning.teachers import CachedTeacher, FrozenTeacher, SampledTeacher, Teacher
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.calibrated import CalibratedTeacher
from kd_lightning.training.objective import Objective
from kd_lightning.types import IGNORE, Batch, ModelOutput
from tests.teachers.cache.examples import KEY, SMALL

V, K = 1500, 8
LENGTHS = (9, 4, 7, 12, 2, 8)


def blocks(index: list[int], padding: int = 0) -> Batch:
    """Return blocks of tokens that their index decides, padded on the right."""
    width = max(LENGTHS[i] for i in index) + padding
    ids, mask = torch.zeros(len(index), width, dtype=torch.long), torch.zeros(len(index), width, dtype=torch.long)
    for row, i in enumerate(index):
        generator = torch.Generator().manual_seed(i)
        ids[row, : LENGTHS[i]] = torch.randint(0, V, (LENGTHS[i],), generator=generator)
        mask[row, : LENGTHS[i]] = 1
    return {"input_ids": ids, "attention_mask": mask, "index": torch.tensor(index)}


@pytest.fixture(scope="module")
def teacher() -> FrozenTeacher:
    torch.manual_seed(0)
    network = causal_lm_small(V, 16, hidden_size=16, num_layers=1, num_heads=2)
    network.network.lm_head.weight.data.mul_(30.0)  # type: ignore[operator, union-attr]
    return FrozenTeacher(network)


def cached(folder: Path, teacher: Teacher, dtype: str = "float32", k: int = K) -> CachedTeacher:
    storage = Storage(dtype, k, drawn=isinstance(teacher, SampledTeacher))  # type: ignore[arg-type]
    cache = TeacherCache.create(folder / f"{dtype}-{k}", KEY, len(LENGTHS), storage, limits=SMALL)
    found = CachedTeacher(cache, teacher)
    for index in ([0, 1, 2], [3, 4, 5]):
        found(blocks(index))
    found.flush()
    return found


def compared(teacher: ModelOutput, batch: Batch, divergence: Divergence = "reverse_kl") -> Tensor:
    """Return the loss of each token, of a student that is the same for each block."""
    student = torch.stack([torch.randn(40, V, generator=torch.Generator().manual_seed(int(i))) for i in batch["index"]])
    keep = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    keep[:, :-1] = batch["attention_mask"][:, 1:].bool()
    found = []
    for place in keep.nonzero().tolist():
        one = torch.zeros_like(keep)
        one[tuple(place)] = True
        logits = student[:, : keep.shape[1]]
        found.append(SparseKDLoss(K, divergence)(ModelOutput(logits), teacher, {"keep": one}))
    return torch.stack(found)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_each_token_teaches_the_same_stored_and_running(
    tmp_path: Path, teacher: FrozenTeacher, dtype: str, tolerance: float
) -> None:
    stored = cached(tmp_path, teacher, dtype)
    batch = blocks([5, 0, 3, 1], padding=3)  # in another company than when the teacher predicted them
    output = stored(batch)
    assert output.logits.shape == (4, 15, 0)
    assert output.sparse is not None
    torch.testing.assert_close(compared(output, batch), compared(teacher(batch), batch), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 4e-3)])
def test_drawn_tokens_are_the_same_stored_and_running_and_whenever_they_are_drawn(
    tmp_path: Path, teacher: FrozenTeacher, dtype: str, tolerance: float
) -> None:
    drawing = SampledTeacher(teacher, K)
    stored, again = cached(tmp_path, drawing, dtype), cached(tmp_path / "again", drawing, dtype)
    batch = blocks([5, 0, 3, 1], padding=3)
    output, running = stored(batch), drawing(batch)
    assert output.sparse is not None
    assert running.sparse is not None
    assert output.sparse.drawn
    assert output.logits.shape == running.logits.shape == (4, 15, 0)
    real = batch["attention_mask"].bool()
    assert torch.equal(output.sparse.ids[real], running.sparse.ids[real])
    one, other = (compared(each, batch, "forward_kl") for each in (output, running))
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    files = [path.read_bytes() for made in (stored, again) for path in sorted(made.cache.folder.glob("shard-*"))]
    assert files[: len(files) // 2] == files[len(files) // 2 :]
    (spec,) = stored.cache.manifest.specs
    assert str(spec) == f"logits 1500 per token, {dtype}, drawn {K}"
    assert TeacherCache.open(stored.cache.folder, KEY).manifest.storage == stored.cache.manifest.storage


def test_what_a_teacher_gives_is_stored_as_the_storage_says_or_not_at_all(
    tmp_path: Path, teacher: FrozenTeacher
) -> None:
    cache = TeacherCache.create(tmp_path / "cache", KEY, len(LENGTHS), Storage(top_k=K), limits=SMALL)
    with pytest.raises(CacheError, match=f"gives {K} logits of each token, and Storage"):
        CachedTeacher(cache, SampledTeacher(teacher, K))(blocks([0]))


def test_of_a_trimmed_vocabulary_in_packed_documents_each_counted_token_teaches_the_same(tmp_path: Path) -> None:
    """Cut to the tokens that are kept, shifted once, masked alike; top K with the tail, and drawn ones."""
    torch.manual_seed(0)
    network = causal_lm_small(40, 16, hidden_size=16, num_layers=1, num_heads=2)
    network.network.lm_head.weight.data.mul_(30.0)  # type: ignore[operator, union-attr]
    frozen = FrozenTeacher(trimmed(network, tuple(range(0, 40, 2))))
    ids = torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 3, 3, 3, 3, 3, -1, -1], [4, 4, 4, 4, 4, 5, 5, 5, -1]])
    mask, first = (documents >= 0).long(), torch.ones(3, 9, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = torch.where(first, torch.arange(9), 0).cummax(1).values
    batch = {
        "input_ids": ids, "attention_mask": mask, "document_ids": documents, "index": torch.arange(3),
        "position_ids": (torch.arange(9) - starts) * mask, "labels": torch.where(first | (mask == 0), IGNORE, ids),
    }  # fmt: skip
    rows, student = next_tokens(batch), ModelOutput(torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(2)))
    part = {name: value[1:2, :7] for name, value in batch.items() if name != "index"} | {"index": torch.tensor([1])}
    for teacher in (frozen, SampledTeacher(frozen, 6)):
        drawn = isinstance(teacher, SampledTeacher)
        cache = TeacherCache.create(tmp_path / f"{drawn}", KEY, 3, Storage("float32", 6, drawn))
        stored = CachedTeacher(cache, teacher)
        stored(part)
        found, expected = stored(batch), teacher(batch)
        for place in rows["keep"].nonzero().tolist():
            one = {"keep": torch.zeros_like(rows["keep"])}
            one["keep"][tuple(place)] = True
            values = [SparseKDLoss(6)(student, each, one) for each in (found, expected)]
            torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)
            assert values[0].item() != 0


def test_an_objective_passes_the_sparse_form_on(tmp_path: Path, teacher: FrozenTeacher) -> None:
    batch = blocks([0, 1])
    batch["keep"] = batch["attention_mask"].bool()
    objective = Objective({"kd": SparseKDLoss(K)}, {"kd": 1.0})
    student = ModelOutput(torch.randn(2, 9, V).half())
    values = [objective(student, each(batch), batch, 0.0)[0] for each in (teacher, cached(tmp_path, teacher))]
    torch.testing.assert_close(values[1], values[0])


def test_a_token_takes_few_bytes(tmp_path: Path, teacher: FrozenTeacher) -> None:
    (spec,) = cached(tmp_path, teacher, "float16", 32).cache.manifest.specs
    assert spec.unit_bytes == 32 * (2 + 2) + 4


def test_a_temperature_for_all_logits_is_refused_where_only_some_are_kept(
    tmp_path: Path, teacher: FrozenTeacher
) -> None:
    calibrated = CalibratedTeacher(cached(tmp_path, teacher), 2.0)
    with pytest.raises(ConfigError, match=r"teacher\.calibrate divides all logits"):
        calibrated(blocks([0]))
