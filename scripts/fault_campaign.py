"""Kill, damage, misconfigure and mislead every command, and count how that ends: results/faults.json.

python scripts/fault_campaign.py                    100 kills of each command, 300 damages, 500 configurations, 90 names
python scripts/fault_campaign.py --only kills --trials 5    five kills of each; --only may be given more than once
python scripts/fault_campaign.py --quick            a few of each, in a minute; writes no file

The trials are drawn by `--seed`. Each command runs in a fork of this process, which has imported everything, on a data
set of some hundred sentences; what is placed, is placed by what happens in the command and not by the clock. What that
leaves out: kills while Python imports, and anything with several processes, a GPU or a network. Exits with 1 where a
trial did not end as it should, and prints those. docs/reliability.md is written from the file by
scripts/update_readme.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from faults import page, process

ROOT = Path(__file__).resolve().parent.parent
TRIALS = {"kills": 100, "damages": 300, "configurations": 500, "names": 90}
QUICK = {"kills": 1, "damages": 12, "configurations": 20, "names": 6}


def run(group: str, given: argparse.Namespace, count: int) -> dict[str, Any]:
    """Run the trials of a group, printing each that does not end as it should, and return what they came to."""
    from kd_lightning.evaluation.profiling import environment

    found: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix=f"faults-{group}-"))
    started = time.monotonic()
    try:
        drawn = importlib.import_module(f"faults.{group}").trials(folder, given.seed, count, given.quick)
        for trial in process.in_lanes(drawn, given.lanes, folder):
            found.append(trial)
            if not page.is_good(trial):
                print(_line(trial), flush=True)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    bad = [trial for trial in found if not page.is_good(trial)]
    minutes = (time.monotonic() - started) / 60
    print(f"{group}: {len(drawn)} trials, {len(bad)} not as they should be, {minutes:.1f} minutes", flush=True)
    return {
        "command": f"python scripts/fault_campaign.py --only {group} --trials {count} --seed {given.seed}",
        "seed": given.seed, "minutes": minutes, "environment": environment(), "counts": page.counts(found),
        "valid": sorted(trial["how"] for trial in found if trial["outcome"] == "valid"), "not as it should be": bad,
    }  # fmt: skip


def _line(trial: dict[str, Any]) -> str:
    said = [trial["group"], trial["what"], trial["how"], trial["outcome"], trial.get("detail", "")]
    return " | ".join(part[:300].encode("unicode_escape").decode() for part in said)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=page.GROUPS, help="this group; default: all of them")
    parser.add_argument("--trials", type=int, help="of each group, of kills of each command")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=os.cpu_count() or 1, help="trials at a time; default: one a core")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the trials, in the temporary folder")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "faults.json")
    given = parser.parse_args()
    process.preload()
    trials = QUICK if given.quick else TRIALS
    if given.trials:
        trials = dict.fromkeys(TRIALS, given.trials)
    content = json.loads(given.output.read_text(encoding="utf-8")) if given.output.is_file() else {}
    groups = {group: run(group, given, trials[group]) for group in given.only or page.GROUPS}
    if not given.quick:  # groups that did not run stay
        from kd_lightning.runtime.files import write_file

        write_file(given.output, json.dumps(content | groups, indent=1, ensure_ascii=True) + "\n")
    print(json.dumps({group: found["counts"] for group, found in groups.items()}, indent=1))
    sys.exit(1 if any(found["not as it should be"] for found in groups.values()) else 0)


if __name__ == "__main__":
    main()
