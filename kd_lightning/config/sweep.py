"""The names by which a sweep's points and those who read them agree."""

from __future__ import annotations

OVERRIDES, SCORE, FAILURE = "overrides.json", "score.json", "failure.json"


GRID = "BasicSweeper"
"""Hydra's sweeper that makes every combination of given values."""
