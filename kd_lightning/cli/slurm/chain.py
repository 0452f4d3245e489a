"""A sweep as a chain of jobs: teacher, its cache, the points (an array), the report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.cli.slurm.sweep import Sweep, varied
from kd_lightning.config.instantiate import processes, to_dict

_OTHER_NAMES = (
    "_target_", "submitit_folder", "timeout_min", "mem_gb", "tasks_per_node", "name", "signal_delay_s", "setup",
    "max_num_timeout", "array_parallelism", "stderr_to_stdout", "additional_parameters",
)  # fmt: skip
"""Keys of the launcher whose names differ from sbatch's options."""


@dataclass
class Job:
    """A job to be submitted.

    Attributes:
        name: teacher, cache, sweep or report.
        script: The batch script.
        after: Names of the jobs it waits for; empty for the first.
        whatever: Whether it runs even if those fail.
    """

    name: str
    script: str
    after: str | None
    whatever: bool = False

    def dependency(self, ids: Mapping[str, str]) -> list[str]:
        """Return sbatch's options that make it wait, given the ids of the jobs before it."""
        if self.after is None:
            return []
        if self.whatever:
            return [f"--dependency=afterany:{ids[self.after]}"]
        return [f"--dependency=afterok:{ids[self.after]}", "--kill-on-invalid-dep=yes"]


def chain(sweep: Sweep, unfinished: Sequence[int]) -> list[Job]:
    """Describe the jobs that train a sweep's unfinished points and report on all of them.

    Args:
        sweep: The sweep.
        unfinished: Numbers of the points to run, in order.
    """
    launcher, cfg, folder = to_dict(sweep.config.hydra.launcher), sweep.config, sweep.folder
    alone = {**launcher, "nodes": 1, "tasks_per_node": 1, "signal_delay_s": None}  # only trainings handle the signal
    if launcher["gpus_per_node"]:
        alone["gpus_per_node"] = 1
    shared = [f"shared_dir={folder}/shared", f"run_dir={folder}/shared/run"]
    first = sweep.points[0]
    tuned = "teacher" in cfg.stages and cfg.teacher.checkpoint is None and cfg.teacher.ema is None
    commands: list[tuple[str, str, dict[str, Any]]] = []
    if unfinished and tuned:
        command = _python("kd_lightning.cli.train", *first, *shared, "stages=[teacher]", "hydra.mode=RUN")
        commands.append(("teacher", command, launcher))
    if unfinished and _fills_before(cfg):
        commands.append(("cache", _python("kd_lightning.cli.cache", "build", *first, *shared), alone))
    if unfinished:
        commands.append(("sweep", _array_command(sweep), launcher))
    commands.append(("report", _python("kd_lightning.cli.report", str(folder)), {**alone, "gpus_per_node": None}))
    jobs: list[Job] = []
    for name, command, resources in commands:
        points = _cases(sweep, unfinished) if name == "sweep" else ""
        array = ",".join(map(str, unfinished)) if name == "sweep" else None
        text = script(name, command, resources, folder / "slurm", array, points)
        jobs.append(Job(name, text, jobs[-1].name if jobs else None, whatever=name == "report"))
    return jobs


def _fills_before(cfg: Any) -> bool:
    """Return whether one job can fill the cache for all points, which must not need several processes."""
    cache, strategy = str(cfg.teacher.cache), str(cfg.trainer.get("strategy", "auto"))
    kept = "distill" in cfg.stages and cfg.teacher.ema is None and (cache == "auto" or "/" in cache)
    return kept and (processes(to_dict(cfg.trainer)) == 1 or strategy.startswith("ddp"))


def _array_command(sweep: Sweep) -> str:
    common = [override for override in sweep.points[0] if all(override in point for point in sweep.points)]
    return _python("kd_lightning.cli.train", "-m", *sweep.hydra, *common) + ' "${point[@]}"'


def _cases(sweep: Sweep, unfinished: Sequence[int]) -> str:
    """Return shell code that selects the point of an array's task."""
    settings = varied(sweep.points)
    lines = [f"  {number}) point=({shlex.join(settings[number])}) ;;" for number in unfinished]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *lines, "esac\n"])


def _python(module: str, *arguments: str) -> str:
    return shlex.join([sys.executable, "-u", "-m", module, *arguments])


def script(
    name: str, command: str, launcher: Mapping[str, Any], logs: Path, array: str | None = None, prepared: str = ""
) -> str:
    """Return a batch script.

    Args:
        name: The job's name.
        command: The command of each process.
        launcher: The settings of conf/hydra/launcher/slurm.yaml.
        logs: The folder for `JOB.out` and `JOB.err`.
        array: The numbers of an array's tasks, for an array.
        prepared: Lines before the command.
    """
    log = logs / ("%A_%a" if array else "%j")
    options = {
        "job-name": f"{launcher['name']}-{name}",
        "output": f"{log}.out",
        "error": f"{log}.err",
        "open-mode": "append",
        "signal": f"USR2@{launcher['signal_delay_s']}" if launcher["signal_delay_s"] else None,
        "time": launcher["timeout_min"],
        "ntasks-per-node": launcher["tasks_per_node"],
        "mem": f"{launcher['mem_gb']}G" if launcher["mem_gb"] else None,
        "array": f"{array}%{launcher['array_parallelism']}" if array else None,
        **{key.replace("_", "-"): value for key, value in launcher.items() if key not in _OTHER_NAMES},
        **launcher["additional_parameters"],
    }
    header = "\n".join(
        f"#SBATCH --{key}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for key, value in options.items()
        if value is not None
    )
    setup = "".join(f"{line}\n" for line in launcher["setup"] or ())
    srun = "srun --kill-on-bad-exit=1"
    if launcher["cpus_per_task"]:
        srun += f" --cpus-per-task={launcher['cpus_per_task']}"  # since SLURM 22.05 it ignores sbatch's
    if launcher["signal_delay_s"]:
        srun += " env --block-signal=USR2"  # delays early signals until kd-train handles them
    return f"#!/bin/bash\n{header}\n{setup}{prepared}{srun} {command}\n"
