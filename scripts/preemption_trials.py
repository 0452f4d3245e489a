"""Send SIGUSR1 to two-rank SLURM jobs at random moments of fast training, and see whether a step is lost.

python scripts/preemption_trials.py                          50 signals over 5 jobs: results/preemption.json
python scripts/preemption_trials.py --signals 4 --jobs 1     a first look; --output elsewhere.json

On the local cluster of scripts/slurm/local_cluster.sh, which is started where it is not running. Every job is
`sbatch scripts/slurm/train.sbatch` with two tasks: a tiny LSTM learns from a tiny teacher in steps of milliseconds,
with dropout, CSV and TensorBoard loggers that write every step, epochs of 11 steps, and checkpoints and looks at
validation every few dozen. It gets its signals one after the other, each once the job is back from the one before, at
optimizer steps drawn with a seed. One more comes in each job while it starts, before anything is trained, and a second
or more after SLURM has started the task: before that there is no process of ours that could hear or block it.

A trial counts as good when the job saved, left within the bound, was put back in the queue exactly once, and both ranks
went on from the step that both had ended with. What proves that nothing was lost is the end of each job: the weights of
both ranks, the selected weights, and the loss that the loggers have of every step are, bit for bit, those of the same
two-rank job without any signal.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "scripts" / "slurm" / "local_cluster.sh"
RANKS = 2
EPOCHS = 40
STEPS = 11 * EPOCHS
LAST = STEPS - 40
"""Later signals might come after the last step, from which there is nothing to go on."""
BOUND = 60.0
"""Seconds from a signal in training to the job's leaving; longer is a hang."""
PATIENCE = 600.0
"""Seconds that a start may take: the wait in the queue and the imports, on a busy machine. A signal waits for these."""


class Trace(Callback):
    """Writes what each rank does, step by step, and its last weights; runs inside the jobs."""

    _file: TextIO | None = None

    def _note(self, trainer: L.Trainer, event: str) -> None:
        assert self._file is not None
        self._file.write(f"{os.environ.get('SLURM_RESTART_COUNT', 0)} {event} {trainer.global_step} {time.time()}\n")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step that a training begins with."""
        self._file = (Path(trainer.default_root_dir) / f"trace-{trainer.global_rank}.txt").open("a", buffering=1)
        self._note(trainer, "begins")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note a step."""
        self._note(trainer, "step")

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the step that a training leaves with, if it had begun."""
        if self._file is not None:
            self._note(trainer, "leaves")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the last weights of this rank, whichever look at validation was best."""
        torch.save(pl_module.state_dict(), Path(trainer.default_root_dir) / f"final-{trainer.global_rank}.pt")


@dataclass
class Trial:
    """One signal and what followed.

    Attributes:
        job: Number of the job.
        start: How often the job had started before: 0 for its first start.
        kind: `training`, or `starting` for a signal before the training of this start.
        aimed_at: The step drawn; None while starting.
        seen_step: The last step that the first rank had written when the signal was sent.
        steps_done: Of each rank, the last step before it left.
        saved_step: The step of the checkpoint that the job left, 0 without any.
        resumed_step: Of each rank, the step it went on from.
        seconds_to_save: From the signal until the last rank, having saved, ended the training.
        seconds_to_leave: From the signal until SLURM said that the job was no longer running.
        requeues: How often SLURM put the job back in the queue because of it.
        said: Processes whose log line says which signal came and where the training is saved.
        clean: It said so, and left without an error in its log.
        hung: It did not leave within the bound.
    """

    job: int
    start: int
    kind: str
    aimed_at: int | None
    seen_step: int | None = None
    steps_done: list[int] = field(default_factory=list)
    saved_step: int | None = None
    resumed_step: list[int] = field(default_factory=list)
    seconds_to_save: float | None = None
    seconds_to_leave: float | None = None
    requeues: int = 0
    said: int = 0
    clean: bool = False
    hung: bool = False

    @property
    def lossless(self) -> bool:
        """Whether every rank went on from exactly the step that every rank had ended with."""
        done = RANKS if self.kind == "training" else 0
        steps = {*self.steps_done, self.saved_step, *self.resumed_step}
        return len(self.steps_done) == done and len(self.resumed_step) == RANKS and len(steps) == 1

    @property
    def good(self) -> bool:
        """Whether all went as it should."""
        return self.clean and not self.hung and self.requeues == 1 and self.lossless


@dataclass
class Event:
    """A line of `Trace`: what a rank did in which start of the job."""

    start: int
    what: str
    step: int
    time: float


class Job:
    """A two-rank training on the cluster.

    Args:
        folder: Where everything is: `toy.csv`, and the folders of the runs.
        name: Of this one's folder there.
        teacher: A finished run.
        more: Overrides besides.
        options: More options of sbatch.
    """

    def __init__(
        self, folder: Path, name: str, teacher: Path, more: Sequence[str] = (), options: Sequence[str] = ()
    ) -> None:
        self.folder, self.log = folder / name, folder / f"{name}.log"
        self.stage = self.folder / "seed_0" / "distill"
        self.read = 0  # characters of the log
        home = folder / f"{name}-home"  # else it would find the outputs of the teacher that another job has kept
        log = [f"--output={self.log}", f"--error={self.log}"]
        command = ["sbatch", "--parsable", f"--ntasks-per-node={RANKS}", "--cpus-per-task=1", *log, *options]
        done = subprocess.run(
            [*command, "scripts/slurm/train.sbatch", *overrides(folder, self.folder, teacher), *more],
            cwd=ROOT, env={**os.environ, "KD_LIGHTNING_HOME": str(home)}, capture_output=True, text=True, check=True,
            timeout=60,
        )  # fmt: skip
        self.id = done.stdout.strip()

    def described(self) -> dict[str, str]:
        """Return what SLURM says of it."""
        for patience in (1, 10, None):
            done = subprocess.run(
                ["scontrol", "show", "job", "-o", self.id], capture_output=True, text=True, timeout=60
            )
            if done.returncode == 0:
                break
            if patience is None:
                raise RuntimeError(f"scontrol fails: {done.stderr.strip()}")
            time.sleep(patience)
        return dict(re.findall(r"(\w+)=(\S+)", done.stdout))

    def events(self, rank: int = 0) -> list[Event]:
        """Return what a rank has written so far."""
        file = self.stage / f"trace-{rank}.txt"
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        parts = [line.split() for line in lines if line.endswith("\n")]
        return [Event(int(start), what, int(step), float(at)) for start, what, step, at in parts]

    def of_start(self, start: int, rank: int = 0) -> list[Event]:
        """Return what a rank has written since the job started for the so-manyeth time."""
        return [event for event in self.events(rank) if event.start == start]

    def wait_for_start(self, start: int) -> None:
        """Wait until it runs (again)."""
        self._until(lambda said: said["JobState"] == "RUNNING" and int(said["Restarts"]) == start, PATIENCE)

    def wait_for_step(self, start: int, step: int) -> int:
        """Wait until the first rank has done a step, or has begun after it; returns where it is."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if (events := self.of_start(start)) and events[-1].step >= step:
                return events[-1].step
            time.sleep(0.005)
        raise TimeoutError(f"{self.folder.name} did not come to step {step}: see {self.log}")

    def saved_step(self) -> int:
        """Return the step that it would go on from."""
        file = self.stage / "checkpoints" / "resume.ckpt"
        return int(torch.load(file, map_location="cpu", weights_only=True)["global_step"]) if file.is_file() else 0

    def signal(self) -> float:
        """Send SIGUSR1 to all tasks, as SLURM does; returns when."""
        now = time.time()
        subprocess.run(["scancel", "--signal=USR1", self.id], check=True, timeout=60)
        return now

    def wait_until_left(self, start: int, seconds: float = BOUND) -> dict[str, str]:
        """Wait until it no longer runs what it ran.

        Raises:
            TimeoutError: It hangs.
        """
        return self._until(lambda said: said["JobState"] != "RUNNING" or int(said["Restarts"]) > start, seconds)

    def wait_until_over(self) -> str:
        """Wait for its end; returns the state."""
        over = self._until(lambda said: said["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), PATIENCE)
        return over["JobState"]

    def _until(self, condition: Any, seconds: float) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while not condition(said := self.described()):
            if said["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                raise RuntimeError(f"{self.folder.name} ended as {said['JobState']}: see {self.log}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder.name} is {said['JobState']} after {seconds} s: see {self.log}")
            time.sleep(0.2)
        return said

    def new_lines(self) -> str:
        """Return what it has logged since the last call."""
        text = self.log.read_text(errors="replace")
        new, self.read = text[self.read :], len(text)
        return new

    def logged_losses(self) -> tuple[list[tuple[int, str]], int]:
        """Return (step, loss) of every row of the CSV files, and how many losses the TensorBoard files have."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        rows = []
        for file in sorted(self.stage.glob("csv/*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1])):
            with file.open(newline="") as text:
                rows += [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(text) if row.get("train/loss")]
        events = 0
        for file in self.stage.glob("tensorboard/*/events.*"):
            found = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
            events += len(found.Scalars("train/loss")) if "train/loss" in found.Tags()["scalars"] else 0
        return rows, events


def overrides(folder: Path, run: Path, teacher: Path) -> list[str]:
    """Return the configuration of a job."""
    return [
        *model(folder), f"teacher.checkpoint={teacher}", f"run_dir={run}", "stages=[distill]", "student.dropout=0.3",
        f"trainer.max_epochs={EPOCHS}", "validations=10", "checkpoint_every_n_steps=25", "data.views=1",
        "trainer.log_every_n_steps=1", "+callbacks.trace={_target_: scripts.preemption_trials.Trace}",
    ]  # fmt: skip


def model(folder: Path) -> list[str]:
    """Return what the teacher's run and the jobs have in common."""
    return [
        "data=text_files", f"data.train_file={folder / 'toy.csv'}", "data.batch_size=16", "optimizer.lr=0.01",
        "model@teacher.network=lstm_teacher", "teacher.network.embedding_size=16", "teacher.network.hidden_size=16",
        "model@student=lstm_student", "student.embedding_size=8", "student.hidden_size=8",
    ]  # fmt: skip


def write_data(file: Path) -> None:
    """Write three kinds of sentences that a word or two, mostly the right ones, tell apart."""
    words = {
        "sport": ["goal", "match", "team"],
        "science": ["atom", "theory", "lab"],
        "food": ["soup", "bread", "cook"],
    }
    draw = random.Random(0)
    with file.open("w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(["text", "label"])
        for number in range(240):
            label = list(words)[number % 3]
            meant = label if draw.random() < 0.8 else draw.choice(list(words))
            filler = draw.choices(["the", "a", "today", "we", "saw", "again", "very"], k=draw.randint(2, 9))
            writer.writerow([" ".join(filler + draw.choices(words[meant], k=2)), label])


def train_teacher(folder: Path) -> Path:
    """Train the teacher here; returns its folder."""
    write_data(folder / "toy.csv")
    settings = [
        *model(folder), f"run_dir={folder / 'teacher'}", "stages=[teacher]", "data.tokenizer=wordpiece:400",
        "teacher.trainer.max_epochs=6", "teacher.trainer.precision=32-true", "teacher.precision=float32",
        "teacher.optimizer.lr=0.02",
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "kd_lightning.cli.train", *settings],
        cwd=ROOT, env={**os.environ, "KD_LIGHTNING_HOME": str(folder / "teacher-home")}, check=True,
        stdout=subprocess.DEVNULL, timeout=600,
    )  # fmt: skip
    return folder / "teacher"


def try_signal(job: Job, trial: Trial, draw: random.Random) -> None:
    """Send one signal at its moment, and note what follows until the job has left."""
    job.wait_for_start(trial.start)
    if trial.aimed_at is None:
        time.sleep(draw.uniform(1.5, 6))  # in its first instants a task has no `env` yet to block signals, and dies
    else:
        trial.seen_step = job.wait_for_step(trial.start, trial.aimed_at)
    job.new_lines()
    sent = job.signal()
    try:
        said = job.wait_until_left(trial.start, PATIENCE if trial.aimed_at is None else BOUND)
    except TimeoutError:
        trial.hung = True
        raise
    trial.seconds_to_leave = time.time() - sent
    trial.requeues = int(said["Restarts"]) - trial.start
    written = [job.of_start(trial.start, rank) for rank in range(RANKS)]
    if trial.aimed_at is None and any(written):  # the imports were faster than the signal
        trial.kind = "training"
    log = job.new_lines()
    trial.saved_step = job.saved_step()
    if trial.kind == "training":
        trial.steps_done = [events[-1].step for events in written if events]
        left = [events[-1].time for events in written if events and events[-1].what == "leaves"]
        trial.seconds_to_save = max(left) - sent if len(left) == RANKS else None
        trial.said = len(re.findall(rf"SIGUSR1 in process \d .* is saved at step {trial.saved_step} in ", log))
    else:
        trial.said = log.count("nothing was being trained")
    ours = [line for line in log.splitlines() if not line.startswith(("srun: ", "slurmstepd"))]
    wrong = re.search(r"Traceback|Error|was not requeued|dumped", "\n".join(ours))
    trial.clean = wrong is None and trial.said >= 1


def interrupted(number: int, job: Job, signals: int, seed: int) -> list[Trial]:
    """Send a job its signals, and wait for its end."""
    draw = random.Random(f"{seed} {number}")
    moments: list[int | None] = list(sorted(draw.sample(range(1, LAST), signals)))
    moments.insert(draw.randrange(signals + 1), None)
    trials = [
        Trial(number, start, "starting" if step is None else "training", step) for start, step in enumerate(moments)
    ]
    try:
        for trial in trials:
            try_signal(job, trial, draw)
            print(f"job {number}: {describe(trial)}", flush=True)
        state = job.wait_until_over()
        print(f"job {number}: {state}", flush=True)
    except (TimeoutError, RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"job {number}: {error}", flush=True)
        subprocess.run(["scancel", job.id], check=False, timeout=60)
    for trial in trials:
        # Not always in the next start, which may have been stopped before it trained.
        begun = [[event for event in job.events(rank) if event.start > trial.start] for rank in range(RANKS)]
        trial.resumed_step = [events[0].step for events in begun if events]
    return trials


def describe(trial: Trial) -> str:
    """Return a line for the screen."""
    where = f"step {trial.saved_step}" if trial.kind == "training" else "starting"
    return f"signal {trial.start + 1} at {where}, left after {trial.seconds_to_leave:.1f} s" + (
        "" if trial.clean and trial.requeues == 1 else "  NOT CLEAN"
    )


def compare(job: Job, whole: Job, trials: list[Trial]) -> dict[str, Any]:
    """Compare a job that was interrupted with one that was not."""
    found = accounting(job)
    rows, events = job.logged_losses()
    return {
        "slurm_job": int(job.id),
        "signals": len(trials),
        "accounting": found,
        "requeued_once_a_signal": found == {"REQUEUED": len(trials), "COMPLETED": 1},
        "last_weights_equal": [equal(job, whole, f"final-{rank}.pt") for rank in range(RANKS)],
        "selected_weights_equal": equal(job, whole, "model.safetensors"),
        "steps_in_csv": len(rows),
        "every_logged_loss_equal": rows == whole.logged_losses()[0] and len(rows) == STEPS,
        "steps_in_tensorboard": events,
        "steps_traced": [
            [event.step for event in job.events(rank) if event.what == "step"] == list(range(1, STEPS + 1))
            for rank in range(RANKS)
        ],
    }


def equal(job: Job, whole: Job, name: str) -> bool:
    """Return whether both left a file of weights, and each tensor is bit for bit the same in both."""
    from safetensors.torch import load_file

    files = [one.stage / name for one in (job, whole)]
    if not all(file.is_file() for file in files):
        return False
    ours, theirs = (
        load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True) for file in files
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def accounting(job: Job) -> dict[str, int]:
    """Return how SLURM's accounting says that each start of a job ended; it hears of the last one a moment later."""
    for _ in range(50):
        done = subprocess.run(
            ["sacct", "-nXPD", "--format=State", f"--jobs={job.id}"], capture_output=True, text=True, check=True,
            timeout=60,
        )  # fmt: skip
        states = dict(Counter(line.split()[0] for line in done.stdout.splitlines()))
        if not {"RUNNING", "PENDING"} & set(states):
            return states
        time.sleep(0.2)
    return states


def whole_is_sound(whole: Job) -> bool:
    """Return whether the uninterrupted job trained every step, its ranks agree, and the weights are not the first."""
    rows, events = whole.logged_losses()
    last = [torch.load(whole.stage / f"final-{rank}.pt", weights_only=True) for rank in range(RANKS)]
    alike = all(torch.equal(last[0][key], last[1][key]) for key in last[0])
    return alike and [step for step, _ in rows] == list(range(STEPS)) and events == STEPS


def counted(trials: list[Trial], jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Count what happened, for signals in training and for those at a start."""
    counts: dict[str, Any] = {}
    for kind in ("training", "starting"):
        own = [trial for trial in trials if trial.kind == kind]
        leave = [trial.seconds_to_leave for trial in own if trial.seconds_to_leave is not None]
        save = [trial.seconds_to_save for trial in own if trial.seconds_to_save is not None]
        counts[kind] = {
            "signals": len(own),
            "good": sum(trial.good for trial in own),
            "clean_exits": sum(trial.clean for trial in own),
            "requeued_exactly_once": sum(trial.requeues == 1 for trial in own),
            "requeued_twice": sum(trial.requeues > 1 for trial in own),
            "resumed_at_the_saved_step": sum(trial.lossless for trial in own),
            "hung": sum(trial.hung for trial in own),
            "seconds_to_leave": spread(leave),
            "seconds_to_save": spread(save),
        }
    counts["jobs"] = {
        "completed": sum(job["accounting"].get("COMPLETED") == 1 for job in jobs),
        "last_weights_equal_on_all_ranks": sum(all(job["last_weights_equal"]) for job in jobs),
        "selected_weights_equal": sum(job["selected_weights_equal"] for job in jobs),
        "every_logged_loss_equal": sum(job["every_logged_loss_equal"] for job in jobs),
        "each_step_trained_once": sum(all(job["steps_traced"]) for job in jobs),
        "requeued_once_a_signal": sum(job["requeued_once_a_signal"] for job in jobs),
    }
    return counts


def spread(values: list[float]) -> dict[str, float] | None:
    """Return median and extremes."""
    if not values:
        return None
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def start_cluster() -> bool:
    """Have a cluster to talk to; returns whether it was this call that started it."""
    home = Path(os.environ.get("KD_SLURM_DIR", "/tmp/kd-slurm"))
    found = (home / "env.sh").is_file()
    done = subprocess.run([CLUSTER, "start"], capture_output=True, text=True, timeout=300)
    if done.returncode:
        sys.exit(f"preemption_trials: no SLURM here: {done.stderr.strip()}")
    os.environ["SLURM_CONF"] = str(home / "etc" / "slurm.conf")
    return not found


def measure(given: argparse.Namespace, folder: Path) -> bool:
    """Run all trials in a folder and write the result; returns whether all was well."""
    from kd_lightning.evaluation.profiling import environment
    from kd_lightning.runtime.files import write_file

    began = time.monotonic()
    teacher = train_teacher(folder)
    whole = Job(folder, "whole", teacher)
    print(f"uninterrupted: {whole.wait_until_over()}, sound: {(sound := whole_is_sound(whole))}", flush=True)
    share = [given.signals // given.jobs + (number < given.signals % given.jobs) for number in range(given.jobs)]

    def run(number: int) -> tuple[list[Trial], dict[str, Any]]:
        job = Job(folder, f"job-{number}", teacher)
        trials = interrupted(number, job, share[number], given.seed)
        return trials, compare(job, whole, trials)

    with ThreadPoolExecutor(given.at_once) as pool:
        done = list(pool.map(run, range(given.jobs)))
    trials, jobs = [trial for own, _ in done for trial in own], [job for _, job in done]
    counts = counted(trials, jobs)
    well = sound and all(trial.good for trial in trials) and set(counts["jobs"].values()) == {given.jobs}
    steps = [event.time for event in whole.events() if event.what == "step"]
    content = {
        "what": str(__doc__).splitlines()[0],
        "command": shlex.join(["python", "scripts/preemption_trials.py", *sys.argv[1:]]),
        "environment": environment(),
        "slurm": subprocess.run(["scontrol", "--version"], capture_output=True, text=True, timeout=60).stdout.strip(),
        "settings": {
            "seed": given.seed, "ranks": RANKS, "steps": STEPS, "jobs_at_once": given.at_once, "hang_bound_s": BOUND,
            "median_step_ms": 1000 * statistics.median(b - a for a, b in itertools.pairwise(steps)),
            "overrides": overrides(Path("FOLDER"), Path("FOLDER/RUN"), Path("FOLDER/teacher")),
        },
        "seconds": time.monotonic() - began,
        "all_well": well,
        "counts": counts,
        "jobs": jobs,
        "trials": [{**asdict(trial), "lossless": trial.lossless, "good": trial.good} for trial in trials],
    }  # fmt: skip
    write_file(given.output, json.dumps(content, indent=1) + "\n")
    print(json.dumps(counts, indent=1))
    return well


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=50, help="during training, over all jobs")
    parser.add_argument("--jobs", type=int, default=5, help="each of which gets its share of them")
    parser.add_argument("--at-once", type=int, default=2, help="jobs side by side; the cluster has room for four")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "preemption.json")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    started, folder = start_cluster(), Path(tempfile.mkdtemp(prefix="kd-preemption-"))
    try:
        well = measure(given, folder)
    finally:
        if started:
            subprocess.run([CLUSTER, "stop"], check=False, timeout=300)
    if not well:
        sys.exit(f"preemption_trials: not all was well, see {given.output} and the logs in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
