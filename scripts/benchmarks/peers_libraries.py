"""torchdistill, TextBrewer and `transformers.Trainer` as contestants of the `peers` benchmark.

Each is written from its own documentation and examples for the classification of sentences; `peers` says which. All
are given the teacher as `AutoModelForSequenceClassification.from_pretrained` loads it (float32, SDPA attention, eval
mode), the sentences as a `datasets.Dataset` tokenised beforehand, and a student whose forward takes the labels and
returns loss and logits, as those of `transformers` do. Nothing is evaluated or logged while training.
"""

from __future__ import annotations

import importlib.util
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, get_linear_schedule_with_warmup
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging as transformers_logging

from benchmarks.peers_task import FewReviews, few_reviews, scored
from benchmarks.task import ALPHA, CLIP, LEARNING_RATE, TEMPERATURE, optimizer
from benchmarks.task import student as build_student

WARMUP = 0.1  # share of the steps, as in `kd_lightning.training.optim.warmup_linear`


class WithLoss(nn.Module):
    """A student of ours with the interface of a `transformers` classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Return logits, and with labels the cross-entropy."""
        logits = self.network(input_ids, attention_mask).logits
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Entrant:
    """What one of the three is given, all of it loaded before its time begins."""

    def __init__(self, student: str, teacher: str, sentences: int, batch_size: int) -> None:
        transformers_logging.disable_progress_bar()
        self.data: FewReviews = few_reviews(sentences, batch_size)
        self.teacher = AutoModelForSequenceClassification.from_pretrained(teacher, local_files_only=True)
        network = build_student(student)
        of_transformers = hasattr(network, "config")
        self.student = network if of_transformers else WithLoss(network)
        self.student_head = "classifier" if of_transformers else "network.classifier"
        random.seed(0)
        torch.manual_seed(0)

    def dataset(self, padding: bool) -> Dataset:
        """Return the training sentences, padded to the longest allowed or not at all."""
        examples = self.data.read().train
        options: dict[str, Any] = {"padding": "max_length"} if padding else {}
        encoded = self.data.student_tokenizer(
            [text for (text,) in examples.texts], truncation=True, max_length=self.data.max_length, **options
        )
        return Dataset.from_dict({**encoded, "labels": examples.labels})

    def race(self, train: Callable[[], Any]) -> dict[str, float]:
        """Time the training."""
        started = time.perf_counter()
        train()
        seconds = time.perf_counter() - started
        return scored(self.student, self.data, seconds)


def torchdistill(student: str, teacher: str, sentences: int, epochs: int, batch_size: int) -> dict[str, float]:
    """Train with a `DistillationBox`."""
    entrant = Entrant(student, teacher, sentences, batch_size)
    _import_torchvision()
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.datasets.registry import register_collate_func
    from torchdistill.optim.registry import register_scheduler

    register_collate_func(DataCollatorWithPadding(entrant.data.student_tokenizer), key="DataCollatorWithPadding")
    register_scheduler(get_linear_schedule_with_warmup)
    steps = math.ceil(sentences / batch_size) * epochs
    config = {  # what torchdistill reads from YAML
        "num_epochs": epochs,
        "train_data_loader": {
            "dataset_id": "reviews/train",
            "sampler": {"class_or_func": RandomSampler},
            "collate_fn": "DataCollatorWithPadding",
            "requires_supp": False,
            "kwargs": {"batch_size": batch_size, "num_workers": 0},
        },
        "teacher": {
            "forward_proc": "forward_batch_only_as_kwargs",
            "forward_hook": {"output": ["classifier"]},
            "requires_grad": False,
        },
        "student": {
            "forward_proc": "forward_batch_only_as_kwargs",
            "forward_hook": {"output": [entrant.student_head]},
            "requires_grad": True,
        },
        "optimizer": {"key": "AdamW", "kwargs": dict(optimizer().keywords), "max_grad_norm": CLIP},
        "scheduler": {
            "key": "get_linear_schedule_with_warmup",
            "kwargs": {"num_warmup_steps": round(WARMUP * steps), "num_training_steps": steps},
            "scheduling_step": 1,
        },
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"weight": 1.0, "criterion": {
            "key": "KDLoss",
            "kwargs": {
                "student_module_path": entrant.student_head, "student_module_io": "output",
                "teacher_module_path": "classifier", "teacher_module_io": "output",
                "temperature": TEMPERATURE, "alpha": 1 - ALPHA, "reduction": "batchmean",
            },
        }}}}},
    }  # fmt: skip
    box = get_distillation_box(
        entrant.teacher, entrant.student, {"reviews/train": entrant.dataset(padding=False)}, config,
        torch.device("cpu"), None, False, 1.0,
    )  # fmt: skip

    def train() -> None:
        for epoch in range(box.num_epochs):
            box.pre_epoch_process(epoch=epoch)
            for batch in box.train_data_loader:
                loss = box.forward_process(batch, targets=batch.pop("labels"), supp_dict=None)
                box.post_forward_process(loss=loss)
            box.post_epoch_process()

    return entrant.race(train)


@cache
def _import_torchvision() -> None:
    """Import torchvision, which torchdistill imports and text never uses, beside any build of torch.

    PyPI's torchvision for Linux is built for CUDA. Beside a torch without CUDA its compiled part cannot load, and the
    import stops at the first operator that was to come from there: so those are declared here.
    """
    if sys.platform == "linux" and torch.version.cuda is None:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    spec = importlib.util.find_spec("torchdistill")
    assert spec is not None
    assert spec.origin is not None
    sys.path.append(str(Path(spec.origin).parents[1] / "vision"))
    import torchvision  # noqa: F401


def textbrewer(
    student: str, teacher: str, sentences: int, epochs: int, batch_size: int, caching: bool
) -> dict[str, float]:
    """Train with the recommended `GeneralDistiller`, or let a `BasicDistiller` keep the teacher's logits in memory."""
    entrant = Entrant(student, teacher, sentences, batch_size)
    from textbrewer import BasicDistiller, DistillationConfig, GeneralDistiller, TrainingConfig

    dataset = entrant.dataset(padding=True).with_format("torch")
    loader = DataLoader(dataset, sampler=RandomSampler(dataset), batch_size=batch_size)
    steps = len(loader) * epochs
    distillation = DistillationConfig(
        temperature=TEMPERATURE, kd_loss_weight=ALPHA * TEMPERATURE**2, hard_label_weight=1 - ALPHA,
        is_caching_logits=caching,
    )  # fmt: skip

    def adaptor(batch: dict[str, Tensor], outputs: SequenceClassifierOutput) -> dict[str, Tensor]:
        return {"logits": outputs.logits, "losses": outputs.loss}

    with tempfile.TemporaryDirectory() as folder:
        distiller = (BasicDistiller if caching else GeneralDistiller)(
            train_config=TrainingConfig(output_dir=folder, device="cpu", ckpt_epoch_frequency=epochs),
            distill_config=distillation,
            model_T=entrant.teacher, model_S=entrant.student, adaptor_T=adaptor, adaptor_S=adaptor,
        )  # fmt: skip

        def train() -> None:
            with distiller:
                distiller.train(
                    optimizer()(entrant.student.parameters()), loader, epochs, callback=None, max_grad_norm=CLIP,
                    scheduler_class=get_linear_schedule_with_warmup,
                    scheduler_args={"num_warmup_steps": round(WARMUP * steps), "num_training_steps": steps},
                )  # fmt: skip

        return entrant.race(train)


def trainer(student: str, teacher: str, sentences: int, epochs: int, batch_size: int) -> dict[str, float]:
    """Train with a `transformers.Trainer` whose `compute_loss` asks the teacher."""
    entrant = Entrant(student, teacher, sentences, batch_size)
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class DistillationTrainer(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            outputs = model(**inputs)
            with torch.no_grad():
                teacher_logits = entrant.teacher(**inputs).logits
            soft = nn.functional.kl_div(
                (outputs.logits / TEMPERATURE).log_softmax(-1), (teacher_logits / TEMPERATURE).softmax(-1),
                reduction="batchmean",
            )  # fmt: skip
            loss: Tensor = (1 - ALPHA) * outputs.loss + ALPHA * TEMPERATURE**2 * soft
            return loss

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=batch_size,
            learning_rate=LEARNING_RATE, weight_decay=0.01, max_grad_norm=CLIP, lr_scheduler_type="linear",
            warmup_steps=WARMUP, optim="adamw_torch_fused", eval_strategy="no", save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        run = DistillationTrainer(
            model=entrant.student,
            args=settings,
            train_dataset=entrant.dataset(padding=False),
            data_collator=DataCollatorWithPadding(entrant.data.student_tokenizer),
        )
        run.remove_callback(PrinterCallback)
        return entrant.race(run.train)
