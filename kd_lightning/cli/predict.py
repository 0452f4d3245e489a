"""`kd-predict`: run a finished student on sentences or images; a language model generates text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.cli.runner import command, run_parser, trusting_folders
from kd_lightning.evaluation.evaluator import inputs_of, predict, read_inputs
from kd_lightning.evaluation.run_files import data_settings, file_options, flag, reader_for
from kd_lightning.runtime.borders import json_line, shown, visible
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.files import replacing

if TYPE_CHECKING:
    from kd_lightning.data.text.corpus import Sentence
    from kd_lightning.training.run_folder import TrainedModel

DECODING = ("max_new_tokens", "temperature", "top_p", "sampling_seed", "chat")
"""The options of generation."""


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
    parser = run_parser("kd-predict", "Run a distilled student on sentences, images or prompts.")
    parser.add_argument(
        "texts", nargs="*", metavar="text",
        help="sentences, image files, or prompts; none: one a line from standard input",
    )  # fmt: skip
    parser.add_argument(
        "--file", type=Path,
        help="a CSV, TSV, JSON or Parquet file; or any other with one sentence, or the path of one image, a line",
    )  # fmt: skip
    parser.add_argument("--npy", type=Path, metavar="FILE", help="write embeddings to a new .npy file, a row a text")
    file_options(parser, labelled=False)
    decoding_options(parser)
    given = parser.parse_intermixed_args(arguments)  # options may stand before the sentences
    with trusting_folders(given.trust):
        if given.texts and given.file:
            raise ConfigError("give sentences or --file, not both")
        if not (given.texts or given.file or given.run.exists()):
            raise ConfigError(f"{given.run}: no such folder; the first argument is the run or export that predicts")
        lines = None if given.file else read_given(given.texts, given.encoding or "utf-8")
        if lines is not None and not any(map(str.strip, lines)):
            raise ConfigError("no sentences: every line is empty")
        from kd_lightning.export.load import load_model

        model = load_model(given.run, given.seed)
        if lines is None:
            settings = {**model.task.input_columns, **data_settings(given.run)}
            inputs = read_inputs(model, given.file, reader_for(settings, given))
        else:
            inputs = inputs_of(model, lines)
        chosen = {name: value for name in DECODING if (value := getattr(given, name)) is not None}
        if model.task.generates:
            print_generated(model, inputs, chosen, given.json)
            return
        if chosen:
            raise ConfigError(f"{flag(next(iter(chosen)))}: the model in {given.run} generates no text: leave it out")
        records = predict(model, inputs)
        if given.npy is not None:
            write_array(given.npy, records)
            return
    kind = "text" if model.images is None else "image"
    texts = ["\t".join(text or ("",)) for text in inputs]
    if given.json:
        for text, record in zip(texts, records, strict=True):
            print(json_line({kind: text, **record}))
        return
    cells = [{} if one is None else model.task.cells(record, model.class_names)
             for one, record in zip(inputs, records, strict=True)]  # fmt: skip
    print_table(kind, texts, cells)


def write_array(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the embeddings of texts as float32 `(N, D)`; of an empty text the row is NaN.

    Raises:
        ConfigError: The model embeds nothing, or there is a file of that name.
    """
    import numpy as np

    rows = [record.get("embedding") for record in records]
    width = next((len(row) for row in rows if row is not None), None)
    if width is None:
        raise ConfigError("--npy: the model embeds nothing: leave it out")
    if path.exists() or path.suffix != ".npy":
        raise ConfigError(f"--npy {path}: expected the name of a new file that ends in .npy")
    found = np.array([[np.nan] * width if row is None else row for row in rows], np.float32)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, found)
    except OSError as error:
        raise ConfigError(f"--npy {path} cannot be written: {error.strerror}") from error
    print(f"{path}: {len(found)} embeddings of {width} numbers")


def decoding_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of language models."""
    group = parser.add_argument_group("language models, which generate text after a prompt")
    group.add_argument("--max-new-tokens", type=int, help="where a text that does not end is cut; default: 128")
    group.add_argument("--temperature", type=float, help="draw tokens; default: 0, the likeliest, or 1 with --top-p")
    group.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this probability together")
    group.add_argument("--sampling-seed", type=int, help="seed of the draw of each prompt's text; default: 0")
    group.add_argument(
        "--chat", action="store_const", const=True, help="a prompt is a user's turn in the tokenizer's chat template"
    )


def print_generated(
    model: TrainedModel, inputs: Sequence[Sentence | None], chosen: Mapping[str, Any], as_json: bool
) -> None:
    """Print what is generated after each prompt, word by word or as JSON; nothing of an empty prompt.

    Args:
        model: A language model.
        inputs: The prompts.
        chosen: Those of the options `DECODING` that were given.
        as_json: Whether to print an object a prompt.
    """
    from kd_lightning.evaluation.generation import RECORD, Decoding, generate

    options: dict[str, Any] = {"temperature": 1.0} if "top_p" in chosen else {}
    options |= {"seed" if name == "sampling_seed" else name: value for name, value in chosen.items()}
    decoding = Decoding(**options)
    if as_json:
        for prompt in (one and one[0] for one in inputs):
            found = generate(model, prompt, decoding) if prompt else dict.fromkeys(RECORD)
            print(json_line({"prompt": prompt or "", **found}), flush=True)
        return
    for number, prompt in enumerate(one[0] for one in inputs if one is not None):
        print_piece("\n" * (number > 0))  # an empty line between two texts
        print_piece("" if decoding.chat else prompt)
        generate(model, prompt, decoding, print_piece)
        print_piece("\n")


def print_piece(text: str) -> None:
    """Print a piece of a text at once, with control characters escaped but for line breaks and tabs."""
    print(visible(text, keep="\n\t"), end="", flush=True)


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
