"""`kd-cli`: Lightning's own command line over the same classes that `kd-train` puts together.

    kd-cli fit --config run.yaml
    kd-cli validate --config run.yaml --ckpt_path best.ckpt        (or test, or predict)
    kd-cli fit --config run.yaml --model.optimizer.lr 1e-4 --trainer.max_steps 100
    kd-cli fit --config run.yaml --print_config                    print what would be run
    kd-cli fit --help                                              every argument

`model` is a `kd_lightning.DistillationModule` or `SupervisedModule` (or any LightningModule), `data` one of
`kd_lightning.data`; networks, teachers, terms, optimizers and schedules are named by their `class_path`.
`kd-config experiment=quickstart --to-cli FOLDER` writes such files.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from kd_lightning.runtime.errors import KDError, interruptible

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser


def partially(function: str, arguments: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Return a function that has some of its arguments: what configurations for Hydra call `_partial_`.

    Args:
        function: Its import path, such as `kd_lightning.training.optim.warmup_linear`.
        arguments: Those it has.

    Raises:
        ConfigError: There is no such function, or it takes other arguments.
    """
    from kd_lightning.config.instantiate import lookup
    from kd_lightning.pipeline.validation import _check_node

    _check_node(function, {"_target_": function, "_partial_": True, **(arguments or {})})
    return partial(lookup(function), **(arguments or {}))


def parser() -> LightningArgumentParser:
    """Return the parser of a configuration that is given as an object, without subcommands; it raises its refusals."""
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


@interruptible("kd-cli", "checkpoints that were saved stay; --ckpt_path=FILE goes on from one")
def main() -> None:
    """Entry point: a user's mistake ends in a line or two, as the parser or we say it."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__.strip().replace("`", ""))
        sys.exit(0 if sys.argv[1:] else 2)
    sys.path.insert(0, os.getcwd())  # a user's own networks and losses are named by the module they start us beside
    from kd_lightning.runtime.log_filters import quiet
    from kd_lightning.runtime.processes import leave
    from kd_lightning.runtime.threads import settle_threads

    quiet()
    settle_threads()
    atexit.register(leave)
    try:
        command_line()
    except Exception as error:
        cause: BaseException | None = error
        missing = isinstance(error, FileNotFoundError) and str(error).startswith(
            "Checkpoint"
        )  # Lightning's --ckpt_path
        while not missing and cause is not None and not isinstance(cause, KDError):
            cause = cause.__cause__  # the parser wraps what a constructor raises
        if cause is None:
            raise
        sys.exit(f"kd-cli: {cause}")


if __name__ == "__main__":
    main()
