from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.export.runs import bilstm_run, transformer_run


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for the runs below."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_LIGHTNING_HOME", str(folder))
        yield folder


@pytest.fixture(scope="package")
def bilstm(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student is a BiLSTM. Read only."""
    return bilstm_run(tmp_path_factory.mktemp("bilstm") / "lstm", num_layers=2)


@pytest.fixture(scope="package")
def bert(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student is a small transformer. Read only."""
    return transformer_run(tmp_path_factory.mktemp("bert") / "bert")
