"""A command that is told to stop saves at a step, ends in one line or goes back into the queue, and loses no step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from kd_lightning.data import TextFiles
from kd_lightning.runtime import signals
from kd_lightning.runtime.errors import Interrupted
from kd_lightning.training.callbacks import Preemption
from tests import ROOT, forks
from tests.conftest import tiny_overrides, write_toy_csv

INT, TERM, USR1, USR2 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2


def raised(left: SystemExit) -> None:
    """Raise what would end the process of these tests."""
    raise left


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Handle the signals as a command does that has just begun, outside of any cluster."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in signals.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(signals, "_before", {})
    monkeypatch.setattr(signals, "_received", None)
    monkeypatch.setattr(signals, "_held", False)
    monkeypatch.setattr(signals, "_end", raised)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    signals.watch()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Be in a job, and write a stand-in for scontrol; what it was told is in the file returned."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "41")

    def write(body: str = "") -> Path:
        (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path / "told"}\n{body}\n')
        (tmp_path / "scontrol").chmod(0o755)
        (tmp_path / "told").touch()
        return tmp_path / "told"

    return write


def tell(number: signal.Signals) -> None:
    """Send this process a signal, and give it time to end."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def train(number: signal.Signals | None, error: Exception | None = None) -> None:
    """Do what a command does from a training's begin to its end, or until it is saved: be told something, and stop."""
    with signals.holding():
        if number is not None:
            tell(number)
        if error is not None:
            raise error


def rank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")


@pytest.mark.usefixtures("watched")
def test_while_a_network_trains_a_signal_is_noted_and_the_later_kind_counts() -> None:
    signals.hold()
    noted = []
    for number in (TERM, USR1, TERM, USR2, USR1):
        tell(number)
        noted.append(signals.received())
    assert noted == [TERM, USR1, USR1, USR2, USR2]


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_signal_ends_a_command_wherever_it_comes(number: signal.Signals) -> None:
    code = (
        "import os, signal; from kd_lightning.runtime import signals; signals.watch()\n"
        "class Ends:\n"
        f"    def __del__(self): os.kill(os.getpid(), {int(number)})\n"
        "one = Ends(); del one; print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130 if number == INT else 1, "")
    (line,) = done.stderr.splitlines()
    assert line.endswith("nothing was being trained; run the same command to resume")


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("number", [TERM, USR1, USR2])
def test_without_a_cluster_a_command_ends_in_one_line(number: signal.Signals) -> None:
    with pytest.raises(SystemExit) as ended:
        tell(number)
    assert ended.value.code == f"kd-train: {number.name}: nothing was being trained; run the same command to resume"


@pytest.mark.usefixtures("watched")
def test_ctrl_c_ends_a_command_in_one_line_after_the_step(
    scontrol: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    told = scontrol("")  # in a job, too, somebody wants it to end
    with pytest.raises(SystemExit) as ended:
        train(INT, Interrupted("distill is saved at step 5"))
    assert ended.value.code == 130
    line = capsys.readouterr().err.splitlines()[-1]  # the first one, to the terminal itself, says that it waits
    assert line == "kd-train: interrupted: distill is saved at step 5; run the same command to resume"
    signals._received = None
    with pytest.raises(SystemExit) as ended:
        tell(INT)
    assert ended.value.code == 130
    assert told.read_text() == ""


def test_a_second_ctrl_c_ends_a_training_at_once() -> None:
    program = (
        "import os, signal, time; from kd_lightning.runtime import signals; signals.watch(); signals.hold();"
        "os.kill(os.getpid(), signal.SIGINT); print('goes on', flush=True);"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(1); print('still there')"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -INT
    assert ended.stdout == "goes on\n"
    assert ended.stderr == "kd-train: saving at the end of this step; another Ctrl-C ends it at once\n"


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("number", [INT, TERM])
def test_lightning_handles_no_signal_of_a_command(
    number: signal.Signals, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a SIGTERM between its handler and the first step would end the training as if it were finished."""
    load = TextFiles.train_dataloader

    def told(self: TextFiles) -> Any:  # Lightning asks for it then
        if signals.received() is None:
            os.kill(os.getpid(), number)
        return load(self)

    handlers = signal.getsignal(TERM), signal.getsignal(INT)
    signals.hold()
    monkeypatch.setattr(TextFiles, "train_dataloader", told)
    learner = fit(write_toy_csv(tmp_path / "toy.csv", rows=60), tmp_path / "run", 1)
    assert signals.received() is number
    assert len(learner.seen) == 1
    assert not learner.trainer.received_sigterm
    assert (signal.getsignal(TERM), signal.getsignal(INT)) == handlers


@pytest.mark.usefixtures("watched")
def test_what_ends_before_the_next_step_ends_as_it_would_have() -> None:
    with pytest.raises(ValueError, match="a mistake"):
        train(None, ValueError("a mistake"))
    train(None)
    with pytest.raises(SystemExit, match="the stage is finished; run the same command to resume"):
        train(USR1)
    with pytest.raises(ValueError, match="a mistake"):
        train(USR1, ValueError("a mistake"))


def test_a_signal_from_before_it_was_handled_is_heard(watched: None) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [USR1])  # as `env --block-signal` does for the first seconds
    signal.pthread_kill(threading.get_ident(), USR1)  # to this thread: others, which torch started, do not block it
    assert signals.received() is None
    with pytest.raises(SystemExit, match="SIGUSR1: nothing was being trained"):
        signals.watch()


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
    ("array", "job"), [({}, "41"), ({"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}, "40_3")]
)
def test_in_a_job_the_first_process_puts_it_back_once(
    array: dict[str, str],
    job: str,
    scontrol: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = scontrol("")
    for name, value in array.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        train(USR1, Interrupted("distill is saved at step 5"))
    assert ended.value.code == 0
    tell(USR2)  # more of them change nothing
    assert told.read_text() == f"requeue {job}\n"
    assert capsys.readouterr().out.splitlines() == [
        f"kd-train: SIGUSR1 in process 0 of job {job}: distill is saved at step 5",
        f"kd-train: job {job} is requeued",
    ]


@pytest.mark.usefixtures("watched")
def test_a_job_that_is_not_put_back_says_why(scontrol: Callable[[str], Path]) -> None:
    scontrol("echo 'slurm_requeue error: Requested operation is presently disabled' >&2; exit 1")
    with pytest.raises(SystemExit) as ended:
        train(USR1, Interrupted("saved"))
    assert ended.value.code == (
        "kd-train: job 41 was not requeued (slurm_requeue error: Requested operation is presently "
        "disabled): submit it again to resume"
    )


@pytest.mark.usefixtures("watched")
def test_a_job_whose_controller_does_not_react_says_so(
    scontrol: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol("exec sleep 60")
    monkeypatch.setattr("kd_lightning.runtime.slurm_queue.PATIENCE", 0.2)
    with pytest.raises(
        SystemExit, match=r"job 41 was not requeued .*scontrol did not finish within 0\.2 s.*submit it again"
    ):
        train(USR1, Interrupted("saved"))


@pytest.mark.usefixtures("watched")
def test_a_requeue_that_ends_its_own_scontrol_is_none_that_failed(scontrol: Callable[[str], Path]) -> None:
    scontrol("kill -TERM $$")
    with pytest.raises(SystemExit) as ended:
        train(USR1, Interrupted("saved"))
    assert ended.value.code == 0


@pytest.mark.usefixtures("watched")
def test_the_other_processes_leave_the_queue_to_the_first(
    scontrol: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = scontrol("")
    rank_one(monkeypatch)
    tell(USR1)  # goes on, until the first process ends the job
    assert signal.getsignal(TERM) is signal.SIG_DFL
    signals.watch()
    train(USR1)  # in its last step
    assert signal.getsignal(TERM) is signal.SIG_DFL
    with pytest.raises(SystemExit) as ended:
        train(None, Interrupted("saved"))
    assert ended.value.code == 0
    assert told.read_text() == ""


@pytest.mark.usefixtures("watched")
def test_after_sigterm_slurm_decides_whether_a_job_goes_on(
    scontrol: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = scontrol("")
    tell(TERM)  # outside of a training there is nothing to save

    def waited() -> None:
        raise TimeoutError

    monkeypatch.setattr(signal, "pause", waited)
    with pytest.raises(TimeoutError):
        train(None, Interrupted("saved"))
    assert signal.getsignal(TERM) is signal.SIG_DFL
    assert told.read_text() == ""


class Again:
    """What submitit runs, and can start again."""

    def __call__(self) -> None: ...

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_under_submitit_submitit_puts_the_job_back_and_we_do_not(
    training: bool,
    rank: int,
    watched: None,
    tmp_path: Path,
    scontrol: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    from submitit.core.utils import JobPaths
    from submitit.helpers import DelayedSubmission
    from submitit.slurm.slurm import SlurmJobEnvironment

    told, delayed = scontrol(""), DelayedSubmission(Again())
    delayed.set_timeout(60, 3)
    if rank:
        rank_one(monkeypatch)
    paths = JobPaths(tmp_path, job_id="41", task_id=rank)
    SlurmJobEnvironment()._handle_signals(paths, delayed)  # before kd-train begins
    monkeypatch.setattr(signals, "_before", {})
    signals.watch()

    tell(TERM)  # SLURM sends it along with the other one
    assert signals.received() is None
    ended: SystemExit | None = None
    try:
        if training:
            with signals.holding():
                tell(USR2)
                assert told.read_text() == "", "not before the training is saved"
                raise Interrupted("saved")
        tell(USR2)
    except SystemExit as error:
        ended = error
    assert told.read_text() == ("" if rank else "requeue 41\n")
    assert paths.submitted_pickle.is_file() == (rank == 0), "submitit's own record of what is to go on"
    assert (ended is None) == (rank == 1 and not training)
    assert "requeued" not in capsys.readouterr().out


def test_a_signal_during_the_exchange_waits_for_the_next(
    watched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else this process would save, and wait for another one that trains on."""
    trainer: Any = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(root_device="cpu"), global_step=1, max_steps=9
    )
    callback = Preemption(tmp_path / "resume.ckpt", 1000, "distill")
    said: list[int] = []

    def exchange(tensor: torch.Tensor, _: Any) -> None:
        said.append(int(tensor))
        os.kill(os.getpid(), USR1)

    monkeypatch.setattr("torch.distributed.all_reduce", exchange)
    signals.hold()
    assert not callback.is_due(trainer)
    assert callback.is_due(trainer)
    assert said == [0, 1 + signals.SIGNALS.index(USR1)]


def test_what_another_process_heard_counts_here(watched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(root_device="cpu"), global_step=1, max_steps=9
    )
    callback = Preemption(tmp_path / "resume.ckpt", 1000, "distill")
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, _: tensor.fill_(1 + signals.SIGNALS.index(USR1)))
    assert callback.is_due(trainer)
    assert signals.received() is USR1


class Learner(L.LightningModule):
    """Notes what it is trained on, and the steps at which it is looked at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        self.seen: list[list[int]] = []
        self.looks: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["index"].tolist())
        loss: torch.Tensor = self.layers(batch["index"].float().unsqueeze(1).expand(-1, 4) / 100).square().mean()
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            self.looks.append(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Tell(L.Callback):
    """Sends this process a signal after so many steps, or during the look at validation that follows."""

    def __init__(self, step: int, looking: bool) -> None:
        self.step, self.looking = step, looking

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.looking and trainer.global_step == self.step and signals.received() is None:
            os.kill(os.getpid(), USR1)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.looking and trainer.global_step == self.step:
            os.kill(os.getpid(), USR1)


def fit(file: Path, folder: Path, accumulate: int, *callbacks: L.Callback, resume: Path | None = None) -> Learner:
    data = TextFiles(train_file=str(file), tokenizer="wordpiece:200", batch_size=8, seed=3)
    module = Learner()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=-1,
        max_steps=36, val_check_interval=9 * accumulate, check_val_every_n_epoch=None, enable_checkpointing=True,
        num_sanity_val_steps=0, accumulate_grad_batches=accumulate, default_root_dir=folder,
        callbacks=[Preemption(folder / "resume.ckpt", 1000, "distill"), *callbacks],
    )  # fmt: skip
    with suppress(Interrupted):
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize(
    ("step", "accumulate", "looking", "stops"),
    [
        (0, 1, False, 1),
        (8, 1, False, 9),  # the step after which validation is looked at
        (9, 1, True, 10),  # during that look
        (20, 1, False, 21),  # the last step of an epoch of 21 batches
        (5, 2, False, 6),  # a step of two batches
        (35, 1, False, None),  # in the last step, after which there is nothing to go on with
    ],
)
def test_one_process_goes_on_with_the_next_step(
    step: int, accumulate: int, looking: bool, stops: int | None, watched: None, own_home: Path, tmp_path: Path
) -> None:
    file = write_toy_csv(tmp_path / "toy.csv", rows=240)
    whole = fit(file, tmp_path / "whole", accumulate)
    assert len(whole.looks) >= 3
    signals.hold()
    first = fit(file, tmp_path / "two", accumulate, Tell(step, looking))
    assert signals.received() is USR1
    file_to_resume = tmp_path / "two" / "resume.ckpt"
    if stops is None:
        assert first.seen == whole.seen
        assert not file_to_resume.exists()
        return
    assert first.seen == whole.seen[: stops * accumulate], "one step more, and no batch after it"
    signals._received = None
    second = fit(file, tmp_path / "two", accumulate, resume=file_to_resume)
    assert first.seen + second.seen == whole.seen
    assert first.looks + second.looks == whole.looks, "no look is left out or made twice"
    for name, weight in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight), name


def kd_train(folder: Path, home: str, *overrides: str, signals: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"KD_LIGHTNING_HOME": str(folder / home), "OMP_NUM_THREADS": "1"}
    environment |= {"SIGNALS_AT": signals} if signals else {}
    if "trainer=ddp" not in overrides:
        return forks.command("kd-train", *overrides, cwd=folder, environment=environment)
    return subprocess.run(
        [sys.executable, "-m", "kd_lightning.cli.train", *overrides],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def goes_on_to_the_same_weights(folder: Path, signals: str, *more: str) -> str:
    """Compare a run that is told to stop with one that is not; returns the line in which the former ended."""
    csv_file = write_toy_csv(folder / "toy.csv")
    whole, stopped = (
        [
            *tiny_overrides(csv_file, folder / name), "trainer.max_epochs=3", "data.views=1", "student.dropout=0.3",
            "stages=[teacher,distill]", "+callbacks.signals={_target_: tests.signals.SignalAt, stage: distill}",
            "+callbacks.final={_target_: tests.final_weights.FinalWeights}", *more,
        ]
        for name in ("whole", "stopped")
    )  # fmt: skip
    done = kd_train(folder, "home", *whole)
    assert done.returncode == 0, done.stderr
    home = "home of the stopped"  # else it would read the outputs that the other run has kept
    ended = kd_train(folder, home, *stopped, signals=signals)
    assert ended.returncode == 1
    places = [folder / name / "seed_0" / "distill" for name in ("whole", "stopped")]
    assert (places[1] / "checkpoints" / "resume.ckpt").is_file()
    assert not (places[1] / "stage.json").exists()
    done = kd_train(folder, home, *stopped)
    assert done.returncode == 0, done.stderr
    assert "teacher  finished before" in done.stdout

    finals = sorted(file.name for file in places[0].glob("final-*.pt"))
    assert finals == ([f"final-{rank}.pt" for rank in range(2)] if "trainer=ddp" in more else ["final-0.pt"])
    for file in finals:
        expected, found = (torch.load(place / file, weights_only=True) for place in places)
        assert found["step"] == expected["step"]
        for name, weight in expected["weights"].items():
            assert torch.equal(found["weights"][name], weight), (file, name)
    selected = [load_file(place / "model.safetensors") for place in places]
    assert all(torch.equal(selected[1][name], weight) for name, weight in selected[0].items())
    records = [json.loads((place / "stage.json").read_text()) for place in places]
    assert records[0]["best_step"] == records[1]["best_step"]
    assert records[0]["validation"] == records[1]["validation"]
    return ended.stderr.strip().splitlines()[-1] if "Traceback" not in ended.stderr else ended.stderr


def test_a_command_ends_in_one_line_and_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    said = goes_on_to_the_same_weights(tmp_path, "SIGTERM:13:own")  # in the epoch that fills the teacher's cache
    place = tmp_path / "stopped" / "seed_0" / "distill" / "checkpoints" / "resume.ckpt"
    assert said == f"kd-train: SIGTERM: distill, seed 0 is saved at step 14 in {place}; run the same command to resume"


@pytest.mark.slow
def test_spawned_processes_hear_what_the_command_hears(tmp_path: Path) -> None:
    said = goes_on_to_the_same_weights(tmp_path, "SIGTERM:13:parent", "trainer=ddp")
    assert said == "kd-train: SIGTERM: the training's processes have stopped; run the same command to resume"
