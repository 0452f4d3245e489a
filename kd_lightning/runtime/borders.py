"""Escapes foreign names and texts for output: on a terminal, in Markdown, in pictures."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of control, direction and line-break characters."""

_MARKS = str.maketrans({"\\": "\\\\", "&": "&amp;", "<": "&lt;", ">": "&gt;", "[": "\\[", "]": "\\]", "`": "\\`"})


def visible(text: object, keep: str = "") -> str:
    r"""Return a text with control and direction characters escaped.

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
    r"""Return JSON on one line, with control and direction characters as JSON escapes.

    >>> json_line({"label": "a\x9b31m\u202eé"})
    '{"label": "a\\u009b31m\\u202eé"}'
    """
    return _escaped(json.dumps(content, ensure_ascii=False))


def json_text(content: Any) -> str:
    r"""Return JSON for a file, likewise; lone surrogates are escaped too.

    >>> json_text({"label": "\ud800"})
    '{\n  "label": "\\ud800"\n}\n'
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return "".join(f"{_escaped(line)}\n" for line in text.split("\n"))


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(json.dumps(char)[1:-1] if unicodedata.category(char) in _UNSEEN else char for char in line)


def shown(text: object, style: str = "", keep: str = "") -> Text:
    """Return a text for `rich`, with markup and control characters escaped."""
    from rich.text import Text

    return Text(visible(text, keep), style)


def tell(line: str) -> None:
    """Print text that may contain foreign names."""
    print(visible(line, keep="\n"))


class Plain(logging.Formatter):
    """Formats log records with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return visible(super().format(record), keep="\n")


def markdown(text: object) -> str:
    r"""Return a text escaped for Markdown: no HTML, no link, no code.

    >>> markdown("<b>[x](y)")
    '&lt;b&gt;\\[x\\](y)'
    """
    return visible(text).translate(_MARKS)


def code(text: object) -> str:
    r"""Return a text as inline Markdown code, whatever backticks it has.

    >>> code("a"), code("`![x](y)")
    ('`a`', '`` `![x](y) ``')
    """
    given = visible(text)
    if "`" not in given:
        return f"`{given}`"
    mark = fence(given, 1)
    return f"{mark} {given} {mark}"


def fence(text: str, least: int = 3) -> str:
    """Return enough backticks to fence this text."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def drawn(text: object, letters: int = 60, keep: str = "") -> str:
    r"""Return a text for matplotlib, without mathematics and shortened to `letters`.

    >>> drawn("$x$"), drawn("abcdef", letters=4)
    ('\\$x\\$', 'abc…')
    """
    seen = visible(text, keep)
    seen = seen if len(seen) <= letters else seen[: letters - 1] + "…"
    if not seen or seen.startswith("_"):  # otherwise missing from the legend
        seen = f" {seen}"
    return seen.replace("$", r"\$")


def html_free(text: object) -> str:
    """Return our own Markdown, which contains names, without HTML and control characters."""
    return visible(text, keep="\n").replace("<", "&lt;")
