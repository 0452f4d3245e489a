"""`kd-predict`: predict the class or the score of sentences or images with a finished student."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_lightning.cli.runner import command, run_parser, trusting_folders
from kd_lightning.evaluation.evaluator import inputs_of, predict, read_inputs
from kd_lightning.evaluation.run_files import data_settings, file_options, flag, reader_for
from kd_lightning.runtime.borders import json_line, shown
from kd_lightning.runtime.errors import ConfigError


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
            inputs = read_inputs(model, given.file, reader_for(data_settings(given.run), given))
        else:
            inputs = inputs_of(model, lines)
        records = predict(model, inputs)
    kind = "text" if model.images is None else "image"
    texts = ["\t".join(text or ("",)) for text in inputs]
    if given.json:
        for text, record in zip(texts, records, strict=True):
            print(json_line({kind: text, **record}))
        return
    cells = [{} if one is None else model.task.cells(record, model.class_names)
             for one, record in zip(inputs, records, strict=True)]  # fmt: skip
    print_table(kind, texts, cells)


def print_table(kind: str, texts: Sequence[str], cells: Sequence[Mapping[str, str]]) -> None:
    """Print the inputs and what is predicted of them, a column for each name; nothing of an empty input."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column(shown(kind), overflow="fold")
    names = next(filter(None, cells))
    for name in names:
        table.add_column(shown(name))
    for text, row in zip(texts, cells, strict=True):
        table.add_row(*(shown(cell) for cell in (text, *(row.get(name, "") for name in names))))
    Console().print(table)


if __name__ == "__main__":
    main()
