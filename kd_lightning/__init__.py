"""Knowledge distillation for people who train with PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_lightning import data, losses, models, tasks, teachers
    from kd_lightning.teachers import CachedTeacher, FrozenTeacher
    from kd_lightning.training import callbacks, schedules
    from kd_lightning.training.distillation import DistillationModule, SupervisedModule
    from kd_lightning.training.objective import Objective
    from kd_lightning.training.run_folder import load_run

__version__ = "0.1.0"

_HOMES = {
    "CachedTeacher": "teachers.CachedTeacher",
    "DistillationModule": "training.distillation.DistillationModule",
    "FrozenTeacher": "teachers.FrozenTeacher",
    "Objective": "training.objective.Objective",
    "SupervisedModule": "training.distillation.SupervisedModule",
    "callbacks": "training.callbacks",
    "data": "data",
    "load_run": "training.run_folder.load_run",
    "losses": "losses",
    "models": "models",
    "schedules": "training.schedules",
    "tasks": "tasks",
    "teachers": "teachers",
}
"""Public names and where they are; each is imported when it is first used, so that importing the package is quick."""

__all__ = [
    "CachedTeacher", "DistillationModule", "FrozenTeacher", "Objective", "SupervisedModule", "callbacks", "data",
    "load_run", "losses", "models", "schedules", "tasks", "teachers",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name.

    Raises:
        AttributeError: There is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = f"{__name__}.{_HOMES[name]}".rpartition(".")
    if attribute[0].isupper() or attribute == "load_run":
        found = getattr(importlib.import_module(module), attribute)
    else:
        found = importlib.import_module(f"{module}.{attribute}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__version__"]
