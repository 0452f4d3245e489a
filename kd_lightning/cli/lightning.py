"""`kd-cli`: train, validate, test or predict with Lightning's own command line.

    kd-cli fit --config run.yaml
    kd-cli validate --config run.yaml --ckpt_path best.ckpt        (or test, or predict)
    kd-cli fit --config run.yaml --model.optimizer.lr 1e-4 --trainer.max_steps 100
    kd-cli fit --config run.yaml --print_config                    print what would be run
    kd-cli fit --help                                              every argument

It uses the classes of `kd-train`: `model` is a `kd_lightning.DistillationModule` or
`SupervisedModule` (or any LightningModule), `data` one of `kd_lightning.data`; networks, teachers, terms, optimizers
and schedules are named by their `class_path`.
`kd-config experiment=quickstart --to-cli FOLDER` writes such files.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from kd_lightning.cli.runner import MISTAKE, begin, command, import_from_here
from kd_lightning.runtime.errors import ConfigError, KDError

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser


def partially(function: str, arguments: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Return a function with some of its arguments, like Hydra's `_partial_`.

    Args:
        function: Its import path, such as `kd_lightning.training.optim.warmup_linear`.
        arguments: Those it has.

    Raises:
        ConfigError: There is no such function, or it takes other arguments.
    """
    from kd_lightning.config.instantiate import lookup
    from kd_lightning.config.nodes import check_node

    check_node(function, {"_target_": function, "_partial_": True, **(arguments or {})})
    return partial(lookup(function), **(arguments or {}))


def parser() -> LightningArgumentParser:
    """Return a parser for configurations as objects, without subcommands, that raises its errors."""
    import lightning as L
    from lightning.pytorch.cli import LightningArgumentParser

    found = LightningArgumentParser(exit_on_error=False)
    found.add_argument("--seed_everything", type=int)
    found.add_lightning_class_args(L.Trainer, "trainer")
    found.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    found.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    return found


def command_line() -> None:
    """Read the command line and run it."""
    import lightning as L
    from lightning.pytorch.cli import LightningCLI

    from kd_lightning.runtime.processes import environment

    class KDCLI(LightningCLI):
        def instantiate_trainer(self, **given: Any) -> L.Trainer:
            plugins = self._get(self.config_init, "trainer").plugins or []
            plugins = plugins if isinstance(plugins, list) else [plugins]
            return super().instantiate_trainer(plugins=[*plugins, environment()], **given)

    KDCLI(
        L.LightningModule, L.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
        auto_configure_optimizers=False, save_config_kwargs={"overwrite": True},
    )  # fmt: skip


@command("kd-cli", "saved checkpoints are kept; --ckpt_path=FILE resumes from one")
def main() -> None:
    """Entry point; a user's mistake ends in a line or two."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__.strip().replace("`", ""))
        sys.exit(0 if sys.argv[1:] else MISTAKE)
    import_from_here()
    from kd_lightning.runtime.processes import leave

    begin()
    atexit.register(leave)
    try:
        command_line()
    except Exception as error:
        ours = _ours(error)
        if ours is None:
            raise
        raise ours from None


def _ours(error: BaseException | None) -> KDError | None:
    """Return our own error that the parser wrapped, or our message for a missing `--ckpt_path`."""
    if isinstance(error, FileNotFoundError) and str(error).startswith("Checkpoint"):
        return ConfigError(str(error))
    while error is not None and not isinstance(error, KDError):
        error = error.__cause__
    return error


if __name__ == "__main__":
    main()
