from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from kd_lightning.tasks import Classification
from kd_lightning.training.callbacks import StageProgress


class Module(L.LightningModule):
    """Logs what the bar shows; breaks down at a step if told to."""

    def __init__(self, fail_at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.fail_at, self.error = fail_at, error
        self.task = Classification(2)  # its score is shown

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise self.error("broke down")
        self.log("train/loss", torch.tensor(0.75))
        return self.weight * batch.mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log_dict({"val/loss": torch.tensor(0.5), "val/accuracy": torch.tensor(0.8125)})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(progress: StageProgress, **options: object) -> L.Trainer:
    settings: dict[str, object] = {"max_steps": 12, "max_epochs": -1, "val_check_interval": 4, **options}
    return L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[progress], **settings,  # type: ignore[arg-type]
    )  # fmt: skip


def loader() -> DataLoader[torch.Tensor]:
    return DataLoader(torch.ones(12, 1))  # type: ignore[arg-type]


@pytest.fixture
def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def test_without_a_terminal_one_line_for_each_look_at_validation(plain: Console) -> None:
    make_trainer(StageProgress("baseline, seed 0", plain)).fit(Module(), loader(), loader())
    lines = text(plain).splitlines()
    assert len(lines) == 3  # and none for the sanity check
    for line, step in zip(lines, (4, 8, 12), strict=True):
        assert re.fullmatch(
            rf"baseline, seed 0  step {step}/12  train/loss 0\.750  val/loss 0\.500  val/accuracy 0\.812  \d+ s left",
            line,
        ), line
    assert lines[-1].endswith("  0 s left")


def test_the_time_left_follows_from_the_steps_of_this_process(
    plain: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [100.0]
    monkeypatch.setattr("kd_lightning.training.callbacks.progress.time.monotonic", lambda: now[0])

    class Slow(Module):
        def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
            now[0] += 2.0

    first = make_trainer(StageProgress("s", plain))
    first.fit(Slow(), loader(), loader())
    assert [line.rsplit("  ")[-1] for line in text(plain).splitlines()] == ["16 s left", "8 s left", "0 s left"]
    first.save_checkpoint(tmp_path / "x.ckpt")
    again = make_trainer(StageProgress("s", plain), max_steps=24)
    again.fit(Slow(), loader(), loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    # 4 steps in 8 seconds since it went on, though 16 are done: 8 more need 16 seconds
    assert [line.rsplit("  ")[-1] for line in text(plain).splitlines()[3:]] == ["16 s left", "8 s left", "0 s left"]


def test_validation_outside_of_a_training_prints_nothing(plain: Console) -> None:
    make_trainer(StageProgress("s", plain)).validate(Module(), loader(), verbose=False)
    assert text(plain) == ""


def test_in_a_terminal_a_bar_with_stage_steps_and_scores(terminal: Console) -> None:
    progress = StageProgress("distill, seed 3", terminal)
    make_trainer(progress).fit(Module(), loader(), loader())
    last = text(terminal).strip().splitlines()[-1]
    assert "distill, seed 3" in last
    assert "12/12" in last
    assert "train/loss 0.750  val/loss 0.500  val/accuracy 0.812" in last
    assert "s left" not in text(terminal)  # lines are for where there is no bar
    assert progress._progress is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_terminal_is_given_back_after_an_exception(terminal: Console, error: type[BaseException]) -> None:
    progress = StageProgress("teacher", terminal)
    with pytest.raises((error, SystemExit)):  # Lightning turns Ctrl-C into an exit
        make_trainer(progress).fit(Module(fail_at=5, error=error), loader(), loader())
    assert progress._progress is None
    assert isinstance(terminal.file, io.StringIO)
    assert terminal.file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is visible again
    assert "5/12" in text(terminal)


def test_a_spawned_process_gets_a_copy_without_the_live_bar(terminal: Console) -> None:
    progress = StageProgress("teacher", terminal)
    copy = pickle.loads(pickle.dumps(progress))
    assert copy.stage == "teacher"
    assert isinstance(copy.console, Console)
    make_trainer(copy, max_steps=2).fit(Module(), loader(), loader())
