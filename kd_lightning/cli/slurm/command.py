"""`kd-slurm`: submit a sweep as chained jobs, and show the state of its points."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.cli.runner import command
from kd_lightning.runtime.borders import shown, tell
from kd_lightning.runtime.errors import ConfigError, KDError

if TYPE_CHECKING:
    from kd_lightning.cli.slurm.chain import Job

_EXAMPLES = """
  kd-slurm pipeline experiment=reviews_bilstm name=grid --sweep 'temperature=1,2,4 alpha=0.5,0.9' --dry-run
  kd-slurm pipeline experiment=reviews_bilstm name=grid --sweep 'temperature=1,2,4' hydra.launcher.partition=gpu
  kd-slurm status runs/grid

conf/hydra/launcher/slurm.yaml has the jobs' partition, time, CPUs, memory and GPUs (hydra.launcher.KEY=VALUE).
"""


@command("kd-slurm", "squeue shows which jobs were submitted")
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-slurm`."""
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    if given.command is _pipeline and not any(word.startswith("-") for word in rest):
        given.overrides += rest  # those after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    given.command(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kd-slurm", description="Submit a sweep as chained SLURM jobs, and show the state of its points.",
        epilog=f"examples:{_EXAMPLES}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "submit teacher, its cache, the sweep's points (an array) and the report as a chain of jobs"
    pipeline = commands.add_parser("pipeline", help=about, description=about[0].upper() + about[1:] + ".")
    pipeline.set_defaults(command=_pipeline)
    pipeline.add_argument("overrides", nargs="*", help="as for kd-train: experiment=reviews_bilstm name=grid ...")
    pipeline.add_argument(
        "--sweep", default="", help="what varies, as for kd-train -m: 'temperature=1,2 alpha=0.5,0.9'"
    )
    pipeline.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    status = commands.add_parser("status", help="show the points of a sweep: state, score or reason, job and log")
    status.set_defaults(command=_status)
    status.add_argument("folder", type=Path, metavar="SWEEP_DIR", help="the folder that holds the points' folders")
    return parser


def _pipeline(given: argparse.Namespace) -> None:
    from kd_lightning.cli.slurm.chain import chain
    from kd_lightning.cli.slurm.status import begun, finished, submitted
    from kd_lightning.cli.slurm.sweep import expand
    from kd_lightning.runtime import slurm_queue

    if not given.dry_run and not slurm_queue.available():
        raise ConfigError("there is no sbatch on PATH: run this on a submit host, or add --dry-run")
    sweep = expand([*given.overrides, *shlex.split(given.sweep)], "hydra/launcher=slurm")
    folder, places = sweep.folder, begun(sweep.folder)
    if still := slurm_queue.queued(submitted(folder)["jobs"].values()):
        raise KDError(f"{folder}: its jobs are still in the queue; to start again, scancel {' '.join(sorted(still))}")
    unfinished = [
        number
        for number, point in enumerate(sweep.points)
        if frozenset(point) not in places or not finished(places[frozenset(point)])
    ]
    jobs = chain(sweep, unfinished)
    tell(f"{folder}: {len(sweep.points)} points, {len(sweep.points) - len(unfinished)} finished before")
    (_show if given.dry_run else _submit)(folder, jobs, sweep.points)


def _show(folder: Path, jobs: Sequence[Job], points: Sequence[Sequence[str]]) -> None:
    """Print what would be submitted; unknown job ids are names in capitals."""
    names = {job.name: job.name.upper() for job in jobs}
    for job in jobs:
        options = " ".join(job.dependency(names))
        tell(f"\n# {names[job.name]}: sbatch {options} {folder / 'slurm' / job.name}.sbatch".replace("  ", " "))
        print(job.script, end="")


def _submit(folder: Path, jobs: Sequence[Job], points: Sequence[Sequence[str]]) -> None:
    """Submit the chain; if a job is refused or cannot be recorded, cancel all of them."""
    from kd_lightning.cli.slurm.status import remember
    from kd_lightning.runtime import slurm_queue
    from kd_lightning.runtime.files import write_file

    ids: dict[str, str] = {}
    files = {job.name: folder / "slurm" / f"{job.name}.sbatch" for job in jobs}
    for job in jobs:
        write_file(files[job.name], job.script)
    try:
        for job in jobs:
            ids[job.name] = slurm_queue.submit(files[job.name], job.dependency(ids))
            tell(f"{job.name:8}  job {ids[job.name]}" + (f", after {ids[job.after]}" if job.after else ""))
        remember(folder, ids, points)
    except (KDError, OSError):
        slurm_queue.cancel(list(ids.values()))
        raise
    tell(f"kd-slurm status {folder}")


def _status(given: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from kd_lightning.cli.slurm.status import status

    jobs, points = status(given.folder)
    table = Table(box=None)
    for heading in ("point", "state", "", "job", "log"):
        table.add_column(heading, no_wrap=True)
    for row in [*jobs, *points]:
        style = {"finished": "green", "failed": "red"}.get(row.state, "")
        cells = (row.name, (row.state, style), row.says, row.job or "", str(row.log or ""))
        table.add_row(*(shown(*cell) if isinstance(cell, tuple) else shown(cell) for cell in cells))
    console = Console(width=max(Console().width, Console(width=10_000).measure(table).maximum))  # never broken lines
    console.print(table)
    counts = Counter(row.state for row in points)
    print(f"{len(points)} points: " + ", ".join(f"{count} {state}" for state, count in counts.items()))


if __name__ == "__main__":
    main()
