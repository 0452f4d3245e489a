"""A sweep of 12 points, temperature x alpha, against 12 trainings of the same student from labels alone.

Each round starts without any stored output of the teacher, so the teacher's pass is in the sweep's time. Both sides run
in one process, as the points of `kd-train -m` do, without the comparison that follows a run. A point is 5 epochs of 700
sentences.
"""

from __future__ import annotations

import csv
import io
import itertools
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console

from benchmarks.common import Measure, interleave, ratios
from benchmarks.task import save_teacher, silence
from kd_lightning.config.instantiate import conf_dir
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.assets import fetch

TEMPERATURES, ALPHAS = (1, 2, 4), (0.1, 0.5, 0.7, 0.9)
SENTENCES, EPOCHS = 1000, 5


def run() -> list[Measure]:
    """Return the ratio of the seconds."""
    silence()
    register_resolvers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher")
        _write_sentences(folder / "train.csv")
        rounds = itertools.count()

        def sweep() -> None:
            number = next(rounds)
            cold = f"teacher.cache={folder / f'outputs_{number}'}"
            for temperature, alpha in itertools.product(TEMPERATURES, ALPHAS):
                point = [f"temperature={temperature}", f"alpha={alpha}", cold, "stages=[distill]"]
                _train(folder, f"sweep_{number}/{temperature}_{alpha}", point)

        def labels_only() -> None:
            number = next(rounds)
            for seed in range(len(TEMPERATURES) * len(ALPHAS)):
                _train(folder, f"labels_{number}/{seed}", ["stages=[baseline]"])

        seconds = interleave({"sweep": sweep, "labels only": labels_only})
    return [
        Measure("12 points / 12 x labels only", ratios(*seconds.values()), "ratio", "<= 1.15"),
        Measure("the sweep of 12 points", seconds["sweep"], "s"),
    ]


def _write_sentences(path: Path) -> None:
    lines = (fetch("reviews") / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    chosen = [(text, float(mean) > 0) for _, mean, text in rows if float(mean) != 0][::4][:SENTENCES]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((text, int(label)) for text, label in chosen)])


def _train(folder: Path, run: str, overrides: list[str]) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(
            "config",
            [
                "data=text_files", f"data.train_file={folder / 'train.csv'}", f"data.cache_dir={folder / 'tokens'}",
                f"teacher.checkpoint={folder / 'teacher'}", f"run_dir={folder / run}", f"trainer.max_epochs={EPOCHS}",
                "validations=2", *overrides,
            ],
        )  # fmt: skip
    train_all(Run(cfg, Console(file=io.StringIO())))
