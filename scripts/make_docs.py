"""Write docs/strategies.md from conf/distillation/*.yaml, the losses' docstrings and results/strategies.json.

python scripts/make_docs.py            write it
python scripts/make_docs.py --check    fail if it is not what they say
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.catalog import Strategy, strategies
from kd_lightning.config.instantiate import build, conf_dir
from kd_lightning.losses.layers import LayerwiseTerm
from kd_lightning.losses.term import Term
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.training.objective import Objective

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "strategies.md"
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
    """Return the whole page."""
    register_resolvers()
    path = ROOT / "results" / "strategies.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["strategies"] if path.is_file() else []
    measured = {row["name"]: row for row in rows}
    base = measured["labels_only"]["test"]["mean"] if measured else None
    found = strategies(conf_dir() / "distillation")
    index = ["| strategy | idea | models |", "| :-- | :-- | :-- |"]
    index += [f"| [`{s.name}`](#{s.name}) | {s.idea} | {', '.join(s.models)} |" for s in found]
    return "\n".join([INTRO, *index, "", *(section(strategy, measured, base) for strategy in found)])


def main() -> None:
    """Entry point."""
    text = page()
    if "--check" in sys.argv[1:]:
        sys.exit(
            "docs/strategies.md is not what the files say: python scripts/make_docs.py"
            if PAGE.read_text() != text
            else 0
        )
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
