"""ONNX, for onnxruntime and others: servers, phones, browsers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_lightning.export.formats import Written
from kd_lightning.export.graph import Traced, following, quietly, trace, whole_lstms
from kd_lightning.export.step import is_step, outputs_of, save_config, step_network
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.onnx import OnnxNetwork
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.onnx_files import open_session
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FILE = "model.onnx"
QUANTIZE = ("none", "int8-weights", "int8-dynamic", "int8-static", "fp16")  # onnxruntime has no bf16 on a CPU
NEEDS = ("onnx", "onnxruntime", "onnxscript")
READS: tuple[str, ...] = ("onnxruntime",)
OPSET = 20
"""Supported by onnxruntime from 1.17 (January 2024) on."""

MOST_BYTES = 2 * 1024**3
"""The size limit of a protobuf, and so of a single ONNX file."""


def check(model: TrainedModel) -> None:
    """Refuse a network that is too large for one file."""
    if (size := sum(tensor.nbytes for tensor in model.network.state_dict().values())) >= MOST_BYTES:
        raise ConfigError(
            f"--format onnx: {size / 1e9:.1f} GB of weights do not fit a single ONNX file (2 GB); use "
            "safetensors, huggingface, pt2"
        )


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Trace the student, convert the graph, quantise it, and run ONNX's checker."""
    import onnx

    model = source.model
    traced = trace(source.network, source.held_out[0], model.max_length, quantize)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as work:
        plain = Path(work) / "plain.onnx"
        with quietly():
            convert(source, traced, plain)
            if quantize in ("int8-dynamic", "int8-static"):
                plain = _quantised(plain, quantize, source, traced.inputs)
        _without_notes(plain, folder / FILE)
    onnx.checker.check_model(str(folder / FILE))
    if isinstance(source.network, CausalLM):
        save_config(source.network, model.tokenizer, folder)
    return Written(traced.inputs, OPSET)


def convert(source: Source, traced: Traced, to: Path) -> None:
    """Write a graph as ONNX, with each LSTM one operator.

    Raises:
        KDError: ONNX lacks an operation.
    """
    with whole_lstms():
        following(
            f"ONNX lacks an operation of {type(source.model.network).__name__}",
            lambda: torch.onnx.export(
                traced.program, dynamo=True, opset_version=OPSET, dynamic_shapes=traced.axes,
                input_names=traced.inputs, output_names=traced.outputs, verbose=False,
            ).save(str(to)),  # type: ignore[union-attr]
        )  # fmt: skip


def _without_notes(model: Path, to: Path) -> None:
    """Write a model without the exporter's metadata of each node, which is larger than the model."""
    import onnx

    graph = onnx.load(str(model))
    if any(is_step([one.name]) for one in graph.graph.input):
        graph.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "past + length"  # of the mask
    for entry in (*graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output, graph.graph):
        del entry.metadata_props[:]
        entry.doc_string = ""
    onnx.save(graph, str(to))


def _quantised(plain: Path, quantize: str, source: Source, inputs: list[str]) -> Path:
    """Return the model with its tables in 8 bits, and all other weights in 7 of 8.

    Dynamic: activation ranges are measured at run time. Static: the input ranges of convolutions and matrix products
    are measured on training examples beforehand. Tables (`Gather`) and LSTMs are the same in both: a table's rows are
    only looked up, and onnxruntime's 8-bit LSTM is dynamic only.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.registry import IntegerOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready, done = plain.with_name("ready.onnx"), plain.with_name("done.onnx")
    quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
    tables, lstms = plain.with_name("tables.onnx"), plain.with_name("lstms.onnx")
    options: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8}
    # Tables have a pass of their own: their rows are looked up and never summed, so nothing overflows, and they keep
    # all 8 bits, where the weights below have 7.
    quantize_dynamic(str(ready), str(tables), op_types_to_quantize=["Gather"], **options)
    # On x86 without VNNI a sum of two products of 8 by 8 bits overflows; of 8 by 7 it does not.
    options["reduce_range"] = True
    if quantize == "int8-dynamic":
        others = sorted(IntegerOpsRegistry.keys() - {"Gather"})
        quantize_dynamic(str(tables), str(done), op_types_to_quantize=others, **options)
        return done
    quantize_dynamic(str(tables), str(lstms), op_types_to_quantize=["LSTM"], **options)
    quantize_static(
        str(lstms), str(done), _reader(lstms, source.calibration, inputs), quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"], activation_type=QuantType.QUInt8, **options,
    )  # fmt: skip
    return done


def _reader(model: Path, batches: Iterable[Batch], inputs: list[str]) -> Any:
    """Return the static quantiser's source of examples; a language model reads them from their beginning."""
    from onnxruntime.quantization import CalibrationDataReader

    past = _shapes(open_session(model, torch.get_num_threads()))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter([
                {name: batch[name].numpy() for name in inputs if name in batch}
                | {name: torch.zeros(len(batch["index"]), heads, 0, size).numpy() for name, heads, size in past}
                for batch in batches
            ])  # fmt: skip

        def get_next(self) -> Any:
            return next(self.rows, None)

    return Reader()


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Open the model in onnxruntime, on the CPU."""
    if not is_step(exported.inputs):
        return OnnxNetwork(folder / FILE, threads)
    session = open_session(folder / FILE, threads or torch.get_num_threads())
    outputs = outputs_of(exported.inputs)

    def run(entries: Sequence[Tensor]) -> list[Tensor]:
        given = {name: one.numpy() for name, one in zip(exported.inputs, entries, strict=True)}
        return [torch.from_numpy(one) for one in session.run(outputs, given)]

    kind = torch.float16 if session.get_inputs()[-1].type == "tensor(float16)" else torch.float32
    return step_network(folder, run, [(heads, size) for _, heads, size in _shapes(session)], kind)


def _shapes(session: Any) -> list[tuple[str, int, int]]:
    """Return the names of a language model's cached inputs, how many heads each has, and their size."""
    return [(one.name, one.shape[1], one.shape[3]) for one in session.get_inputs() if is_step([one.name])]
