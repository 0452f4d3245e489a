"""Measure what the README says of speed and memory, each figure beside its goal.

python scripts/benchmark.py overhead cached    these two
python scripts/benchmark.py all                every file in scripts/benchmarks/
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kd_lightning.evaluation.profiling import environment
from kd_lightning.runtime.files import write_file

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "start", "overhead", "cached", "online", "padding", "cache_io", "vocabulary", "scaling", "sweep", "peers",
    "lm_step", "lm_logits", "lm_memory", "lm_cache", "lm_corpus", "lm_peers", "embed_peers", "deploy",
)  # fmt: skip


def measure(name: str, console: Console) -> None:
    """Run one benchmark, write `results/benchmarks/NAME.json` and print its figures."""
    module = importlib.import_module(f"benchmarks.{name}")
    started = time.monotonic()
    measures = [measure.to_dict() for measure in module.run()]
    content = {
        "name": name,
        "what": (module.__doc__ or "").strip().splitlines()[0],
        "command": shlex.join(["python", "scripts/benchmark.py", name]),
        "environment": environment(),
        "seconds": time.monotonic() - started,
        "measures": measures,
    }
    write_file(ROOT / "results" / "benchmarks" / f"{name}.json", json.dumps(content, indent=1) + "\n")
    table = Table(title=f"{name}: {content['what']}", title_justify="left")
    for column in ("figure", "median", "low", "high", "unit", "goal", "met"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for row in measures:
        figures = [f"{row[key]:.3g}" for key in ("median", "low", "high")]
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        table.add_row(row["name"], *figures, row["unit"], row["goal"] or "", met)
    console.print(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*NAMES, "all"], metavar="NAME", help=", ".join((*NAMES, "all")))
    given = parser.parse_args()
    console = Console()
    for name in NAMES if "all" in given.names else given.names:
        measure(name, console)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "scripts"))
    main()
