"""How large and how fast a network is, and on what machine that was measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.runtime.onnx_files import weight_files
from kd_lightning.runtime.threads import usable_cores
from kd_lightning.types import Batch


@dataclass(frozen=True)
class Latency:
    """Time from one example on the device to its output, in milliseconds.

    Attributes:
        p50: Median.
        p95: 95th percentile.
        calls: Number of timed calls.
        threads: CPU threads torch was allowed.
        device: Where it ran, `cpu` or `cuda:0`.
    """

    p50: float
    p95: float
    calls: int
    threads: int
    device: str


@dataclass(frozen=True)
class Throughput:
    """Examples a second over whole batches, the padding of those batches included.

    Attributes:
        examples_per_second: Examples divided by seconds, over all timed batches.
        batch_size: Size of the largest timed batch.
        threads: CPU threads torch was allowed.
        device: Where it ran.
    """

    examples_per_second: float
    batch_size: int
    threads: int
    device: str


@dataclass(frozen=True)
class Size:
    """How much a network weighs.

    Attributes:
        parameters: All parameters, shared ones counted once.
        parameters_without_embeddings: The same without token and position tables, which a lookup never multiplies.
        bytes: Length of its weights as a safetensors file.
    """

    parameters: int
    parameters_without_embeddings: int
    bytes: int


Batches = Sequence[Batch] | Mapping[str, Sequence[Batch]]
"""The same batches for every network, or a list for each by name (where tokenizers differ), in the same order."""


def measure_latency(
    networks: Mapping[str, nn.Module], batches: Batches, *, rounds: int = 1, warmup: int = 1, threads: int | None = None
) -> dict[str, Latency]:
    """Time every network on one example at a time, taking turns.

    For each example all networks run one after the other, so that a machine that slows down half way (heat, a
    neighbour) slows all of them alike. Networks run as they are (no cast, no autocast) in eval mode under
    `inference_mode`. Moving the example to the device is not timed. On CUDA every call ends with a synchronisation.

    Args:
        networks: Networks by name.
        batches: Batches of one example, see `single_examples`.
        rounds: How often to go through the examples.
        warmup: Untimed calls right before each timed one. Without any, a network that follows a large one finds its
            own weights gone from the processor's caches, which is not how it is served.
        threads: CPU threads to use; None keeps `torch.get_num_threads()`. Restored afterwards, as are the training
            modes.

    Returns:
        Latencies under the networks' names.

    Raises:
        ValueError: If there are no batches, a batch holds more than one example, or the networks' lists differ in
            length.
    """
    prepared = _per_network(networks, batches)
    if any(_batch_size(batch) != 1 for own in prepared.values() for batch in own):
        raise ValueError("latency is measured on batches of one example: use single_examples(batches)")
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with inference(networks.values(), threads):
        for _ in range(rounds):
            for position in range(len(next(iter(prepared.values()), ()))):
                for name, network in networks.items():
                    for _ in range(warmup):
                        _timed(network, prepared[name][position])
                    seconds[name].append(_timed(network, prepared[name][position]))
        used = torch.get_num_threads()
    return {
        name: Latency(
            p50=1000 * statistics.median(seconds[name]),
            p95=1000 * _percentile(seconds[name], 0.95),
            calls=len(seconds[name]),
            threads=used,
            device=str(_device(network)),
        )
        for name, network in networks.items()
    }


def measure_throughput(
    networks: Mapping[str, nn.Module], batches: Batches, *, warmup: int = 1, threads: int | None = None
) -> dict[str, Throughput]:
    """Measure examples per second over whole batches, in turns as in `measure_latency`.

    Args:
        networks: Networks by name.
        batches: Batches as the data gives them, with their lengths and padding.
        warmup: Untimed batches of each network beforehand.
        threads: CPU threads to use; None keeps `torch.get_num_threads()`.

    Returns:
        Throughputs under the networks' names.

    Raises:
        ValueError: If there are no batches or the networks' lists differ in length.
    """
    prepared = _per_network(networks, batches)
    seconds = dict.fromkeys(networks, 0.0)
    with inference(networks.values(), threads):
        for name, network in networks.items():
            for step in range(warmup):
                _timed(network, prepared[name][step % len(prepared[name])])
        for position in range(len(next(iter(prepared.values()), ()))):
            for name, network in networks.items():
                seconds[name] += _timed(network, prepared[name][position])
        used = torch.get_num_threads()
    return {
        name: Throughput(
            examples_per_second=sum(map(_batch_size, prepared[name])) / seconds[name],
            batch_size=max(map(_batch_size, prepared[name])),
            threads=used,
            device=str(_device(network)),
        )
        for name, network in networks.items()
    }


def single_examples(batches: Iterable[Batch], limit: int | None = None) -> list[Batch]:
    """Cut batches into batches of one example, each without the padding it had among longer ones.

    Padding is taken to be on the right (or left): columns where `attention_mask` is 0 go, from every entry of the same
    shape. `teacher_*` entries go by `teacher_attention_mask`.

    >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]]), "attention_mask": mask}
    >>> [example["input_ids"].tolist() for example in single_examples([batch])]
    [[[5, 6, 7]], [[8]]]
    """
    examples: list[Batch] = []
    for batch in batches:
        for row in range(_batch_size(batch)):
            if limit is not None and len(examples) >= limit:
                return examples
            examples.append(_without_padding({name: value[row : row + 1] for name, value in batch.items()}))
    return examples


def size(network: nn.Module, file: str | Path | None = None) -> Size:
    """Count parameters and bytes.

    Args:
        network: The network.
        file: The safetensors file its weights were saved to; None serialises them in memory to learn the length. Tied
            tensors are written once. ONNX files count as they are.

    Returns:
        The size.
    """
    from kd_lightning.models.onnx import OnnxNetwork
    from kd_lightning.models.size import count_parameters

    parameters, without_embeddings = count_parameters(network)
    length = Path(file).stat().st_size if file is not None else _serialised_length(network)
    files = [file for one in network.modules() if isinstance(one, OnnxNetwork) for file in weight_files(one.file)]
    length += sum(file.stat().st_size for file in files)
    return Size(parameters=parameters, parameters_without_embeddings=without_embeddings, bytes=length)


def environment() -> dict[str, Any]:
    """Describe the machine and the versions, for a report. What cannot be found out is None."""
    packages = ("kd-lightning", "torch", "lightning", "torchmetrics", "transformers")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": {package: _version(package) for package in packages},
        "git_commit": _git_commit(),
    }


def _per_network(networks: Mapping[str, nn.Module], batches: Batches) -> dict[str, list[Batch]]:
    """Give each network its own list of batches, on its device."""
    own = batches if isinstance(batches, Mapping) else dict.fromkeys(networks, batches)
    if missing := [name for name in networks if name not in own]:
        raise ValueError(f"no batches for {', '.join(missing)}; given for: {', '.join(own)}")
    lengths = {name: len(own[name]) for name in networks}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"every network must run the same examples, got lists of different length: {lengths}")
    if 0 in lengths.values():
        raise ValueError("nothing to measure on: the list of batches is empty")
    return {
        name: [{key: value.to(_device(network)) for key, value in batch.items()} for batch in own[name]]
        for name, network in networks.items()
    }


@contextlib.contextmanager
def inference(networks: Iterable[nn.Module], threads: int | None) -> Iterator[None]:
    """Eval mode, inference mode and a fixed number of threads inside; all as it was outside."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    before = torch.get_num_threads()
    try:
        for module, _ in modes:
            module.training = False
        if threads is not None:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        for module, mode in modes:  # one by one: a frozen part may be in eval mode inside a network in training mode
            module.training = mode


def _timed(network: nn.Module, batch: Batch) -> float:
    """Return the seconds of one forward pass."""
    from kd_lightning.models.adapt import run_network

    device = _device(network)
    _synchronise(device)
    start = time.perf_counter()
    run_network(network, batch)
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(network: nn.Module) -> torch.device:
    """Return where the network's first parameter lies; a network without any runs on the CPU."""
    first = next(network.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _batch_size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _percentile(values: Sequence[float], share: float) -> float:
    """Return the percentile by linear interpolation, as `numpy.percentile` does."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _without_padding(example: Batch) -> Batch:
    """Drop the columns of one example that its attention mask leaves out."""
    trimmed: Batch = {}
    for name, value in example.items():
        mask = example.get("teacher_attention_mask" if name.startswith("teacher_") else "attention_mask")
        has_tokens = mask is not None and mask.any() and value.shape == mask.shape
        trimmed[name] = value[:, mask[0].bool()] if mask is not None and has_tokens else value
    return trimmed


def _serialised_length(network: nn.Module) -> int:
    """Return the length of the network's safetensors file, tied tensors once."""
    from safetensors.torch import save

    unique: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    for name, tensor in network.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        unique.setdefault(place, (name, tensor.detach().contiguous()))
    return len(save(dict(unique.values())))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    """Return the processor's name: /proc/cpuinfo on Linux, else what the platform reports."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory_bytes() -> int | None:
    """Return the machine's memory; None where the system does not tell (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _git_commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` when it was changed; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
