"""Functions that conf/ calls as `${name:...}`; `kd_lightning.pipeline.resolvers` registers them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_lightning.config.instantiate import to_dict
from kd_lightning.runtime.processes import launched


def one_minus(value: Any) -> Any:
    """Return 1 - value, for a number or for the configuration of a schedule.

    >>> one_minus(0.75)
    0.25
    """
    if isinstance(value, Mapping):
        return {"_target_": "kd_lightning.schedules.OneMinus", "value": to_dict(value)}
    return 1.0 - float(value)


def folder_name(text: str) -> str:
    """Return a text as the name of one folder: no slashes, no quotes, no more than 120 characters.

    >>> folder_name("alpha=0.5,data.train_file=/tmp/my.csv")
    'alpha=0.5,data.train_file=_tmp_my.csv'
    """
    name = re.sub(r"[^\w.,=+-]+", "_", text)
    return name if len(name) <= 120 else f"{name[:107]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def fast_precision() -> str:
    """Return `bf16-mixed` where the hardware multiplies bfloat16 natively, else `32-true`."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


def fast_inference() -> str:
    """Return the fastest precision of a teacher without a loss of accuracy: `bf16` or `float32`."""
    return "bf16" if fast_precision() == "bf16-mixed" else "float32"


def ddp_strategy() -> str:
    """Return `ddp` if a launcher started the processes, otherwise `ddp_spawn`."""
    return "ddp" if launched() > 1 else "ddp_spawn"
