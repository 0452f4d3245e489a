"""The table and the picture of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_lightning.runtime.borders import code, drawn
from kd_lightning.runtime.borders import markdown as escaped


def token_ms(row: Mapping[str, Any]) -> float | None:
    """Return the milliseconds of an example or, of a language model, of a token, if measured."""
    if "latency_ms" in row:
        return float(row["latency_ms"]["p50"])
    return 1000 / row["generation"]["decode_per_second"] if row["generation"] else None


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the table as text: a heading and a row for each model."""
    from kd_lightning.evaluation.report.table import GENERATED, MISSING, file_size, generated_cell, short

    first = result["rows"][0]
    sizes = list(first.get("throughput", ()))
    speeds = ["p50 / p95, ms", *(f"examples/s ({size})" for size in sizes)] if sizes else list(GENERATED)
    heading = ["", first["score"]["title"], *speeds[:1], "times faster", *speeds[1:]]
    rows = [[*heading, "peak memory", "file", "times smaller"]]
    for row in result["rows"]:
        if sizes:
            cells = [f"{short(row['latency_ms']['p50'])} / {short(row['latency_ms']['p95'])}"]
            cells += [MISSING if value is None else short(value) for value in row["throughput"].values()]
        else:
            cells = [generated_cell(row, title) for title in speeds]
        value, faster = row["score"]["value"], row["times_faster"]
        score = MISSING if value is None else f"{value:.4f}"
        cells = [row["name"], score, cells[0], MISSING if faster is None else f"{faster:.1f}", *cells[1:]]
        cells += [file_size(row["peak_memory_bytes"]), file_size(row["file_bytes"]), f"{row['times_smaller']:.1f}"]
        rows.append(cells)
    return rows


def picture(result: Mapping[str, Any], file: Path) -> None:
    """Draw latency and file size of each as dots, the fastest first; what was not measured has none."""
    from kd_lightning.evaluation.report.style import COLOURS, MARKERS, Dot, dots, new_figure

    def time(row: Mapping[str, Any]) -> float:
        return token_ms(row) or math.nan

    rows = sorted(result["rows"], key=lambda row: (math.isnan(time(row)), time(row)))
    one = "example (median)" if "latency_ms" in rows[0] else "token"
    figure = new_figure(11, 1.2 + 0.3 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    panels = (
        (left, [time(row) for row in rows], f"ms for one {one} (log scale)"),
        (right, [row["file_bytes"] / 1e6 for row in rows], "MB on disk (log scale)"),
    )
    roles = ["teacher" if row["of"] == "teacher" else "distilled" for row in rows]
    for axes, values, title in panels:
        named = zip(rows, values, roles, strict=True)
        axes.set_xscale("log")
        dots(
            axes,
            [Dot(drawn(row["name"]), value, None, COLOURS[role], MARKERS[role]) for row, value, role in named],
            "{:.3g}".format,
        )
        axes.set_xlabel(title)
        axes.xaxis.set_major_formatter("{x:g}")
    figure.savefig(file, dpi=150)


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table in Markdown, with a line about where it was measured."""
    from kd_lightning.evaluation.report.table import as_markdown
    from kd_lightning.evaluation.report.text import generation_text

    machine = result["environment"]
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    where = f"{machine['cpu']}, {threads}, torch {machine['versions']['torch']}, {machine['date'][:10]}"
    title, own = (
        result["rows"][0]["score"]["title"],
        "of onnx and openvino with these alone, of pt2 and executorch with torch, of others with",
    )
    against = (
        f"{title[0].upper()}{title[1:]} on the validation split. Times faster and smaller: than {result['against']}"
    )
    how = escaped(generation_text(result["rows"], result["against"]))
    about = f"{against}. Peak memory is a process's own: {own} Lightning. {how}{' ' * bool(how)}"
    missing = "".join(
        f"Not measured: {escaped(name)} ({escaped(why)}).\n\n" for name, why in result.get("unmeasured", {}).items()
    )
    return f"{as_markdown(table_rows(result))}\n\n{missing}{about}{code(result['command'])}, {where}."


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Write `benchmark.json`, `benchmark.md` and `benchmark.png` into a folder."""
    from kd_lightning.runtime.files import write_file
    from kd_lightning.runtime.fingerprints import write_json

    write_json(folder / "benchmark.json", result)
    write_file(folder / "benchmark.md", markdown(result) + "\n")
    picture(result, folder / "benchmark.png")
