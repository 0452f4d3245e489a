"""For the documentation site: formulas as MathML, which browsers draw without a script, and examples as code.

It is also an extension of griffe, which reads the docstrings for the pages of reference.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension
from latex2mathml.converter import convert

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1(?! *$).+)*", re.MULTILINE)
"""A prompt and all lines up to the next empty one."""

BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*|\s*(?=\n\1 )))*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
FENCE = re.compile(r"^```math\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def formula(latex: str, block: bool = False) -> str:
    """Return LaTeX as MathML."""
    made: str = convert(" ".join(latex.split()), display="block" if block else "inline")
    return f'<div class="formula">{made}</div>' if block else made


def with_formulas(page: str) -> str:
    """Return a page with what GitHub draws of fences of `math`."""
    return FENCE.sub(lambda fence: formula(fence[1], block=True), page)


def docstring(text: str) -> str:
    """Return a docstring as Markdown: what Sphinx would draw, and the examples that doctest runs."""
    text = EXAMPLE.sub(r"\1```pycon\n\g<0>\n\1```", text)
    text = BLOCK.sub(lambda found: f"{found[1]}{formula(textwrap.dedent(found[2]), block=True)}", text)
    return INLINE.sub(lambda found: formula(found[1]), text)


class Markup(Extension):
    """Reads docstrings as Markdown."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Change what was read of one object."""
        if obj.docstring is not None:
            obj.docstring.value = docstring(obj.docstring.value)
