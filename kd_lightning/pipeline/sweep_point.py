"""The files of a sweep's point besides its run: overrides, score, or failure."""

from __future__ import annotations

import hashlib
import shlex
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kd_lightning.config.instantiate import in_sweep
from kd_lightning.config.sweep import FAILURE, OVERRIDES, SCORE
from kd_lightning.runtime.errors import Interrupted
from kd_lightning.runtime.processes import rank
from kd_lightning.runtime.seals import write_sealed


@dataclass
class Point:
    """A point while it runs.

    Attributes:
        score: The best validation score, once it is there.
        metric: What was measured.
    """

    score: float = float("nan")
    metric: str = ""


def overrides() -> list[str]:
    """Return what was set for this job on the command line, in a sweep with this point's values."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def command(cfg: DictConfig) -> str:
    """Return the command that reproduces a job: a sweep's point as a run with its own name."""
    if not in_sweep():
        return shlex.join(["kd-train", *overrides()])
    kept = [override for override in overrides() if not override.startswith(("sweep=", "name=", "run_dir="))]
    number = hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()[:6]
    return shlex.join(["kd-train", *kept, f"name={cfg.name}_{number}"])


def _sweeper() -> str:
    from hydra.core.hydra_config import HydraConfig

    return str(HydraConfig.get().sweeper._target_).rpartition(".")[2]


@contextmanager
def recorded(cfg: DictConfig) -> Iterator[Point]:
    """Record a point's overrides before it runs, then its score or its failure, which is re-raised.

    What was interrupted is no failure: it goes on when the same sweep is started again.
    """
    request = {"overrides": overrides(), "command": command(cfg), "sweeper": _sweeper()}
    place, point = Path(cfg.run_dir), Point()
    if rank() == 0:
        (place / FAILURE).unlink(missing_ok=True)
        _write(place / OVERRIDES, request)
    try:
        yield point
    except Interrupted:
        raise
    except Exception as error:
        if rank() == 0:
            lines = str(error).strip().splitlines()
            failure = {"error": lines[0] if lines else type(error).__name__, "type": type(error).__name__}
            _write(place / FAILURE, failure | {"traceback": traceback.format_exc(), **request})
            (place / SCORE).unlink(missing_ok=True)  # of an earlier run
        raise
    if rank() == 0:
        _write(place / SCORE, {"score": point.score, "metric": point.metric})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_sealed(path, content)
