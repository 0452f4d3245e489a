"""Rows of token-level logits: what a training on kept rows is, and which row predicts which token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss, Term
from kd_lightning.tasks import Classification, Task
from kd_lightning.tasks.rows import next_tokens
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.objective import Objective
from kd_lightning.types import IGNORE, Batch, ModelOutput
from tests.losses.test_step_means import OF_LOGITS
from tests.tasks.toy import Tagger, Tagging

WORDS, CLASSES, LENGTH = 13, 4, 5


def sequences(sizes: list[int]) -> list[Batch]:
    """Batches of tokens, some of which are kept, and most of those have a label."""
    generator = torch.Generator().manual_seed(3)
    found: list[Batch] = []
    for size in sizes:
        ids = torch.randint(WORDS, (size, LENGTH), generator=generator)
        keep = torch.rand(size, LENGTH, generator=generator) < 0.6
        labels = torch.randint(CLASSES, (size, LENGTH), generator=generator)
        labels[torch.rand(size, LENGTH, generator=generator) < 0.2] = IGNORE
        found.append({"input_ids": ids, "labels": labels, "keep": keep, "index": torch.arange(size)})
    return found


def in_line(batch: Batch) -> Batch:
    """The kept tokens, as examples of their own."""
    keep = batch["keep"]
    flat = {name: batch[name][keep] for name in ("input_ids", "labels")}
    return flat | {"index": torch.arange(len(flat["labels"]))}


class Data(L.LightningDataModule):
    """Batches, fetched a step at a time."""

    around: Callable[[Any], Any] | None = None

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Any:
        loader = DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]
        return loader if self.around is None else self.around(loader)

    def val_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


def trained(
    task: Task, term: Term, batches: list[Batch], accumulate: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return weights and scores after two epochs."""
    torch.manual_seed(0)
    student, teacher = Tagger(WORDS, CLASSES), Tagger(WORDS, CLASSES, 8)
    objective = Objective({"term": term, "labels": CrossEntropyLoss()}, {"term": 1.0, "labels": 0.5})
    module = DistillationModule(student, FrozenTeacher(teacher), objective, partial(torch.optim.SGD, lr=0.5), task=task)
    module.connect(batches[0], 1)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", accumulate_grad_batches=accumulate, num_sanity_val_steps=0,
        **dict.fromkeys(off, False),
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(batches))
    scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return student.state_dict(), scores


@pytest.mark.parametrize("make", [make for make in OF_LOGITS if not make().needs_student])
def test_a_training_on_kept_rows_is_one_on_these_rows_as_examples(make: Callable[..., Term]) -> None:
    """Two batches a step, of unlike numbers of kept tokens, are one batch of all these tokens in line."""
    batches = sequences([4, 1, 3, 6])
    steps = [{name: torch.cat([one[name] for one in pair]) for name in pair[0]} for pair in (batches[:2], batches[2:])]
    weights, scores = trained(Tagging(CLASSES), make(), batches, 2)
    expected, alone = trained(Classification(CLASSES), make(), [in_line(step) for step in steps], 1)
    torch.testing.assert_close(weights, expected)
    assert scores == pytest.approx(alone, rel=1e-5)
    assert {"val/loss", "val/accuracy", "val/kl_to_teacher"} <= set(scores)


def test_what_is_not_kept_may_be_no_number() -> None:
    """Neither a loss, nor a gradient, nor a score is NaN for rows that do not count."""
    (batch,) = sequences([6])
    task, keep = Tagging(CLASSES), batch["keep"]
    logits = torch.where(keep.unsqueeze(2), torch.randn(6, LENGTH, CLASSES), torch.nan)
    for scores, against in ((task.scores(), batch["labels"]), (task.fidelity(), logits)):
        scores.update(logits, against, batch)
        assert all(torch.isfinite(value) for value in scores.compute().values())


def test_row_t_predicts_token_t_plus_one() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    rows = next_tokens({"input_ids": ids, "labels": ids})
    assert rows["labels"].tolist() == [[6, 7, 8, IGNORE]]
    assert rows["keep"].tolist() == [[True, True, True, False]]
    assert rows["input_ids"] is ids


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([1, 1, 1, 0, 0], [1, 1, 0, 0, 0]),  # padding on the right
        ([0, 0, 1, 1, 1], [0, 0, 1, 1, 0]),  # on the left: it has read nothing, and predicts no first token
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
        ([1, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ],
)
def test_padding_neither_predicts_nor_is_predicted(mask: list[int], expected: list[int]) -> None:
    end = torch.full((1, 5), 2)  # every token, padding too, is the one that ends a text
    for labels in ({}, {"labels": end}):
        rows = next_tokens({"input_ids": end, "attention_mask": torch.tensor([mask])} | labels)
        assert rows["keep"].int().tolist() == [expected]
    assert rows["attention_mask"].tolist() == [mask]  # losses on hidden states read it


def test_only_some_tokens_are_predicted() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8, 2]]), torch.tensor([[1, 1, 1, 1, 0]])
    prompt = torch.tensor([[False, False, True, True, True]])
    batch = {"input_ids": ids, "labels": ids.masked_fill(~prompt, IGNORE), "attention_mask": mask}
    rows = next_tokens(batch)
    assert rows["keep"].int().tolist() == [[0, 1, 1, 0, 0]]
    given = next_tokens(batch | {"keep": rows["keep"]})  # by these rows a teacher's outputs are stored: not shifted
    assert torch.equal(given["keep"], rows["keep"])


def test_a_shifted_loss_is_that_of_cut_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, (3, 5), generator=generator)
    logits = [torch.randn(3, 5, 7, generator=generator).requires_grad_() for _ in range(2)]
    batch = {"input_ids": ids, "labels": ids}
    outputs = [ModelOutput(z) for z in logits]
    for term in (CrossEntropyLoss(), SoftTargetLoss(2.0)):
        value = term(*outputs, next_tokens(batch))
        cut = [ModelOutput(z[:, :-1].flatten(0, 1)) for z in logits]
        torch.testing.assert_close(value, term(*cut, {"labels": ids[:, 1:].flatten()}))
        (gradient,) = torch.autograd.grad(value, logits[0])
        assert (gradient[:, -1] == 0).all()
        assert (gradient[:, :-1] != 0).any(-1).all()
