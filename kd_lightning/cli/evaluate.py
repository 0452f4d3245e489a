"""`kd-eval`: score a finished run again, on its own splits or on another file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.cli.runner import command, run_parser, trusting_folders
from kd_lightning.evaluation.evaluator import score_file
from kd_lightning.evaluation.run_files import data_settings, file_options, is_numbered, reader_for
from kd_lightning.runtime.borders import tell
from kd_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from kd_lightning.tasks.evaluation import Evaluation
    from kd_lightning.training.run_folder import TrainedModel
log = logging.getLogger(__name__)


def score_split(model: TrainedModel, run: Path, split: str) -> Evaluation:
    """Score a model on the validation or test split of the run it came from."""
    from kd_lightning.export.exported import is_export
    from kd_lightning.export.source import role_of, run_data
    from kd_lightning.tasks.evaluation import evaluate
    from kd_lightning.training.run_folder import model_of

    if is_export(model.folder):
        raise ConfigError(f"{run} is an export, which knows no data: give the run folder, or --file")
    data = run_data(model.folder, "score the file with --file").select(tokens=role_of(model.folder))
    loader = data.val_dataloader() if split == "validation" else data.test_dataloader()
    return evaluate(data.task, model_of(model), loader)


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
            own = Path(data.get("train_file") or "")
            if own.is_file() and Path(given.file).is_file() and own.samefile(given.file):
                log.warning("the run learned from texts of this file: without --file its test split alone is scored")
            found = score_file(model, given.file, reader_for(data, given), is_numbered(data))
        else:
            found = score_split(model, given.run, given.split)
    if given.json:
        print(json.dumps({"model": str(model.folder), **found.scores, "examples": float(found.examples)}, indent=2))
        return
    tell(f"{model.folder} on {given.file or given.split + ' split'}, {found.examples} examples")
    for name, value in found.scores.items():
        tell(f"  {name:<14}{value:.4f}")


if __name__ == "__main__":
    main()
