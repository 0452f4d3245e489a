"""Hostile names at every border."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from kd_lightning.cli.predict import print_table
from kd_lightning.evaluation.report.table import as_markdown
from kd_lightning.runtime.borders import (
    Plain,
    code,
    drawn,
    fence,
    html_free,
    json_line,
    json_text,
    markdown,
    shown,
    tell,
    visible,
)
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import DataError
from kd_lightning.tasks import Classification, MultiTask
from tests.names import HOSTILE


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text() | st.sampled_from(HOSTILE))
def test_nothing_commands_a_terminal_or_a_browser(text: str) -> None:
    for made in (visible(text), markdown(text), str(shown(text))):
        assert not any(ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u202e\u2066" for char in made)
    assert "<" not in markdown(text)
    assert "<" not in html_free(text)
    assert "\x1b" not in str(DataError(text))


def test_ordinary_names_stay_as_they_are() -> None:
    for text in ("food", "运动", "très bien", "naïve & co", "a_b*c"):
        assert visible(text) == text
        assert str(shown(text)) == text


@pytest.mark.parametrize("name", HOSTILE)
def test_predictions_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"label": name, "probabilities": {name: 0.75, "b": 0.25}}
    several = MultiTask({name: Classification(2)})
    print_table("text", [name], [Classification(2).cells(record, [name, "b"])])
    print_table("text", [name], [several.cells({name: record})])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert visible(name)[:20] in out


@pytest.mark.parametrize("name", HOSTILE)
def test_lines_and_tables_of_markdown(name: str) -> None:
    told = io.StringIO()
    say(Console(file=told, width=200), name)
    assert "\x1b" not in told.getvalue()
    table = as_markdown([["", name], ["x", name]])
    assert "<" not in table
    assert len(table.splitlines()) == 3


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/../../x"])
def test_a_name_stays_inside_runs(name: str) -> None:
    from hydra import compose, initialize_config_dir

    from kd_lightning.config.instantiate import conf_dir
    from kd_lightning.pipeline.resolvers import register_resolvers
    from kd_lightning.pipeline.validation import validate
    from kd_lightning.runtime.errors import ConfigError

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=[f"name={name}"])
    with pytest.raises(ConfigError, match="inside runs/; for another place set run_dir"):
        validate(cfg)
    assert not Path(name).exists() or name == "/tmp/x"


@pytest.mark.parametrize("text", ["a\x9b31m", "\x1b[2J", "a\u202eb", "a\u2028b", "\ud800", "𝄞\u200d", "運動", '"\\'])
def test_json_has_no_control_character_and_is_read_back(text: str) -> None:
    line = json_line({"text": text})
    assert line.isprintable()
    assert json.loads(line) == {"text": text}


def test_what_is_logged_and_told_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Plain())
    handler.emit(logging.LogRecord("kd_lightning", logging.INFO, "", 0, "classes: %s", ("\x1b[2Ja",), None))
    tell("folder\x1b]0;owned\x07: 2 files\nand a line")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert len(out.splitlines()) == 3


def test_no_command_closes_the_fence_around_it() -> None:
    for command in ("kd-train name='```'", "kd-train x=`````", "kd-train"):
        marks = fence(command)
        assert set(marks) == {"`"}
        assert marks not in command
        assert len(marks) >= 3


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="\\[]()`<!$_ab\u202e\ud800"))
def test_text_in_markdown_and_in_pictures_is_text(text: str) -> None:
    made = markdown(text)
    assert not re.search(r"(?<!\\)(\\\\)*[\[\]`]", made), "a backslash before a bracket takes its escape away"
    assert not re.search(r"(?<!\\)\$", drawn(text))
    marks = re.match("`+", code(text))
    assert marks is not None
    assert not re.search(rf"(?<!`){marks[0]}(?!`)", code(text)[len(marks[0]) : -len(marks[0])])


@pytest.mark.parametrize("text", ["\ud800", "a\u202eb", "\x9b31m", "é", "a\nb"])
def test_json_of_files_is_read_back(text: str) -> None:
    made = json_text({"label": [text]})
    assert json.loads(made.encode()) == {"label": [text]}
    assert made.replace("\n", "").isprintable()
