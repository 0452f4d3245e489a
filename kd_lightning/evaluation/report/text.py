"""The report for people: report.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kd_lightning.evaluation.report.differences import gap_is_noise, is_noise
from kd_lightning.evaluation.report.results import monitor, score_title, sign
from kd_lightning.evaluation.report.table import MISSING, as_markdown, markdown_table, ratio_line, short
from kd_lightning.runtime.borders import fence, markdown, visible


def summary(report: Mapping[str, Any]) -> str:
    """Summarise a run in a paragraph: accuracy kept, size, speed, and the gain over labels alone."""
    models = report["models"]
    student, teacher = models.get("distilled"), models.get("teacher")
    main, title = monitor(report), score_title(report)
    scores = {name: model["test"][main]["mean"] for name, model in models.items()}
    if student is None or teacher is None or not scores["distilled"] or not scores["teacher"]:
        listed = ", ".join(f"{model['title']} {_score(scores[name])}" for name, model in models.items())
        return f"{title[0].upper()}{title[1:]} on the test split: {listed}."
    share = f"{100 * scores['distilled'] / scores['teacher']:.1f}% of the teacher's {title}"
    both = f"{title} {scores['distilled']:.3f}, the teacher {scores['teacher']:.3f},"
    sentence = "The distilled student " + (f"keeps {share}" if sign(report, main) > 0 else f"has {both}")
    clauses = [clause for clause in (_size_clause(teacher, student), _speed_clause(teacher, student)) if clause]
    sentences = [sentence + (" " + " and ".join(clauses) if clauses else "") + "."]
    if scores.get("baseline") is not None:
        sentences.append(_gain(report, scores["baseline"], scores["distilled"]))
    if len(report["seeds"]) > 1:
        sentences.append(f"The students' figures are means over {len(report['seeds'])} seeds.")
    return " ".join(sentences)


def report_markdown(report: Mapping[str, Any], pictures: Collection[str] = ("curves.png", "tradeoff.png")) -> str:
    """Write the report as Markdown.

    Args:
        report: The document `build_report` returns.
        pictures: Names of the pictures beside the report.

    Returns:
        The text of report.md.
    """
    environment = report["environment"]
    parts = [f"# {markdown(report['task'])}: distillation report", markdown(summary(report))]
    parts += ["\n".join(f"> **Warning.** {markdown(warning)}" for warning in report["warnings"]).replace("\n", "\n>\n")]
    parts += ["## Comparison on the test split", markdown_table(report), ratio_line(report) + "."]
    parts += [f"![{markdown(caption)}]({name})" for name, caption in captions(report).items() if name in pictures]
    parts += [
        _errors_by_unit(report),
        _samples(report),
        "## How to read it",
        *map(markdown, reading(report)),
        "## How to reproduce it",
        f"{(marks := fence(report['command']))}\n{visible(report['command'])}\n{marks}",
        as_markdown(
            [["setting", "value"], *([name, cell(value)] for name, value in report["settings"].items())], ":--"
        ),
        as_markdown([["stage", "seconds"], *([name, short(value)] for name, value in report["stages"].items())]),
        as_markdown([["environment", ""], *([name, cell(value)] for name, value in environment.items())], ":--"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def captions(report: Mapping[str, Any]) -> dict[str, str]:
    """Return what each picture shows, by its file's name."""
    title = score_title(report)
    return {
        "curves.png": f"Validation {title} during training",
        "tradeoff.png": f"Test {title} against size and against latency",
        "shares.png": "Each loss term's share of the distillation's loss and gradient",
        "calibration.png": "How often predictions of each confidence are right, on the test split",
    }


def reading(report: Mapping[str, Any]) -> list[str]:
    """Return how the figures are to be read, a paragraph each."""
    data = report["data"]
    splits = ", ".join(f"{name} {size:,}" for name, size in data["splits"].items())
    seeds = ", ".join(map(str, report["seeds"]))
    found = [
        report["selection"], f"Seeds: {seeds}. Data: {data['name']} ({splits}).{_chance_text(data)}",
        _difference_text(report, score_title(report)), _speed_text(report), _outputs_text(report),
    ]  # fmt: skip
    return [text for text in found if text]


def _errors_by_unit(report: Mapping[str, Any]) -> str:
    """Return scores with errors by document or query, and what the distillation changes."""
    models, unit = report["models"], report["data"].get("unit", "example")
    if unit == "example":
        return ""
    units = report["data"]["units"]
    against = report["differences"].get("distilled", {})
    rows = [["", *(m["title"] for m in models.values()), *(f"distilled - {models[name]['title']}" for name in against)]]
    for name, spec in report["scores"].items():
        if any("standard_error" in model["test"].get(name, {}) for model in models.values()):
            changes = [one if name == monitor(report) else one["scores"].get(name) for one in against.values()]
            cells = [model["test"].get(name) for model in models.values()] + changes
            rows.append([spec["title"], *map(_with_error, cells)])
    why = "Documents of a query are ranked together" if unit == "query" else f"Tokens of a {unit} are alike"
    return (
        f"## Standard errors by {unit}\n\n{why}, so errors are over the {units:,} test {_several(unit)}. "
        f"Differences are {unit} by {unit}, and include the variation over seeds.\n\n{as_markdown(rows)}"
    )


def _samples(report: Mapping[str, Any]) -> str:
    """Return how the models go on with the same prompts, in a table for each."""
    models, tables = report["models"], []
    for one in report.get("samples", ()):
        rows = [[model["title"], one["models"][name]] for name, model in models.items() if name in one["models"]]
        tables.append(as_markdown([["prompt", one["prompt"]], *rows], ":--"))
    about = "Beginnings of texts of the test split, and how each model goes on with the likeliest tokens."
    return "\n\n".join(["## Samples", about, *tables]) if tables else ""


def _with_error(measured: Mapping[str, Any] | None) -> str:
    if measured is None or measured["mean"] is None:
        return MISSING
    error = measured.get("standard_error")
    return f"{measured['mean']:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _chance_text(data: Mapping[str, Any]) -> str:
    """Say what a score is to be held against."""
    if data["chance_score"] is None:
        return ""
    text = f" The best constant prediction scores {_score(data['chance_score'])}."
    if data["standard_error"] is None:
        return text
    error = _score(data["standard_error"])
    units, unit = data.get("units", data["n_test"]), data.get("unit", "example")
    return f"{text} With {units:,} test {_several(unit)} the standard error of a score is up to {error}."


def _several(unit: str) -> str:
    """Return a unit in the plural."""
    return "queries" if unit == "query" else f"{unit}s"


def _score(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def cell(value: Any) -> str:
    """Write a setting in one cell."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {cell(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(cell, value)) or "none"
    return "unknown" if value is None else str(value)


def _times(factor: float) -> str:
    """Write a factor with two digits: 1.4x, 12x, 130x."""
    return f"{factor:.1f}x" if factor < 9.95 else f"{float(f'{factor:.2g}'):.0f}x"


def _size_clause(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> str | None:
    if not teacher["size"] or not student["size"]:
        return None
    factor = teacher["size"]["parameters"] / student["size"]["parameters"]
    return f"with {_times(factor)} fewer parameters" if factor >= 1 else f"with {_times(1 / factor)} more parameters"


def _speed_clause(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> str | None:
    if teacher["latency_ms"] and student["latency_ms"]:
        verb, factor = "is", teacher["latency_ms"]["p50"] / student["latency_ms"]["p50"]
    elif teacher.get("generation") and student.get("generation"):
        own, other = (one["generation"]["decode_per_second"] for one in (student, teacher))
        verb, factor = "generates", own / other
    else:
        return None
    return f"{verb} {_times(factor)} faster" if factor >= 1 else f"{verb} {_times(1 / factor)} slower"


def _gain(report: Mapping[str, Any], baseline: float, distilled: float) -> str:
    """Compare with the same student trained from labels, and with the same from the same start."""
    ratio, same = report["distillation_ratio"]["mean"], report["distillation_ratio_same_start"]["mean"]
    compared = (
        f"the same student trained from {report['data'].get('learns_from', 'labels')} alone scores {baseline:.3f}"
    )
    started = report["models"].get("baseline_initialised")
    best = [baseline]
    if started is not None and (value := started["test"][monitor(report)]["mean"]) is not None:
        compared += f", from the same start {value:.3f}"
        best.append(value)
    better = sign(report, monitor(report))
    if ratio is None:
        return f"There was no gap for distillation to close: {compared}."
    if gap_is_noise(report):
        return f"The gap to the teacher may be noise, so that there is little to gain here or to conclude: {compared}."
    if better * distilled <= max(better * value for value in best):
        changes = report["differences"].get("distilled", {}).values()
        noise = ", or its gain is lost in noise" if changes and all(map(is_noise, changes)) else ""
        return f"Distillation did not help{noise}: {compared}."
    from_start = f", {100 * same:.0f}% of what the same start leaves" if same is not None else ""
    return f"Distillation closed {100 * ratio:.0f}% of the gap to the teacher{from_start}: {compared}."


def _difference_text(report: Mapping[str, Any], title: str) -> str:
    """Return how much the distilled student differs from each baseline, and how sure that is."""
    sentences = []
    for baseline, difference in report["differences"].get("distilled", {}).items():
        if difference["standard_error"] is not None:
            same = f"compared on the same test {_several(report['data'].get('unit', 'example'))}"
            method = same if difference["paired"] else "as if from independent test sets"
            sentences.append(
                f"Distilled minus {report['models'][baseline]['title']}: {difference['mean']:+.3f} {title}, standard "
                f"error {difference['standard_error']:.3f} ({method}, variation over seeds included)."
            )
    return " ".join(sentences)


def _outputs_text(report: Mapping[str, Any]) -> str:
    """Return what the teachers' predictions took, and where these seconds are."""
    sentences = []
    for model in report["models"].values():
        if (spent := model.get("outputs_seconds")) is not None:
            sentences.append(
                f"The outputs of the {model['title']} took {spent['total']:.1f} s: {spent['reused']:.1f} s in other "
                f"runs, whose stored outputs were read, and {spent['training']:.1f} s within the students' training "
                "time."
            )
    return " ".join(sentences)


def generation_text(rows: Sequence[Mapping[str, Any]], target: str) -> str:
    """Return how a report's or a benchmark's generation and drafts were measured, if they were."""
    found = next((row["generation"] for row in rows if row.get("generation")), None)
    draft = next((row["draft"] for row in rows if row.get("draft")), None)
    if found is None:
        return ""
    text = (
        f"Generation is one text at a time with a cache, {found['new_tokens']} tokens after each of {found['prompts']} "
        f"prompts of about {found['prompt_tokens']:.0f}, in turns on {found['device']} with {found['threads']} "
        "thread(s); prefill is a prompt's tokens by the time to the first new one."
    )
    if draft is None:
        return text
    return (
        f"{text} As a draft model of {target}, in the assisted generation of transformers, a student proposes "
        f"{draft['proposed']} tokens at a time; accepted is the share of proposed ones that {target} keeps, of the "
        f"likeliest tokens and of tokens drawn at temperature 1 (seed {draft['seed']}), over {draft['prompts']} "
        f"prompts and {draft['new_tokens']} tokens each; the speed-up is that of the likeliest tokens."
    )


def _speed_text(report: Mapping[str, Any]) -> str:
    """Return how latency and throughput were measured."""
    latency = next((model["latency_ms"] for model in report["models"].values() if model["latency_ms"]), None)
    if latency is None:
        return generation_text(list(report["models"].values()), "the teacher")
    return (
        f"Latency is one example at a time, {latency['calls']} calls per model in turns on {latency['device']} with "
        f"{latency['threads']} thread(s); the preparation of inputs is not included."
    )
