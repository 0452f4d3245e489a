"""Reads further files of the user in the format of a run's files, or of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from kd_lightning.training.run_folder import read_config, run_root

if TYPE_CHECKING:
    from kd_lightning.data.sources.files import FileReader


def file_options(parser: argparse.ArgumentParser, labelled: bool) -> None:
    """Add the options for how `--file` is written."""
    own = "of --file; default: the run's own"
    parser.add_argument("--text-column", help=f"column with the sentence {own}, else text")
    parser.add_argument("--text-pair-column", help=f"column with the second sentence of a pair {own}")
    if labelled:
        parser.add_argument("--label-column", help=f"column with the class {own}, else label")
    formats = ("csv", "tsv", "jsonl", "parquet") + (() if labelled else ("txt",))
    parser.add_argument("--format", choices=formats, help="format of --file; default: by its suffix")
    parser.add_argument("--encoding", help=f"encoding {own}, else utf-8")
    parser.add_argument("--quotes", choices=("true", "false"), help=f'whether " opens a quoted field {own}, else true')


def flag(option: str) -> str:
    """Return how an option of the data is called on the command line."""
    return f"--{option.replace('_', '-')}"


def data_settings(run: Path) -> dict[str, Any]:
    """Return the data settings of a run or one of its stages; empty if unknown."""
    root = run_root(run)
    if root is None:
        return {}
    data = read_config(root).get("data")
    if not isinstance(data, dict):
        return {}
    tasks = data.get("tasks") or {}
    named = [name for name in tasks if name in run.absolute().parts]
    return dict(tasks[(named or list(tasks))[0]]) if tasks else {str(key): value for key, value in data.items()}


def is_numbered(settings: Mapping[str, Any]) -> bool:
    """Return whether somebody gave the classes the order of their numbers."""
    return settings.get("class_names") is not None or "config_name" in settings


def reader_for(settings: Mapping[str, Any], given: argparse.Namespace) -> FileReader:
    """Return what reads `--file`.

    Args:
        settings: Those of the run's data.
        given: The command line, with what `file_options` added.
    """
    from kd_lightning.data.sources.files import FileReader
    from kd_lightning.data.sources.hf_dataset import GLUE

    text, pair = GLUE.get(settings.get("config_name") or "", ("text", None))
    label = settings.get("label_column") or "label"
    if "query_column" in settings:
        text, pair = settings["query_column"], settings.get("document_column") or "document"
        label = settings.get("grade_column") or "grade"
    return FileReader(
        text_column=given.text_column or settings.get("text_column") or text,
        text_pair_column=given.text_pair_column or settings.get("text_pair_column") or pair,
        label_column=getattr(given, "label_column", None) or label,
        format=given.format or _format(settings, Path(given.file or "")),
        encoding=given.encoding or settings.get("encoding") or "utf-8",
        quotes=given.quotes != "false" if given.quotes else settings.get("quotes") is not False,
        key=flag,
    )


def _format(settings: Mapping[str, Any], file: Path) -> Any:
    """Return the run's file format, if it is one of tables, for a file with the same or an unknown suffix."""
    from kd_lightning.data.sources.records import Format, format_of

    known = format_of(file)
    alike = known is None or known == format_of(Path(settings.get("train_file") or ""))
    own = settings.get("format")
    return own if alike and own in get_args(Format) else None
