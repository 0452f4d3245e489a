"""`kd-train`: compose a configuration with Hydra and run its stages."""

from __future__ import annotations

import logging
import os
import shlex
import sys

import hydra
from omegaconf import DictConfig

from kd_lightning import config
from kd_lightning.errors import KDError


@hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")
def _run(cfg: DictConfig) -> float:
    """Run one composed configuration; returns the best validation score, averaged over seeds, for a sweeper."""
    try:
        from kd_lightning.checks import validate

        config.place(cfg)
        validate(cfg)
        from kd_lightning.compare import compare
        from kd_lightning.multitask import pipeline_of
        from kd_lightning.quiet import quiet
        from kd_lightning.threads import settle_threads

        quiet()
        settle_threads()
        log = logging.getLogger("kd_lightning")  # what we noticed in the data and the models, as plain lines
        log.setLevel(logging.INFO)
        log.handlers = [logging.StreamHandler()]
        pipeline = pipeline_of(cfg)
        pipeline.run()
        compare(pipeline, shlex.join(["kd-train", *sys.argv[1:]]))
        return pipeline.score()
    except KDError as error:  # here, since Hydra adds lines of its own to an exception that leaves a job
        sys.exit(f"kd-train: {error}")


def main() -> None:
    """Entry point: a user's mistake ends in one line, anything else in its traceback."""
    config.register_resolvers()
    sys.path.insert(0, os.getcwd())  # a user's own networks and losses are named by the module they start us beside
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and what the user reads is decided here
    try:
        _run()
    except Exception as error:
        from kd_lightning.explain import explain

        explained = explain(error, sys.argv[1:])
        if explained is None:
            raise
        sys.exit(f"kd-train: {explained}")


if __name__ == "__main__":
    main()
