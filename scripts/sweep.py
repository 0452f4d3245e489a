"""The sweeps of results/sweeps: the default recipe over temperature and alpha, 3 seeds, on two sets.

python scripts/sweep.py            about an hour on two cores, a set on each; goes on where it was
python scripts/sweep.py reviews    this set
python scripts/sweep.py --small    2 x 2 points of 20 steps, to see that it works; nothing is kept

The points of a set are those of one command, which is recorded. Scores are of the validation split.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from trainings import ROOT, parsed, read_result

RUNS, RESULTS = ROOT / "runs" / "sweeps", ROOT / "results" / "sweeps"
SETS = {"reviews": ["data=reviews"], "debian_sections": ["data=debian_sections", "data.train_examples=10000"]}
BUDGET = ["budget=quick", "logger={}"]
VALUES = ["temperature=1,2,4,8", "alpha=0.1,0.5,0.9,1", "seed=0,1,2"]
SMALL = ["temperature=1,4", "alpha=0.1,0.9", "seed=0", "trainer.max_steps=20", "data.views=0"]
LIMIT = 24 * 3600
"""Seconds that a sweep may take, on one core."""


def sweep(name: str, small: bool = False) -> None:
    """Run a set's sweep on one core, and keep its document and its heat map."""
    arguments = ["-m", *SETS[name], *BUDGET, *(SMALL if small else VALUES)]
    folder = RUNS / ("small" if small else "whole") / name
    command = [sys.executable, "-m", "kd_lightning.cli.train", *arguments, f"run_dir={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=LIMIT)
    if small:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    document = read_result(folder / "sweep.json") | {"command": " ".join(["kd-train", *arguments])}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    shutil.copy(folder / "heatmap.png", RESULTS / f"{name}.png")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a try: 4 points of 20 steps")
    given = parsed(parser, list(SETS))
    with ThreadPoolExecutor(len(SETS)) as pool:
        list(pool.map(lambda name: sweep(name, given.small), given.names))


if __name__ == "__main__":
    main()
