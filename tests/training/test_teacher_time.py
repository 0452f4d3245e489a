from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from kd_lightning.teachers.clock import PREDICTING
from kd_lightning.training.callbacks import TeacherTime


def test_a_resumed_training_goes_on_counting() -> None:
    nobody: Any = None
    trainer, module = nobody, L.LightningModule()
    notes: dict[str, Any] = {}
    killed = TeacherTime({}, earlier=2.0)
    killed.on_train_start(trainer, module)
    with PREDICTING.running(torch.device("cpu")):
        pass
    took = killed.seconds - 2.0
    assert took > 0
    resumed = TeacherTime(notes)
    resumed.load_state_dict(killed.state_dict())
    with PREDICTING.running(torch.device("cpu")):
        pass  # for somebody else, before it goes on
    resumed.on_train_start(trainer, module)
    resumed.on_train_end(trainer, module)
    assert notes == {"teacher_seconds": pytest.approx(2.0 + took)}
