"""Lightning callbacks of the pipeline."""

from kd_lightning.callbacks.progress import StageProgress

__all__ = ["StageProgress"]
