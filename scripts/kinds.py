"""The README's table: an experiment or two of each kind of task, from results/quality.json, tasks.json and lm.json."""

from __future__ import annotations

from collections.abc import Iterator

import language_models
import tasks
from trainings import ROOT, percent, read_result, written

RECIPES = {
    "reviews_bilstm": "classes of sentences", "reviews_3layer": "classes of sentences",
    "fashion_resnet": "classes of images", "multi_task": "three tasks at once",
}  # fmt: skip
"""The recipes in the table, and their kind of task."""
OF_TASKS = ("ner_pii", "qa_debian", "embed_debian", "embed_debian, static", "rank_debian", "masked_general")


def table() -> str:
    """Return the table."""
    lines = [
        "| kind of task | `experiment=` | score | teacher | student from its data alone | ... same start | distilled | "
        "parameters |",
        "| :-- | :-- | :-- |" + " --: |" * 5,
        *(f"| {' | '.join(cells)} |" for cells in (*_recipes(), *_tasks(), *_language_model())),
    ]
    return "\n".join(lines) + "\n"


def _recipes() -> Iterator[list[str]]:
    content = read_result(ROOT / "results" / "quality.json")
    for name, kind in RECIPES.items():
        row = content["recipes"][name]
        scores = [percent(row.get(model)) for model in tasks.MODELS]
        metric = "mean of accuracies and correlations" if row["metric"] == "average" else row["metric"]
        yield [kind, f"`{name}`", metric, *scores, tasks.sizes(row["teacher_parameters"], row["parameters"])]


def _tasks() -> Iterator[list[str]]:
    content = read_result(tasks.RESULT)
    for name in OF_TASKS:
        if row := content.get(name):
            ends = (row["models"][model]["size"]["parameters"] for model in ("teacher", "distilled"))
            yield [tasks.TASKS[name][0], _called(name), *tasks.cells(row), tasks.sizes(*ends)]


def _called(name: str) -> str:
    experiment, _, student = name.partition(", ")
    return f"`{experiment}`" + f", {student}" * bool(student)


def _language_model() -> Iterator[list[str]]:
    if row := read_result(language_models.RESULT).get("lm_quickstart"):
        models = row["models"]
        found = (models.get(model, {}).get("test", {}).get("perplexity") for model in tasks.MODELS)
        scores = [written(score, "{:.0f}".format) for score in found]
        ends = (models[model]["parameters"] for model in ("teacher", "distilled"))
        yield ["language modelling", "`lm_quickstart`", "perplexity, lower is better", *scores, tasks.sizes(*ends)]
