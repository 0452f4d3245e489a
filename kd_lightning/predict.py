"""`kd-predict`: what a distilled student says of sentences."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.errors import KDError
from kd_lightning.evaluate import run_parser, text_logits


def read_texts(texts: Sequence[str], file: Path | None) -> list[str]:
    """Return the sentences of the command line, of a file or of standard input, one a line.

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-predict`."""
    parser = run_parser("kd-predict", "Classify sentences with a distilled student.")
    parser.add_argument("texts", nargs="*", metavar="text", help="sentences; none: one a line from standard input")
    parser.add_argument("--file", type=Path, help="a file with one sentence a line")
    given = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())  # a user's own network is named by the module we are started beside
    try:
        texts = read_texts(given.texts, given.file)
        from kd_lightning.runs import load_run

        model = load_run(given.run, given.seed)
        sentences = [tuple(text.split("\t")) if model.texts == 2 else (text,) for text in texts]
        if wrong := [texts[i] for i, sentence in enumerate(sentences) if len(sentence) != model.texts]:
            raise KDError(
                f"the model in {model.folder} reads pairs, two texts with a tab between: {wrong[0]!r} is none"
            )
        probabilities = text_logits(model, sentences).softmax(dim=-1).tolist()
    except KDError as error:
        sys.exit(f"kd-predict: {error}")
    rows = [
        {
            "text": text,
            "label": model.class_names[row.index(max(row))],
            "probabilities": dict(zip(model.class_names, row, strict=True)),
        }
        for text, row in zip(texts, probabilities, strict=True)
    ]
    if given.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    _print_table(rows, model.class_names)


def _print_table(rows: Sequence[dict[str, object]], class_names: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    table.add_column("text", overflow="fold")
    table.add_column("label")
    for name in class_names:
        table.add_column(f"p({name})", justify="right")
    for row in rows:
        probabilities = row["probabilities"]
        assert isinstance(probabilities, dict)
        table.add_row(
            Text(str(row["text"])), Text(str(row["label"])), *(f"{probabilities[name]:.3f}" for name in class_names)
        )
    Console().print(table)


if __name__ == "__main__":
    main()
