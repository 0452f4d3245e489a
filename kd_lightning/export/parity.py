"""Whether an export answers as the student did."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.evaluation.profiling import single_examples
from kd_lightning.runtime.errors import KDError
from kd_lightning.tasks import Task
from kd_lightning.tasks.predictions import Answers, network_answers
from kd_lightning.types import Batch

ALONE = 16
"""So many examples are also asked one at a time, without the padding that they had among longer ones."""

RESAMPLES = 1000
"""Of the examples, with replacement: what the intervals of scores are read from."""


@dataclass(frozen=True)
class Tolerance:
    """How far an export may be from the student on the validation split.

    Attributes:
        largest: Of all differences between logits, as a share of the student's largest logit (of 1 if that is less).
        mean: Of them on average, likewise.
        agreement: Share of examples that must get the same label.
    """

    largest: float
    mean: float
    agreement: float


TOLERANCES = {
    "none": Tolerance(1e-3, 1e-4, 0.999),
    "fp16": Tolerance(0.02, 0.005, 0.99),
    "bf16": Tolerance(0.15, 0.03, 0.97),
    "int8-dynamic": Tolerance(0.5, 0.05, 0.95),
    "int8-static": Tolerance(0.5, 0.05, 0.95),
}


@dataclass(frozen=True)
class Parity:
    """What was measured.

    Attributes:
        examples: Of the validation split, all of it.
        largest_difference: Between a logit of the export and of the student.
        mean_difference: Likewise on average.
        scale: What the tolerances of differences are shares of.
        agreement: Share of the same labels; None where nothing has a label (a regression).
        kl: Mean KL(student || export) in nats; None likewise.
        student: The student's scores on these examples, among them `accuracy` and `ece`.
        export: The export's.
        student_intervals: The scores' 95% intervals (percentile bootstrap).
        export_intervals: The export's.
        resamples: How many the intervals are from.
        tolerance: What was allowed.
    """

    examples: int
    largest_difference: float
    mean_difference: float
    scale: float
    agreement: float | None
    kl: float | None
    student: dict[str, float | None]
    export: dict[str, float | None]
    student_intervals: dict[str, list[float] | None]
    export_intervals: dict[str, list[float] | None]
    resamples: int
    tolerance: Tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)

    def excess(self) -> str | None:
        """Say what is beyond the tolerance; None where nothing is."""
        found = []
        for name, value, share in (
            ("largest difference of logits", self.largest_difference, self.tolerance.largest),
            ("mean difference of logits", self.mean_difference, self.tolerance.mean),
        ):
            if not value <= share * self.scale:  # a nan is beyond any
                found.append(f"{name} {value:.3g}, allowed {share * self.scale:.3g}")
        if self.agreement is not None and self.agreement < self.tolerance.agreement:
            found.append(f"label agreement {self.agreement:.4f}, allowed {self.tolerance.agreement}")
        return "; ".join(found) or None

    def lines(self) -> list[str]:
        """Say it in sentences."""
        lines = [
            f"logits differ by {self.largest_difference:.2g} at most and {self.mean_difference:.2g} on average "
            f"(allowed {self.tolerance.largest * self.scale:.2g} and {self.tolerance.mean * self.scale:.2g}), "
            f"{self.examples:,} validation examples"
        ]
        if self.agreement is not None:
            lines.append(f"label agreement {self.agreement:.4f} (allowed {self.tolerance.agreement}), KL {self.kl:.2g}")
        changes = [
            f"{name} {before:.4f} -> {after:.4f}"
            for name in ("accuracy", "ece", "pearson", "average")
            if (before := self.student.get(name)) is not None and (after := self.export.get(name)) is not None
        ]
        return [*lines, ", ".join(changes)]


def measure_parity(
    student: nn.Module, export: nn.Module, held_out: Sequence[Batch], task: Task, quantize: str
) -> Parity:
    """Ask both about every example, in batches and some of them alone.

    Args:
        student: The student itself.
        export: What was exported, loaded as those who deploy it load it.
        held_out: Batches of the validation split.
        task: What they predict.
        quantize: Decides the tolerance.
    """
    alone = single_examples(held_out, ALONE)
    said, told = network_answers(student, held_out), network_answers(export, held_out)
    pairs = [
        (told.logits, said.logits),
        (network_answers(export, alone).logits, network_answers(student, alone).logits),
    ]
    largest = [float((ours - theirs).abs().max()) for ours, theirs in pairs]
    above = task.evaluate(said, said.logits), task.evaluate(told, said.logits)
    return Parity(
        examples=len(said.logits),
        largest_difference=math.nan if any(map(math.isnan, largest)) else max(largest),
        mean_difference=float((told.logits - said.logits).abs().mean()),
        scale=max(1.0, float(said.logits.abs().max())),
        agreement=_share(task.same_label(said, told)),
        kl=_mean_of(above[1], "kl_to_teacher"),
        student=_finite(above[0]),
        export=_finite(above[1]),
        student_intervals=intervals(task, said),
        export_intervals=intervals(task, told),
        resamples=RESAMPLES,
        tolerance=TOLERANCES[quantize],
    )


def intervals(task: Task, said: Answers) -> dict[str, list[float] | None]:
    """Return each score's 95% interval: of what it is on resamples of the examples (Efron 1979).

    Args:
        task: What is scored.
        said: A model's answers; alike in number, two models get the same resamples.

    Returns:
        Lower and upper end by score; None for a score that no resample has.
    """
    generator = torch.Generator().manual_seed(0)
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(RESAMPLES):
        rows = torch.randint(len(said.logits), (len(said.logits),), generator=generator)
        which = None if said.task is None else said.task[rows]
        scores = task.evaluate(Answers(said.index[rows], said.logits[rows], said.labels[rows], which))
        for name, value in scores.items():
            if math.isfinite(value):
                found[name].append(value)
    names = _finite(task.evaluate(said))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {
        name: torch.tensor(found[name], dtype=torch.float64).quantile(ends).tolist() if found[name] else None
        for name in names
    }


def require(parity: Parity, title: str) -> None:
    """Raise `KDError` where an export is too far from its student."""
    if excess := parity.excess():
        raise KDError(f"{title} does not answer as the student did ({excess}): nothing was written")


def _share(same: Tensor | None) -> float | None:
    return None if same is None or not len(same) else float(same.float().mean())


def _mean_of(scores: dict[str, float], name: str) -> float | None:
    """Return a score, or of several tasks its mean over those that have it."""
    values = [value for key, value in scores.items() if key.rpartition("/")[2] == name]
    return sum(values) / len(values) if values else None


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """Return the scores against the labels, as JSON can hold them."""
    known = {name: value for name, value in scores.items() if "teacher" not in name and "agreement" not in name}
    return {name: value if math.isfinite(value) else None for name, value in known.items()}
