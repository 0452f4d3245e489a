"""OpenVINO's own files, for servers and computers with Intel's or compatible processors."""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_lightning.export.formats import Written, onnx
from kd_lightning.export.graph import quietly, trace
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FILE = "model.xml"
WEIGHTS = "model.bin"
QUANTIZE = ("none", "int8-weights", "int8-static", "fp16")
NEEDS = ("openvino", "nncf", "onnx", "onnxscript")
READS: tuple[str, ...] = ("openvino",)


def check(model: TrainedModel) -> None:
    """Refuse language models, which optimum-intel writes, and what does not fit an ONNX file."""
    if isinstance(model.network, CausalLM):
        raise ConfigError(
            "--format openvino: language models are not written; use huggingface, which optimum-intel converts, or onnx"
        )
    onnx.check(model)


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Convert the student's ONNX graph; weights of 8 and 16 bits are made of float32.

    8 bits are NNCF's: `int8-weights` a channel, computed in float32; `int8-static` also activations, whose ranges are
    measured on `source.calibration`.

    Raises:
        ConfigError: `int8-static` of an LSTM, of which NNCF makes other logits.
    """
    traced = trace(source.network, source.held_out[0], source.model.max_length, "none")
    with quietly(), tempfile.TemporaryDirectory(dir=folder, prefix=".openvino-") as work:
        onnx.convert(source, traced, Path(work) / "plain.onnx")
        import openvino

        model = openvino.Core().read_model(Path(work) / "plain.onnx")
        if quantize.startswith("int8"):
            model = _in_eight(model, quantize, source, traced.inputs)
        openvino.save_model(model, folder / FILE, compress_to_fp16=quantize == "fp16")
    return Written(traced.inputs, beside=(WEIGHTS,))


def _in_eight(model: Any, quantize: str, source: Source, inputs: list[str]) -> Any:
    if quantize == "int8-static" and any(one.get_type_name() == "LSTMSequence" for one in model.get_ops()):
        raise ConfigError(
            f"--format openvino --quantize int8-static: {type(source.model.network).__name__} has LSTMs, which NNCF "
            "does not quantise: use int8-weights"
        )
    with _telling_nobody(), redirect_stdout(io.StringIO()):  # it draws bars
        import nncf

        nncf.set_log_level(logging.ERROR)
        if quantize == "int8-weights":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        rows = [{name: batch[name].numpy() for name in inputs} for batch in source.calibration]
        kind = None if "pixel_values" in inputs else nncf.ModelType.TRANSFORMER
        return nncf.quantize(model, nncf.Dataset(rows), subset_size=len(rows), model_type=kind)


@contextmanager
def _telling_nobody() -> Iterator[None]:
    """Keep NNCF from reporting its use to its authors: it decides so when it is imported."""
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"
    try:
        yield
    finally:
        os.environ.pop("NNCF_CI")
        if before is not None:
            os.environ["NNCF_CI"] = before


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Compile the model for this processor."""
    return OpenVinoNetwork(compiled(folder / FILE, threads or torch.get_num_threads()))


def compiled(file: Path, threads: int) -> Any:
    """Compile a model for this processor, in float32.

    Without the hint some processors compute in bfloat16.

    Args:
        file: The `.xml`, beside its `.bin`.
        threads: Of each operator.
    """
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    return openvino.Core().compile_model(str(file), "CPU", options)


class OpenVinoNetwork(nn.Module):
    """A compiled model as a network.

    Args:
        model: What `compiled` returns.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.request, self.inputs = model.create_infer_request(), [one.any_name for one in model.inputs]

    def forward(self, **entries: Tensor) -> Tensor:
        """Return the logits of a batch."""
        found = self.request.infer({name: entries[name].numpy() for name in self.inputs}, share_inputs=True)
        return torch.from_numpy(found[0].copy())
