"""Runs a trained model on the user's inputs: predictions, and scores on a labelled file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.runtime.errors import ConfigError, DataError
from kd_lightning.training.run_folder import model_of

if TYPE_CHECKING:
    from torch import Tensor

    from kd_lightning.data.sources.files import FileReader
    from kd_lightning.data.text.corpus import Sentence
    from kd_lightning.tasks.evaluation import Evaluation
    from kd_lightning.training.run_folder import TrainedModel
    from kd_lightning.types import Batch

BATCH = 64
"""Inputs that are predicted together."""


def text_batches(model: TrainedModel, sentences: Sequence[Sentence]) -> Iterator[Batch]:
    """Yield sentences (or pairs) as batches of similar length; `index` is their position.

    Raises:
        ConfigError: The model reads no text.
    """
    import torch

    from kd_lightning.data.text.tokens import encode_batch

    if model.tokenizer is None:
        raise ConfigError(f"the model in {model.folder} has no tokenizer: it does not read text")
    order = sorted(range(len(sentences)), key=lambda i: sum(map(len, sentences[i])))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        encoded = encode_batch(model.tokenizer, [sentences[i] for i in chosen], model.max_length)
        yield {**encoded, "index": torch.tensor(chosen)}


def image_batches(model: TrainedModel, paths: Sequence[Path]) -> Iterator[Batch]:
    """Yield image files as a model of images reads them; `index` is their place.

    Raises:
        ConfigError: The model reads no images, or a file is none.
    """
    import numpy as np
    import torch

    from kd_lightning.data.image.store import read_image

    if model.images is None:
        raise ConfigError(f"the model in {model.folder} does not read images")
    for start in range(0, len(paths), BATCH):
        chosen = paths[start : start + BATCH]
        pixels = np.stack([read_image(path, model.images.size, model.images.channels) for path in chosen])
        index = torch.arange(start, start + len(chosen))
        yield {"pixel_values": model.images.normalise(pixels), "index": index}


def predict(model: TrainedModel, inputs: Sequence[Sentence | None]) -> list[dict[str, Any]]:
    """Return a model's prediction for each input (texts or an image's path); none for empty ones.

    Raises:
        DataError: All of them are empty.
    """
    import torch

    from kd_lightning.evaluation.masks import filled
    from kd_lightning.evaluation.question_spans import found_spans

    given = [one for one in inputs if one is not None]
    if not given:
        raise DataError("no sentences: every line is empty")
    reads_images = model.images is not None
    paths = [Path(one[0]).expanduser() for one in given] if reads_images else []
    found: dict[int, dict[str, Any]] = {}
    network = model_of(model)
    with torch.inference_mode():
        if model.task.in_context:
            found |= enumerate(found_spans(model, [(one[0], one[1]) for one in given]))
        elif model.task.per_token:
            found |= enumerate(entities(model, [one[0] for one in given]))
        elif model.task.fills:
            lines = [number for number, one in enumerate(inputs, start=1) if one is not None]
            found |= enumerate(filled(model, [one[0] for one in given], lines))
        for batch in () if found else image_batches(model, paths) if reads_images else text_batches(model, given):
            logits = network(batch).logits.float()
            read = model.task.read(logits, batch, model.class_names)
            found |= dict(zip(batch["index"].tolist(), read, strict=True))
    records = iter([found[place] for place in range(len(given))])
    nothing = dict.fromkeys(found[0])
    return [dict(nothing) if one is None else next(records) for one in inputs]


def entities(model: TrainedModel, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entities that a model of tokens finds in each text, with the characters where they stand.

    A text of more than `max_length` tokens is read in windows, which share a quarter. Each word's tag is of the window
    that shows most around it; entities are looked for in the whole text.

    Raises:
        ConfigError: The model reads no text.
    """
    import numpy as np
    import torch

    from kd_lightning.data.text.tagged import Place, TaggedText, split_words
    from kd_lightning.data.text.words import WordDataset, encode_words

    if model.tokenizer is None or model.max_length is None:
        raise ConfigError(f"the model in {model.folder} has no tokenizer: it does not read text")
    tokenizer: Any = model.tokenizer
    tagged = [TaggedText(text, split_words(text), None, Place("input", i)) for i, text in enumerate(texts, start=1)]
    windows = encode_words(tokenizer, tagged, model.max_length, model.max_length // 4)
    unknown = np.zeros(len(windows.tokens), np.int64)
    data = WordDataset({"": windows}, unknown, False, range(len(windows)), {"": int(tokenizer.pad_token_id)})
    network = model_of(model)
    of_window: dict[int, Tensor] = {}
    order = np.argsort(windows.lengths, kind="stable")
    for start in range(0, len(order), BATCH):
        batch = data[order[start : start + BATCH]]
        logits = network(batch).logits.float()
        kept = [row[keep] for row, keep in zip(logits, batch["keep"], strict=True)]
        of_window |= dict(zip(batch["index"].tolist(), kept, strict=True))
    found = []
    for number, text in enumerate(tagged):
        logits = torch.cat([of_window[i] for i in np.flatnonzero(windows.texts == number).tolist()])
        rows = {"keep": torch.ones(1, len(logits), dtype=torch.bool)}
        (record,) = model.task.read(logits[None], rows, model.class_names)
        found.append({"entities": [_with_characters(one, text.text, text.words) for one in record["entities"]]})
    return found


def _with_characters(entity: dict[str, Any], text: str, words: Sequence[tuple[int, int]]) -> dict[str, Any]:
    start, end = words[entity["start"]][0], words[entity["stop"] - 1][1]
    return {"type": entity["type"], "text": text[start:end], "start": start, "end": end, "score": entity["score"]}


def score_file(model: TrainedModel, file: str, reader: FileReader, numbered: bool = False) -> Evaluation:
    """Score a model on a labelled file: CSV, TSV, JSON or Parquet.

    Args:
        model: A classifier of texts, or one that ranks them.
        file: The file.
        reader: Reads it.
        numbered: Whether its labels may be the classes' numbers where these are called by words.

    Raises:
        ConfigError: The model is another, or the file is not for it.
    """
    import torch

    from kd_lightning.data.text.corpus import encode_labels
    from kd_lightning.tasks.evaluation import evaluate

    if model.tokenizer is None:
        raise ConfigError(f"the model in {model.folder} has no tokenizer: it does not read text")
    if model.task.learns_from == "grades":
        return _score_queries(model, file, reader)
    if model.task.classes is None or model.task.per_token or model.task.learns_from == "text":
        raise ConfigError(
            f"the model in {model.folder} predicts more than a class: score it on its own splits, without --file"
        )
    check_columns(model, reader)
    examples = encode_labels(reader.examples(file), model.class_names, numbered)
    labels = torch.tensor(examples.labels)
    batches = ({**batch, "labels": labels[batch["index"]]} for batch in text_batches(model, examples.texts))
    return evaluate(model.task, model_of(model), batches)


GRADED = {"query_column": "text_column", "document_column": "text_pair_column", "grade_column": "label_column"}
"""The options of the command line by those of queries with graded documents."""


def _score_queries(model: TrainedModel, file: str, reader: FileReader) -> Evaluation:
    """Score a model on a file of queries with graded documents."""
    from kd_lightning.data.sources.list_reader import ListReader
    from kd_lightning.data.text.lists import check_ranked
    from kd_lightning.data.text.ranking import GradeColumns
    from kd_lightning.tasks.evaluation import evaluate

    lists = ListReader(
        reader.text_column, reader.text_pair_column, reader.label_column, format=reader.format,
        encoding=reader.encoding, quotes=reader.quotes, key=lambda option: reader.key(GRADED.get(option, option)),
    ).lists(file, judged=True)  # fmt: skip
    check_ranked(lists, file, "give documents of grade 0")
    columns, rows = GradeColumns(lists), [(one.query, document) for one in lists for document in one.documents]
    batches = ({**batch, **columns.at(batch["index"].numpy())} for batch in text_batches(model, rows))
    return evaluate(model.task, model_of(model), batches)


def read_inputs(model: TrainedModel, file: Path, reader: FileReader) -> list[Sentence | None]:
    """Return the input of each record of a table or line of another file; None for empty ones.

    Raises:
        ConfigError: The file cannot be read so.
    """
    from dataclasses import replace

    from kd_lightning.data.sources.records import format_of, lines_of

    kind = "txt" if model.images is not None else reader.format or format_of(file) or "txt"
    if kind == "txt":
        return inputs_of(model, [line.rstrip("\n") for line in lines_of(file, reader.manner)])
    check_columns(model, reader)
    return replace(reader, format=kind).sentences_and_gaps(file)


def inputs_of(model: TrainedModel, lines: Sequence[str]) -> list[Sentence | None]:
    """Return the text of each line, or two separated by a tab for pairs; None for empty lines."""
    from kd_lightning.data.text.corpus import is_blank

    found: list[Sentence | None] = []
    most = 1 if model.task.in_context else -1  # a context may have tabs of its own
    for line in lines:
        texts = tuple(text.strip() for text in (line.split("\t", most) if model.texts == 2 else [line]))
        if len(texts) != (model.texts or 1) and not is_blank(line):
            raise DataError(f"the model in {model.folder} reads pairs, two texts with a tab between: {line!r} is none")
        found.append(None if is_blank(line) else texts)
    return found


def check_columns(model: TrainedModel, reader: FileReader) -> None:
    """Refuse a file that is read for fewer or more texts an example than the model reads."""
    if model.texts != len(reader.text_columns):
        reads = "pairs: name --text-pair-column" if model.texts == 2 else "single texts: give no --text-pair-column"
        raise ConfigError(f"the model in {model.folder} reads {reads}")
