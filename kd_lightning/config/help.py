"""Every key with what it takes, its value and what it is for: the middle of `kd-train --help`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.parsing import docs, hints
from kd_lightning.config.schema import (
    FinetuneConfig,
    GeneratedConfig,
    Node,
    OnPolicyConfig,
    RunConfig,
    TaskConfig,
    TeacherConfig,
)
from kd_lightning.config.values import words

_GROUPS: dict[str, tuple[str, type]] = {
    "": ("The run", RunConfig), "teacher": ("The teacher", TeacherConfig),
    "on_policy": ("On-policy", OnPolicyConfig), "generated": ("Generated texts", GeneratedConfig),
    "finetune": ("Fine-tuning", FinetuneConfig),
    "tasks.NAME": ("One of several tasks", TaskConfig),
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        path: The key with those above it.
        value: As a command line takes it; None for an object, whose arguments are `below`.
        takes: What it takes, in words.
        doc: What it is for.
        below: The arguments as they stand, `KEY=VALUE`.
    """

    path: str
    value: str | None
    takes: str
    doc: str
    below: tuple[str, ...]


def keys(cfg: DictConfig) -> dict[str, list[Key]]:
    """Return every key of a composed configuration by group."""
    settings: Any = OmegaConf.to_container(cfg, resolve=False)
    values = {"": settings, **settings, "tasks.NAME": asdict(TaskConfig())}
    found: dict[str, list[Key]] = {}
    for prefix, (title, kind) in _GROUPS.items():
        types = hints(kind)
        found[title] = [
            _key(f"{prefix}.{name}".lstrip("."), values[prefix].get(name), types[name], doc)
            for name, doc in docs(kind).items()
            if name not in ("teacher", "on_policy", "generated", "finetune", "tasks") or kind is TaskConfig
        ]
    return found


def _key(path: str, value: Any, expected: Any, doc: str) -> Key:
    below = tuple(_leaves(path, value)) if isinstance(value, dict) else ()
    is_object = expected == Node and isinstance(value, dict)
    return Key(path, None if is_object else _written(value), words(expected), doc, below)


def keys_help(cfg: DictConfig) -> str:
    """Return every key of a composed configuration with value, type and doc, by group."""
    lines: list[str] = []
    for title, group in keys(cfg).items():
        lines += ["", title]
        for key in group:
            lines += [f"  {line}" for line in _entry(key)]
    return "\n".join(lines[1:]).replace("$", "$$")  # Hydra fills in what stands after a single one


def _entry(key: Key) -> Iterator[str]:
    """Yield the lines about one key; of a class, its arguments follow."""
    yield key.path if key.value is None else f"{key.path}={key.value}  ({key.takes})"
    yield from textwrap.wrap(key.doc, 112, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    yield from (f"    {leaf}" for leaf in key.below)


def _leaves(path: str, value: dict[str, Any]) -> Iterator[str]:
    """Yield what is set below a key."""
    for key, inside in value.items():
        if isinstance(inside, dict):
            yield from _leaves(f"{path}.{key}", inside)
        else:
            yield f"{path}.{key}={_written(inside)}"


def _written(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
