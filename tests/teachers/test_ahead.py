from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning.data.sampler import BucketBatchSampler
from kd_lightning.teachers import ahead
from kd_lightning.teachers.ahead import AheadTeacher
from kd_lightning.teachers.frozen import FrozenTeacher
from kd_lightning.types import Batch, ModelOutput

CPU = torch.device("cpu")


class Loader:
    """Batches of one feature each, and a record of what was asked of it."""

    sampler: object = "the sampler"

    def __init__(self, count: int) -> None:
        self.count = count
        self.log: list[str] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        self.log.append("iter")
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        for i in range(self.count):
            yield {"pixel_values": torch.full((2, 4), float(i)), "index": torch.tensor([2 * i, 2 * i + 1])}


class Logs:
    """A teacher that notes when it is asked about which batch."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.teacher = log, FrozenTeacher(nn.Linear(4, 3), features=["pooled"])

    def __call__(self, batch: Batch) -> ModelOutput:
        self.log.append(f"teacher {int(batch['index'][0]) // 2}")
        return self.teacher(batch)

    def to(self, device: torch.device) -> Logs:
        return self

    def flush(self) -> None:
        self.log.append("closed")


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_same_batches_same_answers_same_order(count: int) -> None:
    log: list[str] = []
    teacher = Logs(log)
    asked = AheadTeacher(teacher)
    answered = list(ahead._Ahead(Loader(count), teacher, CPU))
    log.clear()
    assert len(answered) == count
    for batch, plain in zip(answered, Loader(count), strict=True):
        assert torch.equal(batch["index"], plain["index"])
        output, expected = asked(batch), teacher.teacher(plain)
        assert torch.equal(output.logits, expected.logits)
        assert list(output.features) == ["pooled"]
        assert torch.equal(output.features["pooled"], plain["pixel_values"])
    assert log == []  # nothing was asked twice


def test_the_teacher_is_one_batch_ahead_and_no_more() -> None:
    log: list[str] = []
    for batch in ahead._Ahead(Loader(3), Logs(log), CPU):
        log.append(f"student {int(batch['index'][0]) // 2}")
    assert log == ["teacher 0", "teacher 1", "student 0", "teacher 2", "student 1", "student 2"]


def test_the_loaders_iterator_is_made_with_its_own() -> None:
    loader = Loader(2)
    wrapped = ahead._Ahead(loader, Logs([]), CPU)
    assert loader.log == []
    iter(wrapped)
    assert loader.log == ["iter"]  # before the first `next`: Lightning sets the epoch in between
    assert len(wrapped) == 2
    assert wrapped.sampler == "the sampler"


def test_a_resumed_epoch_goes_on_with_the_same_batches_and_answers() -> None:
    class Sampled(Loader):
        def __init__(self, skip: int) -> None:
            self.sampler = BucketBatchSampler(torch.arange(20).numpy(), 2, shuffle=True, seed=3, rank=0, world_size=1)
            super().__init__(len(self.sampler))
            self.sampler.resume(0, skip)

        def _batches(self) -> Iterator[Batch]:
            for rows in self.sampler:
                index = torch.from_numpy(rows)
                yield {"pixel_values": index[:, None].float().expand(-1, 4), "index": index}

    teacher = Logs([])
    whole = list(ahead._Ahead(Sampled(0), teacher, CPU))
    rest = list(ahead._Ahead(Sampled(4), teacher, CPU))
    assert len(rest) == len(whole) - 4
    for one, other in zip(whole[4:], rest, strict=True):
        assert torch.equal(one["index"], other["index"])
        assert torch.equal(one["teacher_output.logits"], other["teacher_output.logits"])


def test_on_a_cpu_the_loader_is_left_as_it_is() -> None:
    log: list[str] = []
    teacher, loader = AheadTeacher(Logs(log)).to(CPU), Loader(2)
    assert teacher.around(loader) is loader
    batch = next(iter(loader))
    assert torch.equal(teacher(batch).logits, teacher.teacher(batch).logits)


def test_a_device_of_its_own() -> None:
    meta = torch.device("meta")
    asked: list[str] = []

    class Elsewhere(Logs):
        def __call__(self, batch: Batch) -> ModelOutput:
            asked.append(batch["pixel_values"].device.type)
            return ModelOutput(torch.zeros(2, 3, device=meta))

    teacher = AheadTeacher(Elsewhere([]), meta).to(CPU)
    answered = list(teacher.around(Loader(3)))
    assert [batch["pixel_values"].device.type for batch in answered] == ["cpu"] * 3  # the student's entries stay
    assert [tuple(teacher(batch).logits.shape) for batch in answered] == [(2, 3)] * 3
    assert {teacher(batch).logits.device.type for batch in answered} == {"meta"}
    assert asked == ["meta"] * 3  # it was shown its own copy of the batch
    teacher.flush()
    assert teacher.teacher.log == ["closed"]  # type: ignore[attr-defined]


def test_no_network_is_given_the_answer() -> None:
    from kd_lightning.models.adapt import run_network

    class Greedy(nn.Module):
        def forward(self, pixel_values: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
            assert not rest
            return pixel_values

    (batch,) = ahead._Ahead(Loader(1), Logs([]), CPU)
    assert "teacher_output.logits" in batch
    run_network(Greedy(), batch)


def test_lightning_trains_on_the_same_batches_through_it(tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset[Batch]):
        def __getitem__(self, rows: np.ndarray) -> Batch:  # type: ignore[override]
            index = torch.from_numpy(rows)
            return {"pixel_values": index[:, None].float().expand(-1, 4), "index": index}

    class Student(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.seen: list[list[int]] = []

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            self.seen.append(batch["index"].tolist())
            loss: torch.Tensor = self.layer(batch["pixel_values"]).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def seen(wrap: bool) -> list[list[int]]:
        sampler = BucketBatchSampler(np.arange(20), 3, shuffle=True, seed=3, rank=0, world_size=1)
        loader = DataLoader(Rows(), sampler=sampler, batch_size=None)
        student = Student()
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(student, ahead._Ahead(loader, Logs([]), CPU) if wrap else loader)
        return student.seen

    through = seen(wrap=True)
    assert len(through) == 14
    assert through[:7] != through[7:]  # another order in the second epoch
    assert through == seen(wrap=False)
