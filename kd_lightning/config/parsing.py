"""Reads groups of keys into dataclasses: their types, their docs, and what is refused."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.values import check_value
from kd_lightning.runtime.errors import ConfigError, did_you_mean

Group = TypeVar("Group")
NODES = (
    "data", "student", "distillation", "optimizer", "scheduler", "trainer", "callbacks", "logger", "network",
)  # fmt: skip
"""The keys that conf/ has choices for."""


def refuse_missing(settings: DictConfig, plain: dict[str, Any]) -> None:
    """Refuse keys that have no value yet; a network that `teacher.checkpoint` replaces does without them."""
    missing, unused = sorted(map(str, OmegaConf.missing_keys(settings))), "teacher.network."
    if OmegaConf.select(settings, "teacher.checkpoint") is not None:
        for key in [key for key in missing if key.startswith(unused) and "." not in key.removeprefix(unused)]:
            del plain["teacher"]["network"][key.removeprefix(unused)]
            missing.remove(key)
    if missing:
        raise ConfigError(f"{missing[0]} needs a value: kd-train {missing[0]}=...")


def read_group(kind: type[Group], prefix: str, node: dict[str, Any]) -> Group:
    """Read a group of keys into its dataclass.

    Raises:
        ConfigError: A key is unknown, missing or of the wrong type; `prefix` stands before its name.
    """
    values = values_of(kind, prefix, node)
    every = fields(typing.cast(type[Any], kind))
    needed = [one.name for one in every if one.default is MISSING and one.default_factory is MISSING]
    if lacking := [key for key in needed if key not in node]:
        raise ConfigError(f"{prefix}{lacking[0]} was removed (~{prefix}{lacking[0]}), and no run can do without it")
    return kind(**values)


def values_of(kind: type, prefix: str, node: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that are there as their fields have them."""
    types = hints(kind)
    if unknown := [str(key) for key in node if key not in types]:
        raise ConfigError(f"{prefix}{unknown[0]}: there is no such key{did_you_mean(unknown[0], types)}")
    return {key: _value(f"{prefix}{key}", value, types[key]) for key, value in node.items()}


def _value(path: str, value: Any, expected: Any) -> Any:
    """Return a key's value as its field has it."""
    group = is_dataclass(expected) or get_origin(expected) is dict
    if group and value is not None and not isinstance(value, dict):
        raise ConfigError(f"{path}={value!r} is no group of keys{_choice(path)}")
    if value is not None and is_dataclass(expected):
        return read_group(typing.cast(type[Any], expected), f"{path}.", value)
    if value is not None and get_origin(expected) is dict and is_dataclass(inside := get_args(expected)[1]):
        return {name: _value(f"{path}.{name}", one, inside) for name, one in value.items()}
    check_value(path, value, expected)
    return value


def _choice(path: str) -> str:
    """Return how a group is chosen on the command line, if conf/ has choices."""
    above, _, name = path.rpartition(".")
    group = "model" if name in ("student", "network") else name
    if name not in NODES:
        return ""
    return f"; to choose one: {group}@{path}=NAME" if above or group == "model" else f"; to choose one: {path}=NAME"


@cache
def hints(kind: type) -> dict[str, Any]:
    """Return the types of a group's keys by name."""
    found = typing.get_type_hints(kind, include_extras=True)
    return {one.name: found[one.name] for one in fields(kind)}


@cache
def docs(kind: type) -> dict[str, str]:
    """Return what a group's keys are for, by name: the docstrings under its fields."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for above, below in pairwise(definition.body):
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name) and isinstance(below, ast.Expr):
            found[above.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found
