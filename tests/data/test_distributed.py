"""Two real processes: Lightning must leave the sampler alone, and the ranks must share each step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kd_lightning.data import TextFiles

PROGRAM = """
import json, sys
import lightning as L, torch
from kd_lightning.data import TextFiles

class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch["index"].tolist())
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch["index"].tolist())

    def on_train_end(self):
        with open(f"{sys.argv[2]}/{self.global_rank}.json", "w") as file:
            json.dump(self.seen, file)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    data = TextFiles(sys.argv[1], tokenizer="wordpiece:200", batch_size=4, eval_batch_size=4, seed=3)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=1, num_sanity_val_steps=0, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )
    trainer.fit(Recorder(), datamodule=data)
"""


@pytest.mark.slow
def test_two_processes_train_on_what_one_would(toy_csv: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(toy_csv()), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    one = TextFiles(str(toy_csv()), tokenizer="wordpiece:200", batch_size=8, seed=3)
    whole = [batch["index"].tolist() for batch in one.train_dataloader()]
    assert [sorted(a + b) for a, b in zip(ranks[0]["train"], ranks[1]["train"], strict=True)] == list(
        map(sorted, whole)
    )
    assert len(ranks[0]["val"]) == len(ranks[1]["val"])
    seen = np.concatenate([np.concatenate(rank["val"]) for rank in ranks])
    assert sorted(seen) == list(range(84, 96))
