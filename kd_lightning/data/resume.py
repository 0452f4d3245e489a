"""Goes on with training batches where a checkpoint was made."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from kd_lightning.data.sampler import position
from kd_lightning.runtime.errors import ConfigError


class ResumableData(L.LightningDataModule, ABC):
    """A data module whose checkpoints hold the position in training, and what its batches are made from."""

    _resume: tuple[int, int] | None = None
    """The epoch, and the batches of it that are done, with which the next loader of training batches begins."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position in training as the trainer counts it (workers may have fetched further)."""
        if self.trainer is None:
            return {}
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        epoch, batches = position(self.trainer)
        between = epochs.ready == epochs.processed
        return {**self._order(), "epoch": epoch, "batches": batches, "between_epochs": between}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume training batches at the position of a checkpoint.

        Raises:
            ConfigError: The data or batches differ from the checkpoint's, or Lightning cannot resume from it.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # an evaluation may use other batches
        for name, now in self._order().items():
            if state_dict.get(name) != now:
                given = f"{now!r}, but the checkpoint was trained with {state_dict.get(name)!r}"
                raise ConfigError(f"cannot resume: the data's {name} is {given}; restore it or start a new run")
        if self.trainer is not None and self.trainer.max_steps != -1 and state_dict["between_epochs"]:
            # Lightning 2.6 then counts one batch of the next epoch to the finished one and skips the others.
            message = "cannot resume: the checkpoint is from after an epoch's end, which Lightning gets wrong"
            raise ConfigError(f"{message} with trainer.max_steps; limit by trainer.max_epochs, or save at a step")
        self._resume = (state_dict["epoch"], state_dict["batches"])
        # Lightning looks for the position only in the loader, and warns that there is none.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")

    @abstractmethod
    def _order(self) -> dict[str, Any]:
        """Return what determines the sequence of training batches."""
