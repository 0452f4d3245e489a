"""The device that these tests are about. `scripts/gpu_check.sh --cpu` swaps it for a CPU, to prove the tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

DEVICE = torch.device(os.environ.get("GPU_CHECK_DEVICE", "cuda"))
ACCELERATOR = "gpu" if DEVICE.type == "cuda" else "cpu"

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products; read when cuBLAS starts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type != "cuda" or torch.cuda.is_available():
        return
    reason = "no CUDA device; `scripts/gpu_check.sh --cpu` runs these tests on a CPU"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure when it happens: tests that meet the limit of `gpu_check.sh` print no summary."""
    if report.failed and "GPU_CHECK_DEVICE" in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-1500:]}", file=sys.__stdout__, flush=True)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels that sum in one order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
