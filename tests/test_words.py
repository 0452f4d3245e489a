"""The vocabulary of the house (docs/architecture.md, "Words") throughout prose, and figures in tables.

A network is not a person: it predicts and outputs. Words that the field uses in a sense of its own are listed with the
phrases in which they stand.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests import ROOT

BANNED = {
    "answer": r"answer(s|ed|ing|ings|er)?",
    "ask": r"ask(s|ed|ing)?",
    "say": r"said",
    "tell": r"told",
    "guide": r"guid(e|es|ed)",
    "meet": r"meets?",
    "rehearsal": r"rehears\w*",
    "guess": r"guess(es|ed)?",
    "by heart": r"by heart",
}
"""What it is instead: predicts, predictions, teacher outputs; the teacher runs; preflight; chance score."""

ALLOWED = (
    "question answering", "Question answering", "question_answering", "question-answering", "extractive QA",
)  # fmt: skip

OF_QUESTIONS = (
    "docs/question_answering.md", "docs/configuration.md",
    "conf/data/question_files.yaml", "conf/data/debian_questions.yaml",
    "tasks/question_answering.py", "tasks/spans.py", "data/text/questions.py", "data/text/question_windows.py",
    "data/text/question_data.py", "data/sources/question_files.py", "data/sources/question_reader.py",
    "data/sources/debian_questions.py", "evaluation/question_spans.py",
)  # fmt: skip
"""Where an answer is what a question of extractive question answering has, in SQuAD's words: the noun alone."""

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = sorted((ROOT / "kd_lightning").rglob("*.py"))
CONF = sorted((ROOT / "conf").rglob("*.yaml"))


def test_no_banned_words() -> None:
    pattern = re.compile(rf"(?<![A-Za-z])({'|'.join(BANNED.values())})(?![A-Za-z])", re.IGNORECASE)
    found = []
    for path in (*PAGES, *CONF, *CODE):
        text = path.read_text(encoding="utf-8")
        for phrase in ALLOWED:
            text = text.replace(phrase, "")
        if str(path).endswith(OF_QUESTIONS):
            text = re.sub(r"answers?(?![A-Za-z])", "", text, flags=re.IGNORECASE)
        lines = enumerate(text.splitlines(), 1)
        found += [f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in lines if pattern.search(line)]
    assert not found, "\n".join(found)


def test_first_lines_of_docstrings_are_short() -> None:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    long = []
    for path in CODE:
        documented = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, kinds)]
        first = [text.splitlines()[0] for node in documented if (text := ast.get_docstring(node))]
        long += [f"{path.relative_to(ROOT)}: {line}" for line in first if len(line) > 100]
    assert not long, "\n".join(long)


def sentences(page: str) -> list[str]:
    """Return a page's sentences without tables, code, links' targets, dates, years, arXiv ids and what a machine is.

    >>> sentences("It takes 3.5 s (`a 1 2`) and 4 ± 1 MB. See [x](y_1.md).")
    ['It takes 3.5 s () and 4 ± 1 MB.', 'See [x]().']
    """
    page = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    page = re.sub(r"`[^`]*`", "", page)
    page = re.sub(r"\]\([^)]*\)", "]()", page)
    page = re.sub(r"arXiv \d+\.\d+|\d{4}-\d\d-\d\d|\b(19|20)\d\d\b|\d+ cores, torch \S+", "", page)
    lines = ["" if line.lstrip().startswith(("|", "#", "<!--")) else line for line in page.splitlines()]
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*[*-] )", "\n".join(lines))
    joined = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return [sentence for text in joined if text for sentence in re.split(r"(?<=[.?!:;])\**\s+(?=[A-Z*`\[(])", text)]


def figures(sentence: str) -> list[str]:
    """Return the numbers of a sentence; a spread belongs to its number.

    >>> figures("0.84 ± 0.01 of F1 at 4e-3, 2,112 examples, int8, 2 x 128, version 2.13.0+cpu")
    ['0.84 ± 0.01', '4e-3', '2,112', '2 x 128', '2.13.0']
    """
    one = r"[+-]?\d[\d,.]*(?:e-?\d+)?"
    return [found.rstrip(".,") for found in re.findall(rf"(?<![\w.^{{]){one}(?: (?:±|x|to|of) {one})?", sentence)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_more_than_three_numbers_are_a_table(page: Path) -> None:
    found = [one for one in sentences(page.read_text(encoding="utf-8")) if len(figures(one)) > 3]
    assert not found, "\n".join(found)


def test_the_readme_is_read_in_one_evening() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250
