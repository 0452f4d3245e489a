"""Silences messages of libraries that carry no information, one by one, each with its reason."""

from __future__ import annotations

import logging
import warnings


class _Without(logging.Filter):
    """Drops log records that contain one of the given texts."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for a record to drop."""
        message = record.getMessage()
        return not any(text in message for text in self.texts)


LIGHTNING_INFO = (
    "GPU available:",  # in the report's environment
    "TPU available:",
    "💡 Tip",  # advertising
    "`Trainer.fit` stopped:",  # the progress line shows that all steps are done
    "Restoring states from the checkpoint",  # the stage logs the resumption itself
    "Restored all states from the checkpoint",
    "Using bfloat16 Automatic Mixed Precision",  # chosen by us, and in the report's settings
)

WARNINGS = (
    # Data are arrays in memory; worker processes would only copy them.
    r".*does not have many workers.*",
    # The folder holds this very run's settings and its resumable checkpoints, which is why it exists.
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists.*",
    # The number of batches is needed before training, to give the baseline the same number of steps.
    r".*The number of training batches .* is smaller than the logging interval.*",
    # Shown on every machine with srun, also if nothing is launched; checks.py counts the processes.
    r".*The `srun` command is available on your system but is not used.*",
    # Lightning's own use of a PyTorch API that a later PyTorch renamed; nothing a user can change.
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    # An LSTM's output is a view; our networks do not write into it.
    r".*FSDP2-wrapped module \(FSDPLSTM\) returned a view tensor.*",
)


def quiet() -> None:
    """Install the filters."""
    keep = _Without(*LIGHTNING_INFO)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).addFilter(keep)
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(keep)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
