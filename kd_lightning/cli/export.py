"""`kd-export`: export a run's student to files that run without this library, and check them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.runner import begin, command, trust_option, trusting_folders, typed
from kd_lightning.export.formats import FORMATS, QUANTIZE
from kd_lightning.runtime.borders import tell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kd-export", description="Export a run's student, and check that its predictions are the same."
    )
    parser.add_argument("run", type=Path, help="run folder, or the folder of one of its students (RUN/seed_0/distill)")
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument("--quantize", default="none", help=", ".join(QUANTIZE))
    parser.add_argument("--out", type=Path, required=True, help="the export folder: new, or empty")
    parser.add_argument("--seed", type=int, help="which seed's student; default: the best on validation")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the folder to the Hugging Face hub too")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    trust_option(parser)
    return parser


@command("kd-export", "nothing was written")
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-export`."""
    given = _parser().parse_args(arguments)
    with trusting_folders(given.trust):
        from kd_lightning.export.write import export, plan

        if given.push_to_hub:
            from kd_lightning.export.hub import check_repository, push_to_hub

            check_repository(given.push_to_hub)
        line = typed("kd-export", arguments)
        planned = plan(given.run, given.format, given.quantize, given.out, line, given.seed)
        begin()
        from kd_lightning.evaluation.report.table import file_size

        exported, parity = export(planned)
        tell(f"{given.out}: {exported.title} of {exported.network}, {exported.model} {file_size(exported.bytes)}")
        for line in parity.lines():
            tell(f"  {line}")
        if given.push_to_hub:
            tell(f"  {push_to_hub(given.out, given.push_to_hub, given.private)}")


if __name__ == "__main__":
    main()
