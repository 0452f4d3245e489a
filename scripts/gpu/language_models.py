"""What only a GPU shows of language models: random weights of SmolLM2-135M's and of a 1.5B model's shape."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Measure, ratios
from benchmarks.lm_task import SMOLLM2, TOP_K, random_sparse, sparse_objective
from gpu.training import DEVICE, ON_GPU, contest, in_turn, optimizer, timed, train
from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss
from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.losses.sparse import sparse_linear_kd
from kd_lightning.models.causal_lm import CausalLM, causal_lm_small
from kd_lightning.models.continuation import continuations
from kd_lightning.tasks import CausalLanguageModeling
from kd_lightning.teachers import CachedTeacher, FrozenTeacher, Teacher
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.training.distillation import DistillationModule, SupervisedModule
from kd_lightning.training.objective import Objective
from kd_lightning.training.optim import warmup_linear
from kd_lightning.types import Batch, ModelOutput, SparseLogits

LARGE = {
    "hidden_size": 1536, "num_layers": 28, "num_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
}  # fmt: skip
"""The sizes of a model of 1.5 billion weights."""
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
WORDS, BATCH, LENGTH = (49_152, 16, 512) if ON_GPU else (2_048, 2, 16)
WARM, STEPS = (4, 24) if ON_GPU else (1, 3)
TOKENS = BATCH * LENGTH


def lm_steps(peak: Callable[[], list[float]]) -> Iterable[Measure]:
    """A student of SmolLM2's shape: from text alone, from the sparse cache, beside a running teacher of 1.5B."""
    most, given = statistics.median(peak()), batches()
    student = network(SMOLLM2, logits_in_training=False)
    with tempfile.TemporaryDirectory() as folder:
        teacher = stored(given, Path(folder) / "cache")
        alone = SupervisedModule(student, optimizer(), warmup_linear, task=CausalLanguageModeling(WORDS))
        cached = distilled(student, teacher, sparse_objective())
        seconds = in_turn({
            "cached": lambda: train(cached, given, WARM, STEPS), "alone": lambda: train(alone, given, WARM, STEPS),
        }, 3)  # fmt: skip
    yield Measure("sparse cache / text alone: a step", ratios(*seconds.values()), "ratio", "<= 1.03")
    yield from _rates("from the sparse cache", seconds["cached"], flop(student, 3), most)
    large = network(LARGE).to(torch.bfloat16)
    dense = Objective({"ce": CrossEntropyLoss(), "kd": SoftTargetLoss()}, {"ce": 0.1, "kd": 0.9})
    live = distilled(network(SMOLLM2), FrozenTeacher(large, "float32"), dense)
    with _peak("beside a running teacher of 1.5B") as memory:
        took = [train(live, given, WARM, STEPS)]
    yield from _rates("beside a running teacher of 1.5B", took, flop(large, 1) + flop(student, 3), most)
    yield from memory


def lm_losses() -> Iterable[Measure]:
    """The loss of K log probabilities and their tail from hidden states, against dense logits, in bfloat16."""
    for words, width in ((49_152, 576), (131_072, 1536)) if ON_GPU else ((512, 32),):
        tokens = 4096 if ON_GPU else 64
        hidden, head, teacher, labels = _inputs(tokens, words, width)
        sparse = random_sparse(tokens, vocabulary=words).to(DEVICE)

        def ours(h: Tensor, w: Tensor, y: Tensor = labels, sparse: SparseLogits = sparse) -> Tensor:
            return sparse_linear_kd(h, w, sparse, y, ce_weight=0.1, kd_weight=0.9).loss

        def dense(h: Tensor, w: Tensor, y: Tensor = labels, teacher: Tensor = teacher) -> Tensor:
            logits = h @ w.T
            return 0.1 * cross_entropy(logits, y) + 0.9 * soft_target(logits, teacher)

        found = {name: contest(loss, (hidden, head)) for name, loss in (("ours", ours), ("dense", dense))}
        size = f"V = {words:,}, {tokens:,} tokens, width {width}"
        yield Measure(f"{size}: sparse, chunked", [1000 * one for one in found["ours"][0]], "ms")
        yield Measure(f"{size}: sparse, chunked / dense: time", ratios(found["ours"][0], found["dense"][0]), "ratio")
        if ON_GPU:
            share = found["ours"][1] / found["dense"][1]
            yield Measure(f"{size}: sparse, chunked / dense: peak memory", [share], "ratio", "<= 0.1667")


def lm_generation() -> Iterable[Measure]:
    """What a student of SmolLM2's shape generates for on-policy distillation: 64 tokens after 64."""
    student, prompts = network(SMOLLM2).to(DEVICE), 64 if ON_GPU else 2
    if ON_GPU:
        student = student.to(torch.bfloat16)
    new = 64 if ON_GPU else 4
    texts = list(torch.randint(WORDS, (prompts, min(64, LENGTH)), device=DEVICE))
    seconds = timed(lambda: continuations(student, texts, new, [], 1.0, 0), 1, 3)
    yield Measure(f"{prompts} texts at once: generated tokens/s", [prompts * new / one for one in seconds], "1/s")


# -- what they share --------------------------------------------------------------------------------------------------


def network(sizes: dict[str, int], *, logits_in_training: bool = True) -> CausalLM:
    """Return a network of these sizes, a toy on a CPU, with the weights of seed 0."""
    torch.manual_seed(0)
    return causal_lm_small(WORDS, LENGTH, **(sizes if ON_GPU else TINY), logits_in_training=logits_in_training)


def batches(count: int = 4) -> list[Batch]:
    """Return batches of random tokens, each row a document."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        ids = torch.randint(WORDS, (BATCH, LENGTH), generator=generator)
        labels = ids.clone()
        labels[:, 0] = -100
        batch = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
            "index": torch.arange(number * BATCH, (number + 1) * BATCH),
        }  # fmt: skip
        found.append({name: value.pin_memory() for name, value in batch.items()} if ON_GPU else batch)
    return found


def stored(given: list[Batch], folder: Path) -> CachedTeacher:
    """Return a teacher whose random log probabilities are all in a cache."""
    cache = TeacherCache.create(folder, {"teacher": "timings"}, len(given) * BATCH, Storage("float16", TOP_K))
    for batch in given:
        sparse = random_sparse(BATCH, LENGTH, vocabulary=WORDS)
        cache.add(batch["index"], ModelOutput(sparse.values[..., :0], sparse=sparse), batch["attention_mask"])
    cache.flush()
    return CachedTeacher(cache)


def distilled(student: CausalLM, teacher: Teacher, objective: Objective) -> DistillationModule:
    """Return a distillation as the pipeline makes it."""
    task = CausalLanguageModeling(WORDS)
    return DistillationModule(student, teacher, objective, optimizer(), warmup_linear, task=task)


def flop(model: CausalLM, passes: int) -> float:
    """FLOP of a batch: `passes` 1 is the forward pass, 3 a training step; tied embeddings count as the output layer."""
    config = model.network.config
    weights = sum(weight.numel() for weight in model.network.parameters())
    attention = 4 * config.num_hidden_layers * LENGTH * config.hidden_size
    return passes * TOKENS * (2 * weights + attention)


def _rates(name: str, seconds: list[float], flops: float, peak: float) -> Iterator[Measure]:
    yield Measure(f"{name}: tokens/s", [TOKENS / one for one in seconds], "1/s")
    yield Measure(f"{name}: share of the bf16 peak", [flops / one / peak for one in seconds], "ratio")


@contextmanager
def _peak(name: str) -> Iterator[list[Measure]]:
    """Yield a list that holds, at the end, the most memory that was allocated meanwhile."""
    found: list[Measure] = []
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    yield found
    if ON_GPU:
        found.append(Measure(f"{name}: peak memory", [torch.cuda.max_memory_allocated() / 1e9], "GB"))


def _inputs(tokens: int, words: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=DEVICE) * scale).to(torch.bfloat16)

    labels = torch.randint(words, (tokens,), generator=generator, device=DEVICE)
    hidden, head = randn(tokens, width), randn(words, width, 0.05)
    return hidden.requires_grad_(), head.requires_grad_(), randn(tokens, words), labels
