"""What to change for which data, each with what it was worth: a table from the results of recipes and studies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"


def table() -> str:
    """Return docs/levers.md's table of advice, from results/quality.json and results/studies/*.json."""
    rows = [*_data(), *_teacher(), *_student()]
    lines = ["| if ... | then ... | worth | measured on |", "| :-- | :-- | :-- | :-- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


Row = tuple[str, str, str, str]


def _data() -> list[Row]:
    few, wrong, bilstm = _study("data_efficiency"), _study("label_noise"), _recipe("reviews_bilstm")
    start, soft = "labels, start from the teacher", "soft targets"
    return [
        (
            "few of your texts have labels", "give the others, too: `data.transfer=[more.txt]`, or the label -100",
            f"{_points(few('teacher, all sentences', 10) - few(start, 10))} with labels for a tenth",
            "`reviews`, study of labels",
        ),
        (
            "there are no other texts", "keep the augmented views that `budget` chooses",
            _points(_change(bilstm, "no views")), "`reviews_bilstm`",
        ),
        (
            "many labels are wrong", "weigh the teacher high (`alpha=0.5` or more)",
            f"{_points(wrong(soft, 20) - wrong(start, 20))} with a fifth of them wrong, "
            f"{_points(wrong(soft, 40) - wrong(start, 40))} with two fifths",
            "`reviews`, study of wrong labels",
        ),
    ]  # fmt: skip


def _teacher() -> list[Row]:
    quality, calibration = _curve("teacher_quality", "distilled"), _study("calibration", "ece")
    (low, weak), *_, (high, strong) = [(point["x"], _mean(point)) for point in quality]
    before, after = calibration("teacher as it is", 4), calibration("teacher calibrated", 4)
    gap = _study("architecture_gap")
    between = gap("distilled BiLSTM teaches", "BiLSTM") - gap("MiniLM teaches", "BiLSTM")
    return [
        (
            "the teacher is weak", "train it for longer (`budget=best`) before anything else",
            f"{_points(strong - weak)} from a teacher of {high:.0f} % instead of {low:.0f} %",
            "`reviews`, study of teachers",
        ),
        (
            "probabilities matter to you", "`teacher.calibrate=true`",
            f"calibration error {before:.3f} to {after:.3f}", "`reviews`, study of calibration",
        ),
        (
            "the student takes nothing from the teacher, and is unlike it", "a student in between, which teaches it "
            "(`experiment=teacher_assistant`)", _points(between), "`reviews`, study of architectures",
        ),
    ]  # fmt: skip


def _student() -> list[Row]:
    bilstm, best, sensitivity = _recipe("reviews_bilstm"), _study("best_recipe"), _content("sensitivity")["curves"]
    lines = [line for line in sensitivity if line.startswith("T ")]
    rates = [max(_mean(point) for point in sensitivity[line]) for line in lines]
    spread = max(rates) - min(rates)
    return [
        (
            "you may choose the student", "take layers from the teacher (`goal=fast`), or its word embeddings "
            "(`goal=small`)",
            f"{_points(best('distilled', 'as it stands') - best('distilled', 'fresh weights'))}; "
            f"{_points(_change(bilstm, 'fresh embeddings'))}", "`reviews_3layer`; `reviews_bilstm`",
        ),
        (
            "the training was short", "train for longer: `budget=best`, or `trainer.max_steps`",
            f"{_points(_change(bilstm, 'a tenth of the steps'))} for ten times the steps", "`reviews_bilstm`",
        ),
        (
            "you can sweep one thing", "sweep `optimizer.lr`; temperature and alpha matter less at their best rate",
            f"{_points(_of_rates(sensitivity, lines))} from the worst rate to the best, {_points(spread)} from the "
            "worst temperature and alpha",
            "`reviews`, study of settings",
        ),
    ]  # fmt: skip


def _of_rates(curves: dict[str, Any], lines: list[str]) -> float:
    """Return the mean gain from a line's worst learning rate to its best."""
    gains = [max(map(_mean, curves[line])) - min(map(_mean, curves[line])) for line in lines]
    return sum(gains) / len(gains)


def _points(gain: float) -> str:
    return f"{100 * gain:+.1f} points"


def _mean(point: dict[str, Any]) -> float:
    return float(point["test"]["mean"])


def _content(study: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / "studies" / f"{study}.json").read_text(encoding="utf-8"))
    return content


def _curve(study: str, line: str) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = _content(study)["curves"][line]
    return points


def _study(name: str, score: str = "accuracy") -> Callable[[str, float | str], float]:
    """Return what gives a study's mean on the test split: of a line, at a value."""
    content = _content(name)
    assert content["score"] == score, (name, content["score"])
    return lambda line, x: next(_mean(point) for point in content["curves"][line] if point["x"] == x)


def _recipe(name: str) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))["recipes"][name]
    return recipe


def _change(recipe: dict[str, Any], variant: str) -> float:
    """Return how much better a recipe is than one of its variants."""
    return float(recipe["distilled"]["mean"] - recipe["variants"][variant]["test"]["mean"])
