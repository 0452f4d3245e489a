from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.waiting import end_of, wait_for


def test_the_answer_is_returned() -> None:
    answers = iter(["", "", "here"])
    assert wait_for(lambda: next(answers), "an answer") == "here"


def test_a_limit_says_what_was_waited_for() -> None:
    with pytest.raises(TimeoutError, match=r"^waited 0.05 s for a file of nobody$"):
        wait_for(lambda: False, "a file of nobody", timeout=0.05)


def test_a_dead_process_is_not_waited_for() -> None:
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(TimeoutError, match="for its file, and its process ended with exit code 3"):
        wait_for(lambda: False, "its file", process)
    assert time.monotonic() - began < 50


def test_what_a_process_does_last_is_seen() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    assert wait_for(lambda: process.poll() is not None, "its end", process)


def test_who_does_not_end_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    with pytest.raises(TimeoutError, match=f"the end of process {process.pid}"):
        end_of(process, timeout=0.05)
    assert end_of(process) == -9
