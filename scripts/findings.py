"""What the curves of scripts/study.py show: for each study a plain sentence and a table, made of its figures."""

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


def _table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, [":--", *["--:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
        f"With a teacher, {enough(LABELS_LINE)} are enough to match a student trained on all of them, and "
        f"{enough(START_LINE)} to match one that also starts from the teacher. With all labels, the teacher adds "
        f"{_points(*added)} points to the latter. Each share is one draw of labels with one teacher; selection uses "
        "all validation labels."
    )


def noise(curves: Curves) -> str:
    """Say of label_noise how accuracy falls for every line, and what trusting labels less adds."""
    shares = [point["x"] for point in curves[LABELS_LINE]]
    lines = sorted(curves, key=lambda line: _at(curves, line, max(shares)), reverse=True)

    def trusting(title: str, other: str) -> list[str]:
        pairs = ((_point(curves, TRUST_LINE, x), _point(curves, other, x)) for x in shares)
        return [title, *(_points(*_gain(*pair)) for pair in pairs)]

    heading = ["wrong labels", *(f"{x:g} %" for x in shares)]
    rows = [[line, *(f"{100 * _at(curves, line, x):.1f}" for x in shares)] for line in lines]
    rows.append(trusting("label_trust minus soft targets of the same teachers", FOLDS_LINE))
    rows.append(trusting("label_trust minus soft targets of one teacher", SOFT_LINE))
    best = lines[0]
    return (
        f"With {max(shares):g} % wrong labels, {best} does best. Accuracy in %, at alpha 0.5; differences in points "
        "with their standard error. label_trust uses teachers of two folds, each trained on half of the labels.\n\n"
        + _table(heading, rows)
    )


def sensitivity(curves: Curves) -> str:
    """Say how far each of the three settings moves accuracy, and how many of their combinations beat labels."""
    plane = max(curves[START_LINE], key=lambda point: point["validation"]["mean"])
    taught = [point for line, points in curves.items() if line.startswith("T ") for point in points]
    gains = [_gain(point, plane) for point in taught]
    above = sum(gain > 2 * error for gain, error in gains)
    below = sum(gain < -2 * error for gain, error in gains)
    means = [100 * point["test"]["mean"] for point in taught]
    moved = {
        "learning rate": _moved(curves, lambda line, point: point["x"]),
        "alpha": _moved(curves, lambda line, point: line.split(", ")[1]),
        "temperature": _moved(curves, lambda line, point: line.split(", ")[0]),
    }
    most = max(moved, key=moved.__getitem__)
    rows = [[name, f"{moved[name]:.1f}"] for name in sorted(moved, key=lambda name: -moved[name])]
    rows += [["worst setting, %", f"{min(means):.1f}"], ["best setting, %", f"{max(means):.1f}"]]
    base = f"labels from the same start, at their best rate ({plane['x']:g}), %"
    rows.append([base, f"{100 * plane['test']['mean']:.1f}"])
    return (
        f"The {most} matters most. Of {len(taught)} settings, {above} are better than labels from the same start and "
        f"{below} worse, by two standard errors. The first rows are points of accuracy between a setting's worst and "
        "best value, averaged over the others.\n\n" + _table(["setting", "accuracy"], rows)
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
    students = [point["x"] for point in curves[LABELS_LINE]]
    rows = []
    for line, points in taught.items():
        gains = {point["x"]: _points(*_gain(point, _point(curves, LABELS_LINE, point["x"]))) for point in points}
        title = line.removesuffix(" teaches")
        rows.append([title, f"{100 * points[0]['teacher']:.1f}", *(gains.get(x, "") for x in students)])
    best = {x: max(taught, key=lambda line: _at(curves, line, x)).removesuffix(" teaches") for x in students}
    names = list(dict.fromkeys(best.values()))
    verdict = (
        f"Best teacher for every student: {names[0]}."
        if len(names) == 1
        else "Best teacher: " + ", ".join(f"{name} for {x}" for x, name in best.items()) + "."
    )  # fmt: skip
    return (
        f"{verdict} What each teacher adds to labels alone, in points with the standard error; students start from "
        "random weights.\n\n" + _table(["teacher", "its accuracy, %", *students], rows)
    )


def quality(curves: Curves) -> str:
    """Say of teacher_quality from which teacher on a better one makes no better student."""
    points = sorted(curves["distilled"], key=lambda point: point["x"])
    best = points[-1]
    enough = next(point for point in points if abs(_gain(best, point)[0]) <= 2 * _gain(best, point)[1])
    return (
        f"A better teacher makes a better student up to a teacher of {enough['x']:.1f} %: beyond, the gain of "
        f"{_points(*_gain(best, enough))} points is within two standard errors. Students start from random weights."
        "\n\n"
        + _table(
            ["teacher, %", "student, %"],
            [[f"{point['x']:.1f}", f"{100 * point['test']['mean']:.1f}"] for point in points],
        )
    )


def levers(curves: Curves) -> str:
    """Say which changes are better, and worse, than the recipe as it stands."""
    base = _point(curves, "distilled", AS_IT_STANDS)
    gains = {point["x"]: _gain(point, base) for point in curves["distilled"] if point is not base}
    validation = {point["x"]: point["validation"]["mean"] for point in curves["distilled"]}
    for point in curves.get(START_LINE, []):
        name = "labels alone, from the same start"
        gains[name], validation[name] = _gain(point, base), point["validation"]["mean"]

    def verdict(name: str) -> str:
        gain, error = gains[name]
        if abs(gain) <= 2 * error:
            return "within noise"
        if gain < 0:
            return "worse"
        return "better" if validation[name] > validation[AS_IT_STANDS] else "better, but not on validation"

    rows = [[name, _points(*gains[name]), verdict(name)] for name in sorted(gains, key=lambda name: -gains[name][0])]
    worse, better = (sum(row[2].startswith(word) for row in rows) for word in ("worse", "better"))
    return (
        f"As it stands, the recipe scores {100 * base['test']['mean']:.1f} %. Of {len(rows)} changes, {better} are "
        f"better and {worse} worse by more than two standard errors.\n\n"
        + _table(["change", "points", "verdict"], rows)
    )


def calibration(curves: Curves) -> str:
    """Say what calibrating the teacher does to the calibration errors of teacher and student."""
    plain, calibrated = (curves[f"teacher {how}"] for how in ("as it is", "calibrated"))
    rows = [["teacher", f"{plain[0]['teacher']:.3f}", f"{calibrated[0]['teacher']:.3f}"]]
    for point in plain:
        after = _at(curves, "teacher calibrated", point["x"])
        rows.append([f"student at T {point['x']:g}", f"{point['test']['mean']:.3f}", f"{after:.3f}"])
    lowered = sum(float(after) < float(before) for _, before, after in rows[1:])
    return (
        f"A calibrated teacher lowers the student's calibration error at {lowered} of {len(rows) - 1} temperatures "
        "(expected calibration error, ECE).\n\n" + _table(["", "as it is", "calibrated"], rows)
    )


def budgets(curves: Curves) -> str:
    """Say of stage_budget which recipes for the same task no other one beats, and what each takes."""
    best = [name for _, _, name in front(curves)]
    rows = [
        [
            f"`{name}`",
            f"{points[-1]['x']:.0f}",
            f"{100 * points[-1]['test']['mean']:.1f}",
            "yes" if name in best else "",
        ]
        for name, points in curves.items()
    ]
    return (
        "For the reviews, the recipes marked in the last column are the ones that no other beats in both time and "
        "accuracy (one core, teacher outputs cached).\n\n"
        + _table(["recipe", "training, s", "test score, %", "unbeaten on reviews"], rows)
    )


def _on_reviews(recipe: str) -> bool:
    return recipe.startswith("reviews_")


def front(curves: Curves) -> list[tuple[float, float, str]]:
    """Return seconds, accuracy and name of the distilled students on reviews that no other one beats in both."""
    found = {name: points[-1] for name, points in curves.items() if _on_reviews(name)}
    points = sorted((point["x"], point["test"]["mean"], name) for name, point in found.items())
    return [one for i, one in enumerate(points) if all(one[1] > other[1] for other in points[:i])]
