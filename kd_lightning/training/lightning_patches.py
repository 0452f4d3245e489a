"""Workarounds for Lightning and torch, one function each, with the versions they are for.

Each names the version it was found in; `tests/training/test_lightning_patches.py` shows what they do without it, and
fails once they do not any more: then the function can go.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_lightning.runtime.sharding import full
from kd_lightning.training.objective import Objective


def keep_batches_wide(trainer: L.Trainer) -> None:
    """Leave batches as they are under `bf16-true` and `16-true` (Lightning 2.6.6).

    Lightning narrows every floating-point tensor of a batch, labels too, whose numbers it thereby changes.
    `run_network` casts what a network reads.
    """
    if isinstance(trainer.precision_plugin, HalfPrecision):
        trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]


def share_objective(module: L.LightningModule, objective: Objective) -> None:
    """Let DDP handle terms that pause, without the objective's buffers (Lightning 2.6.6, torch 2.13).

    Call it in `setup`, before DDP is made: Lightning takes DDP's arguments with the strategy, before the module is
    known, and torch has no public way to name what DDP leaves out.
    """
    strategy: Any = module.trainer.strategy
    if isinstance(strategy, DDPStrategy):
        if objective.pauses:  # what pauses has no gradient in a step, as in one process
            strategy._ddp_kwargs["find_unused_parameters"] = True
        # Memory banks, which may be large, are alike already: not sent to all processes in every step.
        kept = [f"objective.{name}" for name, _ in objective.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, kept)  # type: ignore[no-untyped-call]


def count_begun_epoch(trainer: L.Trainer) -> None:
    """Count the new epoch of a training resumed at an epoch's last step (Lightning 2.6.6).

    Call it in `on_train_start`. Lightning closes that epoch and does not count the next as begun, so that a checkpoint
    made in it looks as if made between two epochs, and cannot be resumed from.
    """
    loop: Any = trainer.fit_loop
    epochs = loop.epoch_progress
    if loop.restarted_mid_epoch and epochs.current.ready == epochs.current.processed:
        epochs.increment_ready()
        epochs.increment_started()


def clip(
    module: L.LightningModule, parameters: list[nn.Parameter], max_norm: float | None, algorithm: str | None
) -> torch.Tensor | None:
    """Clip gradients by norm, also with a fused optimizer (Lightning 2.6.6); return the norm before.

    Lightning refuses that under every mixed precision, since with a GradScaler (float16) the optimizer would undo the
    scaling after the clipping. In bfloat16 nothing is scaled and clipping is safe. On a CPU gradients that are short
    enough already are left alone, where torch multiplies all of them by one.

    Returns:
        None where Lightning itself is to clip.
    """
    plugin = module.trainer.precision_plugin  # FSDP's is another class: a norm over one shard would be wrong
    unscaled = type(plugin) is Precision or (type(plugin) is MixedPrecision and plugin.scaler is None)
    if not (unscaled and max_norm and algorithm in (None, "norm")):
        return None
    norm: torch.Tensor = full(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if module.device.type != "cpu" or not norm <= max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
