"""Small ONNX files: each token's logits are a row of a table, and those of padding zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


def save(path: Path, nodes: list[Any], inputs: list[str], outputs: list[str], **weights: NDArray[Any]) -> Path:
    """Write a graph over texts."""
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


def keep_weights_in(path: Path, table: NDArray[np.float32], location: str) -> None:
    """Have a tagger's file name another one, which is not written, as the place of its table."""
    model = onnx.load(str(path))
    [tensor] = [one for one in model.graph.initializer if one.name == "table"]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", str(table.nbytes))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())


def write_tagger(path: Path, table: NDArray[np.float32]) -> Path:
    """Logits (B, L, C): of each token the row of `table` (V, C) by its id."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["logits"]),
    ]
    return save(path, nodes, ["input_ids", "attention_mask"], ["logits"], table=table, last=np.array([2]))
