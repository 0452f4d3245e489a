"""Cross-entropy and soft targets over large vocabularies: `fused_linear_kd` against a loss that holds the logits.

All take hidden states (4,096 tokens, width 576, student and teacher alike) and two output matrices, in float32, to the
same loss `0.5 CE + 0.5 T^2 KL(teacher || student)` at T = 2 and to the gradients of the student's hidden states and
matrix; the peers at the smaller vocabulary only. Every round runs each contestant in a fresh process, their order
rotated; it makes the inputs, runs a small step untimed, and then one whole step, which gives the seconds, the peak RSS
and the loss (the losses are compared).

Peak memory is the process's peak RSS less its RSS after imports. It holds the inputs and the matrix gradient, without
which no contestant can do; the notes give the ratio without them too (two matrices, their gradient, hidden states).

naive: the logits by two products, `cross_entropy` and `soft_target` of them, and `backward`.
torchtune style: the idea of torchtune's chunked output losses, written anew on the same losses: the output layer makes
    a list of 8 chunks of logits, and the loss is summed chunk by chunk; autograd keeps every chunk.
Liger: `liger_kernel.chunked_loss.LigerFusedLinearJSDLoss` of liger-kernel 0.8.5 (no Triton in it) with `beta=0`, which
    is this KL, the factor T^2 in its weight, and its defaults otherwise: chunks of 1,024 tokens, `torch.compile`.
    Its untimed step is a whole one, so that compilation is not in its time; it is in its memory. It is installed into a
    temporary folder; where pip cannot, or no C++ compiler is there for `torch.compile`, it is left out and the reason
    printed. Liger's Triton kernels need a GPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Measure, fresh_process, ratios
from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.fused_linear import fused_linear_kd
from kd_lightning.losses.soft_target import soft_target

VOCABULARIES = (32_768, 131_072)
TOKENS, HIDDEN, TEMPERATURE = 4096, 576, 2.0
ROUNDS = 5

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def run(vocabularies: tuple[int, ...] = VOCABULARIES, tokens: int = TOKENS, rounds: int = ROUNDS) -> list[Measure]:
    """Measure time and peak memory at each size."""
    measures = []
    with tempfile.TemporaryDirectory(prefix="vocabulary_") as folder:
        peers = ["torchtune style", *(["Liger"] if _install_liger(Path(folder)) else [])]
        per_logit = 0.0
        for vocabulary in vocabularies:
            fitting = _tokens_that_fit(tokens, vocabulary, per_logit)
            racing = peers if vocabulary == min(vocabularies) else []  # at 128k a peer's round takes minutes
            results = _rounds(vocabulary, fitting, rounds, racing)
            measures += _measures(vocabulary, fitting, tokens, results)
            per_logit = max(_memory(result) for result in results["naive"]) / (vocabulary * fitting)
    return measures


def _rounds(vocabulary: int, tokens: int, rounds: int, peers: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return what the fresh processes say, by contestant."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", "naive", *peers)}
    for turn in range(rounds):
        names = list(results)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(
                fresh_process("benchmarks.vocabulary:step", name=name, vocabulary=vocabulary, tokens=tokens)
            )
    losses = [result["loss"] for each in results.values() for result in each]
    if max(losses) - min(losses) > 1e-5 * max(losses):
        raise RuntimeError(f"the contestants do not compute the same loss: {results}")
    return results


def _measures(vocabulary: int, tokens: int, wanted: int, results: dict[str, list[dict[str, Any]]]) -> list[Measure]:
    """Return the seconds and megabytes of each contestant, and ours over every other's."""
    size = f"V = {vocabulary:,}"
    note = (
        "" if tokens == wanted else f"{tokens:,} tokens for all, because naive would not fit in memory with {wanted:,}"
    )
    held = 4 * HIDDEN * (3 * vocabulary + 3 * tokens) / 1e6  # matrices, one gradient; hidden states, one gradient
    ours = results["ours"]
    measures = []
    for name, each in results.items():
        measures += [
            Measure(f"{name}, {size}: time", [result["seconds"] for result in each], "s", note=note),
            Measure(f"{name}, {size}: peak memory", [_memory(result) for result in each], "MB", note=note),
        ]
        if name == "ours":
            continue
        beside = ours[: len(each)]
        time_ratios = ratios([result["seconds"] for result in beside], [result["seconds"] for result in each])
        memory_ratios = ratios([_memory(result) for result in beside], [_memory(result) for result in each])
        bare = statistics.median(
            ratios([_memory(result) - held for result in beside], [_memory(result) - held for result in each])
        )
        alike = f"{bare:.4f} without the {held:,.0f} MB of inputs and gradients, which all hold. {note}".rstrip()
        goals = ("<= 1.0", "<= 0.1667") if name == "naive" else (None, None)
        measures += [
            Measure(f"ours / {name}, {size}: time", time_ratios, "ratio", goals[0], note),
            Measure(f"ours / {name}, {size}: peak memory", memory_ratios, "ratio", goals[1], alike),
        ]
    return measures


def _memory(result: dict[str, Any]) -> float:
    return float(result["peak_rss_mb"] - result["import_rss_mb"])


def _tokens_that_fit(tokens: int, vocabulary: int, mb_per_logit: float) -> int:
    """Halve the tokens until naive, by its memory at the smaller size, leaves a tenth of the machine's memory free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e3
    while mb_per_logit * vocabulary * tokens > 0.9 * available:
        tokens //= 2
    return tokens


# -- in the fresh processes -------------------------------------------------------------------------------------------


def step(name: str, vocabulary: int, tokens: int) -> dict[str, float]:
    """Run one whole step of a contestant and return its seconds and loss."""
    contestant = CONTESTANTS[name]
    _run(contestant, _inputs(vocabulary, tokens) if name == "Liger" else _inputs(1024, 256))
    inputs = _inputs(vocabulary, tokens)
    started = time.perf_counter()
    loss = _run(contestant, inputs)
    return {"seconds": time.perf_counter() - started, "loss": loss}


def _run(contestant: Callable[..., Tensor], inputs: Inputs) -> float:
    loss = contestant(*inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def _inputs(vocabulary: int, tokens: int) -> Inputs:
    """Return the student's and the teacher's hidden states, their matrices and labels."""
    generator = torch.Generator().manual_seed(0)
    h_s, h_t = (torch.randn(tokens, HIDDEN, generator=generator) for _ in range(2))
    w_s, w_t = (torch.randn(vocabulary, HIDDEN, generator=generator).mul_(0.05) for _ in range(2))
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return h_s.requires_grad_(), h_t, w_s.requires_grad_(), w_t, labels


def ours(h_s: Tensor, h_t: Tensor, w_s: Tensor, w_t: Tensor, labels: Tensor) -> Tensor:
    """The fused loss."""
    return fused_linear_kd(h_s, h_t, w_s, w_t, labels, temperature=TEMPERATURE).loss


def naive(h_s: Tensor, h_t: Tensor, w_s: Tensor, w_t: Tensor, labels: Tensor) -> Tensor:
    """The losses of all logits."""
    z_s, z_t = h_s @ w_s.T, h_t @ w_t.T
    return 0.5 * cross_entropy(z_s, labels) + 0.5 * soft_target(z_s, z_t, TEMPERATURE)


def torchtune_style(h_s: Tensor, h_t: Tensor, w_s: Tensor, w_t: Tensor, labels: Tensor) -> Tensor:
    """The losses of a list of chunks of logits."""
    student, teacher = ([h @ w.T for h in hidden.chunk(8)] for hidden, w in ((h_s, w_s), (h_t, w_t)))
    total = torch.zeros(())
    for z_s, z_t, y in zip(student, teacher, labels.chunk(8), strict=True):
        kd = soft_target(z_s, z_t, TEMPERATURE, reduction="sum")
        total = total + 0.5 * cross_entropy(z_s, y, reduction="sum") + 0.5 * kd
    return total / len(labels)


def liger(h_s: Tensor, h_t: Tensor, w_s: Tensor, w_t: Tensor, labels: Tensor) -> Tensor:
    """Liger's chunked loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weights = {"weight_hard_loss": 0.5, "weight_soft_loss": 0.5 * TEMPERATURE**2}
    loss: Tensor = LigerFusedLinearJSDLoss(**weights, beta=0.0, temperature=TEMPERATURE)(h_s, w_s, h_t, w_t, labels)
    return loss


CONTESTANTS = {"ours": ours, "naive": naive, "torchtune style": torchtune_style, "Liger": liger}


def _install_liger(folder: Path) -> bool:
    """Install Liger beside this project's environment, for the processes started from here; say so if it cannot be."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        print("Liger: left out, since torch.compile finds no C++ compiler")
        return False
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        "liger-kernel==0.8.5",
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"Liger: left out, since pip could not install it: {str(error.stderr or error).strip()[-500:]}")
        return False
    sys.path.append(str(folder))  # which every process started from here takes over
    return importlib.util.find_spec("liger_kernel") is not None
