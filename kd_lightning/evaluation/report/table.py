"""The comparison as a table, for the terminal, report.md and the README."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd_lightning.evaluation.report.differences import gap_is_noise
from kd_lightning.evaluation.report.results import score_title
from kd_lightning.runtime.borders import markdown, shown, visible

MISSING = "–"  # noqa: RUF001 - an en dash, as in printed tables

OUTPUTS = "teacher outputs, s"
"""The row of what a teacher's predictions took."""


def comparison_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the table as text: a heading row of model titles, then one row per measure, its name first.

    With several seeds a cell reads `mean ± sample standard deviation`. An en dash stands for no measurement.
    """
    models = report["models"]
    batch_size = next((m["throughput"]["batch_size"] for m in models.values() if m["throughput"]), None)
    throughput = "examples/s" + (f" (batch {batch_size})" if batch_size else "")
    withheld = gap_is_noise(report)
    speeds: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "latency p50 / p95, ms": lambda m: _latency(m["latency_ms"]),
        throughput: lambda m: _part(m["throughput"], "examples_per_second", short),
    }
    if any(model.get("generation") for model in models.values()):
        speeds = {title: partial(generated_cell, title=title) for title in GENERATED}
    cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
        **{score_title(report, name): partial(_score, name) for name in _tabulated(report)},
        "parameters": lambda m: _part(m["size"], "parameters", count),
        "parameters, no embeddings": lambda m: _part(m["size"], "parameters_without_embeddings", count),
        "file size": lambda m: _part(m["size"], "bytes", file_size),
        **speeds,
        "training time, s": lambda m: spread(m["training_seconds"], lambda value: f"{value:.1f}"),
        **({OUTPUTS: _outputs} if any(model.get("outputs_seconds") for model in models.values()) else {}),
        "gap closed": lambda m: MISSING if withheld else spread(m.get("distillation_ratio"), _two_digits),
    }
    rows = [[name, *(cell(model) for model in models.values())] for name, cell in cells.items()]
    return [["", *(model["title"] for model in models.values())], *rows]


GENERATED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "first token, ms": lambda row: short(row["generation"]["first_token_ms"]),
    "prefill, tokens/s": lambda row: short(row["generation"]["prefill_per_second"]),
    "decode, tokens/s": lambda row: short(row["generation"]["decode_per_second"]),
    "accepted as draft, greedy / drawn": lambda row: " / ".join(
        f"{row['draft'][kind]['rate']:.2f}" for kind in ("greedy", "sampled")
    ),
    "speed-up as draft": lambda row: f"{row['draft']['speed_up']:.2f}x",
}
"""What a language model generates, by title: how a model's entry is written, of a report or a benchmark."""


def generated_cell(row: Mapping[str, Any], title: str) -> str:
    """Return a cell of `GENERATED`; an en dash where it was not measured."""
    measured = row.get("draft" if "draft" in title else "generation")
    return GENERATED[title](row) if measured else MISSING


def _tabulated(report: Mapping[str, Any]) -> list[str]:
    """Return the scores that are tabulated, as the task orders them."""
    found = {name for model in report["models"].values() for name in model["test"]}
    return [name for name, spec in report["scores"].items() if spec["shown"] in ("always", "alone") and name in found]


def _score(name: str, model: Mapping[str, Any]) -> str:
    return spread(model["test"].get(name))


def markdown_table(report: Mapping[str, Any]) -> str:
    """Return the comparison as a Markdown table, for report.md and the README."""
    return as_markdown(comparison_rows(report))


def as_markdown(rows: list[list[str]], rule: str = "--:") -> str:
    r"""Format rows, the first of them the heading, as a Markdown table; `rule` aligns the other columns.

    >>> print(as_markdown([["", "a|b"], ["x", "1"]]))
    |   | a\|b |
    | :-- | --: |
    | x | 1 |
    """
    heading, *body = rows
    rules = [":--"] + [rule] * (len(heading) - 1)
    escaped = [
        [markdown(cell.strip().replace("\n", " ")).replace("|", "\\|") for cell in row] for row in (heading, *body)
    ]
    lines = [escaped[0], rules, *escaped[1:]]
    return "\n".join("| " + " | ".join(cell or " " for cell in line) + " |" for line in lines)


def ratio_line(report: Mapping[str, Any]) -> str:
    """Return the distillation ratio as a sentence."""
    ratio, same = report["distillation_ratio"], report["distillation_ratio_same_start"]
    if ratio["mean"] is None:
        return "distillation ratio (S_kd - S) / (T - S): undefined"
    if gap_is_noise(report):
        return "distillation ratio (S_kd - S) / (T - S): not given, the gap T - S may be noise"
    seeds = f" over {len(ratio['values'])} seeds" if len(ratio["values"]) > 1 else ""
    start = f"; against the same start {spread(same, _two_digits)}" if same["mean"] is not None else ""
    return f"distillation ratio (S_kd - S) / (T - S) = {spread(ratio, _two_digits)}{start}{seeds}"


def _two_digits(value: float) -> str:
    return f"{value:.2f}"


def print_table(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the comparison, the distillation ratio and the warnings.

    Numbers are never broken over lines. Without a terminal (a file, a pipe, CI) the table has the width it
    needs.

    Args:
        report: The document `build_report` returns.
        console: Where to; None is standard output.
    """
    console = console or Console()
    heading, *body = comparison_rows(report)
    title = f"{report['task']} (test split, {report['data']['n_test']:,} examples)"
    table = Table(title=shown(title), title_justify="left", box=None)
    table.add_column(shown(heading[0]), no_wrap=True)
    for number, title in enumerate(heading[1:], start=1):
        # titles may wrap, numbers may not: the longest number is the minimum width
        width = max(len(row[number]) for row in body)
        table.add_column(Text(visible(title), justify="right"), justify="right", vertical="bottom", min_width=width)
    for row in body:
        style = "bold" if row[0] == score_title(report) else None
        table.add_row(*(Text(visible(cell), no_wrap=True) for cell in row), style=style)
    needed = console.measure(table).minimum
    console.print(table, width=max(console.width, needed), crop=False, no_wrap=True, overflow="ignore")
    console.print()
    console.print(Text(ratio_line(report), style="bold cyan"), soft_wrap=True)
    for warning in report["warnings"]:
        console.print(Text(f"warning: {visible(warning)}", style="yellow"), soft_wrap=not console.is_terminal)


def spread(described: Mapping[str, Any] | None, number: Callable[[float], str] | None = None) -> str:
    """Return `mean`, or `mean ± std` with a deviation.

    >>> spread({"mean": 0.82437, "std": 0.00312, "values": []})
    '0.824 ± 0.003'
    >>> spread({"mean": 0.82437, "std": None, "values": []})
    '0.824'
    """
    if described is None or described["mean"] is None:
        return MISSING
    number = number or (lambda value: f"{value:.3f}")
    mean = number(described["mean"])
    return mean if described["std"] is None else f"{mean} ± {number(described['std'])}"


def count(value: float) -> str:
    """Format a number of parameters.

    >>> [count(n) for n in (512, 34_560, 1_234_567, 999_999, 22_713_216, 7_000_000_000)]
    ['512', '34.6k', '1.23M', '1.00M', '22.7M', '7.00G']
    """
    return _scaled(value, (("", 1), ("k", 10**3), ("M", 10**6), ("G", 10**9)))


def file_size(value: float) -> str:
    """Format a number of bytes in decimal units.

    >>> [file_size(n) for n in (512, 34_560, 90_852_864)]
    ['512 B', '34.6 kB', '90.9 MB']
    """
    return _scaled(value, ((" B", 1), (" kB", 10**3), (" MB", 10**6), (" GB", 10**9)))


def short(value: float) -> str:
    """Format a number with three digits, or all digits before the point.

    >>> [short(x) for x in (0.01234, 1.234, 56.78, 123.4, 12345.6)]
    ['0.0123', '1.23', '56.8', '123', '12346']
    """
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}"


def _scaled(value: float, units: tuple[tuple[str, int], ...]) -> str:
    """Format the value in the largest unit that it reaches after rounding."""
    unit, scale = next(((u, s) for u, s in reversed(units) if value >= 0.9995 * s), units[0])
    return (f"{value:.0f}" if scale == 1 else short(value / scale)) + unit


def _part(measured: Mapping[str, Any] | None, key: str, number: Callable[[float], str]) -> str:
    """Format one number of an optional measurement."""
    return MISSING if measured is None or measured[key] is None else number(measured[key])


def _outputs(model: Mapping[str, Any]) -> str:
    """Format the seconds that a teacher's predictions took, and how many of them another run spent."""
    spent = model.get("outputs_seconds")
    if spent is None:
        return MISSING
    reused = f" ({spent['reused']:.1f} reused)" if spent["reused"] else ""
    return f"{spent['total']:.1f}{reused}"


def _latency(measured: Mapping[str, Any] | None) -> str:
    return MISSING if measured is None else f"{short(measured['p50'])} / {short(measured['p95'])}"
