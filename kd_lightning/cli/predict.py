"""`kd-predict`: predict the class or the score of sentences or images with a finished student."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.cli.evaluate import image_logits, text_logits
from kd_lightning.cli.runner import command, run_parser, trusting_folders
from kd_lightning.evaluation.run_files import data_settings, file_options, flag, reader_for
from kd_lightning.runtime.borders import json_line, shown
from kd_lightning.runtime.errors import ConfigError, DataError

if TYPE_CHECKING:
    from kd_lightning.data.sources.files import FileReader
    from kd_lightning.data.text.corpus import Sentence
    from kd_lightning.training.run_folder import TrainedModel


MOST_COLUMNS = 4
"""Of more classes the table shows only the likeliest one's probability."""


def read_given(texts: Sequence[str], encoding: str) -> list[str]:
    """Return the lines (sentences or image files) of the command line or of standard input.

    Raises:
        ConfigError: There are none, or they are not written so.
    """
    from kd_lightning.data.labels import check_unicode

    if texts:
        for number, text in enumerate(texts, start=1):
            check_unicode(text, f"text {number} of the command line")
        return list(texts)
    if sys.stdin.isatty():
        raise ConfigError("no sentences: give them as arguments, with --file, or on standard input")
    from kd_lightning.data.sources.records import Manner, decoded

    content = decoded(sys.stdin.buffer.read(), Manner(encoding, True, flag), "standard input")
    return content.removesuffix("\n").split("\n") if content else []


def read_file(model: TrainedModel, file: Path, reader: FileReader) -> list[Sentence | None]:
    """Return what to predict for each record of a table, or for each line of any other file; None where it is empty.

    Raises:
        ConfigError: The file cannot be read so.
    """
    from dataclasses import replace

    from kd_lightning.data.sources.records import format_of, lines_of

    kind = "txt" if model.images is not None else reader.format or format_of(file) or "txt"
    if kind == "txt":
        return inputs_of(model, [line.rstrip("\n") for line in lines_of(file, reader.manner)])
    if len(reader.text_columns) != model.texts:
        reads = "pairs: name --text-pair-column" if model.texts == 2 else "single texts: give no --text-pair-column"
        raise ConfigError(f"the model in {model.folder} reads {reads}")
    return replace(reader, format=kind).sentences_and_gaps(file)


def inputs_of(model: TrainedModel, lines: Sequence[str]) -> list[Sentence | None]:
    """Return the text of each line, or two with a tab between for a model of pairs; None where there is none."""
    from kd_lightning.data.text.corpus import is_blank

    found: list[Sentence | None] = []
    for line in lines:
        texts = tuple(text.strip() for text in (line.split("\t") if model.texts == 2 else [line]))
        if len(texts) != (model.texts or 1) and not is_blank(line):
            raise DataError(f"the model in {model.folder} reads pairs, two texts with a tab between: {line!r} is none")
        found.append(None if is_blank(line) else texts)
    return found


def predictions(model: TrainedModel, inputs: Sequence[Sentence | None]) -> list[dict[str, Any]]:
    """Return what a model predicts of each input; of an empty one nothing, under the same names."""
    given = [sentence for sentence in inputs if sentence is not None]
    if not given:
        raise DataError("no sentences: every line is empty")
    if model.images is not None:
        logits = image_logits(model, [Path(path).expanduser() for (path,) in given])
    else:
        logits = text_logits(model, given)
    said = iter([model.task.read(row, model.class_names) for row in logits])
    rows = [None if sentence is None else next(said) for sentence in inputs]
    names = next(row for row in rows if row is not None)
    return [dict.fromkeys(names) if row is None else row for row in rows]


@command("kd-predict", "nothing was changed")
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-predict`."""
    parser = run_parser("kd-predict", "Classify sentences or images with a distilled student.")
    parser.add_argument(
        "texts", nargs="*", metavar="text", help="sentences, or image files; none: one a line from standard input"
    )
    parser.add_argument(
        "--file", type=Path,
        help="a CSV, TSV, JSON or Parquet file; or any other with one sentence, or the path of one image, a line",
    )  # fmt: skip
    file_options(parser, labelled=False)
    given = parser.parse_intermixed_args(arguments)  # options may stand before the sentences
    with trusting_folders(given.trust):
        if given.texts and given.file:
            raise ConfigError("give sentences or --file, not both")
        lines = None if given.file else read_given(given.texts, given.encoding or "utf-8")
        if lines is not None and not any(map(str.strip, lines)):
            raise ConfigError("no sentences: every line is empty")
        from kd_lightning.export.load import load_model

        model = load_model(given.run, given.seed)
        if lines is None:
            inputs = read_file(model, given.file, reader_for(data_settings(given.run), given))
        else:
            inputs = inputs_of(model, lines)
        said = predictions(model, inputs)
    kind = "text" if model.images is None else "image"
    rows = [{kind: "\t".join(text or ("",)), **one} for text, one in zip(inputs, said, strict=True)]
    if given.json:
        for row in rows:
            print(json_line(row))
        return
    if "label" in said[0]:
        _print_table(rows, kind, model.class_names)
    else:
        _print_tasks(rows)


def _print_tasks(rows: Sequence[dict[str, Any]]) -> None:
    """Print a score, or what each of several tasks says, in a column each."""
    from rich.console import Console
    from rich.table import Table

    def cell(said: Any) -> str:
        if said is None:  # of an empty line
            return ""
        if isinstance(said, dict):
            return (
                f"{said['label']} {max(said['probabilities'].values()):.3f}" if "label" in said else cell(said["score"])
            )
        return said if isinstance(said, str) else f"{said:.3f}"

    table = Table(box=None)
    for name in rows[0]:
        table.add_column(shown(name))
    for row in rows:
        table.add_row(*(shown(cell(said)) for said in row.values()))
    Console().print(table)


def _print_table(rows: Sequence[dict[str, object]], kind: str, class_names: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column(shown(kind), overflow="fold")
    table.add_column("label")
    few = class_names if len(class_names) <= MOST_COLUMNS else ()
    for title in [f"p({name})" for name in few] or ["p"]:
        table.add_column(shown(title), justify="right")
    for row in rows:
        if row["label"] is None:  # of an empty line
            table.add_row()
            continue
        probabilities = row["probabilities"]
        assert isinstance(probabilities, dict)
        chances = [f"{probabilities[name]:.3f}" for name in few or [str(row["label"])]]
        table.add_row(shown(row[kind]), shown(row["label"]), *chances)
    Console().print(table)


if __name__ == "__main__":
    main()
