"""What one text costs in each format: processor time in torch, onnxruntime, OpenVINO and ExecuTorch, taken in turns.

Students of random weights, since these decide no time: a BiLSTM of 128, 3 layers of 384, and MiniLM's 6 layers of 384.
One text of 24 tokens, one thread. A format whose packages are missing is left out, and a line says so:
pip install -e '.[export,executorch,openvino]' -c constraints.txt
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.common import Measure
from kd_lightning.config.trust import trusting
from kd_lightning.export.formats import check_choice
from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.transformer import transformer
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch

TOKENS, MOST_TOKENS, VOCABULARY, ROUNDS, WARM = 24, 128, 30_522, 96, 8
FORMATS = (
    ("onnx", "none"), ("onnx", "int8-dynamic"), ("openvino", "none"), ("openvino", "int8-weights"),
    ("openvino", "int8-static"), ("executorch", "none"), ("executorch", "int8-static"), ("executorch", "int8-dynamic"),
)  # fmt: skip
STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "BiLSTM-128": partial(BiLSTM, 2, VOCABULARY, embedding_size=128, hidden_size=128),
    "3 x 384": partial(transformer, 2, VOCABULARY, hidden_size=384, num_layers=3, num_heads=12, intermediate_size=1536),
    "MiniLM, 6 x 384": partial(
        transformer, 2, VOCABULARY, hidden_size=384, num_layers=6, num_heads=12, intermediate_size=1536
    ),
}


def run() -> list[Measure]:
    """Time each student in each format that is installed."""
    torch.set_num_threads(1)
    found = []
    for name, make in STUDENTS.items():
        torch.manual_seed(0)
        student, text = make().eval(), texts(1)
        with tempfile.TemporaryDirectory() as folder:
            networks = {"torch": student, **exported(student, Path(folder))}
            for format, seconds in in_turns(networks, text).items():
                note = f"{TOKENS} tokens, processor time"
                found.append(Measure(f"{name}: {format}", [1000 * one for one in seconds], "ms", note=note))
    return found


def texts(count: int) -> Batch:
    """Return a batch of random texts."""
    ids = torch.randint(1, VOCABULARY, (count, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.arange(count)}


def exported(student: nn.Module, folder: Path) -> dict[str, nn.Module]:
    """Write a student in each format, and load it; a format that cannot be had is a line."""
    model = SimpleNamespace(network=student, max_length=MOST_TOKENS, tokenizer=None)
    source: Any = SimpleNamespace(model=model, network=student, held_out=[texts(4)], calibration=[texts(64)])
    found: dict[str, nn.Module] = {}
    for format, quantize in FORMATS:
        name, out = f"{format} {quantize}", folder / f"{format}-{quantize}"
        out.mkdir()
        try:
            chosen = check_choice(format, quantize)
            with trusting():  # this process writes it
                written: Any = chosen.write(source, quantize, out)
                found[name] = chosen.load(out, written, 1)
        except ConfigError as error:
            print(f"{name}: not measured ({error})")
    return found


def in_turns(networks: dict[str, nn.Module], text: Batch) -> dict[str, list[float]]:
    """Return the processor seconds of a text in each network, over `ROUNDS` turns after `WARM` that are not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(WARM + ROUNDS):
        for name, network in networks.items():
            begun = time.process_time()
            with torch.inference_mode():
                run_network(network, text)
            if turn >= WARM:
                seconds[name].append(time.process_time() - begun)
    return seconds
