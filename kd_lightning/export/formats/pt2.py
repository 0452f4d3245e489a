"""PyTorch's own archive (`torch.export`), which loads with torch alone, without TorchScript."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_lightning.config.trust import trusts_all
from kd_lightning.export.formats import Written
from kd_lightning.export.graph import trace
from kd_lightning.export.step import is_step, save_config, step_network
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.files import write_file

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FILE = "model.pt2"
QUANTIZE = ("none", "int8-weights", "fp16", "bf16")
NEEDS: tuple[str, ...] = ()
READS: tuple[str, ...] = ()


def check(model: TrainedModel) -> None:
    """Refuse nothing: tracing finds what is not supported."""


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Trace the student and save the graph."""
    model = source.model
    traced = trace(source.network, source.held_out[0], model.max_length, quantize)
    traced.program.example_inputs = None  # otherwise stored as a pickle
    archive = io.BytesIO()  # torch aborts the process if the disk is full
    torch.export.save(traced.program, archive)
    write_file(folder / FILE, archive.getvalue())
    if isinstance(source.network, CausalLM):
        save_config(source.network, model.tokenizer, folder)
    return Written(traced.inputs)


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Read the graph."""
    program = load_graph(folder / FILE)
    if not is_step(exported.inputs):
        return Pt2Network(program.module(), exported.inputs)
    graph = program.module(check_guards=False)  # they are of the example that was traced
    inputs = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    past = [inputs[name] for name in program.graph_signature.user_inputs][2:]
    shapes = [(int(one.shape[1]), int(one.shape[3])) for one in past]
    return step_network(folder, lambda entries: graph(*entries), shapes, past[0].dtype)


def load_graph(file: Path) -> Any:
    """Load a trusted archive, as a program: `torch.export.load` evaluates expressions in it.

    Raises:
        KDError: It is not trusted, or it holds what `write` does not write.
    """
    if not trusts_all():
        raise ConfigError(
            f"{file} may run code when it is loaded (torch.export evaluates expressions in it): if you trust its "
            "author, add --trust (in Python: load_export(..., trust=True)), or use the format onnx or safetensors"
        )
    check_archive(file)
    return torch.export.load(file)


_MEMBERS = re.compile(
    r"[^/]+/(data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt|models/model\.json"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id))"
)
_EXPRESSION = re.compile(
    r"(Symbol\('[a-z]+\d*'(, [a-z]+=(True|False))*\)|[A-Z][A-Za-z]+\(|True|False|[a-z]\d+|\d+|[ +\-*/%(),<>=&|~])*"
)


def check_archive(file: Path) -> None:
    """Refuse an archive with a pickle in it, a library, or expressions other than arithmetic of sizes.

    Raises:
        KDError: Names the member.
    """
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            known = _MEMBERS.fullmatch(entry.filename) and entry.compress_type == zipfile.ZIP_STORED
            if not known or (entry.filename.endswith(".pt") and entry.file_size):
                raise KDError(f"{file} holds {entry.filename!r}, which kd-export does not write: export it again")
            if entry.filename.endswith(".json"):
                _check_values(json.loads(archive.read(entry)), f"{file}: {entry.filename}")


def _check_values(content: Any, place: str) -> None:
    if isinstance(content, list):
        for value in content:
            _check_values(value, place)
    elif isinstance(content, dict):
        expression = content.get("expr_str")
        if expression is not None and not _EXPRESSION.fullmatch(str(expression)):
            raise KDError(f"{place} holds the expression {str(expression)[:80]!r}, which is not arithmetic of sizes")
        if content.get("use_pickle"):
            raise KDError(f"{place} names a pickle, which kd-export does not write: export it again")
        for value in content.values():
            _check_values(value, place)


class Pt2Network(nn.Module):
    """A graph as a network.

    Args:
        graph: What `ExportedProgram.module()` returns.
        inputs: Names of its inputs.
    """

    def __init__(self, graph: Any, inputs: list[str]) -> None:
        super().__init__()
        self.inputs = inputs
        self.held = (graph,)  # not as a submodule: it refuses eval()

    def forward(self, **entries: Tensor) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self.held[0](**{name: entries[name] for name in self.inputs})
        return logits
