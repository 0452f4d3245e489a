"""Names that people may give, and that do harm where they are taken for more than letters."""

from __future__ import annotations

HOSTILE = [
    "a[/b]", "[bold]x", "\x1b[31mred", "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "<script>alert(1)</script>", "a|b",
    "x\ny", "a\u202eexe", "`x`", "![x](http://e/)", "\\[x\\](http://e/)", "$x$", "$\\frac$", "a$b$", "_x", "-x",
    "=1+1", "a" * 300, "\ud800", "é\u0301 运动", "",
]  # fmt: skip
"""Markup of terminals, Markdown, HTML and matplotlib, orders to a terminal, a formula, and the too long and empty."""
