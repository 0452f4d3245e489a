"""`kd-status`: show how far a run or a sweep is, what it waits for and where it goes on."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.cli.runner import command
from kd_lightning.runtime.borders import json_line, shown, visible

if TYPE_CHECKING:
    from kd_lightning.pipeline.status import RunStatus

STYLES = {"finished": "green", "running": "cyan", "failed": "red", "damaged": "red", "stopped": "yellow"}


@command("kd-status", "nothing was changed")
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-status`."""
    about = "Show what of a run is done, what runs or was stopped, and what comes next; of a sweep, a line a point."
    parser = argparse.ArgumentParser("kd-status", description=about)
    parser.add_argument("run", type=Path, metavar="RUN_DIR|SWEEP_DIR", help="folder of a run or of a sweep")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(arguments)
    from kd_lightning.pipeline.status import point_status, run_status, sweep_points

    points = [point_status(place) for place in sweep_points(given.run)]
    found = points or [run_status(given.run)]
    if given.json:
        documents = [json.loads(json.dumps(asdict(one), default=str)) for one in found]
        print(json_line({"folder": str(given.run), "points": documents} if points else documents[0]))
    elif points:
        _show_points(points)
    else:
        _show_run(found[0])


def _show_run(run: RunStatus) -> None:
    from kd_lightning.runtime.clock import duration

    rows = []
    for stage in run.stages:
        steps = "" if stage.steps is None else f"{stage.step or 0:,} / {stage.steps:,}"
        times = ("" if value is None else duration(value) for value in (stage.seconds, stage.left))
        note = f"{stage.note} ({stage.by})" if stage.by and stage.note else stage.by or stage.note
        rows.append([stage.name, stage.state, steps, *times, note, stage.path])
    _table(["stage", "state", "steps", "spent", "left", "", "folder"], rows)
    lines = [f"{run.folder}: {run.state}" + (f", {run.note}" if run.note else "")]
    if run.left is not None:
        lines.append(f"about {duration(run.left)} left")
    if run.state == "running" and all(stage.state != "running" for stage in run.stages):
        lines.append(f"{run.by} works between stages: it computes teacher outputs, or the report")
    if run.state in ("stopped", "waiting"):
        lines.append(f"to go on: {run.command or 'run the same kd-train again'}")
    lines += [f"{name}: {place}" for name, place in (("report", run.report), ("log", run.log)) if place is not None]
    for line in lines:  # each stays one, whatever a name in it holds
        print(visible(line))


def _show_points(points: Sequence[RunStatus]) -> None:
    from kd_lightning.runtime.clock import duration

    rows = []
    for run in points:
        done = f"{sum(stage.state == 'finished' for stage in run.stages)} / {len(run.stages)} stages"
        now = ", ".join(stage.name for stage in run.stages if stage.state in ("running", "stopped", "damaged"))
        rows.append([
            run.folder.name, run.state, done, "" if run.left is None else duration(run.left), run.note or now,
        ])  # fmt: skip
    _table(["point", "state", "done", "left", ""], rows)
    counts = Counter(run.state for run in points)
    print(f"{len(points)} points: " + ", ".join(f"{count} {state}" for state, count in counts.items()))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose second column is a state; its lines are never broken."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("steps", "spent", "left") else "left")
    for row in rows:
        table.add_row(*(shown(cell, STYLES.get(cell, "") if place == 1 else "") for place, cell in enumerate(row)))
    console = Console(width=max(Console().width, Console(width=10_000).measure(table).maximum))
    console.print(table)


if __name__ == "__main__":
    main()
