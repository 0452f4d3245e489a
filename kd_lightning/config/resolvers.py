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
    """Return `bf16-mixed` where the hardware multiplies bfloat16 faster than float32, else `32-true`."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    processor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if is_faster_in_bfloat16(processor) else "32-true"


def is_faster_in_bfloat16(processor: str) -> bool:
    """Return whether a processor multiplies bfloat16 faster than float32.

    Those with AMX do, and AMD's with AVX512-BF16. A Xeon with AVX512-BF16 alone did matrix products at 0.6 of its speed
    in float32.

    Args:
        processor: What `/proc/cpuinfo` says.

    >>> is_faster_in_bfloat16("vendor_id: GenuineIntel; flags: avx512f avx512_bf16")
    False
    """
    return "amx_bf16" in processor or ("avx512_bf16" in processor and "AuthenticAMD" in processor)


def fast_inference() -> str:
    """Return the fastest precision of a teacher without a loss of accuracy: `bf16` or `float32`."""
    return "bf16" if fast_precision() == "bf16-mixed" else "float32"


def ddp_strategy() -> str:
    """Return `ddp` if a launcher started the processes, otherwise `ddp_spawn`."""
    return "ddp" if launched() > 1 else "ddp_spawn"
