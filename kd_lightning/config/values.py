"""Whether a value is of a type, and what a type takes, in words of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from kd_lightning.runtime.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Range:
    """What a number may be: `Annotated[int, Range(1)]`."""

    least: float
    below: float | None = None

    def __str__(self) -> str:
        """Return it in words."""
        return f"at least {self.least:g}" + (f" and below {self.below:g}" if self.below is not None else "")

    def __contains__(self, value: float) -> bool:
        """Return whether it holds a number."""
        return value >= self.least and (self.below is None or value < self.below)


def check_value(key: str, value: Any, expected: Any) -> None:
    """Check a value against a type: of plain values, lists, unions, Literals, and numbers with a `Range`.

    Raises:
        ConfigError: Names the key, the value and what it takes.
    """
    kind, *more = get_args(expected) if get_origin(expected) is Annotated else (expected,)
    if get_origin(kind) is list and isinstance(value, list):
        for number, one in enumerate(value):
            check_value(f"{key}[{number}]", one, get_args(kind)[0])
        return
    if not fits(value, kind):
        if value is None:
            raise ConfigError(f"{key} needs a value: {words(expected)}")
        near = did_you_mean(str(value), map(str, get_args(kind))) if get_origin(kind) is Literal else ""
        raise ConfigError(
            f"{key}={value!r} is not {words(expected)}{near if 'did you mean' in near else ''}"
            f"{brackets(key, value, expected)}"
        )
    for limits in more:
        if isinstance(limits, Range) and isinstance(value, int | float) and value not in limits:
            raise ConfigError(f"{key}={value} must be {limits}")


def brackets(key: str, value: Any, expected: Any) -> str:
    """Return how a text is written where a list is expected: the end of a message.

    >>> brackets("data.transfer", "more.txt", list[str])
    ": a list is in brackets, 'data.transfer=[more.txt]'"
    """
    is_list = isinstance(value, str) and words(expected).startswith("a list")
    return f": a list is in brackets, '{key}=[{value}]'" if is_list else ""


def fits(value: Any, expected: Any) -> bool:
    """Return whether a value is of a type; a whole number is a number, and true and false are none.

    >>> fits(3, float | None), fits(True, int), fits(["a"], list[str] | None), fits("a", Literal["b"])
    (True, False, True, False)
    """
    origin, inside = get_origin(expected), get_args(expected)
    if expected is Any:
        return True
    if origin is Annotated:
        return fits(value, inside[0])
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inside)
    if origin is Literal:
        return value in inside
    if origin is list:
        return isinstance(value, list) and all(fits(one, inside[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, inside[1]) for one in value.values())
    if expected in (int, float):
        return isinstance(value, int | expected) and not isinstance(value, bool)
    return isinstance(value, expected)


_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list", tuple: "a list",
    Sequence: "a list", Mapping: "a group of keys", dict: "a group of keys", NoneType: "null",
}  # fmt: skip


def words(expected: Any) -> str:
    """Return what a type takes, in words of the command line.

    >>> words(list[float] | Literal["learned"] | None)
    'a list of numbers or learned or null'
    """
    origin, inside = get_origin(expected), get_args(expected)
    if origin is Annotated:
        own = [text for text in inside[1:] if isinstance(text, str)]
        ranges = [f", {limits}" for limits in inside[1:] if isinstance(limits, Range)]
        return own[0] if own else words(inside[0]) + "".join(ranges)
    if origin is Literal:
        return ("one of " if len(inside) > 1 else "") + ", ".join(map(str, inside))
    if origin in (Union, UnionType):  # what no command line can give (a tensor, an object) is left out
        named = [words(one) for one in inside if one in _WORDS or get_origin(one)]
        return " or ".join(dict.fromkeys(named)) or "what it takes"
    if origin in (list, tuple, Sequence) and inside:
        names = [words(one) for one in inside if one is not ...]
        if origin is not tuple or len(names) == 1:
            return f"a list of {_several(names[0])}"
        return f"a list of {len(names)} ({' and '.join(names)})"
    return _WORDS.get(origin or expected) or "a " + str(getattr(expected, "__name__", expected)).replace("typing.", "")


def _several(name: str) -> str:
    """Return the plural of a type's words."""
    if name == "a group of keys":
        return "groups of keys"
    return f"{name.removeprefix('a ')}s" if name.startswith("a ") else name.removeprefix("one of ")
