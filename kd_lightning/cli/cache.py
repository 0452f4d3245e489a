"""`kd-cache`: build, look at, check and remove stored teacher outputs."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.cli.runner import begin, command
from kd_lightning.runtime.borders import shown, tell
from kd_lightning.runtime.errors import CacheError, ConfigError
from kd_lightning.runtime.processes import launched, rank

if TYPE_CHECKING:
    from kd_lightning.teachers.cache.manifest import Manifest


@command("kd-cache", "what was stored is kept; run the same command to resume")
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-cache`."""
    given = _parser().parse_args(arguments)
    sys.exit(given.command(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("kd-cache", description="Build, look at, check and remove stored teacher outputs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        found.set_defaults(command=globals()[f"_{name}"])
        return found

    build = add("build", "run the teacher of a configuration on every example, and store its outputs")
    build.add_argument("overrides", nargs="*", help="as for kd-train: data=reviews teacher.checkpoint=runs/a ...")
    build.add_argument(
        "--share", metavar="I/N",
        help="fill share I of N only, for jobs side by side; array: that of this task of a SLURM array. The processes "
        "of one command (srun, torchrun) share the work unasked",
    )  # fmt: skip
    everywhere = "cache folders; default: all of them in $KD_LIGHTNING_HOME/teacher_outputs"
    info = add("info", "show what is stored: teacher, data, outputs, examples, size, age and integrity")
    info.add_argument("paths", nargs="*", type=Path, metavar="PATH", help=everywhere)
    verify = add("verify", "check every file of a cache against its checksum; exit code 1 if any is damaged")
    verify.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="cache folders")
    prune = add("prune", "remove stored outputs; without a filter, only files of killed processes")
    prune.add_argument("paths", nargs="*", type=Path, metavar="PATH", help=everywhere)
    prune.add_argument("--older-than", type=float, metavar="DAYS", help="remove caches not written to for this long")
    prune.add_argument("--incomplete", action="store_true", help="remove incomplete caches")
    prune.add_argument("--damaged", action="store_true", help="remove caches with a damaged file")
    prune.add_argument("--all", action="store_true", help="remove all of them")
    prune.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    return parser


def _build(given: argparse.Namespace) -> int:
    from kd_lightning.cli.hydra_errors import compose, explained

    with explained(given.overrides):
        cfg = compose(given.overrides)
        share = _share(given.share)
        from rich.console import Console

        from kd_lightning.pipeline.context import Run
        from kd_lightning.pipeline.run import build_caches
        from kd_lightning.runtime.processes import first, join

        begin()
        join()
        with first():
            run = Run(cfg, Console(quiet=rank() > 0))
        folders = build_caches(run, share)
        if rank() == 0 or all(cache.complete for cache in run.providers[0].caches()):
            _table(folders)
    return 0


def _share(given: str | None) -> tuple[int, int]:
    """Return which of how many shares this process fills, counted from 0.

    Raises:
        ConfigError: It is none.
    """
    number, count = 0, 1
    if given == "array":
        try:
            task, first, step, count = (
                int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "STEP", "COUNT")
            )
        except (KeyError, ValueError) as error:
            raise ConfigError("--share array: this is no task of a SLURM array (sbatch --array=0-7)") from error
        number = (task - first) // step
        if first + number * step != task or not 0 <= number < count:
            raise ConfigError(f"--share array: task {task} is not one of {count} from {first} on in steps of {step}")
    elif given is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", given)
        number, count = (int(found[1]) - 1, int(found[2])) if found else (-1, 0)
        if not 0 <= number < count:
            raise ConfigError(f"--share {given}: give I/N, such as 1/8 to 8/8, or array")
    return number * launched() + rank(), count * launched()


def _info(given: argparse.Namespace) -> int:
    folders = given.paths or _everywhere()
    if not folders:
        tell(f"no teacher outputs in {_root()}")
        return 0
    _table(folders)
    return 0


def _verify(given: argparse.Namespace) -> int:
    from kd_lightning.teachers.cache.upkeep import verify

    damaged = False
    for folder in given.paths:
        wrong = verify(folder)
        damaged = damaged or bool(wrong)
        tell("\n".join(wrong) if wrong else f"{folder}: every file is intact")
    return int(damaged)


def _prune(given: argparse.Namespace) -> int:
    from rich.filesize import decimal

    from kd_lightning.teachers.cache.manifest import is_cache
    from kd_lightning.teachers.cache.upkeep import locked, remains, remove_cache, unread

    if given.older_than is not None and not given.older_than > 0:
        raise ConfigError(f"--older-than {given.older_than:g}: give days, more than 0; --all removes every cache")
    verb, freed = ("would remove" if given.dry_run else "removed"), 0
    for folder in given.paths or _everywhere():
        if not is_cache(folder):
            raise ConfigError(f"{folder} holds no teacher outputs, so nothing is removed")
        try:
            with locked(folder, wait=False), unread(folder):
                reason = _why_removed(folder, given)
                found = [folder] if reason else remains(folder)
                for path in found:
                    size = _size(path)
                    freed += size
                    if not given.dry_run and reason:
                        remove_cache(path)
                    elif not given.dry_run:
                        path.unlink()
                    tell(f"{verb} {path}, {decimal(size)} ({reason or 'left by a process that was killed'})")
        except CacheError as error:
            tell(f"left alone: {error}")
    print(f"{verb} {decimal(freed)} in all")
    return 0


def _why_removed(folder: Path, given: argparse.Namespace) -> str | None:
    """Return the filter that a cache matches, None if it stays."""
    from kd_lightning.teachers.cache.upkeep import verify

    if given.all:
        return "--all"
    if given.older_than is not None and _age(folder) > given.older_than * 86_400:
        return f"not written to for {_spoken(_age(folder))}"
    wrong = verify(folder) if given.damaged else []
    if wrong:
        return wrong[0]
    if given.incomplete and (manifest := _manifest(folder)) is not None and manifest.known < manifest.num_examples:
        return f"holds {manifest.known:,} of {manifest.num_examples:,} examples"
    return None


def _table(folders: Sequence[Path]) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from kd_lightning.teachers.cache.upkeep import verify

    table = Table(box=None, title="teacher outputs", title_justify="left")
    numbers = ("examples", "size", "an example", "age")
    for heading in ("teacher", "data", "outputs", *numbers, "verified", "folder"):
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=True)
    found: list[str] = []
    for folder in folders:
        manifest, wrong = _manifest(folder), verify(folder)
        cells = ["?"] * 7
        if manifest is not None:
            size = sum(record.bytes for record in manifest.shards)
            cells = [
                manifest.teacher or "?", manifest.data or "?", "\n".join(map(str, manifest.specs)) or "none yet",
                f"{manifest.known:,} / {manifest.num_examples:,}", decimal(size),
                decimal(round(size / manifest.known)) if manifest.known else "?", _spoken(_age(folder)),
            ]  # fmt: skip
        found += wrong
        verified = Text("damaged", style="red") if wrong else Text("yes", style="green")
        table.add_row(*(shown(cell, keep="\n") for cell in cells), verified, shown(folder))
    console = Console(width=max(Console().width, Console(width=10_000).measure(table).maximum))  # never broken lines
    console.print(table)
    for problem in found:
        console.print(shown(problem, "red"), soft_wrap=True)


def _manifest(folder: Path) -> Manifest | None:
    from kd_lightning.teachers.cache.manifest import MANIFEST, Manifest

    try:
        return Manifest.read(folder / MANIFEST)
    except CacheError:
        return None  # `verify` reports why


def _everywhere() -> list[Path]:
    from kd_lightning.teachers.cache.manifest import is_cache

    return sorted(folder for folder in _root().glob("*") if is_cache(folder))


def _root() -> Path:
    from kd_lightning.runtime.assets import outputs_home

    return outputs_home()


def _size(path: Path) -> int:
    from kd_lightning.teachers.cache.manifest import own_files

    return sum(file.lstat().st_size for file in (own_files(path) if path.is_dir() else [path]))


def _age(folder: Path) -> float:
    """Return the seconds since anything in the folder was written."""
    import time

    from kd_lightning.teachers.cache.manifest import own_files

    written = [folder.stat().st_mtime]
    for path in own_files(folder):
        with suppress(FileNotFoundError):  # a killed process's, just removed
            written.append(path.lstat().st_mtime)
    return time.time() - max(written)


def _spoken(seconds: float) -> str:
    """Write a time span in its largest unit.

    >>> [_spoken(s) for s in (5, 90, 7200, 200_000)]
    ['5 s', '1 min', '2 h', '2 d']
    """
    for unit, scale in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{seconds // scale:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
