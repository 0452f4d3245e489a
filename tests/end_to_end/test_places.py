"""Where a command is to write and cannot: refused before its work where that can be known, else named in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest

from kd_lightning.cli.benchmark import main as kd_benchmark
from kd_lightning.cli.cache import main as kd_cache
from kd_lightning.cli.export import main as kd_export
from kd_lightning.cli.export_config import main as kd_config
from kd_lightning.cli.report import main as kd_report
from kd_lightning.data.image.store import store_images
from kd_lightning.data.text.tokens import encode_store, load_tokenizer
from kd_lightning.export import benchmark_files
from kd_lightning.export.write import filled
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.files import check_place
from tests.end_to_end.test_environment import disk_of, ends
from tests.evaluation.report.sweeps import grid

COMMANDS: dict[str, Callable[[str], None]] = {
    "kd-export": lambda place: kd_export(["no_run", "--format", "onnx", "--out", place]),
    "kd-benchmark": lambda place: kd_benchmark(["no_run", "--out", place]),
    "kd-config": lambda place: kd_config(["no_such_key=1", "--to-cli", place]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("file/x", "a part of that path is a file"),
        ("file/x/y", "a part of that path is a file"),
        ("/proc/x", "cannot be created"),
        ("a" * 300, "choose a shorter name|File name too long"),
        ("new/" + "a" * 300, "choose a shorter name|File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_all_else(
    command: str, place: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    option = "--to-cli" if command == "kd-config" else "--out"
    with pytest.raises(SystemExit, match=rf"^{command}: {option} {place}[^\n]*(?:{says})[^\n]*$"):
        COMMANDS[command](place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "place", "--out new")
    with disk_of(1000), pytest.raises(KDError, match=r"^--out new: nothing can be written there \(.*; ") as refused:
        check_place(tmp_path / "new" / "place", "--out new")
    assert not isinstance(refused.value, ConfigError), "it is no mistake of the user's"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("override", ["teacher.cache={}/x", "run_dir={}", "shared_dir={}/x"])
def test_outputs_are_not_computed_where_they_cannot_be_kept(override: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = str(tmp_path / "file")
    with pytest.raises(SystemExit, match=rf"^kd-cache: {override.format(place)}: nothing can be written [^\n]*$"):
        kd_cache(["build", "experiment=quickstart", override.format(place)])


def test_a_report_that_does_not_fit_is_one_line_and_leaves_the_old_one(tmp_path: Path) -> None:
    sweep = grid(tmp_path)
    kd_report([str(sweep)])
    before = {path: path.read_bytes() for path in sweep.iterdir() if path.is_file()}
    with disk_of(5000):
        assert str(sweep) in ends(partial(kd_report.__wrapped__, [str(sweep)]))  # type: ignore[attr-defined]
    assert {path: path.read_bytes() for path in sweep.iterdir() if path.is_file()} == before


def write_tokens(cache: Path) -> None:
    tokenizer = load_tokenizer("wordpiece:80", ["a word or two"])
    encode_store(tokenizer, [("a word or two " * 20,)] * 200, "0" * 64, 64, cache)


def write_images(cache: Path) -> None:
    store_images(cache, "key", (40, 1, 28, 28), (np.zeros((1, 28, 28), np.uint8) for _ in range(40)))


def write_benchmark(cache: Path) -> None:
    with filled(cache / "benchmark") as folder:
        benchmark_files.write({"a figure": "0" * 20_000}, folder)


@pytest.mark.parametrize("write", [write_tokens, write_images, write_benchmark])
def test_a_full_disk_is_named_by_what_did_not_fit(write: Callable[[Path], None], tmp_path: Path) -> None:
    def work() -> None:
        with disk_of(10_000):
            write(tmp_path / "cache")

    line = ends(work)
    assert line.startswith(f"kd-thing: {tmp_path / 'cache'}/"[:70])  # the middle of a long path is left out
    assert "File too large; " in line or "No space left on device; " in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class Full(L.pytorch.loggers.CSVLogger):
    """Logs to a disk that is full."""

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="full")

    def log_metrics(self, *_: Any, **__: Any) -> None:
        with disk_of(0), (Path(self.save_dir) / "log").open("w") as file:
            file.write("a row")


def test_a_log_that_does_not_fit_names_the_stage(tmp_path: Path, own_home: Path, train: Callable[..., str]) -> None:
    line = ends(
        lambda: train(
            tmp_path / "run", "stages=[baseline]", "+logger.full={_target_: tests.end_to_end.test_places.Full}",
            "trainer.log_every_n_steps=1",
        )
    )  # fmt: skip
    assert f"{tmp_path / 'run/seed_0/baseline'}: File too large; " in line


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., str]:
    from tests.conftest import write_toy_csv
    from tests.end_to_end.test_damage import train

    write_toy_csv(tmp_path / "toy.csv")
    return train
