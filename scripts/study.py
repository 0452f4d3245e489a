"""Answer a question that users ask with a curve: five seeds a point, a picture, one plain sentence.

python scripts/study.py NAME            train (what is trained already is kept); validation scores only
python scripts/study.py NAME --final    read the test split, once; write results/studies/NAME.json and NAME.png
python scripts/study.py --docs          write docs/studies.md from results/studies

data_efficiency   how many labels are needed, with and without a teacher (of these labels) for the unlabelled rest?
label_noise       what do wrong labels cost, when the teacher learned from them too?
sensitivity       temperature, alpha and learning rate, with labels alone as what is to be beaten
architecture_gap  teachers and students that are alike and unlike
teacher_quality   does a better teacher make a better student?
calibration       what temperature, and a calibrated teacher, do to the student's calibration
stage_budget      accuracy (from results/quality.json) against training seconds, for the recipes on reviews; --final
                  times short trainings, one after the other, and needs the machine for itself

The student is the BiLSTM of reviews_bilstm, where nothing else is said with the teacher's embeddings to start from,
with transfer data instead of views, for 400 steps. Seeds differ in their training: teachers, and which labels are left
or wrong, are the same for all of them. Weights are selected on all of the validation split, whose labels are right.
"""

from __future__ import annotations

import argparse
import csv
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

from recipes import TRANSFER, teacher_of
from recipes import jobs as recipe_jobs
from trainings import ROOT, Job, pipeline, spread, teacher_answers, test_answers, train_all

RUNS, RESULTS = ROOT / "runs" / "studies", ROOT / "results" / "studies"
SEEDS = range(5)
BUDGET = [
    "experiment=reviews_bilstm", TRANSFER, "data.views=0", "data.replace_probability=0",
    "data.drop_probability=0", "teacher.cache_views=1", "trainer.max_steps=400", "validations=5",
    "trainer.precision='${fast_precision:}'",
]  # fmt: skip
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
        sentence: Says what was found, given each curve's points.
        score: Which figure of the test split is drawn.
        logarithmic: The x axis.
    """

    question: str
    x_label: str
    points: Callable[[], list[Point]]
    sentence: Callable[[dict[str, list[dict[str, Any]]]], str]
    score: str = "accuracy"
    logarithmic: bool = False


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
    corpus = pipeline([*BUDGET, f"run_dir={RUNS / 'reviews'}"]).data.read()
    names = {part: [corpus.class_names[int(label)] for label in getattr(corpus, part).labels] for part in PARTS}
    texts = {part: [sentence[0] for sentence in getattr(corpus, part).texts] for part in PARTS}
    kept = set(change(texts["train"], names["train"], random.Random(0)))
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        rows = [row for i, row in enumerate(zip(texts[part], names[part], strict=True)) if part != "train" or i in kept]
        with (folder / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    rest = [text for i, text in enumerate(texts["train"]) if i not in kept] + [one[0] for one in corpus.transfer]
    (folder / "rest.txt").write_text("".join(f"{text}\n" for text in rest), encoding="utf-8")
    files = [f"data.{part}_file={folder / f'{part}.csv'}" for part in PARTS]
    return [
        *BUDGET, *TUNING, "data=text_files", *files, f"data.transfer=[{folder / 'rest.txt'}]", "data.tokenizer=minilm",
        "data.teacher_tokenizer=minilm", "data.batch_size=64",
    ]  # fmt: skip


PARTS = ("train", "validation", "test")


def data_efficiency() -> list[Point]:
    """Return runs with fewer and fewer labels; teachers are fine-tuned on what is left, for as many steps each."""

    def some(share: float, texts: list[str], labels: list[str], rng: random.Random) -> Iterable[int]:
        count = max(round(share * len(texts)), 2)
        order = list(range(len(texts)))
        rng.shuffle(order)
        return order[:count]  # a smaller share is a part of a larger one

    stages = {LABELS: "labels alone", START: "labels, start from the teacher", TAUGHT: "teacher, all sentences"}
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
        settings = write_files(RUNS / name, partial(flipped, share))
        stages = {LABELS: "labels alone", START: "labels, start from the teacher", TAUGHT: "soft targets"}
        found.append(Point("", 100 * share, settings, stages))
        # Whoever doubts an example's label must not have learned it by heart.
        trusting = [*settings, "distillation=label_trust", "teacher.folds=3", "stages=[teacher,distill]"]
        found.append(Point("trust", 100 * share, trusting, {TAUGHT: "label_trust, teachers of folds"}))
    return found


def sensitivity() -> list[Point]:
    """Return runs over temperature, alpha and learning rate."""
    found = []
    for rate in ("5e-4", "2e-3", "8e-3"):
        base = [*BUDGET, *given_teacher(), f"optimizer.lr={rate}"]
        stages = {LABELS: "labels alone", START: "labels, start from the teacher"}
        found.append(Point("", float(rate), [*base, "stages=[baseline]"], stages))
        for temperature in (1, 4, 16):
            for alpha in (0.1, 0.5, 0.9):
                line = f"T {temperature}, alpha {alpha}"
                own = [f"temperature={temperature}", f"alpha={alpha}", "stages=[distill]"]
                found.append(Point(line, float(rate), base + own, {TAUGHT: line}))
    return found


def architecture_gap() -> list[Point]:
    """Return runs of every student with every teacher."""
    students: dict[str, Settings] = {
        "BiLSTM": ["model@student=bilstm"],
        "TextCNN": ["model@student=text_cnn"],
        "transformer": ["model@student=transformer", "student.pooling=mean", "optimizer.lr=1e-3"],
    }
    teachers: dict[str, Settings] = {
        "MiniLM": given_teacher(),
        "BiLSTM": ["model@teacher.network=lstm_teacher", "teacher.optimizer.lr=2e-3"],
    }
    found = []
    for name, student in students.items():
        for above, teacher in teachers.items():
            stages = {TAUGHT: f"{above} teaches"} | ({LABELS: "labels alone"} if above == "MiniLM" else {})
            found.append(Point(above, name, [*BUDGET, *student, *teacher], stages))
    return found


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
        if row["taught_by"] == "reviews_bilstm"
    }


def training_seconds(name: str, stage: str, lengths: tuple[int, int] = (20, 100)) -> float:
    """Return how long a recipe's stage takes on one core, its validations included.

    Two short trainings are timed, and what their difference says of a step is multiplied: whole trainings ran beside
    others. The teacher's answers are stored already.
    """
    torch.set_num_threads(1)
    job = recipe_jobs(name)[0]
    steps, found = pipeline(job.overrides).cfg["trainer"]["max_steps"], []
    for length in lengths:
        with tempfile.TemporaryDirectory() as folder:
            own = [f"shared_dir={folder}/shared", f"stages=[{stage}]", f"trainer.max_steps={length}"]
            short = Job(job.name, (*job.settings, *own), Path(folder) / "run", job.seed)
            pipeline(short.overrides).run()
            found.append(short.record(stage)["seconds"])
    return float(found[0] + (found[1] - found[0]) / (lengths[1] - lengths[0]) * (steps - lengths[0]))


Curves = dict[str, list[dict[str, Any]]]


def _at(curves: Curves, line: str, x: float | str) -> float:
    return float(next(point["test"]["mean"] for point in curves[line] if point["x"] == x))


def _said_of_labels(curves: Curves) -> str:
    whole = _at(curves, "labels alone", 100)
    enough = [p["x"] for p in curves["teacher, all sentences"] if p["test"]["mean"] >= whole]
    least = f"{min(enough):g} % of the labels" if enough else "no share of the labels"
    return f"With a teacher {least} are enough for what labels alone reach with all of them ({100 * whole:.1f} %)."


def _said_of_noise(curves: Curves) -> str:
    lost = {line: 100 * (_at(curves, line, 0) - _at(curves, line, 40)) for line in curves}
    parts = ", ".join(f"{line} {points:.1f}" for line, points in sorted(lost.items(), key=lambda one: one[1]))
    return f"What 40 % wrong labels cost, in points of accuracy: {parts}."


def _said_of_sensitivity(curves: Curves) -> str:
    plane = max(point["test"]["mean"] for point in curves["labels, start from the teacher"])
    taught = [points for line, points in curves.items() if not line.startswith("labels")]
    settings = [point["test"]["mean"] for points in taught for point in points]
    above = sum(one > plane for one in settings)
    return (
        f"{above} of {len(settings)} settings beat labels from the same start at its best rate ({100 * plane:.1f} %); "
        f"the settings lie between {100 * min(settings):.1f} and {100 * max(settings):.1f} %."
    )


def _said_of_architectures(curves: Curves) -> str:
    gains = {
        (line.removesuffix(" teaches"), point["x"]): 100
        * (point["test"]["mean"] - _at(curves, "labels alone", point["x"]))
        for line, points in curves.items()
        if line != "labels alone"
        for point in points
    }  # fmt: skip
    parts = ", ".join(f"{above} to {below} {gain:+.1f}" for (above, below), gain in gains.items())
    return f"What a teacher adds to labels alone, in points: {parts}."


def _said_of_quality(curves: Curves) -> str:
    points = sorted(curves["distilled"], key=lambda point: point["teacher"])
    pairs = ", ".join(f"{100 * one['teacher']:.1f} teaches {100 * one['test']['mean']:.1f}" for one in points)
    return f"Teacher's and student's accuracy in %: {pairs}."


def _said_of_calibration(curves: Curves) -> str:
    best = min(((p["test"]["mean"], line, p["x"]) for line, points in curves.items() for p in points))
    worst = max(((p["test"]["mean"], line, p["x"]) for line, points in curves.items() for p in points))
    return (
        f"The student's calibration error lies between {best[0]:.3f} ({best[1]}, T {best[2]:g}) and {worst[0]:.3f} "
        f"({worst[1]}, T {worst[2]:g})."
    )


def _said_of_budgets(curves: Curves) -> str:
    points = sorted((found[-1]["x"], found[-1]["test"]["mean"], name) for name, found in curves.items())
    front = [one for i, one in enumerate(points) if all(one[1] > other[1] for other in points[:i])]
    parts = ", ".join(f"{name} {100 * score:.1f} % after {seconds:.0f} s" for seconds, score, name in front)
    return f"No recipe is both faster to train and better than these: {parts} (one core, the teacher's answers kept)."


STUDIES = {
    "data_efficiency": Study(
        "How many labels are needed, with and without a teacher for the unlabelled rest?",
        "labelled training sentences, %", data_efficiency, _said_of_labels, logarithmic=True,
    ),
    "label_noise": Study(
        "What do wrong labels cost, when the teacher learned from them too?", "wrong training labels, %", label_noise,
        _said_of_noise,
    ),
    "sensitivity": Study(
        "How much do temperature, alpha and learning rate matter?", "learning rate", sensitivity, _said_of_sensitivity,
        logarithmic=True,
    ),
    "architecture_gap": Study(
        "Does it matter how unlike teacher and student are?", "student", architecture_gap, _said_of_architectures
    ),
    "teacher_quality": Study(
        "Does a better teacher make a better student?", "steps of the teacher's fine-tuning", teacher_quality,
        _said_of_quality, logarithmic=True,
    ),
    "calibration": Study(
        "What do temperature and a calibrated teacher do to the student's calibration?", "temperature", calibration,
        _said_of_calibration, score="ece", logarithmic=True,
    ),
    "stage_budget": Study(
        "What does a recipe's accuracy cost in training time?", "training, seconds on one core", stage_budget,
        _said_of_budgets, logarithmic=True,
    ),
}  # fmt: skip


def jobs(name: str, point: Point) -> list[Job]:
    """Return a point's runs; what two studies have in common is trained once."""
    from kd_lightning.runs import digest

    settings = (*point.settings, f"shared_dir={RUNS / 'shared'}")
    folder = RUNS / "points" / digest(sorted(point.settings))
    return [
        Job(f"{name}, {point.line or 'all'} {point.x}, seed {seed}", settings, folder / str(seed), seed)
        for seed in SEEDS
    ]


def measure(name: str, points: Sequence[Point]) -> Curves:
    """Read the test split: every curve's points."""
    study, curves = STUDIES[name], dict[str, list[dict[str, Any]]]()
    for point in points:
        some = jobs(name, point)
        run = pipeline(some[0].overrides)
        for stage, line in point.stages.items():
            if missing := [job.name for job in some if not (job.stage(stage) / "stage.json").is_file()]:
                sys.exit(f"study: {', '.join(missing)}: not trained yet; run python scripts/study.py {name} first")
            scored = [run.task.evaluate(test_answers(job, stage))[study.score] for job in some]
            found = {"x": point.x, "test": spread(scored)}
            if name == "teacher_quality":
                found["teacher"] = run.task.evaluate(teacher_answers(some[0]))[study.score]
            curves.setdefault(line, []).append(found)
    return curves


def picture(name: str, curves: Curves) -> None:
    """Draw the curves with a bar for one standard deviation over the seeds."""
    from matplotlib.figure import Figure

    study = STUDIES[name]
    percent = 100 if study.score == "accuracy" else 1
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for line, points in curves.items():
        x = [point["x"] for point in points]
        y = [percent * point["test"]["mean"] for point in points]
        bars = [percent * point["test"]["std"] for point in points]
        style = {"color": "#E69F00", "linestyle": "--"} if line == "labels alone" else {}
        axes.errorbar(x, y, bars, marker="o", markersize=4, capsize=3, label=line, **style)
    numbers = sorted({point["x"] for points in curves.values() for point in points if not isinstance(point["x"], str)})
    if study.logarithmic:
        axes.set_xscale("log")
    if study.logarithmic and len(numbers) < 8:
        axes.set_xticks(numbers, [f"{x:g}" for x in numbers], minor=False)
        axes.minorticks_off()
    axes.set_xlabel(study.x_label)
    axes.set_ylabel("test accuracy, %" if study.score == "accuracy" else "test calibration error (ECE)")
    axes.set_title(f"{study.question}\n(mean and standard deviation of {len(SEEDS)} seeds)", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"{name}.png", dpi=150)


def record(name: str) -> None:
    """Write what was measured."""
    from kd_lightning.files import write_file
    from kd_lightning.measure import environment

    study = STUDIES[name]
    curves = of_recipes() if name == "stage_budget" else measure(name, study.points())
    content = {
        "question": study.question, "sentence": study.sentence(curves), "score": study.score, "seeds": len(SEEDS),
        "command": f"python scripts/study.py {name} --final", "environment": environment(), "curves": curves,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_file(RESULTS / f"{name}.json", json.dumps(content, indent=1) + "\n")
    picture(name, curves)
    document()
    print(content["sentence"])


def document() -> None:
    """Write docs/studies.md from what has been measured."""
    from kd_lightning.files import write_file

    lines = ["# Questions users ask, measured", ""]
    lines += ["Written by `python scripts/study.py --docs` from `results/studies/*.json`.", ""]
    for name, study in STUDIES.items():
        file = RESULTS / f"{name}.json"
        lines += [f"## {study.question}", ""]
        if not file.is_file():
            lines += [f"Not measured yet: `python scripts/study.py {name}`, then `--final`.", ""]
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        machine = content["environment"]
        lines += [
            content["sentence"], "", f"![{study.question}](../results/studies/{name}.png)", "",
            f"`{content['command']}`, {content['seeds']} seeds, {machine['cpu']}, {machine['cores']} cores, torch "
            f"{machine['versions']['torch']}, {machine['date'][:10]} (`results/studies/{name}.json`).", "",
        ]  # fmt: skip
    write_file(ROOT / "docs" / "studies.md", "\n".join(lines))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=list(STUDIES), metavar="NAME")
    parser.add_argument("--final", action="store_true", help="read the test split, once, when all is trained")
    parser.add_argument("--docs", action="store_true", help="write docs/studies.md")
    given = parser.parse_args()
    if given.docs:
        document()
    elif given.name is None:
        parser.error(f"which study? {', '.join(STUDIES)}")
    elif given.final:
        record(given.name)
    else:
        found = [jobs(given.name, point) for point in STUDIES[given.name].points()]
        for some in found:
            pipeline(some[0].overrides).build_caches()
        train_all([job for some in found for job in some])


if __name__ == "__main__":
    main()
