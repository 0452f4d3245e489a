"""`kd-report`: write one page about a sweep, from its folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.runner import command
from kd_lightning.runtime.borders import tell

EXAMPLES = """\
examples:
  kd-train -m experiment=quickstart name=sweep temperature=1,2,4,8 alpha=0.1,0.5,0.9 seed=0,1,2
  kd-report runs/sweep        while it runs or after it: runs/sweep/report.html, and the pictures beside it
"""


@command("kd-report", "the report is the old or the new one")
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-report`."""
    parser = argparse.ArgumentParser(
        "kd-report",
        description="Write one self-contained page about a sweep: the best point, its uncertainty, failures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP_DIR", help="folder of a sweep (kd-train -m ...)")
    given = parser.parse_args(arguments)
    from kd_lightning.evaluation.report.sweep import headline, report_sweep

    tell(headline(report_sweep(given.sweep), given.sweep))


if __name__ == "__main__":
    main()
