"""Made questions about packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kd_lightning.data import DebianQuestions
from kd_lightning.data.sources.debian_questions import OF_NAME, OF_TEXT
from kd_lightning.data.text.questions import Question
from kd_lightning.runtime.errors import ConfigError, DataError


def index(folder: Path, packages: int = 120) -> Path:
    rows = [
        f"tool{n}\tsource{n // 2}\tdoes the task {n}\tTool{n} is a program for task {n}, says tool{n}. It is small."
        for n in range(packages)
    ]
    path = folder / "index.tsv"
    path.write_text("\n".join(["name\tsource\tsummary\ttext", *rows]) + "\n")
    return path


def made(folder: Path, **options: object) -> DebianQuestions:
    given = {"questions": 200, "held_out_questions": 60, "packages": 4, **options}
    return DebianQuestions(index_file=str(index(folder)), **given)  # type: ignore[arg-type]


def template_of(question: Question) -> str:
    texts = [t for t in (*OF_NAME, *OF_TEXT) if all(piece in question.text for piece in t.split("{}"))]
    return max(texts, key=len)


def test_answers_stand_in_contexts_and_splits_share_no_package_and_no_template(tmp_path: Path, own_home: Path) -> None:
    corpus = made(tmp_path).read()
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [200, 60, 60]
    parts = (corpus.train, corpus.validation, corpus.test)
    templates = [{template_of(one) for one in part} for part in parts]
    sources = [{int(word[4:-1]) // 2 for one in part for word in one.context.split() if word.startswith("tool")}
               for part in parts]  # fmt: skip
    for found in (templates, sources):
        assert not found[0] & found[1] | found[0] & found[2] | found[1] & found[2]  # type: ignore[operator]
    without = sum(one.answers == () for one in corpus.train)
    assert 20 < without < 60
    for one in corpus.train:
        for answer in one.answers or ():
            assert one.context[answer.start : answer.stop] == answer.text
            assert answer.text.startswith(("tool", "does the task"))
        if one.answers and one.answers[0].text.startswith("tool"):
            assert "tool" not in one.text.lower()
            number = one.answers[0].text[4:]
            assert f"task {number}" in one.text
    assert made(tmp_path).read() == corpus
    assert made(tmp_path, split_seed=1).read() != corpus


@pytest.mark.parametrize("column", [2, 3])
def test_no_two_packages_of_a_context_could_be_taken_for_each_other(
    tmp_path: Path, own_home: Path, column: int
) -> None:
    path = index(tmp_path)
    head, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row[column] = f"does the task {number // 4}"  # of four packages
    path.write_text("\n".join("\t".join(row) for row in (head, *rows)) + "\n")
    corpus = DebianQuestions(index_file=str(path), questions=100, held_out_questions=20, packages=3).read()
    own = {row[0]: row[column] for row in rows}
    for one in corpus.train:
        told = [own[name] for name in re.findall(r"(tool\d+):", one.context)]
        assert len(set(told)) == len(told) == 3
    for row in rows:
        row[column] = "does it"
    path.write_text("\n".join("\t".join(row) for row in (head, *rows)) + "\n")
    with pytest.raises(DataError, match="4 packages with different descriptions were not found"):
        DebianQuestions(index_file=str(path), questions=100, held_out_questions=20, packages=3).read()


def test_impossible_options_are_refused(tmp_path: Path, own_home: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.without=1"):
        made(tmp_path, without=1)
    with pytest.raises(ConfigError, match="cannot hold out"):
        made(tmp_path, test_fraction=0.95)
    with pytest.raises(DataError, match=r"the validation split has \d+ packages, too few for data\.packages=50"):
        made(tmp_path, packages=50).read()
