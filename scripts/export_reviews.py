"""Export finished runs' students in every format that has a goal, and measure them against the teacher.

python scripts/export_reviews.py runs/reviews_bilstm                                a BiLSTM
python scripts/export_reviews.py runs/reviews_bilstm --layers runs/reviews_3layer   and a student of three layers

Writes the export folders and `benchmark/` into RUN/export, results/export.json and results/export.png; then run
scripts/update_readme.py. The runs are those of kd-train experiment=reviews_bilstm and experiment=reviews_3layer, which
take one teacher: teacher.checkpoint=runs/reviews_bilstm.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_lightning.cli.benchmark import show
from kd_lightning.export.benchmark import document, in_eight_bits, measure, subjects_of
from kd_lightning.export.benchmark_files import markdown, picture, write
from kd_lightning.export.write import export, filled, plan
from kd_lightning.runtime.files import write_file

ROOT = Path(__file__).resolve().parent.parent
BILSTM = (("onnx", "none"), ("onnx", "fp16"), ("onnx", "int8-dynamic"), ("onnx", "int8-static"), ("pt2", "none"))
LAYERS = (("huggingface", "none"), *BILSTM)


def exports(run: Path, choices: Sequence[tuple[str, str]]) -> list[Path]:
    """Export a run's student; what is there already is kept."""
    folders = []
    for format, quantize in choices:
        out = run / "export" / f"{run.name}-{format}-{quantize}"
        command = shlex.join(["kd-export", str(run), "--format", format, "--quantize", quantize, "--out", str(out)])
        if not out.is_dir():
            _, parity = export(plan(run, format, quantize, out, command))
            print(f"{out}: {'; '.join(parity.lines())}")
        folders.append(out)
    return folders


def goals(result: dict[str, Any], run: Path, layers: Path | None) -> list[dict[str, Any]]:
    """Return what was promised, what was measured, and whether it was kept."""
    rows = {row["name"]: row for row in result["rows"]}
    student = rows["student" if layers is None else f"{run.name}: student"]
    int8 = next(row for name, row in rows.items() if f"{run.name}-onnx-int8-dynamic" in name)
    fast = next(row for name, row in rows.items() if f"{run.name}-onnx-none" in name)
    lost = student["score"]["value"] - int8["score"]["value"]
    found = [
        _goal("BiLSTM ONNX at batch 1, times faster than the teacher", fast["times_faster"], 15.0),
        _goal("BiLSTM ONNX int8 at batch 1, times faster", int8["times_faster"], 15.0),
        _goal("BiLSTM ONNX int8, times smaller", int8["times_smaller"], 20.0),
        _goal("BiLSTM ONNX int8, accuracy lost, points", 100 * lost, 0.5, most=True),
    ]
    if layers is not None:
        three = rows[f"{layers.name}: student"]["times_faster"]
        found.append(_goal("student of three layers at batch 1, times faster", three, 1.9))
    return found


def _goal(name: str, value: float, limit: float, most: bool = False) -> dict[str, Any]:
    met = value <= limit if most else value >= limit
    return {"name": name, "value": value, "goal": f"{'<=' if most else '>='} {limit:g}", "met": met}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run with a teacher and a BiLSTM")
    parser.add_argument("--layers", type=Path, help="a finished run whose student has three of the teacher's layers")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    folders = [given.run, *exports(given.run, BILSTM)]
    if given.layers:
        folders += [given.layers, *exports(given.layers, LAYERS)]
    subjects, stage = subjects_of(folders, given.threads)
    command = shlex.join(["python", *sys.argv])
    out = given.run / "export" / "benchmark"
    shutil.rmtree(out, ignore_errors=True)  # ours, of an earlier call
    with filled(out) as folder:
        rivals, unmeasured = in_eight_bits(subjects, folder, given.threads, given.run / "benchmark")
        rows = measure([subjects[0], *rivals, *subjects[1:]], stage, given.threads)
        result = document(rows, command, given.threads, str(given.run), unmeasured)
        result["goals"] = goals(result, given.run, given.layers)
        write(result, folder)
    write_file(ROOT / "results" / "export.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    picture(result, ROOT / "results" / "export.png")
    show(result, out)
    print(markdown(result))
    for goal in result["goals"]:
        print(f"{goal['name']}: {goal['value']:.3g} (goal {goal['goal']}): {'yes' if goal['met'] else 'NO'}")


if __name__ == "__main__":
    main()
