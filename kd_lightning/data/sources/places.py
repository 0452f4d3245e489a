"""Paths of data: stored as absolute paths, and found again after run and data were moved together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kd_lightning.data.sources.records import format_of
from kd_lightning.runtime.assets import PRETRAINED

_KEYS = (
    "name", "folder", "tokenizer", "chat_template", "teacher_tokenizer", "transfer", "negatives_by", "generator",
)  # fmt: skip
_ENDINGS = ("_file", "_dir", "_folder", "path")
_HUB = "hf:"


def absolute(settings: Any) -> Any:
    """Return data settings with absolute paths.

    Values that are not paths in this working directory, such as names on the hub, stay unchanged.
    """
    return _each(settings, lambda path: os.path.abspath(os.path.expanduser(path)))


def found(settings: Any, was: Path, now: Path) -> Any:
    """Return data settings with missing paths resolved relative to the moved run.

    Args:
        settings: As `absolute` made them.
        was: The run's folder when they were written.
        now: The run's folder.
    """

    def moved(path: str) -> str:
        if os.path.exists(path) or not os.path.isabs(path):
            return path
        beside = os.path.normpath(now.absolute() / os.path.relpath(path, was))
        return beside if os.path.exists(beside) else path

    return _each(settings, moved)


def _each(settings: Any, change: Callable[[str], str], key: str = "") -> Any:
    if isinstance(settings, Mapping):
        return {name: _each(value, change, str(name)) for name, value in settings.items()}
    if isinstance(settings, list):
        return [_each(value, change, key) for value in settings]
    if not isinstance(settings, str) or not (key in _KEYS or key.endswith(_ENDINGS)):
        return settings
    prefix, name, rest = "", settings, ""
    if key == "transfer" and settings.startswith(_HUB):
        prefix, (name, colon, config_name) = _HUB, settings.removeprefix(_HUB).partition(":")
        rest = colon + config_name
    if not _is_path(name, key) or (key == "transfer" and not prefix and format_of(Path(name)) is None):
        return settings
    return prefix + change(name) + rest


def _is_path(name: str, key: str) -> bool:
    """Return whether a setting names a file or folder, present or former, not a hub name."""
    if os.path.isabs(name) or key == "cache_dir":
        return True
    return name not in PRETRAINED and len(name) < 4096 and "\0" not in name and os.path.exists(os.path.expanduser(name))
