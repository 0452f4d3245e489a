from __future__ import annotations

import logging
import warnings

import pytest

from kd_lightning.runtime.log_filters import LIGHTNING_INFO, quiet


@pytest.fixture
def filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(logger, "filters", [])
    with warnings.catch_warnings():
        quiet()
        yield


@pytest.mark.usefixtures("filtered")
def test_only_the_listed_messages_are_dropped() -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def passes(message: str) -> bool:
        return bool(logger.filter(logging.LogRecord("", logging.INFO, "", 0, message, None, None)))

    assert not any(passes(f"{text} more") for text in LIGHTNING_INFO)
    assert passes("Loss is not finite")


@pytest.mark.usefixtures("filtered")
def test_other_warnings_are_still_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        quiet()
        warnings.warn("The 'val_dataloader' does not have many workers which may be a bottleneck", stacklevel=1)
        warnings.warn("Your gradients are exploding", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["Your gradients are exploding"]
