"""A run that stops and goes on trains on exactly the batches of a run that does not stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning.data import TextFiles
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.module import NetworkModule

EPOCH = 11  # batches in one: 84 training examples in eights


class Recorder(L.LightningModule):
    """Notes the examples of each batch it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["index"].tolist())
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.weight)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def fit(
    data: TextFiles,
    ckpt_path: Path | None = None,
    callbacks: list[Any] | None = None,
    module: Callable[[], Recorder] = Recorder,
    **options: Any,
) -> Recorder:
    made = module()
    options = {"max_epochs": 3} | options
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks or ()),
        callbacks=callbacks,
        **options,
    )
    trainer.fit(made, datamodule=data, ckpt_path=ckpt_path)
    return made


@pytest.fixture
def make_data(toy_csv: Callable[..., Path]) -> Callable[..., TextFiles]:
    path = str(toy_csv())

    def make(**options: Any) -> TextFiles:
        return TextFiles(**({"train_file": path, "tokenizer": "wordpiece:200", "batch_size": 8, "seed": 3} | options))

    return make


def saved(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


LIMITS = [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 4 * EPOCH}]


@pytest.mark.parametrize("limit", LIMITS, ids=["epochs", "steps"])
def test_checkpoint_after_a_batch(make_data: Callable[..., TextFiles], tmp_path: Path, limit: dict[str, int]) -> None:
    options = {"limit_val_batches": 0} | limit
    whole = fit(make_data(), callbacks=[saved(tmp_path, every_n_train_steps=1)], **options)
    assert len(whole.seen) == 4 * EPOCH
    for step in (1, 5, EPOCH, EPOCH + 1, 2 * EPOCH, 2 * EPOCH + 5, 3 * EPOCH):
        for workers in (0, 1) if step in (5, EPOCH) else (0,):
            rest = fit(make_data(num_workers=workers), tmp_path / f"step={step}.ckpt", **options)
            assert rest.seen == whole.seen[step:], (step, workers)


@pytest.mark.parametrize("validate", [0, 1.0])
@pytest.mark.parametrize("epoch", [1, 2])
def test_checkpoint_after_an_epoch(
    make_data: Callable[..., TextFiles], tmp_path: Path, epoch: int, validate: float
) -> None:
    options = {"limit_val_batches": validate}
    whole = fit(make_data(), callbacks=[saved(tmp_path, save_on_train_epoch_end=True)], **options)
    rest = fit(make_data(), tmp_path / f"step={epoch * EPOCH}.ckpt", **options)
    assert rest.seen == whole.seen[epoch * EPOCH :]


class Counting(Recorder):
    """Counts epochs as the modules of the package do."""

    def on_train_start(self) -> None:
        NetworkModule.on_train_start(self)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", LIMITS, ids=["epochs", "steps"])
def test_a_run_that_went_on_after_an_epochs_last_batch_can_stop_again(
    make_data: Callable[..., TextFiles], tmp_path: Path, limit: dict[str, int]
) -> None:
    options = {"limit_val_batches": 0, "module": Counting} | limit
    whole = fit(make_data(), callbacks=[saved(tmp_path / "first", every_n_train_steps=1)], **options)
    again = [saved(tmp_path / "second", every_n_train_steps=1)]
    fit(make_data(), tmp_path / "first" / f"step={EPOCH}.ckpt", callbacks=again, **options)
    for then in (1, 5, EPOCH, EPOCH + 2):
        rest = fit(make_data(), tmp_path / "second" / f"step={EPOCH + then}.ckpt", **options)
        assert rest.seen == whole.seen[EPOCH + then :], then


def test_what_lightning_gets_wrong_is_refused(make_data: Callable[..., TextFiles], tmp_path: Path) -> None:
    limit = {"max_epochs": -1, "max_steps": 2 * EPOCH, "limit_val_batches": 0}
    fit(make_data(), callbacks=[saved(tmp_path, save_on_train_epoch_end=True)], **limit)
    with pytest.raises(ConfigError, match=r"after an epoch's end.*trainer.max_epochs"):
        fit(make_data(), tmp_path / f"step={EPOCH}.ckpt", **limit)


@pytest.mark.parametrize("limit", LIMITS, ids=["epochs", "steps"])
@pytest.mark.parametrize("check", [{"val_check_interval": 4, "check_val_every_n_epoch": None}, {}])
def test_checkpoint_at_validation(
    make_data: Callable[..., TextFiles], tmp_path: Path, check: dict[str, Any], limit: dict[str, int]
) -> None:
    whole = fit(make_data(), callbacks=[saved(tmp_path, save_on_train_epoch_end=False)], **check, **limit)
    steps = sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("step=*.ckpt"))
    assert steps == (list(range(4, 4 * EPOCH + 1, 4)) if check else [EPOCH, 2 * EPOCH, 3 * EPOCH, 4 * EPOCH])
    for step in steps[:-1]:
        assert fit(make_data(), tmp_path / f"step={step}.ckpt", **check, **limit).seen == whole.seen[step:], step


def test_accumulated_gradients(make_data: Callable[..., TextFiles], tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    whole = fit(make_data(), callbacks=[saved(tmp_path, every_n_train_steps=1)], **options)
    assert len(whole.seen) == 3 * EPOCH
    for step in (1, 4, 6, 7, 12):
        epoch, inside = divmod(step, 6)  # 11 batches make 6 steps, the last of one batch
        rest = fit(make_data(), tmp_path / f"step={step}.ckpt", **options)
        assert rest.seen == whole.seen[epoch * EPOCH + 2 * inside :], step


def test_stopped_in_mid_epoch_by_an_exception(make_data: Callable[..., TextFiles], tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 2 * EPOCH + 5:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise SystemExit(0)

    whole = fit(make_data(), limit_val_batches=0)
    with pytest.raises(SystemExit):
        fit(make_data(), callbacks=[Stop()], limit_val_batches=0)
    state = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["TextFiles"]
    assert (state["epoch"], state["batches"]) == (2, 5)
    assert fit(make_data(), tmp_path / "stopped.ckpt", limit_val_batches=0).seen == whole.seen[2 * EPOCH + 5 :]


def test_reloaded_every_epoch(make_data: Callable[..., TextFiles]) -> None:
    options = {"limit_val_batches": 0}
    reloaded = fit(make_data(num_workers=1), reload_dataloaders_every_n_epochs=1, **options)
    assert reloaded.seen == fit(make_data(), **options).seen


def test_a_second_fit_starts_from_the_beginning(make_data: Callable[..., TextFiles], tmp_path: Path) -> None:
    whole = fit(make_data(), callbacks=[saved(tmp_path, every_n_train_steps=1)], limit_val_batches=0)
    data = make_data()
    fit(data, tmp_path / "step=15.ckpt", limit_val_batches=0)
    assert fit(data, limit_val_batches=0).seen == whole.seen


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 4}, "global_batch_size is 4, .* 8"),
        ({"seed": 4}, "seed is 4"),
        ({"max_length": 8}, "fingerprint"),
        ({"views": 1}, "fingerprint"),
    ],
)
def test_other_data_are_refused(
    make_data: Callable[..., TextFiles], tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    fit(make_data(), callbacks=[saved(tmp_path, every_n_train_steps=1)], max_epochs=1, limit_val_batches=0)
    with pytest.raises(ConfigError, match=f"cannot resume: the data's {named}"):
        fit(make_data(**change), tmp_path / "step=3.ckpt", limit_val_batches=0)


def test_evaluating_a_checkpoint_may_use_other_batches(make_data: Callable[..., TextFiles], tmp_path: Path) -> None:
    module = fit(make_data(), callbacks=[saved(tmp_path, every_n_train_steps=1)], max_epochs=1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.validate(module, datamodule=make_data(batch_size=2), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    assert trainer.state.finished


def test_order_does_not_touch_the_global_generator(make_data: Callable[..., TextFiles]) -> None:
    data = make_data()
    data.prepare()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for _ in data.train_dataloader():
        pass
    assert torch.equal(before, torch.get_rng_state())
