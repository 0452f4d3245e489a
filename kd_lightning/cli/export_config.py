"""`kd-config`: write what `kd-train` would train with the same overrides as files for `kd-cli`.

    kd-config experiment=quickstart --to-cli quickstart
    kd-cli fit --config quickstart/teacher.yaml
    kd-cli fit --config quickstart/seed_0/baseline.yaml
    kd-cli fit --config quickstart/seed_0/distill.yaml

One file a stage, where `kd-train` would keep the stage in its run folder. A stage reads what those before it left in
that folder, so they are run in the order in which they are printed; each trains to the very weights of `kd-train`.
The data are read once, for what the files must state of them: classes, vocabulary, steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.cli.runner import command, typed
from kd_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def write(cfg: DictConfig, folder: Path, command: str) -> list[Path]:
    """Write the files of a composed configuration, and return them in the order of running.

    Args:
        cfg: As `kd-train` composes it.
        folder: Where to.
        command: What the files name as their origin.

    Raises:
        ConfigError: Whatever is wrong with the configuration, or `kd-cli` cannot run of it.
    """
    from jsonargparse import ArgumentError
    from omegaconf import OmegaConf

    from kd_lightning.cli.lightning import parser
    from kd_lightning.cli.lightning_config import files
    from kd_lightning.pipeline.context import Run
    from kd_lightning.runtime.files import write_file

    texts: dict[Path, str] = {}
    for name, content in files(Run(cfg)):
        path = folder / f"{name}.yaml"
        head = f"# Written by: {command}\n# Run it with: kd-cli fit --config {path}\n"
        texts[path] = head + OmegaConf.to_yaml(OmegaConf.create(content))
        try:
            parser().parse_string(texts[path])
        except ArgumentError as error:
            reason = " ".join(str(error).split())[:500]
            raise ConfigError(f"{name}: kd-cli cannot run this configuration: {reason}") from error
    for path, text in texts.items():
        write_file(path, text)
    return list(texts)


@command("kd-config", "nothing was written")
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `kd-config`."""
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "kd-config", description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for kd-train")
    parser.add_argument("--to-cli", type=Path, required=True, metavar="FOLDER", help="where the files go")
    given = parser.parse_intermixed_args(arguments)
    from kd_lightning.cli.hydra_errors import compose, explained
    from kd_lightning.runtime.files import check_place

    check_place(given.to_cli, f"--to-cli {given.to_cli}")
    with explained(given.overrides):
        for path in write(compose(given.overrides), given.to_cli, typed("kd-config", arguments)):
            print(f"kd-cli fit --config {path}")


if __name__ == "__main__":
    main()
