"""A language model's outputs, kept sparse, teach what the running model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kd_lightning.losses.sparse import SparseKDLoss
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers import CachedTeacher, FrozenTeacher
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.calibrated import CalibratedTeacher
from kd_lightning.training.objective import Objective
from kd_lightning.types import Batch, ModelOutput
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


def cached(folder: Path, teacher: FrozenTeacher, dtype: str = "float32", k: int = K) -> CachedTeacher:
    cache = TeacherCache.create(folder / f"{dtype}-{k}", KEY, len(LENGTHS), Storage(dtype, k), limits=SMALL)  # type: ignore[arg-type]
    found = CachedTeacher(cache, teacher)
    for index in ([0, 1, 2], [3, 4, 5]):
        found(blocks(index))
    found.flush()
    return found


def compared(teacher: ModelOutput, batch: Batch) -> Tensor:
    """Return the loss of each token, of a student that is the same for each block."""
    student = torch.stack([torch.randn(40, V, generator=torch.Generator().manual_seed(int(i))) for i in batch["index"]])
    keep = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    keep[:, :-1] = batch["attention_mask"][:, 1:].bool()
    found = []
    for place in keep.nonzero().tolist():
        one = torch.zeros_like(keep)
        one[tuple(place)] = True
        logits = student[:, : keep.shape[1]]
        found.append(SparseKDLoss(K, "reverse_kl")(ModelOutput(logits), teacher, {"keep": one}))
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
