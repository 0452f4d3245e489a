"""Names and texts of other people where they leave the program: on a terminal, in Markdown."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

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
        repr(char)[1:-1] if char not in keep and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char
        for char in given
    )


def shown(text: object) -> Text:
    """Return a text as `rich` prints it: no markup is read in it, and no control character left."""
    from rich.text import Text

    return Text(visible(text))


def markdown(text: object) -> str:
    r"""Return a text as Markdown that shows it: no HTML, no link, no code.

    >>> markdown("<b>[x](y)")
    '&lt;b&gt;\\[x\\](y)'
    """
    return visible(text).translate(_MARKS)


def html_free(text: object) -> str:
    """Return Markdown of ours with names in it, in which no HTML and no control character is left."""
    return visible(text, keep="\n").replace("<", "&lt;")
