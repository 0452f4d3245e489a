"""Write the tables of README.md, docs/levers.md and docs/reliability.md from results/*.json.

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
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from faults.page import table as fault_table
from kd_lightning.evaluation.report import load_report, markdown_table, summary
from kd_lightning.export.benchmark import markdown
from trainings import closed, gain

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def benchmarks() -> str:
    """Return the README's table of what was measured against a goal, from results/benchmarks/*.json."""
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
    """Return the README's table of what every text strategy is worth to one student, from results/strategies.json."""
    content = _read(ROOT / "results" / "strategies.json")
    rows = sorted(content["strategies"], key=lambda row: -row["test"]["mean"])
    base = next(row for row in rows if row["name"] == "labels_only")["test"]["mean"]
    lines = ["| strategy | test accuracy, % | against labels only | validation, % |"]
    lines.append("| :-- | --: | --: | --: |")
    for row in rows:
        test, validation = _percent(row["test"]), _percent(row["validation"])
        better = 100 * (row["test"]["mean"] - base)
        name = f"[`{row['name']}`](docs/strategies.md#{row['name']})"
        lines.append(f"| {name} | {test} | {better:+.1f} | {validation} |")
    machine = content["environment"]
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['versions']['torch']}, {machine['date'][:10]}"
    lines += [
        "",
        f"Teacher: {100 * content['teacher']['test']:.1f} %. {content['seeds']} seeds; "
        f"{content['minutes']['cpu'] / machine['cores']:.0f} minutes of CPU time on each of {machine['cores']} cores "
        f"({content['minutes']['wall']:.0f} on the clock, beside other work). "
        f"`{content['command']}`, {where} (`results/strategies.json`).",
    ]
    return "\n".join(lines) + "\n"


def exports() -> str:
    """Return the README's table of exported students, with the goals, from results/export.json."""
    file = ROOT / "results" / "export.json"
    if not file.is_file():
        return "Not measured yet: `python scripts/export_reviews.py RUN_DIR` does, and writes `results/export.json`.\n"
    content = _read(file)
    lines = [markdown(content), "", "| goal | measured | wanted | met |", "| :-- | --: | --: | :-- |"]
    for goal in content["goals"]:
        met = "yes" if goal["met"] else "**no**"
        lines.append(f"| {goal['name']} | {goal['value']:.3g} | {goal['goal']} | {met} |")
    return "\n".join(lines) + "\n"


def recipes() -> str:
    """Return the README's main table, what each recipe's student learned, from results/quality.json."""
    file = ROOT / "results" / "quality.json"
    if not file.is_file():
        return "Not measured yet: `python scripts/recipes.py`, then `--final`, which writes `results/quality.json`.\n"
    content = _read(file)
    lines = [
        "| recipe | student | teacher | from labels | from labels, same start | distilled | gap closed | from the same "
        "start | goal |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: | :-- |",
    ]
    for name, row in content["recipes"].items():
        started = _percent(row["baseline_initialised"]) if "baseline_initialised" in row else ""
        ratio = f"{row['ratio']['mean']:.2f} ± {row['ratio']['std']:.2f}"
        lines.append(
            f"| `{name}` | {row['student']} | {100 * row['teacher']['mean']:.1f} | {_percent(row['baseline'])} | "
            f"{started} | {_percent(row['distilled'])} | {ratio} | {_closed_from_start(row)} | {row['goal']}: "
            f"{'met' if row['met'] else '**missed**'} |"
        )
    several = [f"`{name}`" for name, row in content["recipes"].items() if "tasks" in row]
    others = f" (of {', '.join(several)} the mean of its tasks' accuracies and correlations)" if several else ""
    machines = {row["environment"]["cpu"]: row["environment"] for row in content["recipes"].values()}
    where = "; ".join(f"{name}, {m['cores']} cores, torch {m['versions']['torch']}" for name, m in machines.items())
    lines += [
        "",
        f"Test accuracy in %{others}, mean and standard deviation of {content['seeds']} seeds; *gap closed* is the "
        "distillation ratio (S_kd - S) / (T - S) against labels, and then against labels from the same start, which is "
        "what the teacher's answers alone close, on text also those to views and transfer sentences, which students "
        "from labels do not see (they see the views of images, which keep their labels). One seed: `kd-train "
        "experiment=NAME`; all: `python scripts/recipes.py`, then `--final`, which reads the test split, and "
        "`scripts/update_readme.py`; on "
        f"{where} (`results/quality.json`).",
        "",
        *_details(content["recipes"]),
    ]
    return "\n".join(lines) + "\n"


def _repeated() -> str:
    """Return what the best recipe keeps in results/studies/best_recipe.json, which measured it again."""
    file = ROOT / "results" / "studies" / "best_recipe.json"
    if not file.is_file():
        return ""
    content = _read(file)
    again = content["curves"]["distilled"][0]
    return (
        f"; measured again on {content['environment']['cpu']}, below a teacher fine-tuned anew "
        f"({100 * again['teacher']:.1f} %), {100 * again['test']['mean'] / again['teacher']:.1f} %"
    )


def _closed_from_start(row: dict[str, Any]) -> str:
    """Return which share of the gap is closed by the teacher's answers, and not by what the student starts from."""
    if "baseline_initialised" not in row:
        return ""
    ratio = closed(row["baseline_initialised"]["values"], row["distilled"]["values"], row["teacher"]["mean"])
    return f"{ratio['mean']:.2f} ± {ratio['std']:.2f}"


def _details(rows: dict[str, Any]) -> list[str]:
    """Return what goals speak of besides the table's figures, and what training costs."""
    said = []
    for name, row in rows.items():
        if "latency" in row["goal"]:
            kept = 100 * row["distilled"]["mean"] / row["teacher"]["mean"]
            said.append(f"* `{name}` keeps {kept:.2f} % at {row['latency_share']:.2f} of the latency{_repeated()}.")
        if "feature strategy" in row["goal"]:
            best = row["best_features"]
            test = row["variants"][best]["test"]
            more, error = gain(test["values"], row["distilled"]["values"])
            said.append(
                f"* The feature strategy that is best for `{name}` on validation, `{best}`: {_percent(test)}, "
                f"{100 * more:.2f} ± {100 * error:.2f} (standard error) more than plain distillation."
            )
        if "tasks" in row:
            main = {key.split("/")[0]: key for key in reversed(row["tasks"])}  # a task's first metric is its main one
            tasks = "; ".join(
                f"{key.replace('/', ' ')} of the teacher {100 * task['teacher']:.1f}, from labels, same start, "
                f"{_percent(task['baseline_initialised'])}, distilled {_percent(task['distill'])}"
                for key, task in row["tasks"].items()
                if key in main.values()
            )
            said.append(f"* `{name}`, {row['size_share']:.2f} of its teachers' size, by task: {tasks}.")
    budget = ROOT / "results" / "studies" / "stage_budget.json"
    if budget.is_file():
        seconds = {name: [point["x"] for point in points] for name, points in _read(budget)["curves"].items()}
        starts = {name: "baseline_initialised" in row for name, row in rows.items()}
        alone = {name: taught / 60 for name, (_, taught) in seconds.items()}
        whole = {name: (labels * (1 + starts[name]) + taught) / 60 for name, (labels, taught) in seconds.items()}
        least, most = min(alone, key=alone.__getitem__), max(alone, key=alone.__getitem__)
        longest = max(whole, key=whole.__getitem__)
        said.append(
            f"* One seed distils, the teacher's answers kept, within {alone[least]:.0f} (`{least}`) to "
            f"{alone[most]:.0f} minutes (`{most}`) on one core, and with the students from labels beside which it is "
            f"held within {whole[longest]:.0f} (`{longest}`); the first run fine-tunes the teacher and asks it, too "
            f"(`{budget.relative_to(ROOT)}`)."
        )
    return said


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
        ("no teacher, nothing of it", "baseline"),
    ):
        if stage in row:
            rows.append((title, "", row[stage], row["validation"][stage]))
    for variant, settings, test, validation in sorted(rows, key=lambda one: -one[2]["mean"]):
        change = 100 * (test["mean"] - row["distilled"]["mean"])
        lines.append(f"| {variant} | {settings} | {_percent(test)} | {change:+z.1f} | {_percent(validation)} |")
    return "\n".join(lines) + "\n"


def sweep() -> str:
    """Return what the README says of the sweep in results/sweeps: what each parameter moves, and against what."""
    content = _read(ROOT / "results" / "sweeps" / "sweep.json")
    entries, machine = content["configurations"], content["environment"]
    said = []
    for name in ("alpha", "temperature"):
        values = sorted({entry["values"][name] for entry in entries})
        means = {
            value: statistics.mean(entry["validation"]["mean"] for entry in entries if entry["values"][name] == value)
            for value in values
        }
        worst, best = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        said.append(
            f"{name} moves the validation accuracy by {100 * (means[best] - means[worst]):.1f} points "
            f"({means[worst]:.3f} at {worst:g}, {means[best]:.3f} at {best:g})"
        )
    best, base = entries[0], entries[0]["baseline"]["mean"]
    found = "beats" if best["validation"]["mean"] > base else "does not beat"
    points = sum(len(entry["points"]) for entry in entries)
    return (
        f"On `reviews`, averaged over all else, {said[0]}, and {said[1]}; in this short training even the best setting "
        f"({best['validation']['mean']:.3f}) {found} the same student from labels ({base:.3f}). "
        f"`{content['command']}`, {points} points, {machine['cpu']}, {machine['cores']} cores, {machine['date'][:10]} "
        f"(`results/sweeps/`, where `report.html` is the page of `kd-report`).\n"
    )


def faults() -> str:
    """Return what killed, damaged, misconfigured and misled commands came to, from results/faults.json."""
    file = ROOT / "results" / "faults.json"
    return fault_table(_read(file)) if file.is_file() else "Not tried yet: `python scripts/fault_campaign.py`.\n"


def _percent(spread: dict[str, Any]) -> str:
    return f"{100 * spread['mean']:.1f} ± {100 * spread['std']:.1f}"


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def picture() -> None:
    """Draw how long each library takes for the same distillation."""
    from matplotlib.figure import Figure

    measures = _read(ROOT / "results" / "benchmarks" / "peers.json")["measures"]
    seconds = [measure for measure in measures if measure["unit"] == "s"]
    students = list(dict.fromkeys(measure["name"].split(": ")[0] for measure in seconds))
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(seconds) / len(students)), layout="constrained")
    for axes, student in zip(figure.subplots(1, len(students), sharex=True, squeeze=False)[0], students, strict=True):
        rows = [m for m in seconds if m["name"].startswith(f"{student}: ")]
        rows.sort(key=lambda measure: -measure["median"])
        names = [measure["name"].split(": ", 1)[1] for measure in rows]
        spread = [[m["median"] - m["low"] for m in rows], [m["high"] - m["median"] for m in rows]]
        colours = ["#1b6ca8" if name.startswith("ours") else "#b0b0b0" for name in names]
        bars = axes.barh(names, [m["median"] for m in rows], xerr=spread, color=colours, ecolor="#444444", capsize=2)
        axes.bar_label(bars, [f" {m['median']:.1f} s" for m in rows], padding=4, fontsize=9)
        axes.set_title(f"MiniLM-L6 to {student}", fontsize=11)
        axes.set_xlabel("seconds (median; lowest to highest)")
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "results" / "peers.png", dpi=150)


TABLES = {
    "benchmarks": benchmarks, "gpu": gpu, "strategies": strategies, "export": exports, "sweep": sweep,
    "recipes": recipes, "faults": faults,
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
    for path in (
        ROOT / "README.md",
        *(ROOT / "docs" / f"{name}.md" for name in ("levers", "processes", "reliability")),
    ):
        old = path.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda found: f"{found[1]}{block(found[2])}{found[3]}", old)
        if new == old:
            continue
        if given.check:
            sys.exit(f"{path.relative_to(ROOT)} is not what results/ say: python scripts/update_readme.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
