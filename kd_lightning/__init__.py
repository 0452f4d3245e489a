"""Knowledge distillation for people who train with PyTorch Lightning.

`import kd_lightning as kd` gives the names of `__all__`. Each is imported when it is first used, so that importing the
package itself is quick and needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "CachedTeacher", "DistillationModule", "FrozenTeacher", "KDError", "Objective", "SupervisedModule", "TeacherCache",
    "callbacks", "data", "load_run", "losses", "schedules", "tasks", "teachers",
]  # fmt: skip

_HOMES = {
    "CachedTeacher": "kd_lightning.teachers",
    "DistillationModule": "kd_lightning.training.distillation",
    "FrozenTeacher": "kd_lightning.teachers",
    "KDError": "kd_lightning.runtime.errors",
    "Objective": "kd_lightning.training.objective",
    "SupervisedModule": "kd_lightning.training.distillation",
    "TeacherCache": "kd_lightning.teachers.cache.store",
    "callbacks": "kd_lightning.training.callbacks",
    "data": "kd_lightning.data",
    "load_run": "kd_lightning.training.run_folder",
    "losses": "kd_lightning.losses",
    "schedules": "kd_lightning.training.schedules",
    "tasks": "kd_lightning.tasks",
    "teachers": "kd_lightning.teachers",
}
"""The modules that the public names are in, or are."""

if TYPE_CHECKING:
    from kd_lightning import data, losses, tasks, teachers
    from kd_lightning.runtime.errors import KDError
    from kd_lightning.teachers import CachedTeacher, FrozenTeacher
    from kd_lightning.teachers.cache.store import TeacherCache
    from kd_lightning.training import callbacks, schedules
    from kd_lightning.training.distillation import DistillationModule, SupervisedModule
    from kd_lightning.training.objective import Objective
    from kd_lightning.training.run_folder import load_run
else:  # a type checker would take it as a promise of any name

    def __getattr__(name: str) -> object:
        """Import a public name.

        Raises:
            AttributeError: There is no such name.
        """
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(_HOMES[name])
        found = home if _HOMES[name].endswith(f".{name}") else getattr(home, name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """Return the public names."""
        return [*__all__, "__version__"]
