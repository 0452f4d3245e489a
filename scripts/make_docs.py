"""Write the pages of docs/ that files describe.

strategies.md: from conf/distillation/*.yaml, the losses' docstrings and results/strategies.json.
configuration.md: from the commands' docstrings, the comments of conf/*/*.yaml and the docs of the configuration's keys.

python scripts/make_docs.py            write them
python scripts/make_docs.py --check    fail if they are not what the files say
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from kd_lightning.cli.__main__ import commands
from kd_lightning.config.catalog import Strategy, strategies
from kd_lightning.config.help import keys
from kd_lightning.config.instantiate import build, conf_dir
from kd_lightning.losses.layers import LayerwiseTerm
from kd_lightning.losses.term import Term
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.training.objective import Objective

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "model": "`model@student=NAME` and `model@teacher.network=NAME`",
    "data": "`data=NAME`; their keys: [data sets to try](data.md) and the tasks' pages",
    "distillation": "`distillation=NAME`; formulas and papers: [strategies](strategies.md)",
    "experiment": "`experiment=NAME`: a whole run, of which any key can be set",
    "goal": "`goal=NAME`", "optimizer": "`optimizer=NAME`", "scheduler": "`scheduler=NAME`",
    "trainer": "`trainer=NAME`", "logger": "`logger=NAME`", "sweep": "`sweep=NAME`",
    "hydra/launcher": "`hydra/launcher=NAME`; `basic`, Hydra's own, runs one point after another",
}  # fmt: skip
"""How a choice of each group is named on a command line."""
OWN_FILES = (
    "text_files", "image_folder", "token_files", "question_files", "embedding_files", "ranking_files", "lm_text",
    "chat",
)  # fmt: skip
"""Data whose keys have a table."""
MATH = re.compile(r"^\.\. math::(.*(?:\n(?:[ \t]+.*|\s*(?=\n[ \t])))*)", re.MULTILINE)
SHOWN_ONCE = ("CrossEntropyLoss", "SoftTargetLoss", "PairLabelsLoss")
"""Terms that many strategies have beside their own."""
INTRO = """# Distillation strategies

`kd-train distillation=NAME` trains with one of these. A strategy is a file in `conf/distillation/`, whose weights and
options are ordinary keys, and a file in `kd_lightning/losses/`, which needs only torch. How they compare on one
student: [comparison.md](comparison.md). `python scripts/make_docs.py` writes this page from those files.

*Reads* lists what a loss uses besides logits and labels, by the names in `kd_lightning/models/features.py`.
"""


@cache
def configuration() -> DictConfig:
    """Compose the configuration that a strategy's file refers to."""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config")


def objective(name: str) -> Objective:
    """Build a strategy's objective with the values of its file."""
    configuration().distillation = OmegaConf.load(conf_dir() / "distillation" / f"{name}.yaml")
    built: Objective = build(configuration().distillation)
    return built


def formulas(term: Term) -> list[str]:
    """Return the formulas of a term: of the functions in its file that have one, else of its own docstring."""
    module = inspect.getmodule(type(term))
    functions = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]  # type: ignore[union-attr]
    public = [f for f in functions if not f.__name__.startswith("_")]
    documented = [inspect.getdoc(thing) or "" for thing in (*public, type(term))]
    return [text for doc in documented for found in MATH.finditer(doc) if (text := _unindented(found[1]))]


def _unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines() if line.strip())


def reads(built: Objective) -> str:
    """Say which features the terms read."""
    found = []
    for term in built._terms():
        if isinstance(term, LayerwiseTerm):
            layers = term.layers if isinstance(term.layers, str) else "the pairs given"
            found.append(f"`{term.kind}[i]` of both (layers: {layers})")
        for side in ("student", "teacher"):
            if names := getattr(term, f"needs_{side}"):
                found.append(", ".join(f"`{name}`" for name in names) + f" of the {side}")
    return "; ".join(dict.fromkeys(found)) or "nothing else"


def section(strategy: Strategy, measured: dict[str, Any], base: float | None) -> str:
    """Return a strategy's part of the page."""
    built = objective(strategy.name)
    lines = [f"## `{strategy.name}`", "", strategy.idea, ""]
    method = [term for term in built._terms() if type(term).__name__ not in SHOWN_ONCE]
    shown = [formula for term in method or built._terms()[-1:] for formula in formulas(term)]
    for formula in dict.fromkeys(shown):
        lines += ["```math", formula, "```", ""]
    models = ", ".join(strategy.models) + (f" ({strategy.remark})" if strategy.remark else "")
    weights = ", ".join(f"`{name}={_weight(weight)}`" for name, weight in built.weights.items())
    lines += [
        f"* Paper: {strategy.paper}",
        f"* Models: {models}",
        f"* Reads: {reads(built)}",
        f"* Terms and weights: {weights} (`conf/distillation/{strategy.name}.yaml`, at the default alpha)",
    ]
    if (row := measured.get(strategy.name)) and base is not None:
        test = row["test"]
        lines.append(
            f"* Measured: {100 * test['mean']:.1f} ± {100 * test['std']:.1f} % on the reviews' test split, "
            f"{100 * (test['mean'] - base):+.1f} points against labels only ([comparison](comparison.md))"
        )
    return "\n".join([*lines, ""])


def _weight(weight: Any) -> str:
    return f"{type(weight).__name__}" if callable(weight) else f"{weight:g}"


def page() -> str:
    """Return the whole page of strategies."""
    path = ROOT / "results" / "strategies.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["strategies"] if path.is_file() else []
    measured = {row["name"]: row for row in rows}
    base = measured["labels_only"]["test"]["mean"] if measured else None
    found = strategies(conf_dir() / "distillation")
    index = ["| strategy | idea | models |", "| :-- | :-- | :-- |"]
    index += [f"| [`{s.name}`](#{s.name}) | {s.idea} | {', '.join(s.models)} |" for s in found]
    return "\n".join([INTRO, *index, "", *(section(strategy, measured, base) for strategy in found)])


def first_sentence(path: Path) -> str:
    """Return the first sentence of the comment that a configuration file begins with."""
    lines = path.read_text(encoding="utf-8").removeprefix("# @package _global_\n").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=[.]) (?=[A-Z`])", comment)[0].rstrip(".")


def choices(group: str, how: str) -> list[str]:
    """Return the part of a group of configuration files."""
    files = sorted((conf_dir() / group).glob("*.yaml"))
    rows = [f"| `{path.stem}` | {_cell(first_sentence(path))} |" for path in files]
    return [f"### `{group}`", "", f"{how}.", "", "| choice | what |", "| :-- | :-- |", *rows, ""]


def configuration_page() -> str:
    """Return the page of commands, choices and keys."""
    lines = [
        "# Commands, choices, keys", "",
        "`KEY=VALUE` behind a command sets a key, `GROUP=NAME` picks a file of `conf/GROUP/`, and `kd-train --help` "
        "prints all of them. `--config-dir FOLDER` adds groups of your own. `python scripts/make_docs.py` writes this "
        "page.", "",
        "## Commands", "", "| command | what |", "| :-- | :-- |",
        *(f"| `kd {name}`, `kd-{name}` | {_cell(about)} |" for name, (_, about) in commands().items()), "",
        "## Choices", "",
        *(line for group, how in GROUPS.items() for line in choices(group, how)),
        "## Keys", "",
    ]  # fmt: skip
    for name in OWN_FILES:
        lines += data_keys(name)
    for title, group in keys(configuration()).items():
        lines += [f"### {title}", "", "| key | as it stands | takes | what |", "| :-- | :-- | :-- | :-- |"]
        lines += [f"| `{k.path}` | {_value(k.value)} | {k.takes} | {_cell(k.doc)} |" for k in group]
        lines.append("")
    return "\n".join(lines)


def data_keys(name: str) -> list[str]:
    """Return the part of the keys of a file of conf/data, with the comments before them."""
    lines = [f"### Keys of `data={name}`", "", "| key | as it stands | what |", "| :-- | :-- | :-- |"]
    comment: list[str] = []
    after_key = True
    for line in (conf_dir() / "data" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1:]:
        if line.startswith("#"):
            comment = [*([] if after_key else comment), line[1:].strip()]
            after_key = False
            continue
        after_key = True
        key, _, value = line.partition(": ")
        if key != "_target_":  # a key without a comment of its own shares the one before
            lines.append(f"| `data.{key}` | `{value}` | {_cell(' '.join(comment))} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _value(value: str | None) -> str:
    return "a group" if value is None else f"`{value}`"


def pages() -> dict[str, str]:
    """Return the pages by their files' names; strategies are built with the configuration, so theirs is the last."""
    return {"configuration.md": configuration_page(), "strategies.md": page()}


def main() -> None:
    """Entry point."""
    for name, text in pages().items():
        path = ROOT / "docs" / name
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{name} is not what the files say: python scripts/make_docs.py")


if __name__ == "__main__":
    main()
