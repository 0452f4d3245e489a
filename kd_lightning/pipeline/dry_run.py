"""What a run would do: its stages, their steps, time and memory, and what of it is there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.data import MultiTaskData
from kd_lightning.pipeline.estimate import expected
from kd_lightning.pipeline.preflight import preflight
from kd_lightning.pipeline.prepare import settings_of
from kd_lightning.pipeline.run_records import PlannedStage
from kd_lightning.pipeline.stages import Stage, plan
from kd_lightning.pipeline.status import stage_status
from kd_lightning.runtime.borders import shown
from kd_lightning.runtime.clock import Clock, duration
from kd_lightning.runtime.console import say
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.training.run_folder import check_fingerprint, is_finished

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run

BEGINNING = {"finished": "reused", "running": "being trained by another command", "damaged": "damaged"}
"""What becomes of a stage in some states; any other is trained, or goes on."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a run would do.

    Attributes:
        stages: In the order in which they are trained.
        fates: What becomes of each.
        clock: Expected seconds and bytes of the unfinished ones; None where they are not known.
        stored: How many teacher outputs are stored, by the cache; None: they depend on what is trained first.
        examples: How many of them each cache would have.
    """

    stages: Sequence[Stage]
    fates: Sequence[str]
    clock: Clock | None
    stored: dict[Path, int] | None
    examples: int


def look_ahead(run: Run) -> Outlook:
    """Plan and try a run like a real one, without training or writing to its folder and caches.

    Raises:
        ConfigError: What the run would refuse, with what is finished by now.
        KDError: A file that it would reuse is damaged.
    """
    stages = plan(run)
    trials = preflight(run, stages)
    _check_settings(run, stages)
    fates = [_fate(run, stage) for stage in stages]
    unfinished = any(stage.kind == "teacher" and not is_finished(run.folder / stage.path) for stage in stages)
    taught = run.has_teacher and any(stage.distils for stage in stages)
    stored = run.providers[0].stored() if taught and not unfinished else None
    clock = expected(run, stages, trials, partial(_missing, run, stored))
    return Outlook(stages=stages, fates=fates, clock=clock, stored=stored, examples=run.data.num_examples)


def _missing(run: Run, stored: dict[Path, int] | None) -> int:
    """Return for how many examples the teacher would still predict."""
    examples = run.data.num_examples
    if not stored:
        return examples
    several = isinstance(run.data, MultiTaskData)
    return max(examples - (sum(stored.values()) if several else min(stored.values())), 0)


def _check_settings(run: Run, stages: Sequence[Stage]) -> None:
    """Refuse a stage that has begun with other settings, as far as those before it are finished."""
    for stage in stages:
        folder = run.folder / stage.path
        if is_finished(folder) or (folder / "settings.json").is_file():
            settings = settings_of(run, stage)
            check_fingerprint(folder, digest(settings), settings)
        elif stage.kind in ("teacher", "assistant"):
            return  # those after it depend on what it becomes


def _fate(run: Run, stage: Stage) -> str:
    found = stage_status(run.folder, PlannedStage(stage.path, stage.name))
    return BEGINNING.get(found.state) or found.note or "trained"


def show(run: Run, outlook: Outlook) -> None:
    """Print what a run would do."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table, clock = Table(box=None), outlook.clock
    for heading in ("stage", "steps", "time", "memory", "", "folder"):
        numbers = heading in ("steps", "time", "memory")
        table.add_column(heading, no_wrap=True, justify="right" if numbers else "left")
    for stage, fate in zip(outlook.stages, outlook.fates, strict=True):
        seconds = None if clock is None else clock.parts.get(stage.path)
        memory = None if clock is None else clock.memory.get(stage.path)
        cells = [
            stage.name, f"{stage.steps:,}", "" if seconds is None else duration(seconds),
            "" if memory is None else decimal(memory), fate, str(run.folder / stage.path),
        ]  # fmt: skip
        table.add_row(*map(shown, cells))
    wide = max(run.console.width, Console(width=10_000).measure(table).maximum)  # never broken lines
    Console(file=run.console.file, width=wide, quiet=run.console.quiet).print(table)
    for place, known in (outlook.stored or {}).items():
        say(run.console, f"teacher outputs: {known:,} of {outlook.examples:,} are stored in {place}")
    if clock is None:
        say(run.console, "time and memory are not known for several processes, or a served teacher")
    else:
        outputs = f", of which teacher outputs {duration(clock.outputs)}" if clock.outputs else ""
        say(run.console, f"about {duration(clock.total)} with the report{outputs}; memory is without torch's own")
    say(run.console, f"a dry run: nothing was trained, nothing was written to {run.folder}")
