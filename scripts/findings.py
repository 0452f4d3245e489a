"""What the curves of scripts/study.py say: of each study one plain sentence, made of its figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

LABELS_LINE = "labels alone"
START_LINE = "labels, start from the teacher"
SOFT_LINE = "soft targets"
FOLDS_LINE = "soft targets, teachers of folds"
TRUST_LINE = "label_trust, teachers of folds"
AS_IT_STANDS = "as it stands"
Curves = dict[str, list[dict[str, Any]]]


def _point(curves: Curves, line: str, x: float | str) -> dict[str, Any]:
    return next(point for point in curves[line] if point["x"] == x)


def _at(curves: Curves, line: str, x: float | str) -> float:
    return float(_point(curves, line, x)["test"]["mean"])


def _gain(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return how much better one point is than another, and the standard error of that."""
    error = math.sqrt(sum(point["test"]["std"] ** 2 / len(point["test"]["values"]) for point in (one, other)))
    return one["test"]["mean"] - other["test"]["mean"], error


def _points(gain: float, error: float) -> str:
    return f"{100 * gain:+z.1f} ± {100 * error:.1f}"


def labels(curves: Curves) -> str:
    """Say of data_efficiency which share of the labels is enough with a teacher."""
    taught = sorted(curves["teacher, all sentences"], key=lambda point: point["x"])

    def enough(line: str) -> str:
        whole = _at(curves, line, 100)
        below = [i for i, point in enumerate(taught) if point["test"]["mean"] < whole]
        first = below[-1] + 1 if below else 0
        return f"{taught[first]['x']:g} % of the labels" if first < len(taught) else "no share of the labels"

    added = _gain(_point(curves, "teacher, all sentences", 100), _point(curves, START_LINE, 100))
    return (
        f"With a teacher, {enough(LABELS_LINE)} and more do what all of them do alone, and {enough(START_LINE)} "
        f"what all of them do from the same start; where all have labels, it adds {_points(*added)} points to that (a "
        "share is one draw of labels with one teacher; all validation labels select)."
    )


def noise(curves: Curves) -> str:
    """Say of label_noise what is left of every line's accuracy, and what trusting labels less adds to that."""
    shares = [point["x"] for point in curves[LABELS_LINE]]
    lines = sorted(curves, key=lambda line: _at(curves, line, max(shares)), reverse=True)
    parts = [
        f"{line.replace(', ', ' ')} {', '.join(f'{100 * _at(curves, line, x):.1f}' for x in shares)}" for line in lines
    ]

    def trusting(other: str) -> str:
        pairs = ((_point(curves, TRUST_LINE, x), _point(curves, other, x)) for x in shares)
        return ", ".join(_points(*_gain(*pair)) for pair in pairs)

    return (
        f"Accuracy in % with {', '.join(f'{x:g}' for x in shares)} % wrong labels, at alpha 0.5: {'; '.join(parts)}. "
        "label_trust asks teachers of two folds, each of which learned from half of the labels: it has "
        f"{trusting(FOLDS_LINE)} points (with the standard error) more than soft targets of these teachers, and "
        f"{trusting(SOFT_LINE)} more than those of one teacher."
    )


def sensitivity(curves: Curves) -> str:
    """Say what each of the three settings moves, and how many of their combinations beat labels."""
    plane = max(curves[START_LINE], key=lambda point: point["validation"]["mean"])
    taught = [point for line, points in curves.items() if line.startswith("T ") for point in points]
    gains = [_gain(point, plane) for point in taught]
    above = sum(gain > 2 * error for gain, error in gains)
    below = sum(gain < -2 * error for gain, error in gains)
    means = [100 * point["test"]["mean"] for point in taught]
    ranges = ", ".join(
        f"{name} {_moved(curves, key):.1f}"
        for name, key in (
            ("the learning rate", lambda line, point: point["x"]),
            ("alpha", lambda line, point: line.split(", ")[1]),
            ("temperature", lambda line, point: line.split(", ")[0]),
        )
    )
    return (
        f"From its worst value to its best, averaged over the others, each moves accuracy by so many points: {ranges}. "
        f"Of {len(taught)} settings {above} are better and "
        f"{below} worse, by two standard errors, than labels from the same start at the rate that is best on "
        f"validation ({plane['x']:g}: {100 * plane['test']['mean']:.1f} %); they lie between {min(means):.1f} and "
        f"{max(means):.1f} %."
    )


def _moved(curves: Curves, key: Callable[[str, dict[str, Any]], Any]) -> float:
    """Return how far the mean accuracies of the groups that a key makes are apart, in points."""
    groups: dict[Any, list[float]] = {}
    for line, points in curves.items():
        for point in points if line.startswith("T ") else ():
            groups.setdefault(key(line, point), []).append(100 * point["test"]["mean"])
    means = [statistics.mean(group) for group in groups.values()]
    return max(means) - min(means)


def architectures(curves: Curves) -> str:
    """Say of architecture_gap what each teacher adds to each student, and which is whose best."""
    taught = {line: points for line, points in curves.items() if line != LABELS_LINE}
    said = []
    for line, points in taught.items():
        gains = ", ".join(
            f"{point['x']} {_points(*_gain(point, _point(curves, LABELS_LINE, point['x'])))}" for point in points
        )
        said.append(f"{line.removesuffix(' teaches')} ({100 * points[0]['teacher']:.1f} %) {gains}")
    students = [point["x"] for point in curves[LABELS_LINE]]
    best = [f"{x}: {max(taught, key=lambda line: _at(curves, line, x)).removesuffix(' teaches')}" for x in students]
    return (
        "What a teacher adds to labels alone, in points and with the standard error, to students that start from "
        f"nothing: {'; '.join(said)}. Best for {'; best for '.join(best)}."
    )


def quality(curves: Curves) -> str:
    """Say of teacher_quality from which teacher on a better one makes no better student."""
    points = sorted(curves["distilled"], key=lambda point: point["x"])
    pairs = ", ".join(f"{point['x']:.1f} teaches {100 * point['test']['mean']:.1f}" for point in points)
    best = points[-1]
    enough = next(point for point in points if abs(_gain(best, point)[0]) <= 2 * _gain(best, point)[1])
    return (
        f"A better teacher makes a better student up to one of {enough['x']:.1f} %: what the best one's student has "
        f"more than that one's, {_points(*_gain(best, enough))} points, is within two standard errors (accuracy in % "
        f"of teachers and of their students, which start from nothing: {pairs})."
    )


def levers(curves: Curves) -> str:
    """Say which changes are better, and worse, than the recipe as it stands."""
    base = _point(curves, "distilled", AS_IT_STANDS)
    gains = {point["x"]: _gain(point, base) for point in curves["distilled"] if point is not base}
    validation = {point["x"]: point["validation"]["mean"] for point in curves["distilled"]}
    for point in curves.get(START_LINE, []):
        name = "labels alone, from the same start"
        gains[name], validation[name] = _gain(point, base), point["validation"]["mean"]

    def those(chosen: Callable[[float, float], bool]) -> str:
        names = sorted((name for name, gain in gains.items() if chosen(*gain)), key=lambda name: -gains[name][0])
        return ", ".join(f"{name} {_points(*gains[name])}{doubt(name)}" for name in names) or "nothing"

    def doubt(name: str) -> str:
        lucky = gains[name][0] > 2 * gains[name][1] and validation[name] <= validation[AS_IT_STANDS]
        return " (not on validation)" if lucky else ""

    return (
        f"Against {100 * base['test']['mean']:.1f} % as it stands, in points and with the standard error: better by "
        f"more than two of them {those(lambda gain, error: gain > 2 * error)}; worse "
        f"{those(lambda gain, error: gain < -2 * error)}; neither {those(lambda gain, error: abs(gain) <= 2 * error)}."
    )


def calibration(curves: Curves) -> str:
    """Say what calibration does to the errors of teacher and student."""
    plain, calibrated = (curves[f"teacher {how}"] for how in ("as it is", "calibrated"))
    changes = ", ".join(
        f"{point['test']['mean']:.3f} to {_at(curves, 'teacher calibrated', point['x']):.3f} at T {point['x']:g}"
        for point in plain
    )
    return (
        f"Calibration takes the teacher's error (ECE) from {plain[0]['teacher']:.3f} to {calibrated[0]['teacher']:.3f} "
        f"and the student's from {changes}."
    )


def budgets(curves: Curves) -> str:
    """Say of stage_budget which recipes for the same task no other one beats, and what those for other tasks take."""
    parts = ", ".join(f"{name} {100 * score:.1f} % after {seconds:.0f} s" for seconds, score, name in front(curves))
    others = [f"{name} takes {found[-1]['x']:.0f} s" for name, found in curves.items() if not _on_reviews(name)]
    return (
        f"On reviews no recipe is both faster to train and better than these: {parts}; for other tasks, "
        f"{', '.join(others)} (one core, the teacher's answers kept)."
    )


def _on_reviews(recipe: str) -> bool:
    return recipe.startswith("reviews_")


def front(curves: Curves) -> list[tuple[float, float, str]]:
    """Return seconds, accuracy and name of the distilled students on reviews that no other one beats in both."""
    found = {name: points[-1] for name, points in curves.items() if _on_reviews(name)}
    points = sorted((point["x"], point["test"]["mean"], name) for name, point in found.items())
    return [one for i, one in enumerate(points) if all(one[1] > other[1] for other in points[:i])]
