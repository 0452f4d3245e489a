"""The state of a sweep's points, with progress, job and log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.cli.slurm.sweep import recorded, varied
from kd_lightning.config.sweep import FAILURE, OVERRIDES, SCORE
from kd_lightning.runtime import slurm_queue
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import read_json, write_json
from kd_lightning.runtime.seals import read_sealed

JOBS = "slurm/jobs.json"
"""The file with the last submission: `jobs` (ids by name) and `points` (their overrides)."""
MULTIRUN = "multirun.yaml"
"""Hydra's file in a sweep's folder."""
_SUBMITTED = "_submitted.pkl"


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: A point's overrides, or a job of the chain.
        state: finished, failed, running, requeued, pending, unfinished (started, without a live job) or not
            started.
        says: The score; the reason of a failure; the current stage; why it waits.
        job: Its last job, if known.
        log: That job's log.
    """

    name: str
    state: str
    says: str = ""
    job: str | None = None
    log: Path | None = None


def begun(folder: Path) -> dict[frozenset[str], Path]:
    """Return the folders of a sweep's started points by their overrides."""
    return {frozenset(read_json(file)["overrides"]): file.parent for file in sorted(folder.glob(f"*/{OVERRIDES}"))}


def finished(point: Path) -> bool:
    """Return whether a point has its score."""
    return (point / SCORE).is_file()


def submitted(folder: Path) -> dict[str, Any]:
    """Return the last submission of this sweep, `jobs` and `points`; empty without one."""
    return read_json(folder / JOBS) if (folder / JOBS).is_file() else {"jobs": {}, "points": []}


def remember(folder: Path, jobs: Mapping[str, str], points: Sequence[Sequence[str]]) -> None:
    """Write the submission."""
    write_json(folder / JOBS, {"jobs": dict(jobs), "points": list(points)})


def status(folder: Path) -> tuple[list[Row], list[Row]]:
    """Return the rows of the chain's jobs, and those of the points.

    Raises:
        ConfigError: The folder holds no sweep.
    """
    chain, there = submitted(folder), begun(folder)
    points = _points(folder, chain, there)
    if not points:
        raise ConfigError(f"{folder} holds no sweep: expected a folder that kd-train -m or kd-slurm pipeline wrote")
    places = [there.get(frozenset(point)) for point in points]
    wrote = [_last_job(place) for place in places]
    planned = [_planned_job(folder, number, chain) for number in range(len(points))]
    known = {*filter(None, [*wrote, *planned]), *chain["jobs"].values()}
    waiting, over = slurm_queue.queued(known), slurm_queue.ended(known)
    jobs = [plan if plan in waiting else last or plan for plan, last in zip(planned, wrote, strict=True)]
    names = [" ".join(name) or "(the only point)" for name in varied(points)]
    rows = [_row(*point, waiting, over) for point in zip(names, places, jobs, strict=True)]
    links = [_chain_row(folder, name, job, waiting, over) for name, job in chain["jobs"].items() if name != "sweep"]
    return links, rows


def _points(folder: Path, chain: dict[str, Any], there: Mapping[frozenset[str], Path]) -> list[list[str]]:
    """Return all points: of `kd-slurm pipeline`, of the last `kd-train -m`, and started ones."""
    points = [*chain["points"], *(recorded(folder / MULTIRUN) if (folder / MULTIRUN).is_file() else [])]
    points += [read_json(place / OVERRIDES)["overrides"] for place in there.values()]
    return list({frozenset(point): point for point in points}.values())


def _last_job(place: Path | None) -> str | None:
    """Return the job that wrote to a point's folder last."""
    links = sorted(place.glob("slurm/*.out"), key=lambda link: link.lstat().st_mtime) if place else []
    return links[-1].stem if links else None


def _planned_job(folder: Path, number: int, chain: dict[str, Any]) -> str | None:
    """Return the job of a point: from the chain, or from submitit's files."""
    if "sweep" in chain["jobs"]:
        return f"{chain['jobs']['sweep']}_{number}" if number < len(chain["points"]) else None
    files = sorted(folder.glob(f"slurm/*{_SUBMITTED}"), key=lambda file: file.stat().st_mtime)
    if not files:
        return None
    array, _, task = files[-1].name.removesuffix(_SUBMITTED).partition("_")
    return f"{array}_{number}" if task else array


def _row(
    name: str, place: Path | None, job: str | None, waiting: Mapping[str, tuple[str, str]], over: Mapping[str, str]
) -> Row:
    link = place / "slurm" / f"{job}.out" if place else None
    log = link.resolve() if link and link.exists() else None
    if place and finished(place):
        record = read_sealed(place / SCORE, "start the same sweep again", required=False)
        return Row(name, "finished", f"{record['metric']} {record['score']:.4f}", job, log)
    if job is not None and job in waiting:
        state, reason = waiting[job]
        if state != "PENDING":
            return Row(name, state.lower(), _stage(place), job, log)
        return Row(name, "requeued" if log else "pending", reason, job, log)
    if place and (place / FAILURE).is_file():
        failure = read_json(place / FAILURE)
        return Row(name, "failed", f"{failure['type']}: {failure['error']}", job, log)
    if job and over.get(job, "COMPLETED") not in ("COMPLETED", "PENDING", "RUNNING"):
        return Row(name, "failed", f"the job ended as {over[job]}", job, log)
    return Row(name, "unfinished" if place else "not started", _stage(place), job, log)


def _chain_row(
    folder: Path, name: str, job: str, waiting: Mapping[str, tuple[str, str]], over: Mapping[str, str]
) -> Row:
    log = folder.resolve() / "slurm" / f"{job}.out"
    if job is not None and job in waiting:
        state, reason = waiting[job]
        return Row(name, state.lower(), reason if state == "PENDING" else "", job, log)
    if over.get(job, "COMPLETED") == "COMPLETED":
        return Row(name, "finished" if job in over else "ended", "", job, log)
    return Row(name, "failed", f"the job ended as {over[job]}", job, log)


def _stage(place: Path | None) -> str:
    """Return a point's unfinished stages, in its own folder or linked from there."""
    if place is None:
        return ""
    begun = sorted({*place.glob("*/settings.json"), *place.glob("seed_*/*/settings.json")})
    at = [file.parent for file in begun if not (file.parent / "stage.json").is_file()]
    return ", ".join(str(stage.relative_to(place)) for stage in at)
