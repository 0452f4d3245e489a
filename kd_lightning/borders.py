"""Names and texts of other people where they leave the program: on a terminal, in Markdown."""

from __future__ import annotations

import json
import logging
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of characters that command, turn or break instead of being seen."""

_MARKS = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "[": "\\[", "]": "\\]", "`": "\\`"})


def visible(text: object, keep: str = "") -> str:
    r"""Return a text with its control characters, which command a terminal, and its turns of direction spelled out.

    >>> visible("a\x1b[31mb\n")
    'a\\x1b[31mb\\n'
    """
    given = str(text)
    if given.isprintable():
        return given
    return "".join(
        repr(char)[1:-1] if char not in keep and unicodedata.category(char) in _UNSEEN else char for char in given
    )


def json_line(content: Any) -> str:
    r"""Return JSON on one line, to be read as it is, with control characters and turns of direction as JSON's escapes.

    >>> json_line({"label": "a\x9b31m\u202eé"})
    '{"label": "a\\u009b31m\\u202eé"}'
    """
    line = json.dumps(content, ensure_ascii=False)
    if line.isprintable():
        return line
    return "".join(json.dumps(char)[1:-1] if unicodedata.category(char) in _UNSEEN else char for char in line)


def shown(text: object, style: str = "", keep: str = "") -> Text:
    """Return a text as `rich` prints it: no markup is read in it, and no control character left."""
    from rich.text import Text

    return Text(visible(text, keep), style)


def tell(line: str) -> None:
    """Print a line, or lines, in which names of other people may stand."""
    print(visible(line, keep="\n"))


class Plain(logging.Formatter):
    """Formats what is logged without the control characters of names in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return visible(super().format(record), keep="\n")


def markdown(text: object) -> str:
    r"""Return a text as Markdown that shows it: no HTML, no link, no code.

    >>> markdown("<b>[x](y)")
    '&lt;b&gt;\\[x\\](y)'
    """
    return visible(text).translate(_MARKS)


def html_free(text: object) -> str:
    """Return Markdown of ours with names in it, in which no HTML and no control character is left."""
    return visible(text, keep="\n").replace("<", "&lt;")
