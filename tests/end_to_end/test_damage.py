"""What a run has written is used as it was written, or not at all: every file, every damage, every command."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import lightning as L
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from kd_lightning.cli import evaluate, predict
from kd_lightning.cli.benchmark import main as benchmark
from kd_lightning.cli.export import main as export
from kd_lightning.config.instantiate import conf_dir
from kd_lightning.evaluation.report import load_report, read_curves
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.pipeline.run import train_all
from kd_lightning.pipeline.teacher_loading import load_teacher
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.fingerprints import network_digest
from kd_lightning.runtime.seals import read_sealed, write_sealed
from kd_lightning.training.run_folder import find_stage, load_run, read_stage
from tests.conftest import tiny_overrides, write_toy_csv

SHORT = ["teacher.trainer.max_epochs=2", "trainer.max_epochs=1", "finetune.max_epochs=1"]
ALL = "stages=[teacher,baseline,distill,finetune]"


class StopAt(L.Callback):
    """Dies at a step that the environment names, as a process would that is killed."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == int(os.environ.get("STOP_AT", "-1")):
            raise RuntimeError("killed")


def train(folder: Path, *more: str, report: bool = False) -> str:
    """Train in this process, and return what was said."""
    register_resolvers()
    overrides = [*tiny_overrides(folder.parent / "toy.csv", folder), *SHORT, *more]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    said = StringIO()
    pipeline = Run(cfg, Console(file=said, width=200))
    train_all(pipeline)
    if report:
        compare(pipeline, "kd-train")
    return said.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run `run`, another one `other` of the same shapes, and their data."""
    folder = tmp_path_factory.mktemp("damage")
    write_toy_csv(folder / "toy.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_LIGHTNING_HOME", str(folder / "home"))
        train(folder / "run", ALL, report=True)
        train(folder / "other", "stages=[teacher,distill]", "seed=5", "teacher.seed=5", "data.split_seed=0")
        (folder / "other/seed_5").rename(folder / "other/seed_0")
        yield folder


@pytest.fixture
def run(place: Path) -> Iterator[Path]:
    """The finished run, which is whole again after the test."""
    yield place / "run"
    shutil.rmtree(place / "run")
    shutil.copytree(place / "kept", place / "run")


@pytest.fixture(scope="module", autouse=True)
def kept(place: Path) -> Path:
    return Path(shutil.copytree(place / "run", place / "kept"))


def flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(bytes(content))


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


Damage = Callable[[Path, Path], None]
DAMAGES = [flip, truncate, empty, delete, swap]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_stage_with_a_damaged_file_is_neither_loaded_nor_reused(place: Path, run: Path, damage: Damage) -> None:
    stage, other = run / "seed_0/distill", place / "other/seed_0/distill"
    sealed = read_stage(stage)["files"]
    assert {"model.safetensors", "model.json", "task.json", "tokenizer/tokenizer.json"} < set(sealed)
    assert any(name.startswith("csv/") for name in sealed)
    some = ("model.safetensors", "task.json", "stage.json")  # the seals do not know how a file was damaged
    for name in (*sealed, "stage.json") if damage is flip else some:
        path = stage / name
        whole, time = path.read_bytes(), path.stat()
        if damage is swap and (other / name).read_bytes() == whole:
            continue
        damage(path, other / name)
        if not name.startswith("csv/") and (name, damage) != ("stage.json", swap):
            with pytest.raises(KDError, match=r"is unfinished" if (name, damage) == ("stage.json", delete) else name):
                load_run(stage)
        if (name, damage) != ("stage.json", delete):  # then it is trained again
            with pytest.raises(KDError, match=r"distill.* and run the same kd-train again"):
                train(run, ALL)
        path.write_bytes(whole)
        os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns + 1))
    assert "finished before" in train(run, ALL)


def test_a_file_that_comes_to_a_tokenizer_is_not_read(run: Path) -> None:
    (run / "seed_0/distill/tokenizer/chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(KDError, match=r"chat_template\.jinja did not exist when"):
        load_run(run / "seed_0/distill")


@pytest.mark.parametrize(
    "command",
    [
        lambda run, out: predict.main([str(run), "soup"]),
        lambda run, out: evaluate.main([str(run)]),
        lambda run, out: evaluate.main([str(run), "--file", str(run.parent / "toy.csv")]),
        lambda run, out: export([str(run), "--format", "safetensors", "--out", str(out)]),
        lambda run, out: benchmark([str(run), "--out", str(out)]),
    ],
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_command_refuses_damaged_weights_in_one_line(
    place: Path, run: Path, tmp_path: Path, command: Callable[[Path, Path], None], damage: Damage
) -> None:
    damage(run / "seed_0/finetune/model.safetensors", place / "other/seed_0/distill/model.safetensors")
    with pytest.raises(SystemExit, match=r"^kd-\w+: [^\n]*finetune/model\.safetensors is (damaged|missing)[^\n]*$"):
        command(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_teacher_teaches_nobody(place: Path, run: Path) -> None:
    for name in (*(run / "teacher").glob("csv/*/metrics.csv"), run / "teacher/model.safetensors"):
        flip(name, run)
        with pytest.raises(KDError, match=rf"teacher/.*{name.name} is damaged"):
            train(place / "taught", "stages=[distill]", f"teacher.checkpoint={run}")
        assert not (place / "taught").exists()
        flip(name, run)  # whole again
    (run / "teacher/stage.json").unlink()
    with pytest.raises(KDError, match=r"teacher is unfinished, it has no stage\.json"):
        load_teacher(str(run), None, Console())  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["distill", "finetune"])
@pytest.mark.parametrize("whole", [True, False])
def test_no_other_student_takes_the_place_of_one_that_is_not_finished(run: Path, stage: str, whole: bool) -> None:
    if whole:
        shutil.rmtree(run / "seed_0" / stage)
    else:
        (run / "seed_0" / stage / "stage.json").unlink()
    says = rf"is unfinished \(seed_0/{stage} {'is missing' if whole else 'has begun'}\): run the same .* explicitly"
    for command in (lambda: load_run(run), lambda: load_run(run, 0), lambda: find_stage(run)):
        with pytest.raises(KDError, match=says):
            command()
    for arguments in (["--format", "onnx", "--out", str(run / "out")],):
        with pytest.raises(SystemExit, match=says):
            export([str(run), *arguments])
    assert load_run(run / "seed_0/baseline").folder == run / "seed_0/baseline"


def test_a_baseline_is_no_student_of_a_run_that_has_not_come_to_its_distillation(run: Path) -> None:
    for name in ("config.yaml", "seed_0/distill", "seed_0/finetune"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    with pytest.raises(KDError, match=r"is unfinished \(seed_0/distill is missing\)"):
        load_run(run)


@pytest.mark.parametrize("damage", [flip, empty, delete])
def test_a_damaged_configuration_or_report_is_not_believed(place: Path, run: Path, damage: Damage) -> None:
    accuracy = load_report(run)["models"]["distilled"]["test"]["accuracy"]["values"]
    damage(run / "report.json", run)
    said = train(run, ALL, report=True)
    assert damage is delete or "report.json" in said.partition("it is made anew")[0]
    for name in ("curves.png", "tradeoff.png") if damage is delete else ():
        whole = (run / name).read_bytes()
        (run / name).unlink()
        train(run, ALL, report=True)
        assert (run / name).read_bytes() == whole
    assert load_report(run)["models"]["distilled"]["test"]["accuracy"]["values"] == accuracy
    damage(run / "config.yaml", run)
    with pytest.raises(SystemExit, match=r"config\.yaml"):
        evaluate.main([str(run / "seed_0/distill")])
    if damage is delete:
        train(run, ALL)
        evaluate.main([str(run / "seed_0/distill")])
    else:
        with pytest.raises(
            KDError, match=r"config\.yaml .*(damaged|read|not a run's configuration).* remove it and run the same"
        ):
            train(run, ALL)


# -- the run's own data ------------------------------------------------------------------------------------------------


def evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    evaluate.main([str(run), "--json"])
    return capsys.readouterr().out


def renamed(lines: list[str]) -> list[str]:
    return [line.replace(",food", ",meals") for line in lines]


def one_more_class(lines: list[str]) -> list[str]:
    return [*lines, *(f'"sentence of another kind {i}",other' for i in range(20))]


def one_label(lines: list[str]) -> list[str]:
    return [lines[0], lines[1].rpartition(",")[0] + ",science", *lines[2:]]


def in_another_order(lines: list[str]) -> list[str]:
    return [lines[0], *lines[:0:-1]]


@pytest.mark.parametrize("change", [renamed, one_more_class, one_label, in_another_order])
def test_other_data_are_not_scored_as_the_runs_own(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[list[str]], list[str]]
) -> None:
    run, file = place / "run", place / "toy.csv"
    before = evaluated(run, capsys)
    whole = file.read_text(encoding="utf-8")
    try:
        file.write_text("\n".join(change(whole.splitlines())) + "\n", encoding="utf-8")
        says = r"^kd-\w+: the examples or labels in .*toy\.csv changed since the training: "
        with pytest.raises(SystemExit, match=says + "score the file with --file"):
            evaluated(run, capsys)
        for command, name in ((export, "export"), (benchmark, "benchmark")):
            with pytest.raises(SystemExit, match=says):
                command([str(run), *(["--format", "safetensors"] if name == "export" else []), "--out", str(tmp_path)])
        with pytest.raises(KDError, match=r"data: examples, labels, splits, tokenizer or max_length changed|classes"):
            train(run, ALL)
    finally:
        file.write_text(whole, encoding="utf-8")
    assert evaluated(run, capsys) == before


def test_a_run_reads_with_its_own_tokenizer(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluated(place / "run", capsys)

    def learn_no_more(*_: object) -> None:
        raise AssertionError("a tokenizer was learned anew")

    monkeypatch.setattr("kd_lightning.data.text.tokens._train_wordpiece", learn_no_more)
    assert evaluated(place / "run", capsys) == before


def test_a_runs_configuration_says_not_where_to_write(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = evaluated(run, capsys)
    text = (run / "config.yaml").read_text(encoding="utf-8").partition("\n")[2]
    assert "cache_dir: null" in text
    victim = run.parent / "victim"
    (run / "config.yaml").write_text(text.replace("cache_dir: null", f"cache_dir: {victim}"), encoding="utf-8")
    assert evaluated(run, capsys) == before
    assert not victim.exists()


# -- what a killed run goes on from ------------------------------------------------------------------------------------

BASELINE = (
    "logger={csv: {_target_: lightning.pytorch.loggers.CSVLogger, name: csv}}", "trainer.log_every_n_steps=1",
    "stages=[baseline]", "+callbacks.stop={_target_: tests.end_to_end.test_damage.StopAt}",
    "checkpoint_every_n_steps=3",
    "student.dropout=0.3", "trainer.max_epochs=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> str:
    assert "begins again" not in train(place / "uninterrupted", *BASELINE)
    folder = place / "uninterrupted/seed_0/baseline"
    assert not list((folder / "checkpoints").iterdir())
    return network_digest(load_run(folder).network)


@pytest.fixture(scope="module")
def once_killed(place: Path) -> Path:
    """A training that ended at step 17, after a look at validation and after the checkpoint of step 15."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOP_AT", "17")
        with pytest.raises(RuntimeError, match="killed"):
            train(place / "killed", *BASELINE)
    folder = place / "killed/seed_0/baseline/checkpoints"
    assert {path.name for path in folder.iterdir()} == {"resume.ckpt", "best.ckpt", "seals.json"}
    return place / "killed"


@pytest.fixture
def killed(place: Path, once_killed: Path, tmp_path: Path) -> Path:
    """The checkpoints of that training, to be damaged."""
    shutil.copy(place / "toy.csv", tmp_path)
    return Path(shutil.copytree(once_killed, tmp_path / "killed")) / "seed_0/baseline/checkpoints"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("resume.ckpt", flip),
        ("resume.ckpt", delete),
        ("best.ckpt", truncate),
        ("best.ckpt", delete),
        ("seals.json", flip),
    ],
)
def test_damaged_checkpoints_are_discarded_and_the_stage_begins_again(
    killed: Path, uninterrupted: str, name: str, damage: Damage
) -> None:
    damage(killed / name, killed)
    said = train(killed.parent.parent.parent, *BASELINE)
    if (name, damage) != ("resume.ckpt", delete):
        assert name in said.partition("it is removed, and the stage begins again")[0]
        assert "begins again" in said
    assert network_digest(load_run(killed.parent).network) == uninterrupted


def change_a_digit(path: Path, other: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    digit = re.search(r"\d(?=\D*$)", lines[1])
    assert digit is not None
    lines[1] = f"{lines[1][: digit.start()]}{(int(digit[0]) + 1) % 10}{lines[1][digit.end() :]}"
    path.write_text("".join(lines))


def add_a_row(log: Path) -> None:
    columns = log.read_text().splitlines()[0].split(",")
    with log.open("a", newline="") as file:
        csv.DictWriter(file, columns).writerow({"step": 999, "train/loss": 0.5})


def curves(stage: Path) -> dict[str, object]:
    curve = asdict(read_curves(stage, 0, "accuracy"))
    assert len(curve["loss"]) > 5
    assert len(curve["score"]) > 1
    return curve


@pytest.mark.parametrize("damage", [None, change_a_digit, truncate, delete])
def test_damaged_logs_are_put_back_to_what_they_were_at_the_checkpoint(
    killed: Path, uninterrupted: str, place: Path, damage: Damage | None
) -> None:
    log = killed.parent / "csv/version_0/metrics.csv"
    if damage:
        damage(log, log)
    else:  # a row that came after the checkpoint, with a wrong step
        add_a_row(log)
        (killed.parent / "csv/version_9").mkdir()
        shutil.copy(log, killed.parent / "csv/version_9")
    said = train(killed.parent.parent.parent, *BASELINE)
    assert ("metrics.csv is damaged or missing: its rows up to the checkpoint are put back" in said) == bool(damage)
    assert "begins again" not in said
    assert network_digest(load_run(killed.parent).network) == uninterrupted
    assert curves(killed.parent) == curves(place / "uninterrupted/seed_0/baseline")


def test_a_stage_that_begins_again_keeps_no_rows_of_before(killed: Path, place: Path) -> None:
    log = killed.parent / "csv/version_0/metrics.csv"
    add_a_row(log)
    (killed / "seals.json").unlink()
    assert "begins again" in train(killed.parent.parent.parent, *BASELINE)
    assert curves(killed.parent) == curves(place / "uninterrupted/seed_0/baseline")


def test_logs_outside_of_the_stage_are_neither_written_nor_removed(killed: Path, tmp_path: Path) -> None:
    seals = read_sealed(killed / "seals.json", "")
    seals["logs"] |= {"../victim.csv": "written", "csv/version_0/../../victim.csv": "written"}
    write_sealed(killed / "seals.json", seals)
    (killed.parent / "csv/version_0").rename(tmp_path / "outside")
    (killed.parent / "csv/version_0").symlink_to(tmp_path / "outside")
    whole = (tmp_path / "outside/metrics.csv").read_bytes()
    with pytest.raises(ConfigError, match=r"version_0 is a link"):
        train(killed.parent.parent.parent, *BASELINE)
    assert (tmp_path / "outside/metrics.csv").read_bytes() == whole
    (killed.parent / "csv/version_0").unlink()
    train(killed.parent.parent.parent, *BASELINE)
    assert not list(tmp_path.rglob("victim.csv"))


def test_whole_checkpoints_are_gone_on_from_and_foreign_ones_are_not(
    killed: Path, uninterrupted: str, tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "killed", tmp_path / "foreign")
    said = train(tmp_path / "killed", *BASELINE)
    assert "begins again" not in said
    assert network_digest(load_run(killed.parent).network) == uninterrupted
    checkpoints = tmp_path / "foreign/seed_0/baseline/checkpoints"
    other = (*BASELINE, "optimizer.lr=0.02")
    (checkpoints.parent / "settings.json").unlink()
    assert "resume.ckpt belongs to another training" in train(tmp_path / "foreign", *other)


def test_what_killed_writers_left_is_removed_by_the_next_start(killed: Path) -> None:
    dead = ".resume.ckpt.0.999999999@elsewhere.tmp"
    for folder in (killed, killed.parent):
        (folder / dead).write_text("half")
    (killed / "mine.tmp").write_text("mine")
    train(killed.parent.parent.parent, *BASELINE)
    assert {path.name for path in killed.iterdir()} == {"mine.tmp"}
    assert not (killed.parent / dead).exists()


def test_a_reused_stage_removes_what_a_kill_after_its_end_left(place: Path, run: Path) -> None:
    checkpoints = run / "seed_0/distill/checkpoints"
    checkpoints.mkdir(exist_ok=True)
    for name in ("resume.ckpt", "best.ckpt", "seals.json", ".tmpKthVj7", "mine.ckpt"):
        (checkpoints / name).write_text("left")
    assert "finished before" in train(run, ALL)
    assert {path.name for path in checkpoints.iterdir()} == {"mine.ckpt"}
    assert load_run(run)


def test_all_files_of_a_run_have_the_mode_that_the_umask_gives(place: Path) -> None:
    modes = {path: path.stat().st_mode & 0o777 for path in (place / "kept").rglob("*") if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert {path.name: oct(mode) for path, mode in modes.items() if mode != 0o666 & ~mask} == {}
