"""An exported language model predicts and generates as the student does, in every format."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_lightning.evaluation.generation import Decoding, generate
from kd_lightning.export.exported import read_exported
from kd_lightning.export.load import load_export
from kd_lightning.training.run_folder import load_run
from tests.export.conftest import Exports
from tests.export.runs import lm_run

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("gguf", reason="the extra `lm` is not installed")


@pytest.fixture(scope="package")
def llama(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student is a small Llama. Read only."""
    return lm_run(tmp_path_factory.mktemp("llama") / "llama")


@pytest.mark.parametrize("format", ["safetensors", "huggingface", "pt2", "onnx", "gguf"])
def test_it_generates_alike(llama: Path, exports: Exports, format: str) -> None:
    out = exports(llama, format)
    parity = read_exported(out).parity
    assert parity["agreement"] == parity["generated"] == 1
    assert parity["kl"] < 1e-5
    ours, theirs = load_run(llama), load_export(out, trust=True)
    for prompt in ("the people of", "12. laws"):
        expected = generate(ours, prompt, Decoding(20))
        assert expected["tokens"] > 5
        assert generate(theirs, prompt, Decoding(20)) == expected
