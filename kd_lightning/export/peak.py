"""Measures a model's peak memory, in a process that loads only the model's own runtime.

python -m kd_lightning.export.peak KIND FILE BATCHES.npz THREADS True|False

KIND is `onnx`, `openvino`, `pt2` or `executorch` for a file of those formats; `folder` for a run or export that this
package loads. The last argument is whether they may run code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kd_lightning.config.trust import trusting
from kd_lightning.runtime.memory import peak_bytes

Batch = dict[str, Any]


def read_batches(file: str) -> Iterator[Batch]:
    """Load batches stored as `NUMBER/ENTRY`."""
    with np.load(file) as stored:
        grouped: dict[int, Batch] = {}
        for name in stored.files:
            number, _, entry = name.partition("/")
            grouped.setdefault(int(number), {})[entry] = stored[name]
    yield from (grouped[number] for number in sorted(grouped))


def runner(kind: str, path: str, threads: int) -> Callable[[Batch], Any]:
    """Load a model, with only its own runtime, and return a function that runs it on a batch."""
    if kind == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        reads = session.get_inputs()
        return lambda batch: session.run(None, {one.name: batch.get(one.name, _nothing(one, batch)) for one in reads})
    if kind == "openvino":
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        model = openvino.Core().compile_model(path, "CPU", options)
        wanted = [one.any_name for one in model.inputs]
        return lambda batch: model({name: batch[name] for name in wanted})
    import torch

    torch.set_num_threads(threads)
    if kind == "pt2":
        from kd_lightning.export.formats.pt2 import load_graph

        graph = load_graph(Path(path)).module()
        reads = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        return lambda batch: graph(**{name: torch.from_numpy(batch[name]) for name in reads})
    if kind == "executorch":
        from kd_lightning.export.exported import read_exported
        from kd_lightning.export.formats.executorch import ExecutorchNetwork, open_program

        graph = ExecutorchNetwork(open_program(Path(path), threads), read_exported(Path(path).parent).inputs)
        return lambda batch: graph(**{name: torch.from_numpy(entry) for name, entry in batch.items()})
    from kd_lightning.export.load import load_model
    from kd_lightning.models.adapt import run_network

    network = load_model(Path(path)).network
    return lambda batch: run_network(network, {name: torch.from_numpy(entry) for name, entry in batch.items()})


def _nothing(entry: Any, batch: Batch) -> Any:
    """Return what a language model's graph reads as the tokens before a text: keys or values of none."""
    size = [len(next(iter(batch.values()))), *(one if isinstance(one, int) else 0 for one in entry.shape[1:])]
    return np.zeros(size, np.float16 if "16" in entry.type else np.float32)


def main() -> None:
    """Run every batch and print the process's peak resident size in bytes."""
    kind, path, batches, threads, trust = sys.argv[1:]
    with trusting(trust == "True"):
        run = runner(kind, path, int(threads))
    for batch in read_batches(batches):
        if kind in ("onnx", "openvino"):
            run(batch)
        else:
            import torch

            with torch.inference_mode():
                run(batch)
    print(peak_bytes())


if __name__ == "__main__":
    main()
