"""What Lightning does without our patches: where one of these fails, Lightning has mended it, and the patch can go."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning.training import lightning_patches

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Plain(L.LightningModule):
    """A module of Lightning's alone, which learns zeros from ones in epochs of four batches."""

    def __init__(self, fused: bool = False, patched: bool = False) -> None:
        super().__init__()
        self.layer, self.fused, self.patched = nn.Linear(1, 1), fused, patched
        self.epochs: list[tuple[int, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        epochs = self.trainer.fit_loop.epoch_progress.current
        self.epochs.append((epochs.ready, epochs.processed))
        return self.layer(batch).square().mean()

    def on_train_start(self) -> None:
        if self.patched:
            lightning_patches.count_begun_epoch(self.trainer)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(4, 1), batch_size=1)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=self.fused)


def test_a_batch_is_narrowed_whole() -> None:
    trainer = L.Trainer(precision="bf16-true", enable_checkpointing=False, **QUIET)
    assert isinstance(trainer.precision_plugin, HalfPrecision)
    labels = {"labels": torch.tensor([1.001])}
    assert trainer.precision_plugin.convert_input(labels)["labels"].dtype == torch.bfloat16
    lightning_patches.keep_batches_wide(trainer)
    assert trainer.precision_plugin.convert_input(labels) is labels


def test_a_fused_optimizer_is_not_clipped_under_mixed_precision() -> None:
    options: dict[str, Any] = {"gradient_clip_val": 1.0, "max_steps": 1, "enable_checkpointing": False}
    trainer = L.Trainer(precision="bf16-mixed", **options, **QUIET)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trainer.fit(Plain(fused=True))


@pytest.mark.parametrize("patched", [False, True])
def test_the_epoch_after_a_resumed_last_step_is_not_counted(patched: bool, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    L.Trainer(max_steps=4, callbacks=[saved], **QUIET).fit(Plain())
    module = Plain(patched=patched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a resume in the middle of an epoch
        L.Trainer(max_steps=6, enable_checkpointing=False, **QUIET).fit(module, ckpt_path=str(tmp_path / "step=4.ckpt"))
    begun = [ready - processed for ready, processed in module.epochs]
    assert begun == [int(patched)] * 2


def test_what_ddp_is_given_and_leaves_out_has_no_public_way() -> None:
    assert isinstance(DDPStrategy(process_group_backend="gloo")._ddp_kwargs, dict)
    assert hasattr(nn.parallel.DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model")
