"""Normalises labels: an integer is the same class however a file writes it."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

from kd_lightning.runtime.errors import ConfigError, DataError, did_you_mean
from kd_lightning.types import IGNORE

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d*([eE][+-]?\d{1,2})?)?")
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MISSING = ("", "nan", "+nan", "-nan")
ClassNames = Sequence[str | int | float]
"""Names of the classes as a configuration writes them."""

NO_LABEL = str(IGNORE)
"""How `label_of` writes an unlabelled training sentence."""


def label_of(value: object, where: str) -> str:
    """Return a label cell as text: a name or a number, integers always in digits.

    Raises:
        DataError: The label is missing, or is neither a name nor a number.

    >>> [label_of(value, "") for value in (1, 1.0, "1.0", "+1", "-100.0", " neg ")]
    ['1', '1', '1', '1', '-100', 'neg']
    """
    if isinstance(value, float | Decimal) and abs(value) != math.inf:
        value = str(int(value)) if value == value and value % 1 == 0 else str(value)
    text = str(value).strip()
    if value is None or (isinstance(value, str) and text.lower() in _MISSING):
        given = f" ({text})" if text and value is not None else ""
        raise DataError(
            f"{where}: the label is missing{given}; fill it in or remove the example ({IGNORE} marks an "
            "unlabelled training sentence)"
        )
    if not isinstance(value, str | int):
        raise DataError(f"{where}: the label {value!r} is neither a name nor a number")
    check_unicode(text, where)
    number, digits = number_of(text), text.lstrip("+-")
    if number is None:
        return text
    return text if digits.isdecimal() and digits.startswith("0") and len(digits) > 1 else str(number)


def is_missing(value: object) -> bool:
    """Return whether a cell often means a missing label: empty, NaN, -1 or -100."""
    text = "" if value is None else str(value).strip().lower()
    return text in _MISSING or number_of(text) in (-1, IGNORE)


def check_unicode(text: str, where: str) -> None:
    """Refuse a text with a lone surrogate, which cannot be written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {text[error.start]!r} is half a character (a lone surrogate), which cannot be written as UTF-8; "
            "write the whole character, or remove the half"
        ) from error


def number_of(label: str) -> int | None:
    """Return a label's integer value; None for anything else."""
    if not _NUMBER.fullmatch(label):
        return None
    number = Decimal(label)
    return int(number) if number % 1 == 0 else None


def decimal_of(cell: object) -> float:
    """Return a cell's number; NaN for anything else, such as an integer that no float holds.

    >>> [decimal_of(cell) for cell in ("2.5", " 1e3", 3, 10**400, "1_0", "high", None)]
    [2.5, 1000.0, 3.0, nan, nan, nan, nan]
    """
    if isinstance(cell, str):
        return float(cell) if _DECIMAL.fullmatch(cell.strip()) else math.nan
    try:
        return float(cell) if isinstance(cell, int | float) else math.nan
    except OverflowError:
        return math.nan


def key_of(label: str) -> object:
    """Return the normal form of a class's spellings."""
    number = number_of(label)
    if number is not None:
        return number
    return label.lower() if label.lower() in ("true", "false") else label


def sort_names(names: Iterable[str]) -> list[str]:
    """Return class names in their order: by number if all are whole numbers, else as texts."""
    found = sorted(names)
    if any(number_of(name) is None for name in found):
        return found
    return sorted(found, key=lambda name: number_of(name) or 0)


def given_names(names: ClassNames) -> list[str]:
    """Return `data.class_names` as texts.

    Raises:
        ConfigError: Fewer than two, duplicates, or the number for no label.
    """
    given = [str(name).strip() for name in names]
    keys = [key_of(name) for name in given]
    if len(given) < 2 or len(set(keys)) < len(keys) or IGNORE in keys:
        raise ConfigError(f"data.class_names={given}: expected two or more different names, none of them {IGNORE}")
    return given


def found_names(labels: Sequence[str], where: Callable[[int], str], source: str) -> list[str]:
    """Return the classes that the labels of training examples name, in their order.

    Args:
        labels: As `label_of` returns them.
        where: Returns the place of label `i`.
        source: The name of the data in messages.

    Raises:
        DataError: A label that is probably not a class, or two spellings of one class.
    """
    first: dict[str, int] = {}
    for i, label in enumerate(labels):
        first.setdefault(label, i)
    by_key: dict[object, str] = {}
    for label, i in first.items():
        if number_of(label) == -1:
            raise DataError(f"{where(i)}: {_minus_one(labels)}")
        if number_of(label) is None and _NUMBER.fullmatch(label):
            raise DataError(
                f"{where(i)}: the label {label} is neither a name nor a whole number (scores are not supported); if it "
                "is a class, list all of them in data.class_names"
            )
        if (other := by_key.setdefault(key_of(label), label)) != label:
            raise DataError(f"{where(i)}: the label {label!r} is {other!r} elsewhere; spell it one way")
    _warn_of_spellings(sort_names(first), source)
    return sort_names(first)


def _minus_one(labels: Iterable[str]) -> str:
    names = ",".join(sort_names(set(labels)))
    return (
        f"the label -1 often stands for a missing one: write {IGNORE} for an unlabelled training "
        f"sentence, or remove the example; if -1 is a class, list all of them, such as data.class_names=[{names}]"
    )


def _warn_of_spellings(names: Sequence[str], source: str) -> None:
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(folded(name), []).append(name)
    for same in alike.values():
        if len(same) > 1:
            log.warning(
                "%s: the classes %s differ in spelling only and count as %d; if they are one, spell them alike",
                source, " and ".join(map(repr, same)), len(same),
            )  # fmt: skip


def folded(text: str) -> str:
    """Return a text with normalised Unicode, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def positions_in(labels: Sequence[str], names: Sequence[str], where: Callable[[int], str], numbered: bool) -> list[int]:
    """Return the position of each label in the class names.

    Args:
        labels: As `label_of` returns them.
        names: The classes.
        where: Returns the place of label `i`.
        numbered: Whether the user gave the classes in the order of their numbers, so that integers are positions of
            names that are words.

    Raises:
        DataError: A label that is not a class.
    """
    codes = {key_of(name): code for code, name in enumerate(names)}
    words = not any(_NUMBER.fullmatch(name) for name in names)
    if numbered and words:
        codes |= {code: code for code in range(len(names))}
    known: dict[str, int] = {}
    for i, label in enumerate(labels):
        if label in known:
            continue
        if key_of(label) not in codes:
            raise DataError(f"{where(i)}: unknown label {label!r}{_hint(label, names, words)}")
        known[label] = codes[key_of(label)]
    return [known[label] for label in labels]


def _hint(label: str, names: Sequence[str], words: bool) -> str:
    number = number_of(label)
    if number == IGNORE:
        return ": only training sentences may be unlabelled; give it one or remove the example"
    if number == -1:
        return f" (it often stands for a missing one: remove the example){did_you_mean(label, names)}"
    if number is not None and words:
        return f": the classes are {', '.join(names)}; to number them, list them in their order in data.class_names"
    if near := [name for name in names if folded(name) == folded(label)]:
        return f"; did you mean {near[0]!r}?"
    return did_you_mean(label, names)
