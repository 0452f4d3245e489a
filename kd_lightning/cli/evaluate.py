"""`kd-eval`: score a finished run again, on its own splits or on another file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.cli.runner import command, run_parser, trusting_folders
from kd_lightning.evaluation.run_files import data_settings, file_options, is_numbered, reader_for
from kd_lightning.runtime.borders import tell
from kd_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from kd_lightning.data.sources.files import FileReader
    from kd_lightning.data.text.corpus import Sentence
    from kd_lightning.training.run_folder import TrainedModel


def text_logits(model: TrainedModel, sentences: Sequence[Sentence], batch_size: int = 64) -> Tensor:
    """Return the logits of sentences (or pairs) as a trained model sees them.

    Args:
        model: A text model with its tokenizer.
        sentences: Tuples of one text or two.
        batch_size: Sentences of like length that are answered together.

    Returns:
        `(N, C)` float32, in the order of the sentences.

    Raises:
        ConfigError: The model reads no text.
    """
    import torch

    from kd_lightning.data.text.tokens import encode_batch
    from kd_lightning.models.adapt import run_network

    tokenizer = _tokenizer(model)
    order = sorted(range(len(sentences)), key=lambda i: sum(map(len, sentences[i])))
    logits = torch.empty(len(sentences), len(model.class_names))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = encode_batch(tokenizer, [sentences[i] for i in chosen], model.max_length)
            logits[chosen] = run_network(model.network, batch).logits.float()
    return logits


def image_logits(model: TrainedModel, paths: Sequence[Path], batch_size: int = 64) -> Tensor:
    """Return the logits of image files as a trained model sees them.

    Args:
        model: A model that reads images.
        paths: The files.
        batch_size: Images that are answered together.

    Returns:
        `(N, C)` float32, in the order of the files.

    Raises:
        ConfigError: The model reads no images, or a file is none.
    """
    import numpy as np
    import torch

    from kd_lightning.data.image.store import read_image
    from kd_lightning.models.adapt import run_network

    if model.images is None:
        raise ConfigError(f"the model in {model.folder} does not read images")
    format, logits = model.images, []
    with torch.inference_mode():
        for start in range(0, len(paths), batch_size):
            chosen = paths[start : start + batch_size]
            pixels = np.stack([read_image(path, format.size, format.channels) for path in chosen])
            logits.append(run_network(model.network, {"pixel_values": format.normalise(pixels)}).logits.float())
    return torch.cat(logits)


def _tokenizer(model: TrainedModel) -> PreTrainedTokenizerBase:
    if model.tokenizer is None:
        raise ConfigError(f"the model in {model.folder} has no tokenizer: it does not read text")
    return model.tokenizer


def evaluate_file(model: TrainedModel, file: str, reader: FileReader, numbered: bool = False) -> dict[str, float]:
    """Score a model on a labelled file: CSV, TSV, JSON or Parquet.

    Args:
        model: A classifier of texts.
        file: The file.
        reader: Reads it.
        numbered: Whether its labels may be the classes' numbers where these are called by words.

    Raises:
        ConfigError: The model is another, or the file is not for it.
    """
    import torch

    from kd_lightning.data.text.corpus import encode_labels
    from kd_lightning.tasks.metrics import evaluate_logits

    _tokenizer(model)
    if model.task.classes is None:
        raise ConfigError(
            f"the model in {model.folder} predicts more than a class: score it on its own splits, without --file"
        )
    if model.texts != len(reader.text_columns):
        reads = "pairs: name --text-pair-column" if model.texts == 2 else "single texts: give no --text-pair-column"
        raise ConfigError(f"the model in {model.folder} reads {reads}")
    examples = encode_labels(reader.examples(file), model.class_names, numbered)
    labels = torch.tensor(examples.labels)
    return evaluate_logits(text_logits(model, examples.texts), labels) | {"examples": float(len(labels))}


def evaluate_split(model: TrainedModel, run: Path, split: str) -> dict[str, float]:
    """Score a model on the validation or test split of the run it came from."""
    from kd_lightning.export.exported import is_export
    from kd_lightning.export.source import role_of, run_data
    from kd_lightning.tasks.predictions import network_answers

    if is_export(model.folder):
        raise ConfigError(f"{run} is an export, which knows no data: give the run folder, or --file")
    data = run_data(model.folder, "score the file with --file").select(tokens=role_of(model.folder))
    said = network_answers(model.network, data.val_dataloader() if split == "validation" else data.test_dataloader())
    scores: dict[str, float] = data.task.evaluate(said)
    return scores | {"examples": float(len(said.labels))}


@command("kd-eval", "nothing was changed")
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-eval`."""
    parser = run_parser("kd-eval", "Score a finished run on its test split, or on another file.")
    parser.add_argument("--file", help="a labelled CSV, TSV, JSON or Parquet file instead of the run's own data")
    file_options(parser, labelled=True)
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    given = parser.parse_args(arguments)
    with trusting_folders(given.trust):
        from kd_lightning.export.load import load_model

        model = load_model(given.run, given.seed)
        if given.file:
            data = data_settings(given.run)
            scores = evaluate_file(model, given.file, reader_for(data, given), is_numbered(data))
        else:
            scores = evaluate_split(model, given.run, given.split)
    if given.json:
        print(json.dumps({"model": str(model.folder), **scores}, indent=2))
        return
    tell(f"{model.folder} on {given.file or given.split + ' split'}, {scores.pop('examples'):.0f} examples")
    for name, value in scores.items():
        tell(f"  {name:<14}{value:.4f}")


if __name__ == "__main__":
    main()
