"""The whole run on images, offline and small: teacher, baseline, distilled student, report, and the commands after."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from kd_lightning.cli.evaluate import main as evaluate
from kd_lightning.cli.predict import main as predict
from kd_lightning.data import FashionMNIST
from kd_lightning.models.adapt import run_network
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.fingerprints import read_json
from kd_lightning.training.run_folder import load_run
from tests.conftest import tiny_overrides
from tests.data.images import striped, write_fashion, write_folder

Composed = Callable[..., DictConfig]
NETWORKS = [
    "model@teacher.network=resnet", "teacher.network.depth=8", "teacher.network.width=0.5",
    "model@student=cnn", "student.widths=[8,16]",
]  # fmt: skip
GREY = ["++teacher.network.channels=1", "++student.channels=1"]
BUDGET = [
    "data.batch_size=32", "trainer.precision=32-true", "teacher.calibrate=false", "teacher.trainer.max_epochs=12",
    "teacher.trainer.precision=32-true",
    "teacher.precision=float32", "teacher.optimizer.lr=0.01", "teacher.validations=2", "trainer.max_epochs=12",
    "optimizer.lr=0.01", "validations=2", "checkpoint_every_n_steps=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_fashion(tmp_path_factory.mktemp("pictures") / "fashion", train=300, test=60)


def small(pictures: Path, folder: Path) -> list[str]:
    data = ["data=fashion_mnist", f"data.folder={pictures}", "data.views=1"]
    return [*data, *NETWORKS, *GREY, *BUDGET, f"run_dir={folder}"]


@pytest.fixture
def overrides(pictures: Path, tmp_path: Path, own_home: Path) -> list[str]:
    return small(pictures, tmp_path / "run")


Ran = tuple[Run, dict[str, Any], str]


@pytest.fixture(scope="module")
def trained(pictures: Path, composed: Composed) -> Ran:
    """A finished run with all stages. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_LIGHTNING_HOME", str(pictures.parent / "home"))
        overrides = small(pictures, pictures.parent / "run")
        return run(composed(*overrides, "stages=[teacher,baseline,distill,finetune]"))


def run(cfg: DictConfig) -> Ran:
    output = StringIO()
    pipeline = Run(cfg, Console(file=output, width=120))
    train_all(pipeline)
    report = compare(pipeline, "kd-train ...")
    return pipeline, report, output.getvalue()


def test_every_stage_and_the_commands_on_a_finished_run(
    trained: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, report, output = trained
    models = report["models"]
    assert set(models) == {"teacher", "baseline", "distilled", "finetuned"}
    assert models["teacher"]["test"]["accuracy"]["mean"] > 0.9  # the stripes are easy
    assert models["distilled"]["test"]["accuracy"]["mean"] > 0.5
    assert report["data"]["splits"] == {"train": 270, "views": 270, "transfer": 0, "validation": 30, "test": 60}
    assert report["data"]["chance_score"] == pytest.approx(0.1)
    [part] = report["details"]["parts"]
    assert sum(part["models"]["teacher"]["labels"]) == 60
    picture = Image.open(io.BytesIO(base64.b64decode(part["apart"][0]["png"])))
    assert (picture.format, picture.size, picture.mode) == ("PNG", (28, 28), "L")
    assert "teacher  predicted 90 examples" in output, "the rest of its outputs were kept while the first epoch trained"

    folder = pipeline.folder
    model = load_run(folder / "seed_0" / "distill")
    assert (model.tokenizer, model.max_length, model.texts) == (None, None, None)
    assert model.images == pipeline.data.image_format
    assert (model.images.size, model.images.channels) == (28, 1)
    assert not (folder / "teacher" / "tokenizer").exists()
    pixels, labels = striped(60, seed=1)  # the test split
    for number, image in enumerate(pixels[:20]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    files = [str(tmp_path / f"{number}.png") for number in range(20)]
    predict([str(folder / "teacher"), *files, "--json"])
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in said] == files
    right = [row["label"] == model.class_names[label] for row, label in zip(said, labels[:20], strict=True)]
    assert sum(right) >= 18
    test = next(iter(pipeline.data.test_dataloader()))
    expected = run_network(load_run(folder / "teacher").network, test).logits.softmax(1)[:20]
    found = torch.tensor([list(row["probabilities"].values()) for row in said])
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)
    monkeypatch.setenv("COLUMNS", "200")
    predict([str(folder / "teacher"), files[3]])
    head, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["image", "label", "p"]
    assert row == [files[3], "Dress", f"{said[3]['probabilities']['Dress']:.3f}"]

    evaluate([str(folder / "teacher"), "--json"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["accuracy"] == pytest.approx(models["teacher"]["test"]["accuracy"]["mean"])
    with pytest.raises(SystemExit, match=r"kd-predict: .*nothing\.png cannot be read as an image"):
        predict([str(folder), str(tmp_path / "nothing.png")])
    (tmp_path / "labelled.csv").write_text("text,label\nfine,Bag\n")
    with pytest.raises(SystemExit, match=r"kd-eval: the model in .* has no tokenizer: it does not read text"):
        evaluate([str(folder), "--file", str(tmp_path / "labelled.csv")])


def test_mixed_views_are_trained_on_by_students_of_a_teacher_alone(composed: Composed, overrides: list[str]) -> None:
    brief = ["data.mixup_probability=0.5", "trainer.max_epochs=1", "teacher.trainer.max_epochs=1"]
    pipeline, report, _ = run(composed(*overrides, *brief, "stages=[teacher,baseline,distill]"))
    assert report["data"]["splits"]["views"] == 270
    for folder in ("teacher", "seed_0/baseline", "seed_0/distill"):
        assert read_json(pipeline.folder / folder / "stage.json")["steps"] == 9, "an epoch is of the labelled images"


def test_online_and_cached_teacher_train_the_same_student(
    composed: Composed, overrides: list[str], trained: Ran, tmp_path: Path
) -> None:
    more = ["stages=[distill]", f"teacher.checkpoint={trained[0].folder}"]
    more += ["trainer.max_epochs=2", "teacher.cache_views=2"]
    moved = [o for o in overrides if not o.startswith("run_dir")]
    run(composed(*overrides, *more))
    run(composed(*moved, *more, f"run_dir={tmp_path / 'online'}", "teacher.cache=off"))
    cached, online = (load_file(tmp_path / name / "seed_0/distill/model.safetensors") for name in ("run", "online"))
    for name, tensor in cached.items():
        torch.testing.assert_close(online[name], tensor, rtol=1e-3, atol=1e-4)


def test_fresh_views_go_with_a_running_teacher_only(composed: Composed, overrides: list[str]) -> None:
    short = ["data.view_sets=null", "trainer.max_steps=4", "teacher.trainer.max_steps=4"]
    with pytest.raises(ConfigError, match=r"data\.view_sets=null makes new inputs in every epoch"):
        run(composed(*overrides, *short))
    _, report, _ = run(composed(*overrides, *short, "teacher.cache=off"))
    assert report["data"]["splits"]["views"] == 0


def test_a_finished_teacher_of_all_pictures_serves_a_student_of_few(
    composed: Composed, overrides: list[str], trained: Ran, tmp_path: Path
) -> None:
    chosen = [o for o in overrides if not o.startswith("run_dir")]
    taken = [*chosen, f"teacher.checkpoint={trained[0].folder}", "stages=[baseline,distill]", "trainer.max_steps=6"]
    _, report, output = run(composed(*taken, f"run_dir={tmp_path / 'next'}", "data.train_examples=50", "seeds=2"))
    assert report["data"]["splits"]["train"] == 50
    assert report["models"]["teacher"]["test"]["accuracy"]["mean"] > 0.9
    assert "teacher  predicted 190 examples" in output, "50 pictures, a view of each, 30 and 60 to look at"
    with pytest.raises(KDError, match=r"reads ImageFormat.*mean=\[0\.286\].*the data give it .*mean=\[0\.5\]"):
        run(composed(*taken, f"run_dir={tmp_path / 'other'}", "data.mean=[0.5]"))


def test_a_folder_of_colour_images(composed: Composed, overrides: list[str], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", {"train": 40, "test": 10})
    chosen = [o for o in overrides if not o.startswith("data") and o not in GREY]
    data = ["data=image_folder", f"data.folder={folder}", "data.image_size=8", "data.batch_size=8"]
    _, report, _ = run(composed(*data, *chosen, "distillation=labels_only", "stages=[baseline]"))
    assert report["data"]["class_names"] == ["blue", "red"]
    assert report["models"]["baseline"]["test"]["accuracy"]["mean"] == 1
    assert read_json(tmp_path / "run/seed_0/baseline/task.json")["images"]["channels"] == 3
    assert load_run(tmp_path / "run").network.arguments["channels"] == 3


def test_networks_that_read_text_are_refused_before_any_training(
    composed: Composed, overrides: list[str], toy_csv: Path, tmp_path: Path
) -> None:
    chosen = [o for o in overrides if not o.startswith(("student", "++student", "model@student"))]
    says = "student: kd_lightning.models.bilstm.BiLSTM needs vocab_size; FashionMNIST gives ['num_classes', 'channels']"
    with pytest.raises(ConfigError, match=re.escape(says)):
        run(composed(*chosen, "model@student=bilstm"))
    run(composed(*tiny_overrides(toy_csv, tmp_path / "text"), "stages=[teacher]", "teacher.trainer.max_steps=2"))
    read_text = [o for o in overrides if not o.startswith("run_dir")]
    elsewhere = [f"run_dir={tmp_path / 'mixed'}", f"teacher.checkpoint={tmp_path / 'text'}", "stages=[distill]"]
    with pytest.raises(ConfigError, match=r"teacher\.checkpoint must be a teacher of the same classes"):
        run(composed(*read_text, *elsewhere))


def test_a_killed_training_goes_on_with_the_batches_it_had_left(
    composed: Composed, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["stages=[baseline]", "data.view_sets=2", "trainer.max_epochs=4"]
    moved = [o for o in overrides if not o.startswith("run_dir")]
    run(composed(*moved, *more, f"run_dir={tmp_path / 'whole'}"))
    made, seen = FashionMNIST._dataset, [0]

    def dies(self: FashionMNIST, first: str, last: str) -> Any:
        data = made(self, first, last)
        fetch = type(data).__getitem__

        class Dying(type(data)):  # type: ignore[misc]
            def __getitem__(self, positions: Any) -> Any:
                seen[0] += last == "views"
                if seen[0] == 25:  # in the second epoch of 17 batches
                    raise KeyboardInterrupt("killed")
                return fetch(self, positions)

        data.__class__ = Dying
        return data

    monkeypatch.setattr(FashionMNIST, "_dataset", dies)
    with pytest.raises((KDError, KeyboardInterrupt, SystemExit)):
        run(composed(*overrides, *more))
    assert (tmp_path / "run/seed_0/baseline/checkpoints/resume.ckpt").is_file()
    monkeypatch.setattr(FashionMNIST, "_dataset", made)
    run(composed(*overrides, *more))
    whole, resumed = (load_file(tmp_path / name / "seed_0/baseline/model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
