"""What a campaign came to: counts by outcome, for people and for `docs/reliability.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

GROUPS = ("kills", "damages", "configurations", "names")
GOOD = {
    "kills": ("finished",),
    "damages": ("right", "refused in a line"),
    "configurations": ("refused in a line", "valid", "diverged"),
    "names": ("escaped", "harmless", "refused in a line"),
}
TITLES = {
    "kills": (
        "Killed and begun again",
        "command",
        "Each command dies at a place drawn from all its file operations and optimizer steps: by SIGKILL, in the "
        "middle of a write, by SIGTERM or by SIGINT. The same command then has to finish with the weights, scores and "
        "outputs of an undisturbed run, to the bit, and without a file more than that one leaves.",
    ),
    "damages": (
        "Damaged files",
        "read by",
        "A file of a finished run, an interrupted one, an export or the home folder is drawn. It gets a bit flipped, "
        "or is cut short, deleted, emptied, zeroed or exchanged for another; then a command runs that may read it. It "
        "has to end with the right result or in one line.",
    ),
    "configurations": (
        "Configurations",
        "command",
        "One setting more than a good run has: values of a wrong type or range, misspelt keys and values, missing "
        "files, damaged data, syntax errors, groups that do not go together. It has to be refused in one line before "
        "anything is trained. Some turn out to be valid: they have to run to their report.",
    ),
    "names": (
        "Hostile names, links and descriptions",
        "kind",
        "Classes and sentences made of terminal sequences, markup, HTML, YAML, templates and formulas go through "
        "training, prediction, scoring and export. Then traps: links, paths that lead upwards, and descriptions, "
        "caches and exports that name code or the user's files.",
    ),
}


def is_good(trial: dict[str, Any]) -> bool:
    """Return whether a trial ended as it should."""
    return trial["outcome"] in GOOD[trial["group"]]


def counts(trials: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return how many trials of a group ended how, by what was tried."""
    tried = sorted({trial["what"] for trial in trials})
    return {what: dict(sorted(Counter(t["outcome"] for t in trials if t["what"] == what).items())) for what in tried}


def table(content: dict[str, Any]) -> str:
    """Return the part of `docs/reliability.md` that a campaign's file says."""
    return "\n\n".join(_section(group, content[group]) for group in GROUPS if group in content) + "\n"


def _section(group: str, content: dict[str, Any]) -> str:
    title, first, text = TITLES[group]
    rows = content["counts"]
    outcomes = [*GOOD[group], *sorted({outcome for row in rows.values() for outcome in row} - {*GOOD[group]})]
    outcomes = [outcome for outcome in outcomes if any(outcome in row for row in rows.values())]
    lines = [f"### {title}", "", text, "", f"| {first} | trials | {' | '.join(outcomes)} |"]
    lines.append(f"| :-- | {' | '.join(['--:'] * (len(outcomes) + 1))} |")
    for what, row in rows.items():
        cells = [str(sum(row.values())), *(str(row.get(outcome, 0)) for outcome in outcomes)]
        lines.append(f"| {f'`{what}`' if what.startswith('kd-') else what} | {' | '.join(cells)} |")
    machine, bad = content["environment"], len(content["not as it should be"])
    said = f"**{bad} did not end as they should**; `results/faults.json` names them." if bad else "All as they should."
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['versions']['torch']}, {machine['date'][:10]}"
    lines += ["", f"{said} `{content['command']}`, {content['minutes']:.0f} minutes, {where}."]
    return "\n".join(lines)
