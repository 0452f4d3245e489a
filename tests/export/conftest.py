from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kd_lightning.cli.export import main as kd_export
from kd_lightning.export.formats import format_named
from tests.export.runs import bilstm_run, cnn_run, multi_task_run, regression_run, transformer_run
from tests.toy_reviews import write_archive


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for the runs below."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_LIGHTNING_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands are for those who read the intervals."""
    monkeypatch.setattr("kd_lightning.export.parity.RESAMPLES", 50)


@pytest.fixture(scope="package")
def bilstm(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student is a BiLSTM. Read only."""
    return bilstm_run(tmp_path_factory.mktemp("bilstm") / "lstm", num_layers=2, embedding_size=64, hidden_size=64)


@pytest.fixture(scope="package")
def bert(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student is a small transformer. Read only."""
    return transformer_run(tmp_path_factory.mktemp("bert") / "bert")


@pytest.fixture(scope="package")
def pictures(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student reads images, which lie beside it. Read only."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    return cnn_run(tmp_path_factory.mktemp("pictures") / "cnn")


Exports = Callable[..., Path]


def needs(format: str) -> None:
    """Skip a test where a package of a format is missing."""
    if missing := [name for name in format_named(format).NEEDS if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)}: not installed, and needed for {format}")


@pytest.fixture(scope="package")
def exports(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Export a run, once in each format. Read only."""
    made: dict[tuple[Path, str, str], Path] = {}

    def export(run: Path, format: str, quantize: str = "none") -> Path:
        needs(format)
        key = (run, format, quantize)
        if key not in made:
            out = tmp_path_factory.mktemp("export") / "deep" / "out"
            kd_export([str(run), "--format", format, "--quantize", quantize, "--out", str(out), "--trust"])
            made[key] = out
        return made[key]

    return export


@pytest.fixture(scope="package")
def archive(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have the reviews be a few hundred toy sentences."""
    folder = write_archive(tmp_path_factory.mktemp("reviews") / "archive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kd_lightning.data.sources.reviews.fetch", lambda name: folder)
        yield


@pytest.fixture(scope="package")
def rating(archive: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student is a regression. Read only."""
    return regression_run(tmp_path_factory.mktemp("rating") / "rating")


@pytest.fixture(scope="package")
def several(archive: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student has two tasks. Read only."""
    return multi_task_run(tmp_path_factory.mktemp("several") / "several")
