"""The model card, `README.md` of an export, with metadata for the Hugging Face hub."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.evaluation.report.table import as_markdown, count, file_size
from kd_lightning.export.exported import Exported
from kd_lightning.export.history import KNOWN, History, hub_names
from kd_lightning.export.step import PAST
from kd_lightning.runtime.borders import code, html_free, markdown, visible
from kd_lightning.runtime.files import write_file
from kd_lightning.tasks import ScoreSpec, Task, task_of

if TYPE_CHECKING:
    from kd_lightning.export.source import Source

LIBRARIES = {
    "onnx": "onnx", "huggingface": "transformers", "pt2": "pytorch", "safetensors": "kd_lightning", "gguf": "gguf",
    "peft": "peft", "sentence_transformers": "sentence-transformers", "executorch": "executorch",
    "openvino": "openvino",
}  # fmt: skip
USE = {
    "onnx": "docs/export.md of kd_lightning has a script for onnxruntime alone.",
    "pt2": "`torch.export.load('model.pt2').module()` takes the inputs by name and returns logits; needs only torch.",
    "executorch": "One example at a time, in ExecuTorch's runtime with XNNPACK: docs/export.md of kd_lightning has a "
    "script in Python, and what an Android or iOS app needs.",
    "openvino": "`openvino.Core().compile_model('model.xml', 'CPU')` takes any number of examples; `model.bin` "
    "is beside it.",
    "safetensors": "Weights only; `model.json` describes their network. `kd-predict FOLDER` builds it.",
    "gguf": "`llama-cli -m model.gguf -p PROMPT` of llama.cpp, or "
    "`AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file='model.gguf')`.",
    "sentence_transformers": "`SentenceTransformer(FOLDER).encode(texts)`.",
    "peft": "`AutoPeftModelForCausalLM.from_pretrained(FOLDER)` loads the pretrained model and these adapters.",
}
OF_STEPS = {
    "onnx": "docs/language_models.md of kd_lightning has a script for onnxruntime alone.",
    "pt2": "`torch.export.load('model.pt2').module(check_guards=False)` takes the inputs in this order.",
}
"""Likewise for a language model, whose graph reads and returns each layer's keys and values."""
TRANSFORMERS = {
    "text-classification": "`pipeline('text-classification', FOLDER)` or "
    "`AutoModelForSequenceClassification.from_pretrained`.",
    "image-classification": "`AutoModelForImageClassification.from_pretrained(FOLDER)`; it has no image processor.",
    "token-classification": "`pipeline('token-classification', FOLDER, aggregation_strategy='first')`.",
    "question-answering": "`AutoModelForQuestionAnswering.from_pretrained(FOLDER)`; `start_logits` and `end_logits` "
    "are the two columns.",
    "text-ranking": "`CrossEncoder(FOLDER).predict(pairs)` of sentence-transformers, or "
    "`AutoModelForSequenceClassification.from_pretrained(FOLDER)`.",
    "fill-mask": "`pipeline('fill-mask', FOLDER)` or `AutoModelForMaskedLM.from_pretrained(FOLDER)`.",
    "text-generation": "`pipeline('text-generation', FOLDER)` or `AutoModelForCausalLM.from_pretrained(FOLDER)`.",
}
"""How `--format huggingface` is loaded, by the hub's name of the task."""


def write_card(exported: Exported, source: Source, folder: Path) -> None:
    """Write `README.md`."""
    write_file(folder / "README.md", card(exported, History(source)))


def card(exported: Exported, run: History) -> str:
    """Return the card's text."""
    unread = ("views", "transfer", "generated") if run.from_labels else ()  # used only with a teacher
    sizes = {part: size for part, size in run.data.sizes.items() if size and part not in unread}
    examples = ", ".join(f"{size:,} {part}" for part, size in sizes.items())
    parts = [
        f"# {markdown(run.name)}: {exported.title}",
        f"{markdown(run.data.title)}. A {markdown(exported.network)} of {count(exported.parameters)} parameters, "
        f"{run.summary} with kd_lightning and exported as {exported.title}.",
        "## Use", _use(exported),
        "## Scores", _scores(exported, run),
        "## Compared with the student", _parity(exported),
        "## How it was made", _bullets([
            f"data: {examples}, of {'; '.join(markdown(origin.text) for origin in run.sources)}",
            f"teacher: {markdown(run.teacher.text) if run.distilled and run.teacher else 'none'}",
            f"initialised from {markdown(run.start.text)}: it is derived from these weights" if run.start
            else "initialised with random weights",
            *run.recipe,
            f"exported by {code(exported.command)}",
            "with " + ", ".join(f"{name} {version}" for name, version in exported.environment.items() if version),
        ]),
        "## Limits", _bullets(_limits(exported, run)),
    ]  # fmt: skip
    return f"---\n{_metadata(exported, run)}\n---\n\n" + html_free("\n\n".join(parts)) + "\n"


def _metadata(exported: Exported, run: History) -> str:
    """Return the YAML header, the hub's metadata."""
    from huggingface_hub import EvalResult, ModelCardData

    task = task_of(exported.predicts)
    pipeline = task.pipeline(_reads(exported))
    data = [name for origin in run.sources for name in origin.names]
    results = [
        EvalResult(
            task_type=pipeline or "other", dataset_type=", ".join(data).lower(), dataset_name=", ".join(data),
            dataset_split="test", metric_type=metric, metric_value=round(value, 4),
            metric_name=f"{metric} of the float32 student",
        )
        for metric, value in run.test_scores(run.own_name).items()
        if metric in (task.monitor, "macro_f1")
    ]  # fmt: skip
    tags = ["knowledge-distillation"] * run.distilled + [*task.tags]
    tags += ["kd_lightning", exported.format] + [exported.quantize] * (exported.quantize != "none")
    began = run.start.names if run.start else ()
    licences = {KNOWN[name].licence.lower() if name in KNOWN else None for name in began}
    languages = {KNOWN[name].language if name in KNOWN else None for name in data}
    card = ModelCardData(
        library_name=LIBRARIES[exported.format],
        pipeline_tag=pipeline,
        tags=tags,
        model_name=run.name,
        eval_results=results or None,
        license=licences.pop() if len(licences) == 1 else None,  # the owner of random weights decides
        base_model=hub_names(began) or None,
        datasets=_datasets(data) or None,
        language=languages.pop() if len(languages) == 1 else None,
    )
    return visible(str(card.to_yaml()).strip(), keep="\n")


def _datasets(names: list[str]) -> list[str]:
    """Return the names of the data on the hub, or the names of our classes."""
    return hub_names(tuple(name for name in names if name in KNOWN or "/" in name))


def _reads(exported: Exported) -> str:
    return "text" if exported.images is None else "image"


def _use(exported: Exported) -> str:
    task, images = task_of(exported.predicts), exported.images
    files = f"`{exported.model}`, {file_size(exported.bytes)}"
    length = " of any length" if images is None else ""
    opset = f", opset {exported.opset}, any number of examples{length}" if exported.opset else ""
    if images is None:
        most = "" if task.generates else f", at most {exported.max_length}"
        reads = f"`tokenizer.json` beside it tokenises text{most}"
    else:
        kind = "RGB" if images["channels"] == 3 else "grey"
        reads = (
            f"{kind} images of {images['size']} x {images['size']} pixels, preprocessed as `images` in `export.json`"
        )
    pipeline = task.pipeline(_reads(exported))
    use = TRANSFORMERS[str(pipeline)] if exported.format == "huggingface" else USE[exported.format]
    shown = [name for name in exported.inputs if not name.startswith(PAST)]
    if len(shown) < len(exported.inputs):
        use, shown = OF_STEPS[exported.format], [*shown, f"{PAST}N.key", f"{PAST}N.value"]
    inputs = ", ".join(f"`{name}`" for name in shown)
    return f"{files}{opset}. Inputs: {inputs}; {reads}. {task.columns(list(map(markdown, exported.class_names)))} {use}"


def _scores(exported: Exported, run: History) -> str:
    """Return tables of the run's models on test, and of student and export on validation."""
    parity, task = exported.parity, task_of(exported.predicts)
    specs, rows = task.specs, [["", "student", "this export"]]
    for name in parity["student"]:
        cells = [_cell(specs[name], parity[one].get(name), parity["examples"], parity[f"{one}_intervals"].get(name))
                 for one in ("student", "export")]  # fmt: skip
        rows.append([specs[name].title, *cells])
    return "\n\n".join([
        _test_table(run, specs, task),
        f"On the {parity['examples']:,} validation {_examples(task)}, which decided on the quantisation:",
        as_markdown(rows),
        f"In brackets: 95% intervals, as the examples are a sample (shares: Wilson; others: {parity['resamples']:,} "
        "bootstrap resamples).",
    ])  # fmt: skip


def _examples(task: Task) -> str:
    """Return what the examples of a split are."""
    return "windows" if task.in_context else "examples"


def _test_table(run: History, specs: Mapping[str, ScoreSpec], task: Task) -> str:
    """Return the test scores of the run's teacher, the student from labels, or such, and this student."""
    own = {score: value for score, value in run.test_scores(run.own_name).items() if specs[score].shown != "apart"}
    if not own:
        return "The run has no report of this student, so there are no test scores."
    n = run.data.sizes["test"]
    rows = [["", *(specs[score].title for score in own)]]
    titles = {"teacher": "teacher", "baseline": f"student from {task.learns_from}", run.own_name: "this student"}
    for name, title in titles.items():
        if scores := run.test_scores(name):
            title += " (float32)" if name == run.own_name else ""
            rows.append([title, *(_cell(specs[score], scores.get(score), n) for score in own)])
    return f"On the {n:,} test {_examples(task)}, which were evaluated once:\n\n{as_markdown(rows)}"


def _cell(spec: ScoreSpec, value: float | None, n: int, interval: list[float] | None = None) -> str:
    if value is None:
        return "not measured"
    low_high = wilson(value, n) if spec.share else interval
    return f"{value:.3f} ({low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else f"{value:.3f}"


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
            f"the same {'label' if p['generated'] is None else 'next token'} for {100 * p['agreement']:.2f}% of "
            f"{'examples' if p['generated'] is None else 'tokens'}, at least {100 * tolerance['agreement']}%"
        )
        limit = "" if tolerance["kl"] is None else f", allowed {tolerance['kl']:g}"
        lines.append(f"KL(student || export) {p['kl']:.2g} nats{limit}")
    if p["cosine"] is not None:
        lines.append(f"mean cosine of embeddings {p['cosine']:.6f}, at least {tolerance['agreement']}")
    if p["generated"] is not None:
        lines.append(f"of the tokens that it generates greedily {100 * p['generated']:.1f}% are the student's")
    return f"On the {p['examples']:,} validation examples:\n\n{_bullets(lines)}"


def _limits(exported: Exported, run: History) -> list[str]:
    lines = [task_of(exported.predicts).limits(list(map(markdown, exported.class_names)))]
    if exported.max_length is not None and task_of(exported.predicts).per_token:
        lines.append(
            f"It reads {exported.max_length} tokens at a time: cut longer texts into windows, as kd-predict does."
        )
    elif task_of(exported.predicts).generates:
        lines.append(f"It was trained on texts of at most {exported.max_length} tokens.")
    elif exported.max_length is not None:
        lines.append(f"Text beyond {exported.max_length} tokens is ignored.")
    kinds = "sources and languages" if exported.images is None else "sources and kinds of images"
    lines.append(f"Its scores are from the data it was trained on; other {kinds} were not tested.")
    if exported.quantize.startswith("int8"):
        lines.append("8-bit kernels differ between processors: the differences above are from the one used here.")
    return [*lines, "It learned its teacher's errors and biases too."] if run.distilled else lines


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
