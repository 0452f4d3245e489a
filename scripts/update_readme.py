"""Write the README's tables from results/*.json: what stands between `<!-- table: NAME -->` and `<!-- end -->`.

python scripts/update_readme.py            write README.md
python scripts/update_readme.py --check    fail if it is not what the results say
python scripts/update_readme.py --record runs/quickstart    first copy that run's report to results/quickstart.json
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from kd_lightning.report import load_report, markdown_table, summary

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def block(name: str) -> str:
    """Return the README's block for one result: the sentence that sums it up, the table, and where it was measured."""
    report = load_report(ROOT / "results" / f"{name}.json")
    machine = report["environment"]
    ratio = report["distillation_ratio"]
    seeds = len(report["seeds"])
    spread = f" ± {ratio['std']:.2f}" if ratio["std"] is not None else ""
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['versions']['torch']}, {machine['date'][:10]}"
    lines = [
        summary(report), "", markdown_table(report), "",
        f"Distillation ratio (S_kd - S) / (T - S): {ratio['mean']:.2f}{spread}, {seeds} seed{'s' * (seeds > 1)}. "
        f"`{report['command']}`, {where} (`results/{name}.json`).",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def record(run: Path) -> None:
    """Copy a run's report and pictures to results/, under the run's name."""
    (ROOT / "results").mkdir(exist_ok=True)
    report = load_report(run / "report.json")
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (ROOT / "results" / f"{run.name}.json").write_text(text, encoding="utf-8")
    for picture in ("curves", "tradeoff"):
        shutil.copyfile(run / f"{picture}.png", ROOT / "results" / f"{run.name}_{picture}.png")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", type=Path, metavar="RUN_DIR")
    given = parser.parse_args()
    if given.record:
        record(given.record)
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = BLOCK.sub(lambda found: f"{found[1]}{block(found[2])}{found[3]}", old)
    if given.check:
        sys.exit("README.md is not what results/ say: python scripts/update_readme.py" if new != old else 0)
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
