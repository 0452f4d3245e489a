"""Labels as they are written, made alike: a whole number is the same class however a file spells it."""

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
_MISSING = ("", "nan", "+nan", "-nan")
ClassNames = Sequence[str | int | float]
"""Names of the classes as a configuration writes them."""

NO_LABEL = str(IGNORE)
"""How `label_of` writes that only the teacher labels a training sentence."""


def label_of(value: object, where: str) -> str:
    """Return a label cell as text: a name, or a number; a whole number in digits, as another file may write it.

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
            f"{where}: the label is missing{given}; fill it in or remove the example ({IGNORE} says that only the "
            "teacher labels a training sentence)"
        )
    if not isinstance(value, str | int):
        raise DataError(f"{where}: the label {value!r} is neither a name nor a number")
    check_unicode(text, where)
    number, digits = number_of(text), text.lstrip("+-")
    if number is None:
        return text
    return text if digits.isdecimal() and digits.startswith("0") and len(digits) > 1 else str(number)


def is_missing(value: object) -> bool:
    """Return whether a cell is written where nobody knows the label: nothing, NaN, -1 or -100."""
    text = "" if value is None else str(value).strip().lower()
    return text in _MISSING or number_of(text) in (-1, IGNORE)


def check_unicode(text: str, where: str) -> None:
    """Refuse a text that no file can hold, since it has half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {text[error.start]!r} is half a character (a lone surrogate), which cannot be written as UTF-8; "
            "write the whole character, or remove the half"
        ) from error


def number_of(label: str) -> int | None:
    """Return the whole number that a label spells; None for anything else."""
    if not _NUMBER.fullmatch(label):
        return None
    number = Decimal(label)
    return int(number) if number % 1 == 0 else None


def key_of(label: str) -> object:
    """Return what two spellings of one class have in common."""
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
        ConfigError: Fewer than two, two that are one, or the number that means that there is no label.
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
        where: Says where label `i` stands.
        source: What to call the whole in a message.

    Raises:
        DataError: A label that is hardly a class, one class in two spellings.
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
        f"the label -1 often stands for a missing one: write {IGNORE} where only the teacher is to label a training "
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
    """Return a text with Unicode, case and white space made alike."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def positions_in(labels: Sequence[str], names: Sequence[str], where: Callable[[int], str], numbered: bool) -> list[int]:
    """Return the position of each label in the class names.

    Args:
        labels: As `label_of` returns them.
        names: The classes.
        where: Says where label `i` stands.
        numbered: Whether somebody gave the classes the order of their numbers, so that where the names are words a
            whole number is a position.

    Raises:
        DataError: A label that is no class.
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
        return ": only a training sentence may go without a label; give it one or remove the example"
    if number == -1:
        return f" (it often stands for a missing one: remove the example){did_you_mean(label, names)}"
    if number is not None and words:
        return f": the classes are {', '.join(names)}; to number them, list them in their order in data.class_names"
    if near := [name for name in names if folded(name) == folded(label)]:
        return f"; did you mean {near[0]!r}?"
    return did_you_mean(label, names)
