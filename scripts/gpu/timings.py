"""The timings of `scripts/gpu_check.sh`: one part a process, each prints its figures as one line of JSON.

Times are the device's after warm-ups, in rounds in turn; sizes are small on a CPU, where only that the parts run is of
interest. FLOP are counted as usual: 2 a weight and token forwards, 4 more backwards, and attention's products.

python -m gpu.timings PART...    on the device that GPU_CHECK_DEVICE names
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Measure, ratios
from benchmarks.task import silence
from benchmarks.vocabulary import CONTESTANTS
from gpu.language_models import lm_generation, lm_losses, lm_steps
from gpu.training import (
    CLASSES,
    DEVICE,
    ON_GPU,
    base,
    batches,
    contest,
    distilled,
    in_turn,
    stored,
    supervised,
    synchronise,
    timed,
    train,
    train_by_hand,
)
from kd_lightning.teachers import AheadTeacher, FrozenTeacher
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.types import Batch


def bf16_peak() -> list[float]:
    """Return the FLOP/s of products of random bfloat16 matrices."""
    size = 8192 if ON_GPU else 256
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return [2 * size**3 / seconds for seconds in timed(lambda: a @ b)]


def ceilings() -> Iterable[Measure]:
    """What this card does at most: a copy, and a bfloat16 matrix product."""
    source = torch.randn(2**30 if ON_GPU else 2**20, device=DEVICE)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source))
    yield Measure("copy, read and written", [2 * 4 * source.numel() / each / 1e12 for each in seconds], "TB/s")
    yield Measure("bf16 matrix product", [each / 1e12 for each in bf16_peak()], "TFLOP/s")


def overhead() -> Iterable[Measure]:
    """A training step at BERT-base with a cached teacher, logging on, against a minimal hand-written loop."""
    return [*_overhead(256, 25, 3), *_overhead(32, 65, 5)]


def _overhead(size: int, steps: int, rounds: int) -> Iterable[Measure]:
    shape = base(size)
    given = batches(shape, 8)
    warm, steps = (5, steps) if ON_GPU else (1, 3)
    with tempfile.TemporaryDirectory() as folder:
        teacher = stored(given, Path(folder) / "cache")
        table = teacher.cache.lookup(torch.arange(len(given) * shape.batch)).logits
        seconds = in_turn({
            "ours": lambda: train(distilled(shape.network, teacher), given, warm, steps),
            "by hand": lambda: train_by_hand(shape.network, table, given, warm, steps),
        }, rounds)  # fmt: skip
    yield Measure(f"batch {size}: ours / by hand", ratios(seconds["ours"], seconds["by hand"]), "ratio", "<= 1.03")
    yield Measure(f"batch {size}: ours, a step", [1000 * each for each in seconds["ours"]], "ms")


def cached() -> Iterable[Measure]:
    """A step of a 3-layer student with a cached teacher against the same from labels alone."""
    return [*_cached(256), *_cached(32)]


def _cached(size: int) -> Iterable[Measure]:
    shape = base(size, layers=3)
    given = batches(shape, 8)
    warm, steps = (5, 65) if ON_GPU else (1, 3)
    with tempfile.TemporaryDirectory() as folder:
        teacher = stored(given, Path(folder) / "cache")
        seconds = in_turn({
            "distilled": lambda: train(distilled(shape.network, teacher), given, warm, steps),
            "labels": lambda: train(supervised(shape.network), given, warm, steps),
        }, 5)  # fmt: skip
    shares = ratios(seconds["distilled"], seconds["labels"])
    yield Measure(f"batch {size}: distilled / labels only", shares, "ratio", "<= 1.03")
    yield Measure(f"batch {size}: distilled, a step", [1000 * each for each in seconds["distilled"]], "ms")


def overlap() -> Iterable[Measure]:
    """A live BERT-base teacher one batch ahead on a stream of its own, against one that predicts in the step."""
    return [*_overlap(32, False), *_overlap(32, True), *_overlap(256, False)]


def _overlap(size: int, compiled: bool) -> Iterable[Measure]:
    above, shape = base(size), base(size, layers=3)
    given = batches(shape, 8)
    warm, steps = (8, 48) if ON_GPU else (1, 3)
    teacher = FrozenTeacher(above.network, "bf16", compile=compiled and ON_GPU)
    seconds = in_turn({
        "in the step": lambda: train(distilled(shape.network, teacher), given, warm, steps, compile=compiled),
        "ahead": lambda: train(distilled(shape.network, AheadTeacher(teacher)), given, warm, steps, compile=compiled),
    }, 3)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        module = distilled(shape.network, stored(given, Path(folder) / "cache"))
        alone = train(module, given, warm, steps, compile=compiled)
    moved = {name: value.to(DEVICE) for name, value in given[0].items()}
    teacher.to(DEVICE)
    own, busy = statistics.median(timed(lambda: teacher(moved))), _kernel_seconds(lambda: teacher(moved))
    name = f"batch {size}{', both compiled' if compiled else ''}"
    note = (
        f"a step with a cached teacher {1000 * alone:.1f} ms; the teacher's pass alone {1000 * own:.1f} ms, of which "
        f"its kernels run {1000 * busy:.1f} ms"
    )
    gain = ratios(seconds["in the step"], seconds["ahead"])
    yield Measure(f"{name}: in the step / ahead", gain, "ratio", ">= 1.3", note)
    yield Measure(f"{name}: ahead, a step", [1000 * each for each in seconds["ahead"]], "ms")


def _kernel_seconds(work: Callable[[], object]) -> float:
    """Return for how long the device's kernels run."""
    if not ON_GPU:
        return statistics.median(timed(work, 1, 2))
    synchronise()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        synchronise()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def fused() -> Iterable[Measure]:
    """`fused_linear_kd` at 128k words and 8,192 tokens in bfloat16, against dense logits and Liger's chunked loss."""
    tokens, width, words = (8192, 2048, 131_072) if ON_GPU else (64, 32, 1024)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(rows: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, width, generator=generator, device=DEVICE) * scale).to(torch.bfloat16)

    h_s, h_t, w_s, w_t = randn(tokens), randn(tokens), randn(words, 0.05), randn(words, 0.05)
    labels = torch.randint(words, (tokens,), generator=generator, device=DEVICE)
    inputs = h_s.requires_grad_(), h_t, w_s.requires_grad_(), w_t, labels
    found: dict[str, tuple[list[float], float, float]] = {}
    for name in ("ours", "naive", "Liger"):
        try:
            found[name] = contest(CONTESTANTS[name], inputs)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    own, peak, _ = found["ours"]
    note = "losses: " + ", ".join(f"{name} {loss:.5g}" for name, (_, _, loss) in found.items())
    size = f"V = {words:,}, {tokens:,} tokens, width {width}"
    yield Measure(f"{size}: ours", [1000 * each for each in own], "ms", note=note)
    products = 4 * 2 * tokens * width * words / statistics.median(bf16_peak())
    yield Measure("ours / its four matrix products at the card's peak", [each / products for each in own], "ratio")
    for name, title, goals in (("naive", "dense", (None, "<= 0.1667")), ("Liger", "Liger's loss", ("<= 1.0", None))):
        if name not in found:
            continue
        seconds, memory, _ = found[name]
        yield Measure(f"ours / {title}: time", ratios(own, seconds), "ratio", goals[0])
        if ON_GPU:
            note = f"{peak / 1e9:.2f} GB against {memory / 1e9:.2f} GB above the inputs"
            yield Measure(f"ours / {title}: peak memory", [peak / memory], "ratio", goals[1], note)


def end_to_end() -> Iterable[Measure]:
    """BERT-base fine-tuned, and distilled live to 3 layers: 128 tokens, batches of 256, compiled, in bfloat16."""
    peak = statistics.median(bf16_peak())
    above, below = base(256), base(256, layers=3)
    given = batches(above, 8)
    warm, steps = (10, 40) if ON_GPU else (1, 3)
    for where in ("fine-tuned", "to 3 layers, live in the step", "to 3 layers, live ahead"):
        if where == "fine-tuned":
            module, flop = supervised(above.network), above.flop(3)
        else:
            teacher = FrozenTeacher(above.network, "bf16", compile=ON_GPU)
            module = distilled(below.network, AheadTeacher(teacher) if "ahead" in where else teacher)
            flop = above.flop(1) + below.flop(3)
        seconds = train(module, given, warm, steps, compile=True)
        yield Measure(f"BERT-base {where}: examples/s", [above.batch / seconds], "1/s")
        yield Measure(f"BERT-base {where}: share of the bf16 peak", [flop / seconds / peak], "ratio", ">= 0.4")


def teacher_pass() -> Iterable[Measure]:
    """MiniLM over all sentences of `reviews` and its transfer sets, logits kept in a cache."""
    from kd_lightning.data import Reviews
    from kd_lightning.models.hf import pretrained

    data = Reviews(transfer=["amazon", "nyt", "tweets"] if ON_GPU else [], tokenizer="minilm")
    data.prepare()
    torch.manual_seed(0)
    network = pretrained("minilm", CLASSES).eval()
    for size in (128, 1024) if ON_GPU else (128,):
        teacher = FrozenTeacher(network, "bf16").to(DEVICE)
        loader = data.select(tokens="teacher").with_batches(eval_batch_size=size).all_dataloader()
        given = [batch for number, batch in enumerate(loader) if ON_GPU or number < 2]
        _fill(teacher, given[:2])
        name = f"MiniLM, batches of {size}: sentences/s with logits kept"
        yield Measure(name, [_fill(teacher, given) for _ in range(3 if ON_GPU else 1)], "1/s", ">= 20000")


def _fill(teacher: FrozenTeacher, given: list[Batch]) -> float:
    """Fill a cache with the teacher's predictions for these batches; return examples/s."""
    ranks = torch.cat([batch["index"] for batch in given]).sort().values
    known = [{**batch, "index": torch.searchsorted(ranks, batch["index"])} for batch in given]
    moved = ({name: value.to(DEVICE) for name, value in batch.items()} for batch in known)
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache.create(Path(folder) / "cache", {}, len(ranks))
        started = time.perf_counter()
        return fill(cache, teacher, moved) / (time.perf_counter() - started)


PARTS: dict[str, Callable[[], Iterable[Measure]]] = {
    part.__name__: part
    for part in (ceilings, fused, end_to_end, overhead, cached, overlap, teacher_pass, lm_losses, lm_generation)
} | {"lm_steps": partial(lm_steps, bf16_peak)}


def main(parts: list[str]) -> None:
    """Run parts; print each figure as soon as it is there."""
    silence()
    for measure in chain.from_iterable(PARTS[part]() for part in parts):
        measure.goal = measure.goal if ON_GPU else None
        print("figure " + json.dumps(measure.to_dict()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
