"""What small runs come to, by composition: held in golden.json, so that rebuilding the house changes no figure.

python -m tests.end_to_end.golden [NAME]    train all, or those named, and write golden.json anew: only when figures are
                                            to change
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from safetensors.torch import load_file

from kd_lightning.config.instantiate import conf_dir
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.pipeline.run import train_all
from kd_lightning.training.run_folder import read_stage
from kd_lightning.training.stage import VERSION
from tests.conftest import tiny_overrides, write_toy_csv
from tests.end_to_end.test_multi_task import NETWORKS, TASKS
from tests.toy_reviews import write_archive, write_tokenizer

FILE = Path(__file__).with_name("golden.json")
ASSISTANT = "assistants=[{_target_: kd_lightning.models.bilstm.BiLSTM, embedding_size: 12, hidden_size: 12}]"
TRANSFORMER = [f"teacher.network.{size}" for size in ("hidden_size=16", "num_layers=2", "num_heads=2")]
ALL = "stages=[teacher,baseline,distill,finetune]"
VIEWS = ["data.views=1", "data.replace_probability=0", "data.drop_probability=0"]
TOY = {
    "all stages": [
        ALL,
        "seeds=2",
        "student.dropout=0.2",
        *VIEWS,
        "trainer.max_steps=22",
        "finetune.max_epochs=1",
    ],
    "from the teacher": ["model@student=embeddings_from_teacher", "student.network.embedding_size=8"],
    "ensemble": ["teacher.seeds=2", "teacher.weights=learned"],
    "cross-fitted": ["teacher.folds=2", "teacher.calibrate=true"],
    "assistants": [ASSISTANT, "distillation=hint", "seeds=2"],
    "peers": ["distillation=deep_mutual", "peers=['${student}']", "stages=[baseline,distill]"],
    "mean teacher": [
        "teacher.ema=0.9",
        "stages=[distill]",
        *VIEWS,
        "trainer.max_steps=22",
        "student.dropout=0.3",
    ],
    "contrastive": ["distillation=crd", "balance=gradnorm", "trainer.accumulate_grad_batches=2"],
    "one pass ahead": ["teacher.cache=off", "teacher.optimizer.weight_decay=0.1"],
}
"""Overrides of `tiny_overrides`."""
NAMES = (*TOY, "quickstart", "tasks", "regression")


def overrides_of(name: str, folder: Path) -> list[str]:
    """Return a composition's overrides, its run in `folder`/run."""
    if name in TOY:
        small = tiny_overrides(write_toy_csv(folder / "toy.csv", 120), folder / "run")
        more = ["teacher.trainer.max_epochs=3", *TOY[name]]
        kept = [
            one
            for one in small
            if not (name == "from the teacher" and one.startswith("student.")) and "max_epochs=6" not in one
        ]
        return [*kept, *more]
    tokenizer, run = write_tokenizer(folder / "tokenizer"), f"run_dir={folder / 'run'}"
    if name == "tasks":
        readers = [f"data.tasks.{t}.{key}={tokenizer}" for t in TASKS for key in ("tokenizer", "teacher_tokenizer")]
        budgets = [f"{'+' if t == TASKS[0] else ''}tasks.{t}.teacher.trainer.max_steps=8" for t in TASKS]
        return [
            "experiment=multi_task",
            *NETWORKS,
            "trainer.max_steps=8",
            "data.batch_size=32",
            *readers,
            *budgets,
            run,
        ]
    budget = ["trainer.max_steps=8", "teacher.trainer.max_steps=8", "data.batch_size=16", "validations=2"]
    if name == "regression":
        own = [
            "data=reviews",
            "data.labels=rating",
            "data.views=0",
            "distillation=regression",
            f"data.tokenizer={tokenizer}",
        ]
        return [*(one for one in NETWORKS if not one.startswith(("~", "validations"))), *own, *budget, run]
    teacher = ["model@teacher.network=transformer", "~teacher.network.frozen_layers", *TRANSFORMER]
    return [
        "experiment=quickstart",
        *teacher,
        f"data.tokenizer={tokenizer}",
        *budget,
        *VIEWS,
        "student.hidden_size=8",
        "teacher.optimizer.lr=5e-5",
        ALL,
        run,
    ]


def figures(name: str, folder: Path) -> dict[str, Any]:
    """Train a composition in `folder` and return what its stages and its report come to."""
    register_resolvers()
    archive, threads = write_archive(folder / "archive"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            patch.dict(os.environ, {"KD_LIGHTNING_HOME": str(folder / "home")}),
            patch("kd_lightning.data.sources.reviews.fetch", lambda _: archive),
            initialize_config_dir(str(conf_dir()), version_base="1.3"),
        ):
            pipeline = Run(compose("config", overrides_of(name, folder)), Console(file=io.StringIO()))
            train_all(pipeline)
            report = compare(pipeline, "kd-train ...")
    finally:
        torch.set_num_threads(threads)
    stages = {
        str(file.parent.relative_to(folder / "run")): file for file in (folder / "run").rglob("model.safetensors")
    }
    return {
        "stages": {stage: _stage(file) for stage, file in sorted(stages.items())},
        "test": {model: found["test"] for model, found in report["models"].items()},
        "steps": report["settings"]["steps"],
    }


def _stage(file: Path) -> dict[str, Any]:
    record, state = read_stage(file.parent), load_file(file)
    return {
        "weights": hashlib.sha256(file.read_bytes()).hexdigest(),
        "norms": {name: float(f"{float(value.double().norm()):.5g}") for name, value in state.items()},
        "steps": record["steps"], "best_step": record["best_step"], "validation": record["validation"],
    }  # fmt: skip


def machine() -> str:
    """Return what bits depend on: the version of torch, how its kernels compute here, and the kind of CPU."""
    kinds = Path("/proc/cpuinfo")
    lines = kinds.read_text().splitlines() if kinds.exists() else [platform.processor()]
    cpu = [line.partition(":")[2].strip() for line in lines if line.startswith(("cpu family", "model\t"))][:2]
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, CPU {' '.join(cpu)}, one thread"


def main() -> None:
    """Write golden.json."""
    found = json.loads(FILE.read_text())["runs"]
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = figures(name, Path(folder))
        print(name, file=sys.stderr)
    FILE.write_text(json.dumps({"machine": machine(), "version": VERSION, "runs": found}, indent=0) + "\n")


if __name__ == "__main__":
    main()
