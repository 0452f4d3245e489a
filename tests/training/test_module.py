"""The randomness of a step follows from (seed, rank, batches so far), and so does a resumed run's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning.runtime.mixing import mixed_seed
from kd_lightning.tasks import Classification
from kd_lightning.training.distillation import SupervisedModule
from kd_lightning.training.module import NetworkModule
from kd_lightning.types import Batch


class Noisy(nn.Module):
    """Notes the dropout mask of every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(3, 2), nn.Dropout(0.5)
        self.masks: list[Tensor] = []

    def forward(self, pixel_values: Tensor) -> Tensor:
        mask = self.dropout(torch.ones(64))
        if self.training:
            self.masks.append(mask)
        logits: Tensor = self.linear(pixel_values) * mask.mean()
        return logits


class Data(L.LightningDataModule):
    """Six batches an epoch; it draws from the global generator, as a careless transform would."""

    def __init__(self, wasteful: int = 0) -> None:
        super().__init__()
        self.wasteful = wasteful

    def train_dataloader(self) -> DataLoader[Batch]:
        torch.rand(self.wasteful)
        inputs = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
        batches = [{"pixel_values": x, "labels": torch.tensor([0, 1, 0, 1]), "index": torch.arange(4)} for x in inputs]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def fit(data: Data | None = None, seed: int = 0, ckpt_path: Path | None = None, **options: Any) -> SupervisedModule:
    torch.manual_seed(5)
    module = SupervisedModule(Noisy(), partial(torch.optim.AdamW, lr=0.1), task=Classification(2), seed=seed)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, **{"max_epochs": 2, **options},
    )  # fmt: skip
    trainer.fit(module, datamodule=data or Data(), ckpt_path=ckpt_path, weights_only=True)
    return module


def masks(module: SupervisedModule) -> list[list[float]]:
    assert isinstance(module.network, Noisy)
    return [mask.tolist() for mask in module.network.masks]


def test_every_step_of_every_epoch_draws_its_own_mask() -> None:
    drawn = masks(fit())
    assert len(drawn) == 12
    assert len({tuple(mask) for mask in drawn}) == 12


def test_masks_follow_from_the_seed_and_from_nothing_else() -> None:
    drawn = masks(fit())
    assert masks(fit(Data(wasteful=17))) == drawn
    assert all(a != b for a, b in zip(masks(fit(seed=1)), drawn, strict=True))


def test_each_rank_draws_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = masks(fit())
    monkeypatch.setattr(NetworkModule, "global_rank", property(lambda self: 1))
    assert all(a != b for a, b in zip(masks(fit()), drawn, strict=True))


def test_accumulated_batches_draw_their_own() -> None:
    drawn = masks(fit(accumulate_grad_batches=3))
    assert len({tuple(mask) for mask in drawn}) == 12


@pytest.mark.parametrize("step", [4, 6, 9])
def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(tmp_path: Path, step: int) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    whole = fit(callbacks=[Save()])
    resumed = fit(Data(wasteful=3), ckpt_path=tmp_path / "x.ckpt")
    assert masks(resumed) == masks(whole)[step:]


def test_the_schedule_covers_the_planned_steps() -> None:
    planned: list[int] = []

    def schedule(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        planned.append(total_steps)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total_steps)

    class Rates(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates: list[float] = []
    module = SupervisedModule(Noisy(), partial(torch.optim.SGD, lr=8.0), schedule, task=Classification(2))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, max_epochs=2, accumulate_grad_batches=3, callbacks=[Rates()],
    )  # fmt: skip
    trainer.fit(module, datamodule=Data())
    assert planned == [4]
    assert rates == [8.0] * 3 + [6.0] * 3 + [4.0] * 3 + [2.0] * 3  # by optimizer step, not by epoch or batch


def test_neighbouring_numbersmixed_seed_to_unrelated_seeds() -> None:
    seeds = {mixed_seed(seed, rank, batch) for seed in range(8) for rank in range(8) for batch in range(64)}
    assert len(seeds) == 8 * 8 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(0, 1, 0) != mixed_seed(1, 0, 0) != mixed_seed(0, 0, 1)  # the place counts
    flipped = [(mixed_seed(0, 0, batch) ^ mixed_seed(0, 0, batch + 1)).bit_count() for batch in range(200)]
    assert 28 < sum(flipped) / len(flipped) < 35  # half of 63 bits change


class Seen(Callback):
    """The steps after which a new training loss was known."""

    def __init__(self) -> None:
        self.losses: list[float | None] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        value = trainer.callback_metrics.get("train/loss")
        self.losses.append(None if value is None else float(value))


@pytest.mark.parametrize(("every", "changes"), [(1, list(range(12))), (5, [0, 4, 9]), (0, [0])])
def test_losses_are_logged_in_the_first_step_and_in_every_nth(every: int, changes: list[int]) -> None:
    seen = Seen()
    fit(log_every_n_steps=every, callbacks=[seen])
    assert [step for step in range(12) if step == 0 or seen.losses[step] != seen.losses[step - 1]] == changes
