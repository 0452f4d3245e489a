"""ExecuTorch, for phones and other devices: one file of XNNPACK's and ExecuTorch's own operators.

The graph computes one example of up to `max_length` tokens: XNNPACK has one axis of any size, and the memory of all
others is planned beforehand.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kd_lightning.config.trust import trusts_all
from kd_lightning.evaluation.profiling import single_examples
from kd_lightning.export.formats import Written
from kd_lightning.export.graph import Traced, following, quietly, trace
from kd_lightning.export.int8 import in_int8
from kd_lightning.export.loops import in_kernels, with_loops
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.files import write_file
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FILE = "model.pte"
QUANTIZE = ("none", "int8-dynamic", "int8-static")
NEEDS = ("executorch", "torchao")
READS: tuple[str, ...] = ("executorch",)


def check(model: TrainedModel) -> None:
    """Refuse language models, whose keys and values grow with each token."""
    if isinstance(model.network, CausalLM):
        raise ConfigError("--format executorch: language models are not written; use gguf, which phones run, or onnx")


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Trace the student for one example, quantise it, and lower it to XNNPACK.

    What XNNPACK does not take, ExecuTorch's portable kernels compute.

    8 bits are PT2E's: linear layers and convolutions a channel, tables a row. `int8-static` has the ranges of
    activations of `source.calibration`; with `int8-dynamic` they are measured at run time, and convolutions stay float.

    Raises:
        KDError: ExecuTorch lacks an operation.
    """
    network = source.model.network
    with quietly():
        copied = with_loops(source.network)
        if quantize != "none":
            copied = in_int8(copied, tables_only=True)
        batch = source.held_out[0]
        traced = trace(copied, batch, source.model.max_length, "none", alone=True)
        what = f"ExecuTorch lacks an operation of {type(network).__name__}"
        content = following(what, lambda: _lowered(_in_eight(traced, quantize, source.calibration, batch)))
    write_file(folder / FILE, content)
    return Written(traced.inputs)


def _in_eight(traced: Traced, quantize: str, calibration: Sequence[Batch], batch: Batch) -> ExportedProgram:
    """Return the graph with its layers in 8 bits; for `none` as it is."""
    if quantize == "none":
        return traced.program
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic, aten, quantizer = quantize == "int8-dynamic", torch.ops.aten, XNNPACKQuantizer()
    quantizer.transform_for_annotation = lambda model: model  # it would make positions, too, floats
    for operation in (aten.linear.default, *(() if dynamic else (aten.conv1d.default, aten.conv2d.default))):
        quantizer.set_operator_type(operation, get_symmetric_quantization_config(True, is_dynamic=dynamic))
    prepared = prepare_pt2e(traced.program.module(check_guards=False), quantizer)
    rows = [row for one in ([batch] if dynamic else calibration) for row in _rows(one, traced.inputs)]
    with torch.no_grad():
        for row in rows:
            prepared(**dict(zip(traced.inputs, row, strict=True)))
    sample = {name: batch[name][:1] for name in traced.inputs}
    return torch.export.export(convert_pt2e(prepared), (), sample, dynamic_shapes=traced.axes)


def _lowered(program: ExportedProgram) -> bytes:
    """Return the file's content.

    Raises:
        KDError: The runtime has no kernel for an operation.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    lowered = to_edge_transform_and_lower(in_kernels(program), partitioner=[XnnpackPartitioner()]).to_executorch()
    (plan,) = lowered.executorch_program.execution_plan
    needed = {f"{one.name}.{one.overload}" if one.overload else one.name for one in plan.operators}
    if missing := sorted(needed - set(Runtime.get().operator_registry.operator_names)):
        raise KDError(f"ExecuTorch's runtime has no kernel for {', '.join(missing)}: use onnx")
    return bytes(lowered.buffer)


def _rows(batch: Batch, inputs: Sequence[str]) -> list[list[Tensor]]:
    """Return the inputs of each example of a batch without its padding, as they are deployed."""
    return [[one[name].contiguous() for name in inputs] for one in single_examples([batch])]


def _padded(outputs: Tensor, mask: Tensor) -> Tensor:
    """Return outputs `(1, l, C)` of tokens at their places in the batch, `(1, L, C)`, else zero.

    Args:
        outputs: What the graph returns; outputs of whole texts, `(1, C)`, stay as they are.
        mask: Which of the L places are tokens.
    """
    if outputs.ndim < 3 or outputs.shape[1] == len(mask):
        return outputs
    whole = outputs.new_zeros(1, len(mask), *outputs.shape[2:])
    whole[:, mask.bool()] = outputs
    return whole


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Open the file in ExecuTorch's runtime."""
    return ExecutorchNetwork(open_program(folder / FILE, threads), exported.inputs)


def open_program(file: Path, threads: int | None = None) -> Any:
    """Load a trusted file.

    Args:
        file: The model.
        threads: Of XNNPACK; None: as many as torch uses.

    Raises:
        ConfigError: It is not trusted: the runtime trusts addresses and sizes in it.
    """
    if not trusts_all():
        raise ConfigError(
            f"{file} may crash or take over the process that loads it (ExecuTorch trusts sizes and places in it): if "
            "you trust its author, add --trust (in Python: load_export(..., trust=True)), or use onnx or safetensors"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself experimental
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime, Verification

        _unsafe_reset_threadpool(threads or torch.get_num_threads())
        return Runtime.get().load_program(file.read_bytes(), verification=Verification.InternalConsistency)


class ExecutorchNetwork(nn.Module):
    """A graph of one example as a network of batches.

    Args:
        program: What `open_program` returns.
        inputs: Names of its inputs.
    """

    def __init__(self, program: Any, inputs: Sequence[str]) -> None:
        super().__init__()
        self.program, self.inputs = program, inputs  # whose memory the method reads
        self.method = program.load_method("forward")

    def forward(self, **entries: Tensor) -> Tensor:
        """Return the logits of a batch, one example after the other, each without its padding."""
        found = [self.method.execute(row)[0] for row in _rows(entries, self.inputs)]
        if (mask := entries.get("attention_mask")) is not None:
            found = [_padded(*pair) for pair in zip(found, mask, strict=True)]
        return torch.cat(found)
