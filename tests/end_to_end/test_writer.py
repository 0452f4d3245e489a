"""A language model learns to write a data set's sentences; a student learns from them what the teacher outputs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from kd_lightning.data import TextFiles
from tests.conftest import tiny_overrides, write_toy_csv
from tests.end_to_end.test_lm_experiments import language_model
from tests.forks import command


@pytest.mark.slow
def test_from_a_file_to_a_student_of_generated_sentences(tmp_path: Path) -> None:
    file = write_toy_csv(tmp_path / "my.csv")
    texts = [text for (text,) in TextFiles(str(file)).read().train.texts]
    language_model(tmp_path / "small", 300, texts, positions=128)

    def run(*line: str) -> str:
        home = {"KD_LIGHTNING_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        done = command(*line, cwd=tmp_path, environment=home)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run(
        "kd-train", "experiment=writer", "data@data.of=text_files", f"data.of.train_file={file}",
        "model@student=causal_lm", "student.name=small", "trainer.max_epochs=20", "optimizer.lr=0.02",
        "trainer.precision=32-true", "data.block_size=32", "run_dir=writer",
    )  # fmt: skip
    run("kd-export", "writer/seed_0/baseline", "--format", "huggingface", "--out", "writes")
    more = ["data.generate=80", "data.generator=writes", "stages=[teacher,distill]"]
    said = run("kd-train", *tiny_overrides(file, tmp_path / "run"), *more)
    found = re.search(r"(\d+) generated texts join the transfer set; left out: ", said)
    assert found is not None, said
    assert int(found[1]) > 20
    assert f"168 train, 0 views, {found[1]} transfer, " in said
    assert (tmp_path / "run" / "report.json").is_file()
    shutil.rmtree(tmp_path / "writes")
    shutil.rmtree(tmp_path / "home" / "generated")
    assert "48 examples" in run("kd-eval", "run"), "a finished run needs the model no more"
    run("kd-export", "run", "--format", "safetensors", "--out", "out")
    assert not (tmp_path / "home" / "generated").exists()
