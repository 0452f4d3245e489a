"""Traces a student to a graph of tensor operations without our code, for the formats that are one."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._decomp import global_decomposition_table
from torch.export import Dim, ExportedProgram

from kd_lightning.export.int8 import in_int8
from kd_lightning.export.step import outputs_of, trace_step
from kd_lightning.models.adapt import run_network
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.types import Batch

T = TypeVar("T")

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
INPUTS = (*TEXT_INPUTS, "pixel_values")
DTYPES = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Traced:
    """A network as a graph.

    Attributes:
        program: The graph.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.
        axes: The dynamic axes of its arguments.
    """

    program: ExportedProgram
    inputs: list[str]
    outputs: list[str]
    axes: dict[str, Any]


class _Logits(nn.Module):
    """A network as a function from named batch entries, any of these, to float32 logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, pixel_values: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        entries = dict(zip(INPUTS, (input_ids, attention_mask, token_type_ids, pixel_values), strict=True))
        return run_network(self.network, {name: x for name, x in entries.items() if x is not None}).logits.float()


def in_precision(network: nn.Module, quantize: str) -> nn.Module:
    """Return a copy of a network in eval mode that computes in 16 bits, or has its weights in 8."""
    if quantize == "int8-weights":
        return in_int8(network)
    return copy.deepcopy(network).eval().to(DTYPES.get(quantize, torch.float32))


def trace(network: nn.Module, batch: Batch, max_length: int | None, quantize: str, alone: bool = False) -> Traced:
    """Return a network as a graph for any number of examples and any length.

    Args:
        network: The student; it is copied, not changed.
        batch: Some examples.
        max_length: The longest text in tokens.
        quantize: The precision of weights and computation.
        alone: For one example, of any length.

    Raises:
        KDError: `torch.export` cannot trace the network.
    """
    network = in_precision(network, quantize)
    if isinstance(network, CausalLM):
        program, inputs, axes = following(_cannot_trace(network), lambda: trace_step(network))
        _without_traces(program)
        return Traced(program, inputs, outputs_of(inputs), axes)
    names = [name for name in INPUTS if name in batch]
    sample = {name: batch[name][:1] if alone else _at_least_two(batch[name]) for name in names}
    axes = free_axes(names, max_length, alone)
    program = _program(network, sample, axes)
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and any(map(_computes, node.users))}
    used = [name for name in names if name in read]
    if used != names:  # a network that ignores the mask does not require one
        sample, axes = {name: sample[name] for name in used}, free_axes(used, max_length, alone)
        program = _program(network, sample, axes)
    return Traced(program, used, ["logits"], axes)


def _computes(node: Any) -> bool:
    """Return whether an operation uses more than the sizes of its inputs."""
    return node.target is not torch.ops.aten.sym_size.int


def free_axes(names: list[str], max_length: int | None, alone: bool = False) -> dict[str, dict[int, Any]]:
    """Return the dynamic axes of the inputs by name."""
    rows, length = {} if alone else {0: Dim("batch", min=1)}, Dim("length", min=1, max=max_length)
    return {name: {**rows, 1: length} if name in TEXT_INPUTS else rows for name in names}


def _program(network: nn.Module, sample: dict[str, Tensor], axes: dict[str, dict[int, Any]]) -> ExportedProgram:
    if not sample:
        raise ConfigError(f"a network with none of the inputs {', '.join(INPUTS)} cannot be exported")
    wrapped = _Logits(network).eval()
    with torch.no_grad(), whole_lstms(), warnings.catch_warnings():
        # nn.LSTM also keeps its parameters in a list, about which the exporter warns
        warnings.filterwarnings("ignore", r"(?s).*_flat_weights.*assigned during export.*")
        program = following(
            _cannot_trace(network),
            lambda: torch.export.export(wrapped, (), sample, dynamic_shapes=axes),
        )
    _without_traces(program)
    return program


def _cannot_trace(network: nn.Module) -> str:
    return f"torch.export cannot trace {type(network).__name__}"


def _without_traces(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine, and most of a small model's size


def following(what: str, convert: Callable[[], T]) -> T:
    """Run a conversion; raise a one-line `KDError` if it fails."""
    try:
        return convert()
    except (KDError, OSError):  # a full disk is not the graph's fault
        raise
    except Exception as error:  # torch's and ONNX's exporters raise a dozen kinds; each means the same to the user
        raise KDError(f"{what}: {reason(error)}; formats that need no graph: safetensors, huggingface") from error


def reason(error: BaseException) -> str:
    """Return the first line of an error's root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _at_least_two(entry: Tensor) -> Tensor:
    """Return at least two rows: the exporter takes an axis of length 1 as constant."""
    rows = entry[:4]
    return torch.cat([rows, rows]) if len(rows) == 1 else rows


@contextmanager
def quietly() -> Iterator[None]:
    """Hide the exporters' warnings about their own internals, such as deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def whole_lstms() -> Iterator[None]:
    """Keep each LSTM one operation of any length inside this block.

    By default torch traces an LSTM by unrolling it, which fixes the example's length. This replaces entries of the same
    tables as `torch.export._patches` (whose loop is much slower), and restores them.
    """
    op: Any = torch.ops.aten.lstm.input
    table: Any = global_decomposition_table["post_autograd"]
    kernels, unrolled = dict(op.py_kernels), table[op]
    try:
        for key in ("Autograd", "CompositeImplicitAutograd", "Meta"):
            op.py_kernels[getattr(torch._C.DispatchKey, key)] = _lstm_shapes
        table[op] = _lstm_shapes
        op._dispatch_cache.clear()
        yield
    finally:
        op.py_kernels.clear()
        op.py_kernels.update(kernels)
        table[op] = unrolled
        op._dispatch_cache.clear()


def _lstm_shapes(
    states: Tensor, start: list[Tensor], weights: list[Tensor], biased: bool, layers: int, dropout: float,
    training: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return tensors of the shapes that an LSTM returns."""
    hidden, cell = start
    width = (2 if bidirectional else 1) * hidden.shape[2]
    return states.new_empty((*states.shape[:2], width)), hidden.new_empty(hidden.shape), cell.new_empty(cell.shape)
