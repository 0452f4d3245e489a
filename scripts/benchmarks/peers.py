"""Seconds to distil MiniLM-L6 into two small students on `reviews`: this library against its peers.

The same for all: the teacher's weights (fine-tuned once, for one epoch), SENTENCES training sentences of `reviews`
spread evenly over the split, at most 64 tokens each, EPOCHS epochs of shuffled batches of 32, the student's first
weights, the loss `(1 - alpha) CE + alpha T^2 KL` with T = 2 and alpha = 0.9, torch's fused AdamW at 1e-3 with weight
decay 0.01, a linear schedule with 10% warm-up, gradients clipped at 1, SDPA attention, the process's threads, no
worker processes, no evaluation and no logging. The students are those of `conf/model/transformer.yaml` (2 layers x
128) and `conf/model/bilstm.yaml`. Everything runs on the CPU.

Each contestant trains both students in a fresh process every round, the order of the contestants rotated. Imports,
tokenisation, loading of the networks and making of data sets and trainers are outside the time of all. Inside is
everything from there to the last step: all of the teacher's work and, for ours, the preparation of the teacher (its
conversion to bfloat16) and the building of the cache on disk. As a check that all learn alike, the notes beside the
seconds hold the student's accuracy on the validation split and on the sentences it was trained on.

Ours: `DistillationModule` under `lightning.Trainer`, length-bucketed batches, the teacher in its default precision
(`teacher.precision`: bfloat16 where the hardware multiplies it natively, else float32), the student in float32. What
the precision is worth is seen beside it, with the teacher in float32. The peers, each from its own documentation:

torchdistill 1.1.5: its GLUE example (`examples/hf_transformers/general_language_understanding.py`,
    `configs/sample/glue/sst2/kd/bert_base_uncased_from_bert_large_uncased.yaml`): a distillation box with `KDLoss` on
    the outputs hooked at both classifiers, sentences padded batch by batch by `DataCollatorWithPadding`, a random
    sampler, 0 workers, gradients clipped at 1. Other than there, the targets are handed to the box: without them
    `KDLoss` leaves out the cross-entropy and T^2; and there is no `accelerate.Accelerator`, which has nothing to do
    on one CPU.
TextBrewer 0.2.1.post1: its SST-2 example (`examples/notebook_examples/sst2.ipynb`): every sentence padded to the
    longest allowed, a `datasets.Dataset` in torch format, a random sampler, `GeneralDistiller` (which its
    documentation recommends), a linear schedule with 10% warm-up. The example's matches of hidden states are left
    out, being another loss. Its soft term is a cross-entropy, which differs from the KL by a constant, and without
    T^2, which its weight makes up for. It saves the student at the end, which cannot be turned off.
TextBrewer, caching: the same with `BasicDistiller` and `is_caching_logits=True`, of which the documentation of
    `DistillationConfig` says that it makes distillation faster where data are small or medium: padded batches and
    logits are kept in memory, and every epoch trains on the same batches.
transformers.Trainer: an overridden `compute_loss` as in the documentation
    (`docs/source/en/tasks/knowledge_distillation_for_image_classification.md`), and data as its guide to text
    classification has them (`tasks/sequence_classification.md`): `DataCollatorWithPadding`, batches in random order.
"""

from __future__ import annotations

import hashlib
import importlib
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import Measure, fresh_process, ratios
from kd_lightning.runtime.assets import home, new_folder

SENTENCES, EPOCHS, ROUNDS, BATCH_SIZE = 256, 3, 5, 32
STUDENTS = ("transformer 2x128", "BiLSTM-128")
REQUIREMENTS = Path(__file__).with_name("peers_requirements.txt")

OURS = {
    "ours cached": {"cached": True, "float32": False},
    "ours online": {"cached": False, "float32": False},
    "ours cached, float32": {"cached": True, "float32": True},
    "ours online, float32": {"cached": False, "float32": True},
}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "torchdistill": ("torchdistill", {}),
    "TextBrewer": ("textbrewer", {"caching": False}),
    "TextBrewer, caching": ("textbrewer", {"caching": True}),
    "transformers.Trainer": ("trainer", {}),
}
CONTESTANTS = {name: ("benchmarks.peers_ours:ours", options) for name, options in OURS.items()} | {
    name: (f"benchmarks.peers_libraries:{function}", options) for name, (function, options) in PEERS.items()
}


def run(
    sentences: int = SENTENCES, epochs: int = EPOCHS, rounds: int = ROUNDS, batch_size: int = BATCH_SIZE
) -> list[Measure]:
    """Race all contestants with each student."""
    contestants = dict(CONTESTANTS)
    try:
        sys.path.append(str(install()))  # which every process started from here takes over
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = str(error.stderr or error).strip()[-500:]
        print(f"peers: none of them, since pip could not install {REQUIREMENTS.name}: {reason}")
        contestants = {name: CONTESTANTS[name] for name in OURS}
    teacher = fresh_process("benchmarks.peers_task:train_teacher")["folder"]
    job = {"teacher": teacher, "sentences": sentences, "epochs": epochs, "batch_size": batch_size}
    results = _race(contestants, rounds, job)
    return [measure for student in STUDENTS for measure in _measures(student, results)]


def install(requirements: Path = REQUIREMENTS) -> Path:
    """Return the folder of the peers' packages (torchvision below it, in `vision`), filled by pip the first time.

    Raises:
        subprocess.CalledProcessError: pip could not.
        subprocess.TimeoutExpired: It did not in half an hour.
    """
    folder = home() / "peers" / hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        with new_folder(folder) as temporary:
            command = [*pip, "--require-hashes", "-r", str(requirements), "--target", str(temporary)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
            # Apart, since lightning and transformers import a torchvision that they can see.
            (temporary / "vision").mkdir()
            for path in temporary.glob("torchvision*"):
                path.rename(temporary / "vision" / path.name)
    return folder


def both(contestant: str, **job: Any) -> dict[str, dict[str, float]]:
    """Train both students, one after the other."""
    module, _, name = contestant.partition(":")
    train = getattr(importlib.import_module(module), name)
    return {student: train(student=student, **job) for student in STUDENTS}


def _race(
    contestants: dict[str, tuple[str, dict[str, Any]]], rounds: int, job: dict[str, Any]
) -> dict[str, list[dict[str, dict[str, float]]]]:
    """Return every contestant's results, one a round, by student; a peer that fails is named and left out."""
    results: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in contestants}
    for turn in range(rounds):
        names = list(results)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            function, options = contestants[name]
            try:
                results[name].append(fresh_process("benchmarks.peers:both", contestant=function, **job, **options))
            except RuntimeError as error:  # its own traceback stands above
                if name in OURS:
                    raise
                print(f"peers: {name} is left out: {error}")
                del results[name]
    return results


def _measures(student: str, results: dict[str, list[dict[str, dict[str, float]]]]) -> list[Measure]:
    seconds = {name: [one[student]["seconds"] for one in rounds] for name, rounds in results.items()}
    measures: list[Measure] = []
    for ours in OURS:
        goal = None if "float32" in ours else ">= 3" if "cached" in ours else ">= 1.0"
        measures += [
            Measure(f"{student}: {peer} / {ours}", ratios(seconds[peer], seconds[ours]), "ratio", goal)
            for peer in PEERS
            if peer in seconds
        ]
    for name, rounds in results.items():
        trained, held_out = (
            statistics.median(one[student][key] for one in rounds)
            for key in ("training_accuracy", "validation_accuracy")
        )
        note = f"accuracy: {held_out:.3f} on validation, {trained:.3f} on the sentences trained on"
        measures.append(Measure(f"{student}: {name}", seconds[name], "s", note=note))
    return measures
