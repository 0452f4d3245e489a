"""Compares the predictions of an export with the student's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.evaluation.generation import Decoding, continued
from kd_lightning.evaluation.profiling import single_examples
from kd_lightning.runtime.errors import KDError
from kd_lightning.tasks import Task
from kd_lightning.tasks.evaluation import of_network
from kd_lightning.types import Batch

ALONE = 16
"""This many examples also run one at a time, without padding."""

RESAMPLES = 1000
"""Bootstrap resamples for the intervals of scores."""

PARTS = 512
"""A validation split is resampled in about so many parts."""


@dataclass(frozen=True)
class Tolerance:
    """How far an export may be from the student on the validation split.

    Attributes:
        largest: Largest difference of logits, as a share of the student's largest logit (of 1 if that is less).
        mean: Mean difference, likewise.
        agreement: Share of examples that must get the same label; of a language model of tokens, also of those that it
            generates; of embeddings the least mean cosine.
        kl: Mean KL(student || export) in nats a token; None: it is not limited.
    """

    largest: float
    mean: float
    agreement: float
    kl: float | None = None


TOLERANCES = {
    "none": Tolerance(1e-3, 1e-4, 0.999),
    "fp16": Tolerance(0.02, 0.005, 0.99),
    "bf16": Tolerance(0.15, 0.03, 0.97),
    "int8-weights": Tolerance(0.15, 0.03, 0.97),
    "int8-dynamic": Tolerance(0.5, 0.05, 0.95),
    "int8-static": Tolerance(0.5, 0.05, 0.95),
}

OF_TOKENS = {
    "none": Tolerance(1e-3, 1e-4, 0.999, 1e-4),
    "fp16": Tolerance(0.02, 0.005, 0.99, 1e-3),
    "bf16": Tolerance(0.5, 0.05, 0.95, 0.02),
    **dict.fromkeys(("int8-weights", "int8-dynamic", "int8-static"), Tolerance(0.5, 0.05, 0.93, 0.02)),
}
"""For language models, whose first token is often a matter of hairs: what decides is the KL; 0.02 nats are 2% of
perplexity. Of SmolLM2-135M weights in 8 bits have 0.005 and 94.5% of the tokens, Q8_0 has 0.001 and 97.1%."""

PROMPTS, PROMPT, CONTINUATION = 8, 16, 24
"""So many texts are generated, so many tokens each after so many."""


@dataclass(frozen=True)
class Parity:
    """The measured differences and scores.

    Attributes:
        examples: Of the validation split, all of it.
        largest_difference: Largest difference between a logit of the export and of the student.
        mean_difference: Likewise on average.
        scale: The tolerances of differences are shares of it.
        agreement: Share of the same labels, of several tasks the mean over those that have labels; None where none has.
        kl: Mean KL(student || export) in nats; likewise.
        cosine: Mean cosine of the two embeddings of a text; None where nothing is embedded.
        generated: Share of the tokens which the export generates greedily, with its cache, that the student would; None
            where nothing is generated.
        student: The student's scores on these examples, among them `accuracy` and `ece`.
        export: The export's.
        student_intervals: The scores' 95% intervals (percentile bootstrap).
        export_intervals: The export's.
        resamples: Number of resamples for the intervals.
        tolerance: The allowed differences.
    """

    examples: int
    largest_difference: float
    mean_difference: float
    scale: float
    agreement: float | None
    kl: float | None
    cosine: float | None
    generated: float | None
    student: dict[str, float | None]
    export: dict[str, float | None]
    student_intervals: dict[str, list[float] | None]
    export_intervals: dict[str, list[float] | None]
    resamples: int
    tolerance: Tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as JSON values."""
        return asdict(self)

    def excess(self) -> str | None:
        """Return what exceeds the tolerance, None if nothing does."""
        found = []
        for name, value, share in (
            ("largest difference of logits", self.largest_difference, self.tolerance.largest),
            ("mean difference of logits", self.mean_difference, self.tolerance.mean),
        ):
            if not value <= share * self.scale:  # a NaN exceeds any tolerance
                found.append(f"{name} {value:.3g}, allowed {share * self.scale:.3g}")
        if self.agreement is not None and self.agreement < self.tolerance.agreement:
            found.append(f"{self.same} agreement {self.agreement:.4f}, allowed {self.tolerance.agreement}")
        if self.kl is not None and self.tolerance.kl is not None and not self.kl <= self.tolerance.kl:
            found.append(f"KL {self.kl:.3g}, allowed {self.tolerance.kl:g}")
        if self.cosine is not None and not self.cosine >= self.tolerance.agreement:
            found.append(f"mean cosine {self.cosine:.4f}, allowed {self.tolerance.agreement}")
        if self.generated is not None and self.generated < self.tolerance.agreement:
            found.append(f"agreement of generated tokens {self.generated:.4f}, allowed {self.tolerance.agreement}")
        return "; ".join(found) or None

    @property
    def same(self) -> str:
        """What `agreement` is a share of."""
        return "label" if self.generated is None else "token"

    def lines(self) -> list[str]:
        """Return the measurements as text."""
        lines = [
            f"logits differ by {self.largest_difference:.2g} at most and {self.mean_difference:.2g} on average "
            f"(allowed {self.tolerance.largest * self.scale:.2g} and {self.tolerance.mean * self.scale:.2g}), "
            f"{self.examples:,} validation examples"
        ]
        if self.agreement is not None:
            lines.append(
                f"{self.same} agreement {self.agreement:.4f} (allowed {self.tolerance.agreement}), KL {self.kl:.2g}"
                f"{'' if self.tolerance.kl is None else f' (allowed {self.tolerance.kl:g})'}"
            )
        if self.cosine is not None:
            lines.append(f"mean cosine {self.cosine:.6f} (allowed {self.tolerance.agreement})")
        if self.generated is not None:
            lines.append(f"greedy continuations: {100 * self.generated:.1f}% of the tokens are the student's")
        changes = [
            f"{name} {before:.4f} -> {after:.4f}"
            for name, before in self.student.items()
            if before is not None and (after := self.export.get(name)) is not None
        ]
        return [*lines, ", ".join(changes)]


def measure_parity(
    student: nn.Module, export: nn.Module, held_out: Sequence[Batch], task: Task, quantize: str
) -> Parity:
    """Compare both on every example, in batches and some of them alone, keeping only sums.

    Args:
        student: The student itself.
        export: The export, loaded as for deployment.
        held_out: Batches of the validation split.
        task: What they predict.
        quantize: Determines the tolerance.
    """
    models, gap = (of_network(student), of_network(export)), _Gap()
    parts = math.ceil(PARTS / len(held_out))
    sampled, near = (_Parts(task, parts), _Parts(task, parts)), task.fidelity()
    with torch.inference_mode():
        for batch in held_out:
            rows = task.compared(batch)
            ours, theirs = (model(batch).logits.float() for model in models)
            gap.add(theirs, ours, rows)
            near.update(theirs, ours, rows)
            for one, logits in zip(sampled, (ours, theirs), strict=True):
                one.add(logits, rows)
        alone = _Gap()
        for batch in single_examples(held_out, ALONE):
            ours, theirs = (model(batch).logits.float() for model in models)
            alone.add(theirs, ours, task.compared(batch))
    fidelity = {name: float(value) for name, value in near.compute().items()}
    largest = gap.largest, alone.largest
    return Parity(
        examples=sum(len(batch["index"]) for batch in held_out),
        largest_difference=math.nan if any(map(math.isnan, largest)) else max(largest),
        mean_difference=gap.total / gap.count,
        scale=max(1.0, gap.scale),
        agreement=_mean_of(fidelity, "agreement"),
        kl=_mean_of(fidelity, "kl_to_teacher"),
        cosine=_mean_of(fidelity, "cosine_to_teacher"),
        generated=generated_alike(student, export, held_out) if task.generates else None,
        student=sampled[0].scores(),
        export=sampled[1].scores(),
        student_intervals=sampled[0].intervals(),
        export_intervals=sampled[1].intervals(),
        resamples=RESAMPLES,
        tolerance=(OF_TOKENS if task.generates or task.fills else TOLERANCES)[quantize],
    )


def generated_alike(student: nn.Module, export: nn.Module, held_out: Sequence[Batch]) -> float | None:
    """Return the share of an export's greedy tokens that are the student's after the same text.

    It is 1 where the continuations are the same. The export generates with its cache, and the student reads the whole
    text at once. A token that the student holds to be as likely as its first, up to float32's rounding, is the same.

    Args:
        student: The student itself.
        export: The export, loaded as for deployment.
        held_out: Batches of the validation split, of which the prompts are.
    """
    right: list[Tensor] = []
    for batch in single_examples(held_out, PROMPTS):
        ids = batch["input_ids"][0].tolist()
        prompt = ids[: min(PROMPT, (len(ids) + 1) // 2)]  # which leaves positions for what follows
        new = continued(export, prompt, Decoding(CONTINUATION))
        rows = torch.tensor([prompt + new])
        with torch.inference_mode():
            logits = of_network(student)({"input_ids": rows, "attention_mask": torch.ones_like(rows)}).logits.float()
        before = logits[0, len(prompt) - 1 : -1]
        theirs = before.gather(-1, rows[0, len(prompt) :, None])[:, 0]
        right.append(before.amax(-1) - theirs <= 1e-5 * before.abs().amax(-1))
    return float(torch.cat(right).float().mean())


class _Gap:
    """How far one model's logits are from another's."""

    def __init__(self) -> None:
        self.largest = self.total = self.scale = 0.0
        self.count = 0

    def add(self, theirs: Tensor, ours: Tensor, rows: Batch) -> None:
        """Add a batch; rows that do not count are left out."""
        if "keep" in rows:
            theirs, ours = theirs[rows["keep"]], ours[rows["keep"]]
        differences = (theirs - ours).abs()
        if len(differences):
            largest = float(differences.max())
            self.largest = largest if math.isnan(largest) else max(self.largest, largest)
            self.total += float(differences.double().sum())
            self.count += differences.numel()
            self.scale = max(self.scale, float(ours.abs().max()))


class _Parts:
    """A model's scores, in parts of the examples from which intervals are resampled (Efron 1979).

    A part is one example of a split of up to `PARTS`, and more of a larger one, evenly from a batch. Two models whose
    parts are of the same examples get the same resamples. Of scores that do not divide, such as those of ranks, the
    parts are the units that they are means of, as queries; the others have no interval.

    Args:
        task: What is scored.
        parts: How many a batch is made into, at most.
    """

    def __init__(self, task: Task, parts: int) -> None:
        self.total, self.parts = task.scores(), parts
        self.states: list[Tensor] = []

    def add(self, logits: Tensor, rows: Batch) -> None:
        """Add a batch."""
        if not self.total.divides:
            self.total.update(logits, rows["labels"], rows)
        for number in range(min(self.parts, len(logits)) if self.total.divides else 0):
            part = slice(number, None, self.parts)
            own = {name: value[part] for name, value in rows.items()}
            self.total.reset()
            self.total.update(logits[part], own["labels"], own)
            self.states.append(self.total.states())

    def scores(self) -> dict[str, float | None]:
        """Return the scores of all parts together, as JSON can hold them."""
        found = self._of(sum(self.states)) if self.total.divides else self.whole()  # type: ignore[arg-type]
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def whole(self) -> dict[str, float]:
        """Return scores that do not divide."""
        return {name: float(value) for name, value in self.total.compute().items()}

    def intervals(self) -> dict[str, list[float] | None]:
        """Return each score's 95% interval; None for a score that is undefined on all resamples."""
        generator = torch.Generator().manual_seed(0)
        units: dict[str, tuple[Tensor, Tensor]] = {}
        if not self.total.divides:
            self.whole()
            values = self.total.values()
            units = {} if values is None else values.of
        states = torch.stack(self.states) if self.states else torch.zeros(0)
        count = len(states) or len(next(iter(units.values()), ((),))[0])
        found: defaultdict[str, list[float]] = defaultdict(list)
        for _ in range(RESAMPLES if count else 0):
            times = torch.randint(count, (count,), generator=generator).bincount(minlength=count).double()
            means = {name: float((times @ v.double()) / (times @ w.double())) for name, (v, w) in units.items()}
            for name, value in (self._of(times @ states) if len(states) else means).items():
                if math.isfinite(value):
                    found[name].append(value)
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        return {
            name: torch.tensor(found[name], dtype=torch.float64).quantile(ends).tolist() if found[name] else None
            for name in self.scores()
        }

    def _of(self, states: Tensor) -> dict[str, float]:
        self.total.load(states)
        return {name: float(value) for name, value in self.total.compute().items()}


def require(parity: Parity, title: str) -> None:
    """Raise `KDError` if an export differs too much from its student."""
    if excess := parity.excess():
        raise KDError(f"{title} differs from the student ({excess}): nothing was written")


def _mean_of(scores: dict[str, float], name: str) -> float | None:
    """Return a score, or its mean over the tasks that have it."""
    values = [value for key, value in scores.items() if key.rpartition("/")[2] == name]
    return sum(values) / len(values) if values else None
