"""The tests mirror the rooms of the package; what is end to end stands in `end_to_end`."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The checkout."""
