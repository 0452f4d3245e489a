"""Answer a question that users ask with a curve: five seeds a point, a picture, a sentence and a table.

python scripts/study.py NAME            train (what is trained already is kept); validation scores only
python scripts/study.py NAME --final    read the test split, once; write results/studies/NAME.json
python scripts/study.py --docs          write docs/studies.md and its pictures from results/studies, as --final does

data_efficiency   how many labels are needed, with and without a teacher (of these labels) for the unlabelled rest?
label_noise       what do wrong labels cost, when the teacher learned from them too?
sensitivity       temperature, alpha and learning rate, with labels alone as what is to be beaten
architecture_gap  teachers and students that are alike and unlike
levers            what views, transfer data, schedules and more (docs/levers.md) are worth, each changed alone
best_recipe       the same of views, transfer data, a start from the teacher and steps, for all of reviews_3layer
teacher_quality   does a better teacher make a better student?
calibration       what temperature, and a calibrated teacher, do to the student's calibration
stage_budget      accuracy (from results/quality.json) against training seconds, for every recipe; --final
                  times short trainings, one after the other, and needs the machine for itself

But in best_recipe the student is the BiLSTM of reviews_bilstm, where nothing else is said with the teacher's embeddings
to start from, with transfer data instead of views (levers: with two views), for 400 steps. Seeds differ in their
training: teachers, and which labels are left or wrong, are the same for all of them. Weights are selected on all of the
validation split, whose labels are right.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import findings
from findings import AS_IT_STANDS, FOLDS_LINE, LABELS_LINE, SOFT_LINE, START_LINE, TRUST_LINE, Curves
from kd_lightning.evaluation.report.style import (
    COLOURS,
    MARKERS,
    SERIES,
    SMALL,
    TITLE,
    End,
    name_lines,
    name_rows,
    new_figure,
    tidy,
)
from recipes import TRANSFER, teacher_of, train_teacher, trained_teachers
from recipes import jobs as recipe_jobs
from trainings import (
    ROOT,
    Job,
    run_of,
    spread,
    store_outputs,
    teacher_scores,
    test_scores,
    train_all,
    train_run,
    without_traceback,
)

RUNS, RESULTS = ROOT / "runs" / "studies", ROOT / "results" / "studies"
SEEDS = range(5)
SHORT = [
    "experiment=reviews_bilstm", "teacher.cache_views=1", "trainer.max_steps=400", "validations=5",
    "trainer.precision='${fast_precision:}'",
]  # fmt: skip
BUDGET = [*SHORT, TRANSFER, "data.views=0", "data.replace_probability=0", "data.drop_probability=0"]
RATE = "optimizer.lr=8e-3"  # the best for so few steps, on validation (sensitivity); labels alone do not mind
TUNING = ["teacher.trainer.max_epochs=-1", "teacher.trainer.max_steps=200", "teacher.network.frozen_layers=2"]
LABELS, START, TAUGHT = "baseline", "baseline_initialised", "distill"
Settings = list[str]


@dataclass(frozen=True)
class Point:
    """Where a run stands in the picture.

    Attributes:
        line: Which curve it is on; a stage's name is put before it where a run gives several.
        x: A number, or a name.
        settings: Its configuration.
        stages: Which trainings of the run are points, by the names of their curves.
    """

    line: str
    x: float | str
    settings: Settings
    stages: dict[str, str]


@dataclass(frozen=True)
class Study:
    """A question.

    Attributes:
        question: In words.
        x_label: With its unit.
        points: Makes the runs.
        finding: Returns what was found, as a sentence and a table, from each curve's points.
        score: Which figure of the test split is drawn.
        logarithmic: The x axis.
        teacher: Whether the teacher's own figure is recorded.
    """

    question: str
    x_label: str
    points: Callable[[], list[Point]]
    finding: Callable[[dict[str, list[dict[str, Any]]]], str]
    score: str = "accuracy"
    logarithmic: bool = False
    teacher: bool = False


def given_teacher() -> Settings:
    """Return what lets the recipes' teacher teach."""
    return [f"teacher.checkpoint={teacher_of('reviews_bilstm')}"]


def write_files(folder: Path, change: Callable[[list[str], list[str], random.Random], Iterable[int]]) -> Settings:
    """Write the reviews as files of one's own, after `change` did something to the training labels.

    Args:
        folder: Where to.
        change: Given the training sentences and their labels, which it may alter, and random numbers, returns which of
            the sentences keep a label; the others become sentences that only the teacher labels.

    Returns:
        The data's configuration.
    """
    from kd_lightning.runtime.files import write_file

    corpus = run_of([*BUDGET, f"run_dir={RUNS / 'reviews'}"]).data.read()
    names = {part: [corpus.class_names[int(label)] for label in getattr(corpus, part).labels] for part in PARTS}
    texts = {part: [sentence[0] for sentence in getattr(corpus, part).texts] for part in PARTS}
    kept = set(change(texts["train"], names["train"], random.Random(0)))
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        rows = [row for i, row in enumerate(zip(texts[part], names[part], strict=True)) if part != "train" or i in kept]
        content = io.StringIO(newline="")
        csv.writer(content).writerows([("text", "label"), *rows])
        write_file(folder / f"{part}.csv", content.getvalue())
    rest = [text for i, text in enumerate(texts["train"]) if i not in kept] + [one[0] for one in corpus.transfer]
    write_file(folder / "rest.txt", "".join(f"{text}\n" for text in rest))
    files = [f"data.{part}_file={folder / f'{part}.csv'}" for part in PARTS]
    return [
        *BUDGET, RATE, *TUNING, "data=text_files", *files, f"data.transfer=[{folder / 'rest.txt'}]",
        "data.tokenizer=minilm", "data.teacher_tokenizer=minilm", "data.batch_size=64",
    ]  # fmt: skip


PARTS = ("train", "validation", "test")


def data_efficiency() -> list[Point]:
    """Return runs with fewer and fewer labels; teachers are fine-tuned on what is left, for as many steps each."""

    def some(share: float, texts: list[str], labels: list[str], rng: random.Random) -> Iterable[int]:
        count = max(round(share * len(texts)), 2)
        order = list(range(len(texts)))
        rng.shuffle(order)
        return order[:count]  # a smaller share is a part of a larger one

    stages = {LABELS: LABELS_LINE, START: START_LINE, TAUGHT: "teacher, all sentences"}
    return [
        Point("", 100 * share, write_files(RUNS / f"files_{share:g}", partial(some, share)), stages)
        for share in (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
    ]


def label_noise() -> list[Point]:
    """Return runs with more and more wrong labels; the teacher is fine-tuned on the same ones."""

    def flipped(share: float, texts: list[str], labels: list[str], rng: random.Random) -> Iterable[int]:
        other = {"negative": "positive", "positive": "negative"}
        for i in rng.sample(range(len(labels)), round(share * len(labels))):
            labels[i] = other[labels[i]]
        return range(len(labels))

    found = []
    for share in (0.0, 0.2, 0.4):
        name = f"files_noise_{share:g}" if share else "files_1"  # all labels, and these right: as in data_efficiency
        # Half of what is learned is the label. A teacher sees the labels it learns from 1.7 times.
        settings = [*write_files(RUNS / name, partial(flipped, share)), "alpha=0.5", "teacher.trainer.max_steps=400"]
        stages = {LABELS: LABELS_LINE, START: START_LINE, TAUGHT: SOFT_LINE}
        found.append(Point("", 100 * share, settings, stages))
        folds = [*settings, "teacher.folds=2", "teacher.trainer.max_steps=200", "stages=[teacher,distill]"]
        found.append(Point("folds", 100 * share, folds, {TAUGHT: FOLDS_LINE}))
        trusting = [*folds, "distillation=label_trust"]
        found.append(Point("trust", 100 * share, trusting, {TAUGHT: TRUST_LINE}))
    return found


def sensitivity() -> list[Point]:
    """Return runs over temperature, alpha and learning rate."""
    found = []
    for rate in ("5e-4", "2e-3", "8e-3", "3.2e-2"):
        base = [*BUDGET, *given_teacher(), f"optimizer.lr={rate}"]
        stages = {LABELS: LABELS_LINE, START: START_LINE}
        found.append(Point("", float(rate), [*base, "stages=[baseline]"], stages))
        for temperature in (1, 4, 16):
            for alpha in (0.1, 0.5, 0.9):
                line = f"T {temperature}, alpha {alpha}"
                own = [f"temperature={temperature}", f"alpha={alpha}", "stages=[distill]"]
                found.append(Point(line, float(rate), base + own, {TAUGHT: line}))
    return found


def architecture_gap() -> list[Point]:
    """Return runs of every student with every teacher; of the three two are equally good."""
    students: dict[str, Settings] = {
        "BiLSTM": ["model@student=bilstm"],
        "TextCNN": ["model@student=text_cnn"],
        "transformer": ["model@student=transformer", "student.pooling=mean", "optimizer.lr=1e-3"],
    }
    teachers: dict[str, Settings] = {
        "MiniLM": ["teacher.trainer.max_steps=250"],
        "distilled BiLSTM": [f"teacher.checkpoint={recipe_jobs('reviews_bilstm')[0].stage(TAUGHT)}"],
        "BiLSTM from labels": ["model@teacher.network=lstm_teacher", "teacher.optimizer.lr=2e-3"],
    }
    found = []
    for name, student in students.items():
        for above, teacher in teachers.items():
            stages = {TAUGHT: f"{above} teaches"} | ({LABELS: LABELS_LINE} if above == "MiniLM" else {})
            found.append(Point(above, name, [*BUDGET, *student, *teacher], stages))
    return found


VIEWS = [*SHORT, RATE, "data.views=2"]
GENERAL, SECOND = RUNS / "general", RUNS / "second_teacher"
CHANGES = {
    "no views": ["data.views=0"],
    "no words masked": ["data.mask_probability=0"],
    "no n-grams": ["data.ngram_probability=0"],
    "no words replaced": ["data.replace_probability=0"],
    "replaced within the class": ["data.replace_by=class"],
    "no words left out": ["data.drop_probability=0"],
    "words swapped": ["data.swap_probability=0.1"],
    "cropped": ["data.crop_probability=0.25"],
    "transfer data": [TRANSFER],
    "fresh embeddings": ["model@student=bilstm"],
    "alpha 1 to 0.5": ["alpha={_target_: kd_lightning.schedules.Linear, start: 1.0, end: 0.5}"],
    "T 8 to 1": ["temperature={_target_: kd_lightning.schedules.Linear, start: 8.0, end: 1.0}"],
    "teacher calibrated": ["teacher.calibrate=true"],
    "two teachers": [f"teacher.checkpoint=[{teacher_of('reviews_bilstm')},{SECOND}]"],
    "pre-distilled": ["model@student=from_run", f"student.checkpoint={GENERAL}", "trainer.max_steps=200"],
}


def levers() -> list[Point]:
    """Return runs of a tenth of reviews_bilstm, with one change each; the last has half of its steps before."""
    base = [*VIEWS, *given_teacher()]
    found = [Point("", AS_IT_STANDS, base, {START: START_LINE, TAUGHT: "distilled"})]
    return found + [
        Point("", name, [*base, *change, "stages=[teacher,distill]"], {TAUGHT: "distilled"})
        for name, change in CHANGES.items()
    ]


def best_recipe() -> list[Point]:
    """Return runs of reviews_3layer, with one lever removed each; what labels alone do is in results/quality.json."""
    changes: dict[str, Settings] = {
        AS_IT_STANDS: [],
        "no views": ["data.views=0"],
        "no transfer data": ["data.transfer=[]"],
        "fresh weights": ["student.initialise=random"],
        "a tenth of the steps": ["trainer.max_steps=100"],
    }
    base = ["experiment=reviews_3layer", *given_teacher(), "stages=[teacher,distill]"]
    return [Point("", name, [*base, *change], {TAUGHT: "distilled"}) for name, change in changes.items()]


def train_general() -> None:
    """Pre-distil: the teacher's outputs on views and transfer data, and no label, for the `levers`."""
    settings = (*VIEWS, *given_teacher(), "trainer.max_steps=200", "alpha=1", TRANSFER, "stages=[distill]")
    general = Job("pre-distillation", settings, GENERAL, seed=0)
    if not general.is_trained():
        train_run(general.overrides, quiet=False)


def teacher_quality() -> list[Point]:
    """Return runs below teachers that were fine-tuned for longer and longer."""
    student = [*BUDGET, "model@student=bilstm"]  # none of the teacher's embeddings, whose quality would count too
    teachers = {steps: [f"teacher.trainer.max_steps={steps}"] for steps in (40, 100, 250)}
    teachers[696] = given_teacher()  # three epochs
    return [Point("", steps, [*student, *teacher], {TAUGHT: "distilled"}) for steps, teacher in teachers.items()]


def calibration() -> list[Point]:
    """Return runs over the temperature, with the teacher as it is and calibrated."""
    found = []
    for temperature in (1, 4, 16):
        chosen = ["optimizer.lr=2e-3", f"temperature={temperature}", "alpha=0.9", "stages=[distill]"]
        for line, more in (("teacher as it is", []), ("teacher calibrated", ["teacher.calibrate=true"])):
            settings = [*BUDGET, *given_teacher(), *chosen, *more]
            found.append(Point(line, temperature, settings, {TAUGHT: line}))
    return found


def stage_budget() -> list[Point]:
    """Return no runs: `recipes.py` trained them."""
    return []


def of_recipes() -> Curves:
    """Return each recipe's students, from labels and distilled, by the seconds their training takes."""
    rows = json.loads((ROOT / "results" / "quality.json").read_text(encoding="utf-8"))["recipes"]
    return {
        name: [
            {"x": training_seconds(name, stage), "test": row[key]}
            for stage, key in ((LABELS, "baseline"), (TAUGHT, "distilled"))
        ]
        for name, row in rows.items()
    }


def training_seconds(name: str, stage: str) -> float:
    """Return how long a recipe's stage takes on one core, its validations included.

    After one to warm up, three short trainings are timed: what one with more steps, and one with more validations,
    take longer says what these cost, since whole trainings ran beside others. The teacher's outputs must be stored
    already.
    """
    torch.set_num_threads(1)
    job, teachers = recipe_jobs(name)[0], trained_teachers(name)
    cfg = run_of(job.overrides).cfg

    def seconds(steps: int, validations: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            length = [f"trainer.max_steps={steps}", f"validations={validations}"]
            own = [f"shared_dir={folder}/shared", f"stages=[{stage}]", "teacher.cache=require", *length]
            short = Job(job.name, (*job.settings, *teachers, *own), Path(folder) / "run", job.seed)
            train_run(short.overrides)
            return float(short.record(stage)["seconds"])

    seconds(10, 1)
    short, longer, checked = seconds(30, 1), seconds(90, 1), seconds(30, 3)
    step, validation = (longer - short) / 60, (checked - short) / 2
    return short + step * (cfg.trainer["max_steps"] - 30) + validation * (cfg.validations - 1)


STUDIES = {
    "data_efficiency": Study(
        "How many labels are needed, with and without a teacher for the unlabelled rest?",
        "labelled training sentences, %", data_efficiency, findings.labels, logarithmic=True,
    ),
    "label_noise": Study(
        "What do wrong labels cost, when the teacher learned from them too?", "wrong training labels, %", label_noise,
        findings.noise,
    ),
    "sensitivity": Study(
        "How much do temperature, alpha and learning rate matter?", "learning rate", sensitivity, findings.sensitivity,
        logarithmic=True,
    ),
    "architecture_gap": Study(
        "Does it matter how unlike teacher and student are?", "student", architecture_gap, findings.architectures,
        teacher=True,
    ),
    "levers": Study(
        "What is each lever worth?", "a tenth of reviews_bilstm, one thing changed", levers, findings.levers,
    ),
    "best_recipe": Study(
        "What is each lever worth to the best recipe?", "reviews_3layer, one thing changed", best_recipe,
        findings.levers, teacher=True,
    ),
    "teacher_quality": Study(
        "Does a better teacher make a better student?", "test accuracy of the teacher, %", teacher_quality,
        findings.quality, teacher=True,
    ),
    "calibration": Study(
        "What do temperature and a calibrated teacher do to the student's calibration?", "temperature", calibration,
        findings.calibration, score="ece", logarithmic=True, teacher=True,
    ),
    "stage_budget": Study(
        "What does a recipe's accuracy cost in training time?", "training, seconds on one core", stage_budget,
        findings.budgets, logarithmic=True,
    ),
}  # fmt: skip


TRAINED = [name for name in STUDIES if name != "stage_budget"]


def jobs(name: str, point: Point) -> list[Job]:
    """Return a point's runs; what two studies have in common is trained once."""
    from kd_lightning.runtime.fingerprints import digest

    settings = (*point.settings, f"shared_dir={RUNS / 'shared'}")
    folder = RUNS / "points" / digest(sorted(point.settings))
    return [
        Job(f"{name}, {point.line or 'all'} {point.x}, seed {seed}", settings, folder / str(seed), seed)
        for seed in SEEDS
    ]


def measure(name: str, points: Sequence[Point]) -> Curves:
    """Read the test split: every curve's points."""
    study, curves = STUDIES[name], dict[str, list[dict[str, Any]]]()
    found = [(point, jobs(name, point)) for point in points]
    stages = [(stage, job) for point, some in found for stage in point.stages for job in some]
    if missing := {job.name for stage, job in stages if not job.is_trained(stage)}:
        sys.exit(f"study: {', '.join(sorted(missing))}: not trained yet; run python scripts/study.py {name} first")
    for point, some in found:
        for stage, line in point.stages.items():
            scored = [test_scores(job, stage)[study.score] for job in some]
            one = {
                "x": point.x, "test": spread(scored), "validation": spread([job.validation(stage) for job in some]),
            }  # fmt: skip
            if study.teacher and stage == TAUGHT:
                one["teacher"] = teacher_scores(some[0])[study.score]
            if name == "teacher_quality":
                one |= {"x": 100 * one["teacher"], "steps": point.x}
            curves.setdefault(line, []).append(one)
    return curves


STYLES: dict[str, dict[str, Any]] = {
    LABELS_LINE: {"color": COLOURS["baseline"], "marker": MARKERS["baseline"], "linestyle": "--"},
    START_LINE: {
        "color": COLOURS["baseline_initialised"], "marker": MARKERS["baseline_initialised"], "linestyle": ":",
    },
}  # fmt: skip
OTHERS = tuple(colour for colour in SERIES if colour not in {style["color"] for style in STYLES.values()})


def picture(name: str, curves: Curves) -> None:
    """Draw the curves with a bar for one standard deviation over the seeds; of sensitivity a panel a temperature.

    Settings that are names, with nothing between them, are rows, the best first.
    """
    study = STUDIES[name]
    panels = list(dict.fromkeys(line.split(", ")[0] for line in curves if line.startswith("T "))) or [""]
    names = [point["x"] for point in max(curves.values(), key=len) if isinstance(point["x"], str)]
    figure = new_figure(max(8.5, 4 * len(panels)), 2.2 + 0.3 * len(names) if names else 4.8)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    score = "test accuracy, %" if study.score == "accuracy" else "test calibration error (ECE)"
    for panel, axes in zip(panels, row, strict=True):
        lines = {line: curves[line] for line in curves if not panel or line in STYLES or line.split(", ")[0] == panel}
        (_rows if names else _lines)(axes, study, lines, panel, score)
        axes.set_title(panel, fontsize=TITLE)
    if name == "stage_budget":
        best = findings.front(curves)
        row[0].plot([one[0] for one in best], [100 * one[1] for one in best], color="#bbbbbb", linewidth=5, zorder=0)
        for line, *_ in row[0].containers:
            x, y = (values[0] for values in line.get_data())
            hollow = {"color": "white", "markeredgecolor": line.get_color(), "zorder": 3}
            row[0].plot(x, y, marker=line.get_marker(), markersize=6, **hollow)
        row[0].set_title(
            "hollow: from labels, filled: distilled, grey: nothing on reviews is faster and better", fontsize=SMALL
        )
    figure.suptitle(f"{study.question}\n(mean and standard deviation of {len(SEEDS)} seeds)", fontsize=TITLE)
    if names and len(curves) > 1:
        handles = row[0].get_legend_handles_labels()
        figure.legend(*handles, fontsize=SMALL, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(RESULTS / f"{name}.png", dpi=150)


def _styled(lines: Curves) -> list[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Return each line with its points and how it is drawn."""
    colours = iter(OTHERS if STYLES.keys() & lines.keys() else SERIES)
    plain = {"marker": MARKERS["distilled"], "linestyle": "-"}
    return [(line, points, STYLES.get(line) or plain | {"color": next(colours)}) for line, points in lines.items()]


def _lines(axes: Any, study: Study, lines: Curves, panel: str, score: str) -> None:
    """Draw the points of each line over numbers, with its name at the end."""
    percent = 100 if study.score == "accuracy" else 1
    ends: list[End] = []
    for line, points, style in _styled(lines):
        y = [percent * point["test"]["mean"] for point in points]
        bars = [percent * point["test"]["std"] for point in points]
        axes.errorbar([point["x"] for point in points], y, bars, markersize=5, capsize=3, **style)
        if line not in STYLES or axes.get_subplotspec().is_last_col():  # what all panels have is named once
            name = line.removeprefix(f"{panel}, ") if panel else line
            ends.append(End(points[-1]["x"], y[-1], name, style["color"]))
    if study.logarithmic:
        _label_decades(axes, {point["x"] for points in lines.values() for point in points})
    axes.set_xlabel(study.x_label)
    axes.set_ylabel(score if axes.get_subplotspec().is_first_col() else "")
    tidy(axes)
    name_lines(axes, ends)


def _rows(axes: Any, study: Study, lines: Curves, panel: str, score: str) -> None:
    """Draw the points of each line in rows that have names, the best first."""
    means: dict[str, list[float]] = {}
    for point in (point for points in lines.values() for point in points):
        means.setdefault(point["x"], []).append(point["test"]["mean"])
    order = sorted(means, key=lambda x: -max(means[x]))
    for number, (line, points, style) in enumerate(_styled(lines)):
        y = [order.index(point["x"]) + 0.12 * (number - (len(lines) - 1) / 2) for point in points]
        x, bars = ([100 * point["test"][key] for point in points] for key in ("mean", "std"))
        axes.errorbar(x, y, xerr=bars, markersize=5, capsize=2, label=line, **{**style, "linestyle": "none"})
    name_rows(axes, order)
    axes.set_xlabel(score)
    axes.set_ylabel(study.x_label)


def _label_decades(axes: Any, numbers: set[float]) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_xscale("log")
    if len(numbers) < 8:
        axes.set_xticks(sorted(numbers), [f"{x:g}" for x in sorted(numbers)])
        axes.minorticks_off()
    else:
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(FuncFormatter(lambda x, _: f"{x:g}"))


def record(name: str) -> None:
    """Write what was measured."""
    from kd_lightning.evaluation.profiling import environment
    from kd_lightning.runtime.files import write_file

    study = STUDIES[name]
    curves = measure(name, study.points()) if name in TRAINED else of_recipes()
    content = {
        "question": study.question, "score": study.score, "seeds": len(SEEDS),
        "command": f"python scripts/study.py {name} --final", "environment": environment(), "curves": curves,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_file(RESULTS / f"{name}.json", json.dumps(content, indent=1) + "\n")
    document()
    print(study.finding(curves))


def document() -> None:
    """Write docs/studies.md and the pictures from what has been measured."""
    from kd_lightning.runtime.files import write_file

    lines = ["# Studies", ""]
    lines += [
        "Most of these students train for 400 steps, so that a study takes an hour; a recipe trains up to ten times as "
        "long and gains more from its teacher ([recipes.md](recipes.md)). Unless a study says otherwise, students are "
        "BiLSTMs trained on sentences without augmented views.", "",
        "| studies | learning rate |", "| :-- | :-- |", "| labels, levers | 0.008, the best for so short a training |",
        "| others | 0.002, that of the recipe; 0.001 for transformers |",
        "| several rates, or recipes as they stand | as the study sets them |", "",
        "What follows a ± is the spread over seeds only: all of them are scored on one test split. "
        "`python scripts/study.py --docs` writes this page from `results/studies/*.json`.", "",
    ]  # fmt: skip
    for name, study in STUDIES.items():
        file = RESULTS / f"{name}.json"
        lines += [f"## {study.question}", ""]
        if not file.is_file():
            how = f"{name}`, then `--final`" if name in TRAINED else f"{name} --final`"
            lines += [f"Not measured yet: `python scripts/study.py {how}.", ""]
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        picture(name, content["curves"])
        machine = content["environment"]
        lines += [
            study.finding(content["curves"]), "", f"![{study.question}](../results/studies/{name}.png)", "",
            f"`{content['command']}`, {content['seeds']} seeds, {machine['cpu']}, {machine['cores']} cores, torch "
            f"{machine['versions']['torch']}, {machine['date'][:10]} (`results/studies/{name}.json`).", "",
        ]  # fmt: skip
    write_file(ROOT / "docs" / "studies.md", "\n".join(lines))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=list(STUDIES), metavar="NAME")
    parser.add_argument("--final", action="store_true", help="read the test split, once, when all is trained")
    parser.add_argument("--docs", action="store_true", help="write docs/studies.md and its pictures")
    given = parser.parse_args()
    if given.docs:
        document()
    elif given.name is None:
        parser.error(f"which study? {', '.join(STUDIES)}")
    elif given.final:
        record(given.name)
    elif given.name not in TRAINED:
        parser.error(f"{given.name} trains nothing of its own: scripts/recipes.py does; add --final")
    else:
        train_teacher("reviews_bilstm", teacher_of("reviews_bilstm"))
        if given.name == "levers":
            train_teacher("reviews_bilstm", SECOND, "teacher.seed=1001")
            train_general()
        found = [jobs(given.name, point) for point in STUDIES[given.name].points()]
        for some in found:
            store_outputs(some[0].overrides)
        train_all([job for some in found for job in some])


if __name__ == "__main__":
    without_traceback(main)
