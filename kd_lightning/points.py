"""What a point of a sweep leaves beside the files of its run: what was asked for, its score, or why it failed."""

from __future__ import annotations

import json
import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kd_lightning.errors import Interrupted
from kd_lightning.files import write_file
from kd_lightning.processes import rank

OVERRIDES, SCORE, FAILURE = "overrides.json", "score.json", "failure.json"


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


def command() -> str:
    """Return the command that makes this job again, alone."""
    return shlex.join(["kd-train", *(override for override in overrides() if not override.startswith("sweep="))])


@contextmanager
def recorded(folder: str) -> Iterator[Point]:
    """Write what the point is before it runs, its score after it, and if it fails the reason; failures are raised on.

    What was interrupted is no failure: it goes on when the same sweep is started again.
    """
    asked = {"overrides": overrides(), "command": command()}
    place, point = Path(folder), Point()
    if rank() == 0:
        (place / FAILURE).unlink(missing_ok=True)
        _write(place / OVERRIDES, asked)
    try:
        yield point
    except Interrupted:
        raise
    except Exception as error:
        if rank() == 0:
            lines = str(error).strip().splitlines()
            failure = {"error": lines[0] if lines else type(error).__name__, "type": type(error).__name__}
            _write(place / FAILURE, failure | {"traceback": traceback.format_exc(), **asked})
        raise
    if rank() == 0:
        _write(place / SCORE, {"score": point.score, "metric": point.metric})


def _write(path: Path, content: object) -> None:
    write_file(path, json.dumps(content, indent=2) + "\n")
