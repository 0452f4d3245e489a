"""The model card: `README.md` of an export, as the Hugging Face hub shows it, with metadata that it can read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.export.exported import Exported
from kd_lightning.files import write_file
from kd_lightning.report.table import as_markdown, count, file_size
from kd_lightning.runs import read_json

if TYPE_CHECKING:
    from kd_lightning.export.source import Source

LIBRARIES = {"onnx": "onnx", "huggingface": "transformers", "pt2": "pytorch", "safetensors": "kd_lightning"}
LICENCES = {
    "minilm": "all-MiniLM-L6-v2, Apache-2.0",
    "Reviews": "Hutto & Gilbert 2014 and Pang & Lee 2005, as distributed with vaderSentiment 3.3.2, MIT",
    "FashionMNIST": "Fashion-MNIST (Xiao, Rasul & Vollgraf 2017), MIT",
}
"""What is known of the teachers and data that this package fetches."""

UNKNOWN = "licence not recorded: look it up where it came from before you pass this model on"

USE = {
    "onnx": "docs/export.md of kd_lightning has a script of 30 lines for onnxruntime alone.",
    "pt2": "`torch.export.load('model.pt2').module()` takes the inputs by name, gives logits; needs torch alone.",
    "huggingface": "`pipeline('text-classification', FOLDER)` or `AutoModelForSequenceClassification.from_pretrained`.",
    "safetensors": "Weights alone; `model.json` says what network they are of. `kd-predict FOLDER` builds it.",
}


def write_card(exported: Exported, source: Source, folder: Path) -> None:
    """Write `README.md`."""
    write_file(folder / "README.md", card(exported, Run(source)))


class Run:
    """What a run's files say of how its student came to be.

    Args:
        source: The student.
    """

    def __init__(self, source: Source) -> None:
        from omegaconf import OmegaConf

        stage = source.stage
        self.root = next(folder for folder in (stage, *stage.parents) if (folder / "config.yaml").is_file())
        config = OmegaConf.to_container(OmegaConf.load(self.root / "config.yaml"))
        assert isinstance(config, dict)
        self.config: dict[Any, Any] = config
        self.record: dict[str, Any] = read_json(stage / "stage.json")
        self.stage = stage
        self.data_title, self.data_kind = source.data.title, type(source.data).__name__
        self.sizes = source.data.sizes
        report = self.root / "report.json"
        self.report: dict[str, Any] | None = read_json(report) if report.is_file() else None

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name", self.root.name))

    @property
    def test(self) -> dict[str, float]:
        """This very student's scores on the test split; nothing where the run has no report."""
        names = {"distill": "distilled", "finetune": "finetuned"}
        models = (self.report or {}).get("models", {})
        entry = models.get(names.get(self.stage.name, self.stage.name))
        number = self.stage.parent.name.removeprefix("seed_")
        if entry is None or not number.isdecimal() or int(number) not in self.report["seeds"]:  # type: ignore[index]
            return {}
        which = self.report["seeds"].index(int(number))  # type: ignore[index]
        values = {score: described["values"][which] for score, described in entry["test"].items()}
        return {score: value for score, value in values.items() if value is not None}

    @property
    def teacher(self) -> str:
        """The teacher and its licence."""
        given = self.config.get("teacher", {})
        checkpoint, network = given.get("checkpoint"), given.get("network") or {}
        if self.stage.name.startswith("baseline"):
            return "none: this student was trained from labels alone"
        if given.get("ema") is not None:
            return "the average of the student's own weights"
        if not checkpoint and "name" not in network:
            return f"{str(network.get('_target_')).rpartition('.')[2]}, trained in this run from random weights"
        name = str(checkpoint or network["name"])
        return f"{name} ({LICENCES.get(name, UNKNOWN)})"

    @property
    def recipe(self) -> list[str]:
        """How the student was trained, a line each."""
        objective = self.config.get("distillation") or {}
        terms = ", ".join(objective.get("terms", {})) if isinstance(objective, dict) else ""
        optimizer = self.record["settings"].get("optimizer", {})
        lines = [
            f"stage `{self.stage.name}`, {self.record['steps']} optimizer steps, weights of step "
            f"{self.record['best_step']}, selected by {self.record.get('selected_by', 'accuracy')} on validation",
            f"batches of {self.record['settings'].get('batch_size')}, learning rate {optimizer.get('lr')}",
        ]
        if terms and not self.stage.name.startswith("baseline"):
            lines.append(
                f"loss terms: {terms}; temperature {self.config.get('temperature')}, alpha {self.config.get('alpha')}"
            )
        if self.report:
            lines.append(f"made by `{self.report['command']}`")
        return lines


def card(exported: Exported, run: Run) -> str:
    """Return the card's text."""
    parts = [
        f"# {run.name}: {exported.title}",
        f"{run.data_title}. A {exported.network} of {count(exported.parameters)} parameters, distilled with "
        f"kd_lightning and exported as {exported.title}.",
        "## Use", _use(exported),
        "## Scores", _scores(exported, run),
        "## How near to the student", _parity(exported),
        "## How it was made", _bullets([
            f"data: {run.data_kind}, {', '.join(f'{size:,} {part}' for part, size in run.sizes.items() if size)} "
            f"({LICENCES.get(run.data_kind, UNKNOWN)})",
            f"teacher: {run.teacher}",
            *run.recipe,
            f"exported by `{exported.command}`",
            "with " + ", ".join(f"{name} {version}" for name, version in exported.environment.items() if version),
        ]),
        "## Limits", _bullets(_limits(exported)),
    ]  # fmt: skip
    return f"---\n{_metadata(exported, run)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(exported: Exported, run: Run) -> str:
    """Return the YAML on top: what the hub searches by."""
    from huggingface_hub import EvalResult, ModelCardData

    reads = "image" if exported.images is not None else "text"
    task = f"{reads}-classification"
    results = [
        EvalResult(
            task_type=task, dataset_type=run.data_kind.lower(), dataset_name=run.data_kind, dataset_split="test",
            metric_type=metric, metric_value=round(value, 4), metric_name=f"{metric} of the float32 student",
        )
        for metric, value in run.test.items() if metric in ("accuracy", "macro_f1", "pearson")
    ]  # fmt: skip
    quantised = [] if exported.quantize == "none" else [exported.quantize]
    data = ModelCardData(
        library_name=LIBRARIES[exported.format],
        pipeline_tag=task,
        tags=["knowledge-distillation", "kd_lightning", exported.format, *quantised],
        model_name=run.name,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _use(exported: Exported) -> str:
    reads = "`export.json` has the names of the classes"
    if exported.max_length is not None:
        reads += f"; `tokenizer.json` beside it makes tokens of text, at most {exported.max_length}"
    files = f"`{exported.model}`, {file_size(exported.bytes)}"
    opset = f", opset {exported.opset}, any number of examples of any length" if exported.opset else ""
    return (
        f"{files}{opset}. Inputs: {', '.join(f'`{name}`' for name in exported.inputs)}. {reads}. {USE[exported.format]}"
    )


def _scores(exported: Exported, run: Run) -> str:
    """Return a table: the student on the test split, and student and export on the validation split."""
    student, export = exported.parity["student"], exported.parity["export"]
    n = exported.parity["examples"]
    rows = [["", "student, test", "student, validation", "this export, validation"]]
    for name in dict.fromkeys([*run.test, *student]):
        cells = [
            _cell(name, run.test.get(name), run.sizes["test"]),
            *(_cell(name, found.get(name), n) for found in (student, export)),
        ]
        rows.append([name, *cells])
    note = "In brackets: 95% intervals (Wilson), as the examples are a sample. " if "accuracy" in student else ""
    missing = "" if run.test else "The run has no report, so nothing is said of the test split. "
    return f"{as_markdown(rows)}\n\n{note}{missing}Quantisation was judged on validation; the test split was read once."


def _cell(name: str, value: float | None, n: int) -> str:
    if value is None:
        return "not measured"
    if name.rpartition("/")[2] != "accuracy" or "/" in name:
        return f"{value:.3f}"
    low, high = wilson(value, n)
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of a share of n examples (Wilson 1927).

    >>> [round(end, 3) for end in wilson(0.8, 100)]
    [0.711, 0.867]
    """
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def _parity(exported: Exported) -> str:
    p, tolerance = exported.parity, exported.parity["tolerance"]
    lines = [
        f"largest difference of logits {p['largest_difference']:.2g}, allowed {tolerance['largest'] * p['scale']:.2g}",
        f"mean difference of logits {p['mean_difference']:.2g}, allowed {tolerance['mean'] * p['scale']:.2g}",
    ]
    if p["agreement"] is not None:
        lines.append(
            f"the same label for {100 * p['agreement']:.2f}% of examples, at least {100 * tolerance['agreement']}%"
        )
        lines.append(f"KL(student || export) {p['kl']:.2g} nats")
    return f"On the {p['examples']:,} validation examples:\n\n{_bullets(lines)}"


def _limits(exported: Exported) -> list[str]:
    lines = [f"It knows {', '.join(exported.class_names)} and nothing else: whatever it is given, it says one of them."]
    if exported.max_length is not None:
        lines.append(f"What comes after {exported.max_length} tokens is not read.")
    lines.append("Its scores are those of the data it was made with; other sources and languages were not tried.")
    if exported.quantize.startswith("int8"):
        lines.append("8-bit kernels differ between processors: the parity above is that of the one it was made on.")
    return [*lines, "Its teacher's errors and biases are in what it learned."]


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
