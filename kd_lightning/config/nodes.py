"""Checks nodes that name a class: it exists, and takes these arguments of these types."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from kd_lightning.config.instantiate import lookup, parameters
from kd_lightning.config.values import brackets, words
from kd_lightning.runtime.errors import ConfigError, did_you_mean


def nodes(settings: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every node with a `_target_`, with its path."""
    if isinstance(settings, dict):
        if "_target_" in settings:
            yield path, settings
        for key, value in settings.items():
            yield from nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(settings, list):
        for number, value in enumerate(settings):
            yield from nodes(value, f"{path}[{number}]")


def check_node(path: str, node: dict[str, Any], whole: bool = True) -> None:
    """Check the arguments of a node's class.

    Args:
        path: The node's key.
        node: The node; those inside it are checked on their own.
        whole: Whether arguments that the class cannot do without must be there: others come from the run.

    Raises:
        ConfigError: Names the key, and what the class takes.
    """
    if not isinstance(node["_target_"], str):
        raise ConfigError(f"{path}._target_={node['_target_']!r} is no import path, such as torch.optim.AdamW")
    takes = parameters(lookup(node["_target_"]))
    for key, value in node.items():
        if key in ("_target_", "_partial_", "_convert_", "_recursive_", "_args_"):
            continue
        if key not in takes:
            raise ConfigError(f"{path}.{key}: {node['_target_']} takes no '{key}'{did_you_mean(key, takes)}")
        if not any(True for _ in nodes(value)):
            _check_argument(f"{path}.{key}", value, takes[key][0])
    if whole and not node.get("_partial_"):
        for key, (_, required) in takes.items():
            if required and key not in node:
                raise ConfigError(f"{path}.{key} needs a value: {node['_target_']} cannot do without it")


def _check_argument(key: str, value: Any, expected: Any) -> None:
    """Check an argument's type, of any kind that jsonargparse knows."""
    from jsonargparse import ArgumentError, ArgumentParser

    if expected in (Any, dict, inspect.Parameter.empty):
        return
    if value is None and _needs_value(expected):
        raise ConfigError(f"{key}=null is not {words(expected)}")
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=expected)
    except ValueError:  # a type jsonargparse cannot check, such as a protocol
        return
    try:
        parser.parse_object({"value": value})
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}={value!r} is not {words(expected)}{brackets(key, value, expected)}") from error


def _needs_value(expected: Any) -> bool:
    """Return whether a type has no None among its values."""
    if get_origin(expected) in (Union, UnionType):
        return all(map(_needs_value, get_args(expected)))
    plain = isinstance(expected, type) and expected not in (object, NoneType)
    return plain or get_origin(expected) in (Literal, list, tuple, Sequence)
