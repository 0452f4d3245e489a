"""Fingerprints of settings, files and weights, and JSON files that are written in one step."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.runtime.borders import json_text
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.files import write_file
from kd_lightning.runtime.seals import sha256

if TYPE_CHECKING:
    from torch import nn


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step."""
    write_file(path, json_text(content))


def read_json(path: Path) -> Any:
    """Read JSON, or raise `KDError` naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise KDError(f"{path} cannot be read: {error}") from error


def digest(settings: Any) -> str:
    """Return a fingerprint of plain settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def content_digest(content: Any) -> str:
    """Return the sha256 of plain values, texts with halves of characters included."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """Return a fingerprint of a file's content."""
    return sha256(path)[:16]


def network_digest(network: nn.Module) -> str:
    """Return a fingerprint of a network's weights."""
    whole = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.detach().cpu().float().numpy().tobytes())
    return whole.hexdigest()[:16]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the keys in which two nested settings differ, and how; of two hashes only that they differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in old.keys() | new.keys():
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    if json.dumps(old, default=str) == json.dumps(new, default=str):
        return []
    hashes = all(isinstance(value, str) and _FINGERPRINT.fullmatch(value) for value in (old, new))
    return [f"{path} changed" if hashes else f"{path} was {old}, now {new}"]


_FINGERPRINT = re.compile("[0-9a-f]{16,64}")
