"""Optimizer parameter groups, and learning-rate schedules with a relative warm-up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd_lightning.runtime.errors import ConfigError

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
SchedulerCallable = Callable[[Optimizer, int], LRScheduler]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups, the second without weight decay.

    Vectors (biases, the scales of normalisation layers) are not decayed: shrinking them regularises nothing.
    The first group takes whatever `weight_decay` the optimizer was configured with.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2]},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _steps_of(warmup: float, total_steps: int) -> int:
    """Return a warm-up's steps."""
    if not 0 <= warmup <= 1:
        raise ConfigError(f"warmup={warmup} must be a share of the training, between 0 and 1")
    return round(warmup * total_steps)


def warmup_linear(optimizer: Optimizer, total_steps: int, warmup: float = 0.1) -> LRScheduler:
    """Rise linearly over the first `warmup` share of the training, then fall linearly to zero."""
    from transformers.optimization import get_linear_schedule_with_warmup

    schedule: LRScheduler = get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
        optimizer, _steps_of(warmup, total_steps), total_steps
    )
    return schedule


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.1) -> LRScheduler:
    """Rise linearly over the first `warmup` share of the training, then fall along half a cosine."""
    from transformers.optimization import get_cosine_schedule_with_warmup

    schedule: LRScheduler = get_cosine_schedule_with_warmup(optimizer, _steps_of(warmup, total_steps), total_steps)
    return schedule


def constant(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LRScheduler:
    """Rise linearly over the first `warmup` share, then stay at the configured learning rate."""
    from transformers.optimization import get_constant_schedule_with_warmup

    schedule: LRScheduler = get_constant_schedule_with_warmup(optimizer, _steps_of(warmup, total_steps))
    return schedule
