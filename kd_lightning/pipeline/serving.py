"""How a teacher's outputs are computed and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

from kd_lightning.config.schema import Calibrate, Combine, Precision, StoredDtype
from kd_lightning.teachers.cache.outputs import Storage

if TYPE_CHECKING:
    from kd_lightning.config.schema import TeacherConfig


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a teacher's outputs are computed and kept.

    Attributes:
        members: How many teachers predict together.
        folds: How many of them were each trained without a fold; 1: none.
        precision: As for `FrozenTeacher`.
        cache: auto, require, refresh, off or a path: see `teacher.cache` in `conf/config.yaml`.
        cache_dtype: How outputs are stored.
        cache_top_k: Store so many of an example's largest logits and the mass of the rest; None: all.
        cache_samples: Store so many drawn tokens and their weights instead.
        features: What is stored besides logits and what the objective reads.
        predict_batch_size: Examples in a batch when it predicts before a training.
        combine: What an ensemble averages.
        weights: An ensemble's: None (equal), one a member, `learned` (on validation) or `confidence`.
        device: A GPU of its own, when `cache=off`.
        compile: Whether to compile it.
        sharded: Whether the processes of a training share its weights out.
        calibrate: Whether its logits are divided by the temperature that fits them; `auto`: where its probabilities
            are badly wrong.
    """

    members: int = 1
    folds: int = 1
    precision: Precision = "float32"
    cache: str = "auto"
    cache_dtype: StoredDtype = "float32"
    cache_top_k: int | None = None
    cache_samples: int | None = None
    features: Sequence[str] = ()
    predict_batch_size: int = 128
    combine: Combine = "probabilities"
    weights: Sequence[float] | Literal["learned", "confidence"] | None = None
    device: str | None = None
    compile: bool = False
    sharded: bool = False
    calibrate: Calibrate = False

    @classmethod
    def of(cls, teacher: TeacherConfig) -> Self:
        """Return the settings below `teacher`."""
        names = cls.__dataclass_fields__.keys() - {"members"}
        found = cls(members=teacher.number, **{name: getattr(teacher, name) for name in names})
        return found if teacher.url is None else replace(found, precision="float32")  # the server's is its own

    @property
    def storage(self) -> Storage:
        """How outputs are encoded."""
        return Storage(self.cache_dtype, self.cache_samples or self.cache_top_k, drawn=self.cache_samples is not None)
