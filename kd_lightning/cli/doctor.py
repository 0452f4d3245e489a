"""`kd-doctor`: check versions, devices, caches, registries and extras, and train a tiny student."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from kd_lightning.cli.runner import FAILURE, command
from kd_lightning.runtime.borders import json_line, visible

MARKS = {"ok": "  ", "note": "- ", "problem": "! "}


@command("kd-doctor", "nothing was changed")
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-doctor`."""
    parser = argparse.ArgumentParser(
        "kd-doctor",
        description="Check what decides how runs go here, and train a tiny student. Exit code 1 where runs would fail.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--no-self-test", action="store_true", help="train nothing")
    given = parser.parse_args(arguments)
    from kd_lightning.pipeline.doctor import examine

    found = examine(self_test=not given.no_self_test)
    problems = [one for one in found if one.verdict == "problem"]
    if given.json:
        print(json_line({"ok": not problems, "findings": [asdict(one) for one in found]}))
    else:
        width = max(len(one.name) for one in found) + 2
        for number, one in enumerate(found):
            if number == 0 or found[number - 1].about != one.about:
                print(one.about)
            print(visible(f"{MARKS[one.verdict]}{one.name:<{width}}{one.says}"))
        notes = sum(one.verdict == "note" for one in found)
        print(f"{len(problems)} problems (!), {notes} notes (-)")
    if problems:
        sys.exit(FAILURE)


if __name__ == "__main__":
    main()
