"""Networks in ONNX files, computed by onnxruntime."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.onnx_files import open_session, refusals

_READS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
_TYPES = {
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16,
}  # fmt: skip
_PACKED = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}
"""Operators whose weights are packed, and which of their inputs belong to these."""
_SCALES = {"DequantizeLinear": (1, 2), "QuantizeLinear": (1, 2), "MatMulInteger": (2, 3)}
"""Operators and those of their inputs that are scales and zero points."""


class OnnxNetwork(nn.Module):
    """A network in an ONNX file, which onnxruntime runs on the CPU.

    It is frozen, and its graph computes in the precision in which it was exported. Copies share their sessions, which
    keep nothing of what they computed. A mask that the batch lacks is all ones, segments are zeros.

    Args:
        file: The model. Its output `logits`, or its only one, is read.
        threads: Of each operator; None: as many as torch uses.

    Raises:
        ConfigError: It reads something else than texts or images by the names of Hugging Face, or has several outputs.
        KDError: onnxruntime cannot read the file.
    """

    def __init__(self, file: Path, threads: int | None = None) -> None:
        super().__init__()
        self.file, self.threads = file, threads
        self._sessions: dict[int, Any] = {}
        session = self._session()
        self.inputs = {one.name: _TYPES.get(one.type) for one in session.get_inputs()}
        outputs = [one.name for one in session.get_outputs()]
        if strange := [name for name, kind in self.inputs.items() if name not in _READS or kind is None]:
            raise ConfigError(f"{file} reads {', '.join(strange)}; expected nothing but {', '.join(_READS)}")
        if "logits" not in outputs and len(outputs) != 1:
            raise ConfigError(f"{file} has the outputs {', '.join(outputs)}; expected one called logits")
        self.output = "logits" if "logits" in outputs else outputs[0]

    def forward(self, **entries: Tensor) -> Tensor:
        """Return the logits of a batch, on its device.

        Raises:
            ConfigError: It reads texts and the batch has images, or the other way round.
            KDError: onnxruntime refuses the batch, as of a file for batches of one size only.
        """
        reads = "input_ids" if "input_ids" in self.inputs else "pixel_values"
        if reads not in entries:
            raise ConfigError(f"{self.file} reads {reads}, and the data have {', '.join(entries)}")
        main = entries[reads]
        fill = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
        given = {
            name: (entries[name] if name in entries else fill[name](main)).cpu().numpy().astype(kind, copy=False)
            for name, kind in self.inputs.items()
        }
        try:
            [found] = self._session().run([self.output], given)
        except refusals() as error:
            shape, reason = list(main.shape), " ".join(str(error).split())
            raise KDError(f"{self.file} cannot compute {reads} of shape {shape}: {reason[:300]}") from error
        return torch.from_numpy(found).to(main.device)

    def _session(self) -> Any:
        """Return the session for as many threads as there are to be; each is opened once."""
        threads = self.threads or torch.get_num_threads()
        if threads not in self._sessions:
            self._sessions[threads] = open_session(self.file, threads)
        return self._sessions[threads]

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process opens the file with."""
        return {**self.__dict__, "_sessions": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxNetwork:
        """Return the network itself."""
        return self

    @cached_property
    def counts(self) -> tuple[int, int]:
        """The number of its weights, and of those outside of embedding tables."""
        import onnx
        from onnx import TensorProto, helper

        graph = onnx.load(str(self.file), load_external_data=False).graph
        kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8)
        sizes = {one.name: int(np.prod(one.dims)) for one in graph.initializer if one.data_type in kinds}
        tables: set[str] = set()
        for node in graph.node:
            attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
            names = dict(enumerate(node.input))
            for place in _PACKED.get(node.op_type, ())[1:] + _SCALES.get(node.op_type, ()):
                sizes.pop(names.get(place, ""), None)
            weight = names.get(_PACKED.get(node.op_type, (0,))[0], "")
            if node.op_type == "MatMulNBits":
                sizes[weight] = attributes["K"] * attributes["N"]
            elif node.op_type == "GatherBlockQuantized" and weight in sizes:
                sizes[weight] *= 8 // attributes.get("bits", 4)
            if node.op_type in ("Gather", "GatherBlockQuantized"):
                tables.add(weight)
        total = sum(sizes.values())
        return total, total - sum(sizes.get(name, 0) for name in tables)
