"""A call that takes too long is not waited for; one that fails raises here."""

from __future__ import annotations

import time
from contextvars import ContextVar
from threading import Event

import pytest

from kd_lightning.runtime.limits import within

SET: ContextVar[int] = ContextVar("SET", default=0)


def test_a_call_is_waited_for_in_the_same_context() -> None:
    found: list[int] = []
    token = SET.set(3)
    within(30, lambda: found.append(SET.get()))
    SET.reset(token)
    assert found == [3]


def test_what_a_call_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        within(30, lambda: 1 // 0)


def test_what_takes_too_long_is_left() -> None:
    over, begun = Event(), time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done after 0\.1 s"):
        within(0.1, lambda: over.wait(60))
    over.set()
    assert time.monotonic() - begun < 30
