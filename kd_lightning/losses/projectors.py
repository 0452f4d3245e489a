"""Projectors: learned maps from the student's width to the teacher's.

They train with the student and are not part of it.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

Projection = Literal["linear", "conv1x1", "mlp", "none"]
"""How a student's feature is mapped to the teacher's width.

* `linear`: a linear map of the channels with a bias; of a map `(B, C, H, W)` that is the same as `conv1x1`
* `conv1x1`: a 1x1 convolution without a bias, then BatchNorm; maps only
* `mlp`: two linear maps of the channels with a ReLU between them, as wide as the teacher inside
* `none`: the feature as it is; the widths must agree
"""


def projector(kind: Projection | nn.Module, student: Tensor, teacher: Tensor, name: str = "the feature") -> nn.Module:
    """Build the projector between two features.

    Args:
        kind: See `Projection`; a module of your own is returned as it is.
        student: The student's feature: `(B, D)`, `(B, L, D)` or `(B, C, H, W)`.
        teacher: The teacher's, of the same rank.
        name: What the feature is called in an error.

    Raises:
        ValueError: An unknown kind, features that do not fit it, or widths that differ without a projector.
    """
    if isinstance(kind, nn.Module):
        return kind
    if kind not in get_args(Projection):
        raise ValueError(f"projector={kind!r}: expected one of {', '.join(get_args(Projection))}, or a module")
    if student.ndim != teacher.ndim or student.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name}: the student's is {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; both must be "
            "vectors (B, D), tokens (B, L, D) or maps (B, C, H, W)"
        )
    is_map = student.ndim == 4
    channels = 1 if is_map else -1
    narrow, wide = student.shape[channels], teacher.shape[channels]
    if kind == "none":
        if narrow != wide:
            raise ValueError(
                f"{name}: the student's width is {narrow} and the teacher's {wide}, and projector=none: use linear"
            )
        return nn.Identity()
    if kind == "conv1x1":
        if not is_map:
            raise ValueError(
                f"{name} is {tuple(student.shape)}, not a map (B, C, H, W), and projector=conv1x1: use linear"
            )
        return nn.Sequential(nn.Conv2d(narrow, wide, 1, bias=False), nn.BatchNorm2d(wide))
    if kind == "linear":
        return _channelwise(narrow, wide, is_map)
    return nn.Sequential(_channelwise(narrow, wide, is_map), nn.ReLU(), _channelwise(wide, wide, is_map))


def _channelwise(narrow: int, wide: int, is_map: bool) -> nn.Module:
    return nn.Conv2d(narrow, wide, 1) if is_map else nn.Linear(narrow, wide)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average pool two maps `(B, C, H, W)` to the smaller height and width; return others unchanged."""
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
