"""`kd COMMAND ...`, or `python -m kd_lightning.cli COMMAND ...`: every command under one name.

A command is a module beside this one whose docstring begins with its name; `kd train` runs the one of `kd-train`.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

from kd_lightning.cli.runner import MISTAKE, command
from kd_lightning.runtime.errors import ConfigError, did_you_mean


def commands() -> dict[str, tuple[str, str]]:
    """Return each command's module and help line by name, without importing the modules."""
    found = {}
    here = Path(__file__).parent
    for file in here.rglob("*.py"):
        with file.open(encoding="utf-8") as lines:
            head = re.match(r'"""`kd-(\w+)`: (.+)\.(?:"""|$)', lines.readline())
        if head:
            module = ".".join(file.relative_to(here).with_suffix("").parts)
            found[head[1]] = (f"{__package__}.{module}", head[2].replace("`", ""))
    return dict(sorted(found.items()))


def _help(known: dict[str, tuple[str, str]]) -> str:
    lines = ["usage: kd COMMAND ...", "", "Knowledge distillation with PyTorch Lightning.", "", "commands:"]
    lines += [f"  {name:<11}{about}" for name, (_, about) in known.items()]
    return "\n".join([*lines, "", "kd COMMAND --help shows a command's options; kd-COMMAND is the same command."])


@command("kd", "nothing was begun")
def main() -> None:
    """Entry point of `kd`: runs the command's module like `python -m`, also in further processes."""
    known = commands()
    name, *rest = sys.argv[1:] or [""]
    if name in ("", "-h", "--help"):
        print(_help(known))
        sys.exit(0 if name else MISTAKE)
    if name not in known:
        raise ConfigError(f"{name}: there is no such command{did_you_mean(name, known)}")
    sys.argv[1:] = rest
    runpy.run_module(known[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
