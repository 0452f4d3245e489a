"""A student as a graph of tensor operations that needs none of our code: what the formats pt2 and onnx are made of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._decomp import global_decomposition_table
from torch.export import Dim, ExportedProgram

from kd_lightning.models.adapt import run_network
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.types import Batch

T = TypeVar("T")

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
DTYPES = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class _Logits(nn.Module):
    """A network as a function of the batch's entries, by position, that returns float32 logits and nothing else."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def _answer(self, *entries: Tensor) -> Tensor:
        return run_network(self.network, dict(zip(self.names, entries, strict=True))).logits.float()


class _Ids(_Logits):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self._answer(input_ids)


class _Text(_Logits):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._answer(input_ids, attention_mask)


class _Pair(_Logits):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self._answer(input_ids, attention_mask, token_type_ids)


class _Image(_Logits):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self._answer(pixel_values)


_SHAPES: dict[tuple[str, ...], type[_Logits]] = {
    ("input_ids",): _Ids,
    ("input_ids", "attention_mask"): _Text,
    ("input_ids", "attention_mask", "token_type_ids"): _Pair,
    ("pixel_values",): _Image,
}


def trace(
    network: nn.Module, batch: Batch, max_length: int | None, dtype: torch.dtype = torch.float32
) -> tuple[ExportedProgram, dict[str, dict[int, Any]]]:
    """Return a network as an `ExportedProgram` for any number of examples and any length.

    Args:
        network: The student; it is copied, not changed.
        batch: Some examples that it reads.
        max_length: The longest text in tokens.
        dtype: What it is computed in.

    Returns:
        The program, and for each input, in order, which of its axes are free.

    Raises:
        KDError: `torch.export` cannot follow what the network does.
    """
    network = copy.deepcopy(network).eval().to(dtype)
    names = [name for name in (*TEXT_INPUTS, "pixel_values") if name in batch]
    sample = {name: _at_least_two(batch[name]) for name in names}
    program = _program(network, sample, max_length)
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and any(map(_computes, node.users))}
    used = [name for name in names if name in read]
    if used != names:  # a network that reads no mask does not ask for one
        sample = {name: sample[name] for name in used}
        program = _program(network, sample, max_length)
    return program, free_axes(used, max_length)


def _computes(node: Any) -> bool:
    """Return whether an operation reads more of its inputs than their sizes."""
    return node.target is not torch.ops.aten.sym_size.int


def free_axes(names: list[str], max_length: int | None) -> dict[str, dict[int, Any]]:
    """Return which axes of the inputs are of any length, by name."""
    batch, length = Dim("batch", min=1), Dim("length", min=1, max=max_length)
    return {name: {0: batch, 1: length} if name in TEXT_INPUTS else {0: batch} for name in names}


def _program(network: nn.Module, sample: dict[str, Tensor], max_length: int | None) -> ExportedProgram:
    shape = _SHAPES.get(tuple(sample))
    if shape is None:
        known = "; ".join(", ".join(names) for names in _SHAPES)
        raise ConfigError(
            f"a network that reads {', '.join(sample) or 'nothing'} cannot be exported; those that can: {known}"
        )
    wrapped = shape(network, list(sample)).eval()
    with torch.no_grad(), whole_lstms(), warnings.catch_warnings():
        # nn.LSTM keeps its weights in a list too, which the exporter notices; they are parameters all the same
        warnings.filterwarnings("ignore", r"(?s).*_flat_weights.*assigned during export.*")
        program = following(
            f"torch.export cannot follow {type(network).__name__}",
            lambda: torch.export.export(wrapped, (), sample, dynamic_shapes=free_axes(list(sample), max_length)),
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine, and is most of a small model's size
    return program


def following(what: str, convert: Callable[[], T]) -> T:
    """Convert, or say in one line what stood in the way."""
    try:
        return convert()
    except (KDError, OSError):  # a full disk is not the graph's fault
        raise
    except Exception as error:  # torch's and ONNX's exporters raise a dozen kinds; each means the same to the user
        raise KDError(f"{what}: {reason(error)}; formats that need no graph: safetensors, huggingface") from error


def reason(error: BaseException) -> str:
    """Return what lies at the bottom of an error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _at_least_two(entry: Tensor) -> Tensor:
    """Return some rows, more than one: the exporter takes an axis of length 1 for one that is never longer."""
    rows = entry[:4]
    return torch.cat([rows, rows]) if len(rows) == 1 else rows


@contextmanager
def whole_lstms() -> Iterator[None]:
    """Keep each LSTM one operation of any length inside this block.

    torch otherwise asks what comes out of an LSTM by unrolling it, and so takes the example's length for the only one.
    As `torch.export._patches` does for its own way (a loop, slower by far): in these tables, which are put back.
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
