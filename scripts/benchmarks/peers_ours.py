"""This library as a contestant of the `peers` benchmark, used as a script of a user's would."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.peers_task import FewReviews, few_reviews, plain_trainer, scored
from benchmarks.task import objective, optimizer, scheduler
from benchmarks.task import student as build_student
from kd_lightning.config.resolvers import fast_inference
from kd_lightning.models.hf import finished
from kd_lightning.runtime.fingerprints import digest, network_digest
from kd_lightning.tasks import Classification
from kd_lightning.teachers import CachedTeacher, FrozenTeacher, Teacher
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.training.distillation import DistillationModule


def our_cached_teacher(teacher: FrozenTeacher, data: FewReviews, folder: Path) -> Teacher:
    """Keep on disk what the teacher outputs while the first epoch trains, as `teacher.cache=auto` does."""
    key = {"teacher": network_digest(teacher), "data": digest([data.fingerprint, data.sentences])}
    return CachedTeacher(TeacherCache.create(folder / "cache", key, data.sizes["train"]), teacher)


def ours(
    student: str, teacher: str, sentences: int, epochs: int, batch_size: int, cached: bool, float32: bool
) -> dict[str, float]:
    """Train with length-bucketed batches; the teacher predicts in its default precision unless `float32`."""
    data = few_reviews(sentences, batch_size)
    network, small = finished(teacher, 2), build_student(student)
    trainer = plain_trainer(epochs)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        asked: Teacher = FrozenTeacher(network, "float32" if float32 else fast_inference())
        if cached:
            asked = our_cached_teacher(asked, data, Path(folder))
        module = DistillationModule(small, asked, objective(), optimizer(), scheduler, task=Classification(2))
        trainer.fit(module, datamodule=data)
        seconds = time.perf_counter() - started
    return scored(small, data, seconds)
