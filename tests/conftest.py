from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from kd_lightning.config.instantiate import conf_dir
from kd_lightning.pipeline.resolvers import register_resolvers

MARKERS = {
    "运动": ["goal", "match", "球赛", "team"],
    "science": ["atom", "theory", "实验", "lab"],
    "food": ["soup", "bread", "好吃", "cook"],
}
FILLER = ["the", "a", "today", "very", "然后", "we", "saw", "it", "again", "and"]


def write_toy_csv(path: Path, rows: int = 240, seed: int = 0) -> Path:
    """Three classes told apart by a word or two, with quoted commas and Chinese text."""
    generator = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(rows):
            label = list(MARKERS)[i % 3]
            words = generator.choices(FILLER, k=generator.randint(2, 9)) + generator.choices(MARKERS[label], k=2)
            generator.shuffle(words)
            writer.writerow([f"{' '.join(words)}, {i}", label])
    return path


@pytest.fixture
def toy_csv(tmp_path: Path) -> Path:
    return write_toy_csv(tmp_path / "toy.csv")


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, so that no test sees what another one, or the user, left."""
    home = tmp_path / "home"
    monkeypatch.setenv("KD_LIGHTNING_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def composed() -> Callable[..., DictConfig]:
    """Compose conf/config.yaml with overrides, as kd-train does."""
    register_resolvers()

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("config", overrides=list(overrides))

    return make


def tiny_overrides(csv_file: Path, run_dir: Path) -> list[str]:
    """An offline run of seconds: the LSTM pair, shrunk, on a toy file with a vocabulary learned from it."""
    return [
        "data=text_files", f"data.train_file={csv_file}", "data.tokenizer=wordpiece:400", "data.batch_size=16",
        "data.views=0",
        "model@teacher.network=lstm_teacher", "teacher.network.embedding_size=16", "teacher.network.hidden_size=16",
        "model@student=lstm_student", "student.embedding_size=8", "student.hidden_size=8",
        "teacher.trainer.max_epochs=6", "teacher.trainer.precision=32-true", "teacher.precision=float32",
        "teacher.optimizer.lr=0.02", "trainer.max_epochs=2", "optimizer.lr=0.01", "teacher.validations=2",
        "validations=2", "teacher.calibrate=false", f"run_dir={run_dir}",
    ]  # fmt: skip
