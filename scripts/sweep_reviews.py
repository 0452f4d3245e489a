"""The sweep of results/sweeps: temperature x alpha x 3 seeds on movie reviews, 75 points, and what is kept of it.

python scripts/sweep_reviews.py                      about half an hour on two cores, two points side by side
python scripts/sweep_reviews.py --teacher RUN_DIR    from a run with a finished teacher
python scripts/sweep_reviews.py --small              2 x 2 points of 20 steps, to see that it works; nothing is kept

The points are those of one command, which is recorded. It is given out in parts so that two processes share the work:
no part waits for another but for the first point, which tunes the teacher and stores its outputs, once for all. A sweep
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "sweeps"
KEPT = ("report.html", "heatmap.png")
TEMPERATURES, ALPHAS, SEEDS = "1,2,4,8,16", "0.1,0.3,0.5,0.7,0.9", "0,1,2"
PARTS = [
    {"temperature": TEMPERATURES, "alpha": ALPHAS, "seed": "0"},
    {"temperature": TEMPERATURES, "alpha": ALPHAS, "seed": "1"},
    {"temperature": "1,2,4", "alpha": ALPHAS, "seed": "2"},
    {"temperature": "8,16", "alpha": ALPHAS, "seed": "2"},
]
"""What the processes take, in this order: together the whole sweep."""
SMALL = [{"temperature": "1,4", "alpha": "0.1", "seed": "0"}, {"temperature": "1,4", "alpha": "0.9", "seed": "0"}]
LIMIT = 24 * 3600
"""Seconds that a part of the sweep may take, on one core."""
BUDGET = ["trainer.max_steps=250", "validations=6", "logger={}"]


def sweep(settings: list[str], values: dict[str, str]) -> list[str]:
    """Return the arguments of `kd-train` for a part of the sweep."""
    return ["-m", *settings, *(f"{key}={value}" for key, value in values.items())]


def train(arguments: list[str]) -> None:
    """Run `kd-train` on one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kd_lightning.cli.train", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=LIMIT)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, metavar="RUN_DIR", help="a run with a finished teacher")
    parser.add_argument("--small", action="store_true", help="a try: 4 points of 20 steps")
    given = parser.parse_args()
    from kd_lightning.evaluation.report.sweep import report_sweep

    parts, name = (SMALL, "sweep_small") if given.small else (PARTS, "sweep_reviews")
    settings = ["experiment=quickstart", f"name={name}", *BUDGET]
    if given.small:
        settings += ["trainer.max_steps=20", "data.views=0", "data.transfer=[]"]
    if given.teacher:
        settings += [f"teacher.checkpoint={given.teacher}", "stages=[baseline,distill]"]
    whole = {"temperature": TEMPERATURES, "alpha": ALPHAS, "seed": SEEDS}

    started = time.monotonic()
    train(sweep(settings, {key: value.split(",")[0] for key, value in parts[0].items()}))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: train(sweep(settings, part)), parts))
    folder = ROOT / "runs" / name
    document = report_sweep(folder)
    if given.small:
        return
    document |= {
        "command": " ".join(["kd-train", *sweep(settings, whole)]),
        "minutes": (time.monotonic() - started) / 60,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copy(folder / file, RESULTS / file)
    (RESULTS / "sweep.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {', '.join((*KEPT, 'sweep.json'))} to {RESULTS}")


if __name__ == "__main__":
    main()
