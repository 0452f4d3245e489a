"""`kd-predict`: what a distilled student says of sentences or images."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.errors import KDError
from kd_lightning.evaluate import image_logits, run_parser, text_logits

if TYPE_CHECKING:
    from torch import Tensor

    from kd_lightning.runs import TrainedModel


MOST_COLUMNS = 4
"""Of more classes the table shows only the likeliest one's probability."""


def read_texts(texts: Sequence[str], file: Path | None) -> list[str]:
    """Return the sentences (or image files) of the command line, of a file or of standard input, one a line.

    Raises:
        KDError: There are none, or the file cannot be read.
    """
    if texts and file:
        raise KDError("give sentences or --file, not both")
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KDError(f"{file} cannot be read as UTF-8 text: {error}") from error
    elif texts:
        lines = list(texts)
    elif sys.stdin.isatty():
        raise KDError("no sentences: give them as arguments, with --file, or on standard input")
    else:
        lines = sys.stdin.read().splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise KDError("no sentences: every line is empty")
    return found


def _logits(model: TrainedModel, texts: Sequence[str]) -> Tensor:
    if model.images is not None:
        return image_logits(model, [Path(text).expanduser() for text in texts])
    sentences = [tuple(text.split("\t")) if model.texts == 2 else (text,) for text in texts]
    if wrong := [texts[i] for i, sentence in enumerate(sentences) if len(sentence) != model.texts]:
        raise KDError(f"the model in {model.folder} reads pairs, two texts with a tab between: {wrong[0]!r} is none")
    return text_logits(model, sentences)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-predict`."""
    parser = run_parser("kd-predict", "Classify sentences or images with a distilled student.")
    parser.add_argument(
        "texts", nargs="*", metavar="text", help="sentences, or image files; none: one a line from standard input"
    )
    parser.add_argument("--file", type=Path, help="a file with one sentence, or the path of one image, a line")
    given = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())  # a user's own network is named by the module we are started beside
    try:
        texts = read_texts(given.texts, given.file)
        from kd_lightning.export.load import load_model

        model = load_model(given.run, given.seed)
        logits = _logits(model, texts)
    except KDError as error:
        sys.exit(f"kd-predict: {error}")
    kind = "text" if model.images is None else "image"
    said = [model.task.read(row, model.class_names) for row in logits]
    rows = [{kind: text, **one} for text, one in zip(texts, said, strict=True)]
    if given.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    if "label" in said[0]:
        _print_table(rows, kind, model.class_names)
    else:
        _print_tasks(rows)


def _print_tasks(rows: Sequence[dict[str, Any]]) -> None:
    """Print a score, or what each of several tasks says, in a column each."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(said: Any) -> str:
        if isinstance(said, dict):
            return (
                f"{said['label']} {max(said['probabilities'].values()):.3f}" if "label" in said else cell(said["score"])
            )
        return said if isinstance(said, str) else f"{said:.3f}"

    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(Text(cell(said)) for said in row.values()))
    Console().print(table)


def _print_table(rows: Sequence[dict[str, object]], kind: str, class_names: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    table.add_column(kind, overflow="fold")
    table.add_column("label")
    few = class_names if len(class_names) <= MOST_COLUMNS else ()
    for title in [f"p({name})" for name in few] or ["p"]:
        table.add_column(title, justify="right")
    for row in rows:
        probabilities = row["probabilities"]
        assert isinstance(probabilities, dict)
        shown = [f"{probabilities[name]:.3f}" for name in few or [str(row["label"])]]
        table.add_row(Text(str(row[kind])), Text(str(row["label"])), *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
