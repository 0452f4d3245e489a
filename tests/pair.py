"""Two processes that meet, for tests of what a training in several comes to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.waiting import wait_for

SECONDS = 240
"""Longer than two processes take to start on a machine that has much else to do."""


def in_two(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Return what `function(rank, *arguments)` returns in each of two processes, for which gloo carries messages.

    Args:
        function: At a module's top level; it returns tensors, numbers, lists and dicts of them.
        folder: An empty one, for files of theirs.
        arguments: The same for both.

    Raises:
        TimeoutError: They did not end.
    """
    context = torch.multiprocessing.start_processes(
        _one, (function, folder, arguments), nprocs=2, join=False, start_method="spawn"
    )
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"{function.__name__} in two processes did not end in {SECONDS} s")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(_result(folder, rank)) for rank in (0, 1)]


def _one(rank: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(function(rank, *arguments), _result(folder, rank))
    # Where the other one dies, `in_two` hears of it, and ends this one.
    wait_for(_result(folder, 1 - rank).exists, f"the result of process {1 - rank}", timeout=SECONDS)
    # Without a farewell: on a full machine one of two was once left waiting in destroy_process_group for ever.
    os._exit(0)


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.pt"
