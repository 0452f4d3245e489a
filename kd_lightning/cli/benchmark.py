"""`kd-benchmark`: measure speed, size and accuracy of a run's teacher, its student and exports."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_lightning.cli.runner import command, trust_option, trusting_folders, typed
from kd_lightning.runtime.borders import shown, tell


def _parser() -> argparse.ArgumentParser:
    about = "Latency, throughput, memory and size of a run's teacher, its student and exports, on its validation split."
    parser = argparse.ArgumentParser("kd-benchmark", description=about)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR|EXPORT_DIR")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each; default: 1")
    parser.add_argument("--seed", type=int, help="which seed's student; default: the best on validation")
    parser.add_argument("--out", type=Path, help="folder for benchmark.json, .md and .png; default: RUN_DIR/benchmark")
    trust_option(parser)
    return parser


@command("kd-benchmark", "nothing was written")
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-benchmark`."""
    given = _parser().parse_args(arguments)
    line = typed("kd-benchmark", arguments)
    with trusting_folders(given.trust):
        from kd_lightning.export.benchmark import benchmark

        result, out = benchmark(given.folders, threads=given.threads, seed=given.seed, out=given.out, command=line)
    show(result, out)


def show(result: Mapping[str, Any], out: Path) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    from kd_lightning.export.benchmark_files import table_rows

    heading, *body = table_rows(result)
    title = f"{result['threads']} thread(s), validation split; times faster and smaller than {result['against']}"
    table = Table(title=shown(title), title_justify="left", box=None)
    for number, name in enumerate(heading):
        table.add_column(shown(name), justify="right" if number else "left", no_wrap=number == 0)
    for row in body:
        table.add_row(*map(shown, row))
    console = Console()
    wanted = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, wanted)).print(table)  # wraps lines on a narrow terminal instead of truncating
    tell(f"benchmark: {out / 'benchmark.md'}")


if __name__ == "__main__":
    main()
