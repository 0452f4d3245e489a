"""Write the tables of README.md and docs/*.md from results/*.json.

They stand between `<!-- table: NAME -->` and `<!-- end -->`.

python scripts/update_readme.py            write them
python scripts/update_readme.py --check    fail if they are not what the results say
python scripts/update_readme.py --record runs/quickstart    first copy that run's report to results/quickstart.json
python scripts/update_readme.py --picture  first draw results/peers.png from results/benchmarks/peers.json
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import advice
import defaults
import kinds
import language_models
import tasks
from faults.page import table as fault_table
from kd_lightning.evaluation.report import load_report, markdown_table, summary
from kd_lightning.evaluation.report.style import COLOURS, GREY, TITLE, Dot, dots, new_figure
from kd_lightning.export.benchmark_files import markdown
from trainings import closed, gain

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def benchmarks() -> str:
    """Return docs/benchmarks.md's table of what was measured against a goal, from results/benchmarks/*.json."""
    lines = ["| benchmark | figure | median | low to high | runs | goal | met |"]
    lines.append("| :-- | :-- | --: | --: | --: | --: | :-- |")
    files = sorted((ROOT / "results" / "benchmarks").glob("*.json"))
    for content in map(_read, files):
        for measure in content["measures"]:
            if measure["goal"] is None:
                continue
            unit = "" if measure["unit"] == "ratio" else f" {measure['unit']}"
            spread = f"{measure['low']:.3g} to {measure['high']:.3g}"
            met = "yes" if measure["met"] else "**no**"
            lines.append(
                f"| `{content['name']}` | {measure['name']} | {measure['median']:.3g}{unit} | {spread} | "
                f"{measure['rounds']} | {measure['goal']} | {met} |"
            )
    machines = {content["environment"]["cpu"]: content["environment"] for content in map(_read, files)}
    where = "; ".join(f"{name}, {m['cores']} cores, torch {m['versions']['torch']}" for name, m in machines.items())
    return "\n".join([*lines, "", f"Measured with `python scripts/benchmark.py NAME` on {where}."]) + "\n"


def gpu() -> str:
    """Return docs/processes.md's table of what was timed on a GPU, from results/gpu.json."""
    content = _read(ROOT / "results" / "gpu.json")
    lines = ["| part | figure | median | goal | met |", "| :-- | :-- | --: | :-- | :-- |"]
    for name, part in content["parts"].items():
        for figure in part["figures"]:
            unit = "" if figure["unit"] == "ratio" else f" {figure['unit']}"
            met = {None: "", True: "yes", False: "**no**"}[figure["met"]]
            median = f"{figure['median']:,.0f}" if figure["median"] >= 1000 else f"{figure['median']:.3g}"
            lines.append(f"| `{name}` | {figure['name']} | {median}{unit} | {figure['goal'] or ''} | {met} |")
    machine = content["environment"]
    card = ", ".join(machine["cuda_devices"])
    lines += ["", f"`{content['command']}`, {card}, torch {machine['versions']['torch']}, {machine['date'][:10]}."]
    return "\n".join(lines) + "\n"


def strategies() -> str:
    """Return docs/comparison.md's table: one student with every text strategy, from results/strategies.json."""
    content = _read(ROOT / "results" / "strategies.json")
    rows = sorted(content["strategies"], key=lambda row: -row["test"]["mean"])
    base = next(row for row in rows if row["name"] == "labels_only")["test"]["mean"]
    lines = ["| strategy | test accuracy, % | against labels only | validation, % |"]
    lines.append("| :-- | --: | --: | --: |")
    for row in rows:
        test, validation = _percent(row["test"]), _percent(row["validation"])
        better = 100 * (row["test"]["mean"] - base)
        name = f"[`{row['name']}`](strategies.md#{row['name']})"
        lines.append(f"| {name} | {test} | {better:+.1f} | {validation} |")
    machine = content["environment"]
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['versions']['torch']}, {machine['date'][:10]}"
    lines += [
        "",
        f"Teacher: {100 * content['teacher']['test']:.1f} %; {content['seeds']} seeds. "
        f"`{content['command']}`, {content['minutes']['cpu'] / machine['cores']:.0f} minutes of CPU time a core, "
        f"{where} (`results/strategies.json`).",
    ]
    return "\n".join(lines) + "\n"


def exports() -> str:
    """Return docs/export.md's table of exported students, with the goals, from results/export.json."""
    file = ROOT / "results" / "export.json"
    if not file.is_file():
        return "Not measured yet: `python scripts/export_reviews.py RUN_DIR` does, and writes `results/export.json`.\n"
    content = _read(file)
    lines = [markdown(content), "", "| goal | measured | wanted | met |", "| :-- | --: | --: | :-- |"]
    for goal in content["goals"]:
        met = "yes" if goal["met"] else "**no**"
        lines.append(f"| {goal['name']} | {goal['value']:.3g} | {goal['goal']} | {met} |")
    return "\n".join(lines) + "\n"


def _recipes() -> dict[str, Any] | None:
    file = ROOT / "results" / "quality.json"
    return _read(file) if file.is_file() else None


NO_RECIPES = "Not measured yet: `python scripts/recipes.py`, then `--final`, which writes `results/quality.json`.\n"


def recipes() -> str:
    """Return docs/recipes.md's first table, each recipe's student beside its teacher, from results/quality.json."""
    if (content := _recipes()) is None:
        return NO_RECIPES
    lines = ["| recipe | student | teacher | from labels | distilled | gap closed |", "| :-- | :-- |" + " --: |" * 4]
    for name, row in content["recipes"].items():
        lines.append(
            f"| `{name}` | {row['student']} | {100 * row['teacher']['mean']:.1f} | {_percent(row['baseline'])} | "
            f"{_percent(row['distilled'])} | {_ratio(row['ratio'])} |"
        )
    machines = {row["environment"]["cpu"]: row["environment"] for row in content["recipes"].values()}
    where = "; ".join(f"{name}, {m['cores']} cores, torch {m['versions']['torch']}" for name, m in machines.items())
    lines += [
        "",
        f"Test accuracy in %, mean and standard deviation over {content['seeds']} seeds; for `multi_task` the average "
        f"of its tasks' accuracies and correlations. {where} (`results/quality.json`).",
    ]
    return "\n".join(lines) + "\n"


def recipe_goals() -> str:
    """Return each recipe's goal, whether it is met, and what remains of the gain at an equal start."""
    if (content := _recipes()) is None:
        return NO_RECIPES
    lines = [
        "| recipe | from labels, same start | distilled | gap closed from the same start | goal | met |",
        "| :-- | --: | --: | --: | :-- | :-- |",
    ]
    for name, row in content["recipes"].items():
        started = _percent(row["baseline_initialised"]) if "baseline_initialised" in row else ""
        met = "yes" if row["met"] else "**no**"
        lines.append(
            f"| `{name}` | {started} | {_percent(row['distilled'])} | {_closed_from_start(row)} | {row['goal']} | "
            f"{met} |"
        )
    return "\n".join(lines) + "\n"


def recipe_details() -> str:
    """Return the figures besides accuracy that the goals name."""
    if (content := _recipes()) is None:
        return NO_RECIPES
    lines = ["| recipe | figure | value |", "| :-- | :-- | --: |"]
    for name, row in content["recipes"].items():
        lines += [f"| `{name}` | {figure} | {value} |" for figure, value in _goal_figures(row)]
    return "\n".join(lines) + "\n"


def _goal_figures(row: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    if "latency" in row["goal"]:
        found.append(("share of the teacher's accuracy", f"{row['distilled']['mean'] / row['teacher']['mean']:.2%}"))
        file = ROOT / "results" / "studies" / "best_recipe.json"
        if file.is_file():
            content = _read(file)
            again, cpu = content["curves"]["distilled"][0], content["environment"]["cpu"]
            title = f"... measured again with a teacher fine-tuned anew, on {cpu}"
            found.append((title, f"{again['test']['mean'] / again['teacher']:.2%}"))
        found.append(("share of the teacher's latency", f"{row['latency_share']:.2f}"))
    if "feature strategy" in row["goal"]:
        best = row["best_features"]
        test = row["variants"][best]["test"]
        more, error = gain(test["values"], row["distilled"]["values"])
        found.append((f"accuracy with the best feature strategy on validation, `{best}`", _percent(test)))
        found.append(("... minus plain distillation (± standard error)", f"{100 * more:.2f} ± {100 * error:.2f}"))
    if "tasks" in row:
        found.append(("share of its teachers' parameters", f"{row['size_share']:.2f}"))
    return found


def recipe_tasks() -> str:
    """Return the scores of `multi_task` by task."""
    if (content := _recipes()) is None:
        return NO_RECIPES
    lines = ["| task | teacher | from labels, same start | distilled |", "| :-- | --: | --: | --: |"]
    for row in content["recipes"].values():
        selected = {key.split("/")[0]: key for key in reversed(row.get("tasks", {}))}  # a task's first is its monitor
        for key, task in row.get("tasks", {}).items():
            if key in selected.values():
                lines.append(
                    f"| {key.replace('/', ', ')} | {100 * task['teacher']:.1f} | "
                    f"{_percent(task['baseline_initialised'])} | {_percent(task['distill'])} |"
                )
    return "\n".join(lines) + "\n"


def recipe_minutes() -> str:
    """Return how long one seed of each recipe trains on one core, from results/studies/stage_budget.json."""
    file = ROOT / "results" / "studies" / "stage_budget.json"
    if (content := _recipes()) is None or not file.is_file():
        return "Not measured yet: `python scripts/study.py stage_budget --final`.\n"
    lines = ["| recipe | distilled student, minutes | with its baselines, minutes |", "| :-- | --: | --: |"]
    for name, (labels, distilled) in _read(file)["curves"].items():
        baselines = labels["x"] * (1 + ("baseline_initialised" in content["recipes"][name]))
        lines.append(f"| `{name}` | {distilled['x'] / 60:.0f} | {(baselines + distilled['x']) / 60:.0f} |")
    return "\n".join(lines) + "\n"


def _ratio(spread: dict[str, Any]) -> str:
    return f"{spread['mean']:.2f} ± {spread['std']:.2f}"


def _closed_from_start(row: dict[str, Any]) -> str:
    """Return the share of the gap that the teacher's outputs close, beyond what the student starts from."""
    if "baseline_initialised" not in row:
        return ""
    return _ratio(closed(row["baseline_initialised"]["values"], row["distilled"]["values"], row["teacher"]["mean"]))


def ablation(name: str) -> str:
    """Return what a recipe loses without each of its levers, from results/quality.json."""
    file = ROOT / "results" / "quality.json"
    row = _read(file)["recipes"].get(name) if file.is_file() else None
    if row is None:
        return f"Not measured yet: `python scripts/recipes.py {name}`, then `--final`.\n"
    lines = [
        f"| `{name}` | changed setting | test accuracy, % | against the recipe | validation, % |",
        "| :-- | :-- | --: | --: | --: |",
    ]
    lines.append(f"| as it stands | | {_percent(row['distilled'])} | | {_percent(row['validation']['distill'])} |")
    rows = [
        (variant, " ".join(f"`{setting}`" for setting in one["settings"]), one["test"], one["validation"])
        for variant, one in row["variants"].items()
    ]
    for title, stage in (
        ("no teacher, the same start", "baseline_initialised"),
        ("no teacher, random start", "baseline"),
    ):
        if stage in row:
            rows.append((title, "", row[stage], row["validation"][stage]))
    for variant, settings, test, validation in sorted(rows, key=lambda one: -one[2]["mean"]):
        change = 100 * (test["mean"] - row["distilled"]["mean"])
        lines.append(f"| {variant} | {settings} | {_percent(test)} | {change:+z.1f} | {_percent(validation)} |")
    return "\n".join(lines) + "\n"


def sweep() -> str:
    """Return docs/sweeps.md's table: what the default, the best and the worst point of results/sweeps/*.json gain."""
    lines = [
        "| data | gain at temperature 2, alpha 0.9 (the default) | best | gain | worst | gain |",
        "| :-- | --: | :-- | --: | :-- | --: |",
    ]
    documents = {file.stem: _read(file) for file in sorted((ROOT / "results" / "sweeps").glob("*.json"))}
    if not documents:
        return "Not measured yet: `python scripts/sweep.py`.\n"
    for name, document in documents.items():
        entries = document["configurations"]
        default = next(entry for entry in entries if entry["values"] == {"temperature": 2, "alpha": 0.9})
        shown = [_points(default["gain"])]
        for entry in (entries[0], entries[-1]):
            values = entry["values"]
            shown += [f"temperature {values['temperature']:g}, alpha {values['alpha']:g}", _points(entry["gain"])]
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    for name, document in documents.items():
        machine, points = document["environment"], sum(len(entry["points"]) for entry in document["configurations"])
        lines += [
            "",
            f"![Gain over temperature and alpha, {name}](../results/sweeps/{name}.png)",
            "",
            f"`{name}`: `{document['command']}`, {points} points, {machine['cpu']}, {machine['date'][:10]}.",
        ]
    return "\n".join(lines) + "\n"


def faults() -> str:
    """Return docs/reliability.md's tables of how trials of faults ended, from results/faults.json."""
    file = ROOT / "results" / "faults.json"
    return fault_table(_read(file)) if file.is_file() else "Not tried yet: `python scripts/fault_campaign.py`.\n"


def _points(spread: dict[str, Any]) -> str:
    return f"{100 * spread['mean']:+.1f} ± {100 * spread['std']:.1f}"


def _percent(spread: dict[str, Any]) -> str:
    return f"{100 * spread['mean']:.1f} ± {100 * spread['std']:.1f}"


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def picture() -> None:
    """Draw how long each library takes for the same distillation, the fastest first."""
    measures = _read(ROOT / "results" / "benchmarks" / "peers.json")["measures"]
    seconds = [measure for measure in measures if measure["unit"] == "s"]
    students = list(dict.fromkeys(measure["name"].split(": ")[0] for measure in seconds))
    figure = new_figure(10, 1.2 + 0.3 * len(seconds) / len(students))
    for axes, student in zip(figure.subplots(1, len(students), sharex=True, squeeze=False)[0], students, strict=True):
        rows = sorted((m for m in seconds if m["name"].startswith(f"{student}: ")), key=lambda m: m["median"])
        named = [(row["name"].split(": ", 1)[1], row) for row in rows]
        colours = [COLOURS["distilled"] if name.startswith("ours") else GREY for name, _ in named]
        some = zip(named, colours, strict=True)
        dots(
            axes,
            [Dot(name, row["median"], (row["low"], row["high"]), colour) for (name, row), colour in some],
            "{:.1f} s".format,
        )
        axes.set_xlim(left=0)
        axes.set_title(f"MiniLM-L6 to {student}", fontsize=TITLE)
        axes.set_xlabel("seconds (median; lowest to highest)")
    figure.savefig(ROOT / "results" / "peers.png", dpi=150)


def quickstart_sentence() -> str:
    """Return README.md's sentence about `experiment=quickstart`, from results/quickstart.json."""
    return summary(load_report(ROOT / "results" / "quickstart.json")) + "\n"


TABLES = {
    "kinds": kinds.table, "quickstart_sentence": quickstart_sentence,
    "benchmarks": benchmarks, "gpu": gpu, "strategies": strategies, "export": exports, "sweep": sweep,
    "recipes": recipes, "recipe_goals": recipe_goals, "recipe_details": recipe_details, "recipe_tasks": recipe_tasks,
    "recipe_minutes": recipe_minutes, "faults": faults, "advice": advice.table, "defaults": defaults.table,
    "lm": language_models.table, "lm_costs": language_models.costs,
    "tags": partial(tasks.table, "token classification"),
    "embeddings": partial(tasks.table, "sentence embedding"), "questions": partial(tasks.table, "question answering"),
    "ranking": partial(tasks.table, "ranking"), "masked": partial(tasks.table, "masked language modelling"),
    **{f"ablation_{name}": partial(ablation, name) for name in ("reviews_bilstm", "reviews_3layer", "fashion_resnet")},
}  # fmt: skip


def block(name: str) -> str:
    """Return the README's block for one result: the sentence that sums it up, the table, and where it was measured."""
    if name in TABLES:
        return TABLES[name]()
    report = load_report(ROOT / "results" / f"{name}.json")
    machine = report["environment"]
    ratio = report["distillation_ratio"]
    seeds = len(report["seeds"])
    spread = f" ± {ratio['std']:.2f}" if ratio["std"] is not None else ""
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['versions']['torch']}, {machine['date'][:10]}"
    lines = [
        summary(report), "", markdown_table(report), "",
        f"Distillation ratio (S_kd - S) / (T - S): {ratio['mean']:.2f}{spread}, {seeds} seed{'s' * (seeds > 1)}. "
        f"`{report['command']}`, {where} (`results/{name}.json`).",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def record(run: Path) -> None:
    """Copy a run's report and pictures to results/, under the run's name."""
    (ROOT / "results").mkdir(exist_ok=True)
    report = load_report(run / "report.json")
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (ROOT / "results" / f"{run.name}.json").write_text(text, encoding="utf-8")
    for picture in ("curves", "tradeoff"):
        shutil.copyfile(run / f"{picture}.png", ROOT / "results" / f"{run.name}_{picture}.png")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", type=Path, metavar="RUN_DIR")
    parser.add_argument("--picture", action="store_true")
    given = parser.parse_args()
    if given.record:
        record(given.record)
    if given.picture:
        picture()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda found: f"{found[1]}{block(found[2])}{found[3]}", old)
        if new == old:
            continue
        if given.check:
            sys.exit(f"{path.relative_to(ROOT)} is not what results/ say: python scripts/update_readme.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
