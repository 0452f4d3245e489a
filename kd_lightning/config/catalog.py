"""The headers of conf/distillation's files, for the documentation, comparison and tests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kd_lightning.runtime.errors import ConfigError

_HEADER = re.compile(
    r"# (?P<idea>.+)\n# Paper: (?P<paper>.+)\n# Models: (?P<models>[a-z, ]+?)(?: \((?P<remark>.+)\))?\n"
)


@dataclass(frozen=True)
class Strategy:
    """One file of conf/distillation.

    Attributes:
        name: Of the file, and so of the choice: `distillation=NAME`.
        idea: What the student learns from, in a sentence.
        paper: Authors, year and arXiv id.
        models: The kinds of models it trains out of the box: `text`, `vision`; `language`, `embedding`,
            `ranking` and `spans`: language models, embeddings, rankings, or starts and ends of spans alone.
        remark: Its requirements, or "".
    """

    name: str
    idea: str
    paper: str
    models: tuple[str, ...]
    remark: str


def strategies(folder: Path) -> list[Strategy]:
    """Read the headers of a folder of distillation configs, in the order of their names.

    Raises:
        ConfigError: A file that does not begin with its idea, paper and models, a comment line each.
    """
    found = []
    for path in sorted(folder.glob("*.yaml")):
        header = _HEADER.match(path.read_text(encoding="utf-8"))
        if header is None:
            raise ConfigError(f"{path} must begin with three lines: '# IDEA', '# Paper: ...', '# Models: text, vision'")
        models = tuple(header["models"].split(", "))
        found.append(Strategy(path.stem, header["idea"], header["paper"], models, header["remark"] or ""))
    return found
