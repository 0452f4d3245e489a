"""What every contestant of the `peers` benchmark starts from, and how its student is scored."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.task import CLIP, scheduler
from kd_lightning.config.resolvers import fast_precision
from kd_lightning.data import Reviews
from kd_lightning.data.text.corpus import Corpus
from kd_lightning.models.hf import pretrained
from kd_lightning.runtime.assets import home, new_folder
from kd_lightning.runtime.log_filters import quiet
from kd_lightning.tasks import Classification
from kd_lightning.tasks.evaluation import evaluate, of_network
from kd_lightning.training.distillation import SupervisedModule


class FewReviews(Reviews):
    """The `reviews` data with fewer training sentences, spread evenly over the split (which is sorted by class).

    Args:
        sentences: How many training sentences.
        options: Those of `Reviews`.
    """

    def __init__(self, sentences: int, **options: Any) -> None:
        super().__init__(**options)
        self.sentences = sentences

    def read(self) -> Corpus:
        """Cut the training split."""
        corpus = super().read()
        whole = len(corpus.train)
        return replace(corpus, train=corpus.train.take(i * whole // self.sentences for i in range(self.sentences)))


def few_reviews(sentences: int, batch_size: int) -> FewReviews:
    """Return the data, tokenised (which is outside of every contestant's time)."""
    data = FewReviews(sentences, batch_size=batch_size)
    data.prepare()
    return data.select(pool=False)


def plain_trainer(epochs: int, precision: str = "32-true") -> L.Trainer:
    """Return a trainer that trains and does nothing else."""
    quiet()
    return L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, precision=precision, gradient_clip_val=CLIP, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip


def train_teacher() -> dict[str, str]:
    """Fine-tune MiniLM-L6 for one epoch on the whole training split, unless that has been done, and say where it is."""
    folder = home() / "benchmarks" / "peers_teacher"
    if not folder.exists():
        torch.manual_seed(0)
        network: Any = pretrained("minilm", 2)
        optimizer = partial(torch.optim.AdamW, lr=5e-5, fused=True)
        module = SupervisedModule(network, optimizer, scheduler, task=Classification(2))
        plain_trainer(1, fast_precision()).fit(module, datamodule=Reviews().select(tokens="teacher", pool=False))
        with new_folder(folder) as temporary:
            network.save_pretrained(temporary)
    return {"folder": str(folder)}


def scored(student: nn.Module, data: Reviews, seconds: float) -> dict[str, float]:
    """Return a contestant's result: its time, and that its student has learned what the others' have."""
    loaders = {"validation": data.val_dataloader(), "training": data.train_dataloader()}
    model, task = of_network(student), Classification(2)
    scores = {f"{part}_accuracy": evaluate(task, model, own).scores["accuracy"] for part, own in loaders.items()}
    return {"seconds": seconds, **scores}
