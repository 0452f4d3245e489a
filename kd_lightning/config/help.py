"""Every key with what it takes, its value and what it is for: the middle of `kd-train --help`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.schema import (
    FinetuneConfig,
    GeneratedConfig,
    Node,
    OnPolicyConfig,
    RunConfig,
    TaskConfig,
    TeacherConfig,
    docs,
    hints,
)
from kd_lightning.config.values import words

_GROUPS: dict[str, tuple[str, type]] = {
    "": ("The run", RunConfig), "teacher": ("The teacher", TeacherConfig),
    "on_policy": ("On-policy", OnPolicyConfig), "generated": ("Generated texts", GeneratedConfig),
    "finetune": ("Fine-tuning", FinetuneConfig),
    "tasks.NAME": ("One of several tasks", TaskConfig),
}  # fmt: skip


def keys_help(cfg: DictConfig) -> str:
    """Return every key of a composed configuration with value, type and doc, by group."""
    settings: Any = OmegaConf.to_container(cfg, resolve=False)
    values = {"": settings, **settings, "tasks.NAME": asdict(TaskConfig())}
    lines: list[str] = []
    for prefix, (title, kind) in _GROUPS.items():
        lines += ["", title]
        types = hints(kind)
        for key, doc in docs(kind).items():
            if key not in ("teacher", "on_policy", "generated", "finetune", "tasks") or kind is TaskConfig:
                path, value = f"{prefix}.{key}".lstrip("."), values[prefix].get(key)
                lines += [f"  {line}" for line in _entry(path, value, types[key], doc)]
    return "\n".join(lines[1:]).replace("$", "$$")  # Hydra fills in what stands after a single one


def _entry(path: str, value: Any, expected: Any, doc: str) -> Iterator[str]:
    """Yield the lines about one key; of a class, its arguments follow."""
    if expected == Node and isinstance(value, dict):
        yield path
    else:
        yield f"{path}={_written(value)}  ({words(expected)})"
    yield from textwrap.wrap(doc, 112, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    if isinstance(value, dict):
        yield from (f"    {leaf}" for leaf in _leaves(path, value))


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
