"""Students that a finished run has trained already, to be trained on: what pre-distillation needs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kd_lightning.models.initialise import Initialise, check_initialise
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.training.run_folder import find_stage, load_run


def from_run(
    checkpoint: str, num_classes: int | None = None, vocab_size: int | None = None, initialise: Initialise = "teacher"
) -> nn.Module:
    """Make a student of a finished run's student.

    Pre-distillation (general distillation in Jiao et al. 2019, arXiv 1909.10351) is two runs: the first teaches what
    needs no labels, such as hidden states on a large pool of sentences, the second starts from its student.

    Args:
        checkpoint: A run folder, whose best student is taken, or one of its stage folders.
        num_classes: Number of outputs, those of the run; None for a language model.
        vocab_size: Number of token ids, for texts: the run's.
        initialise: `teacher`: with the weights it has; `random`: the same network with fresh ones, for the honest
            baseline from nothing.

    Returns:
        The network, all of it trainable.

    Raises:
        ConfigError: No finished run, one of another number of classes or of other tokens, or a network that only its
            own code can build.
    """
    check_initialise(initialise)
    with torch.random.fork_rng():
        try:
            trained = load_run(find_stage(Path(checkpoint)))
        except KDError as error:
            raise ConfigError(f"student.checkpoint={checkpoint}: {error}") from error
    if num_classes is not None and trained.task.outputs != num_classes:
        raise ConfigError(
            f"student.checkpoint={checkpoint} has {trained.task.outputs} outputs and the data need {num_classes}: "
            "give a run of the same classes, or of embeddings as wide"
        )
    tokens = len(trained.tokenizer) if trained.tokenizer is not None else None
    if vocab_size is not None and tokens is not None and tokens != vocab_size:
        raise ConfigError(
            f"student.checkpoint={checkpoint} reads {tokens} tokens and data.tokenizer makes {vocab_size}: read with "
            f"the run's own, data.tokenizer={trained.folder / 'tokenizer'}"
        )
    description = describe(trained.network)
    if description is None:
        raise ConfigError(
            f"student.checkpoint={checkpoint} holds a {type(trained.network).__name__}, which has no description to "
            "build it anew from: load its weights in the class's own constructor"
        )
    network = from_description(description)
    if initialise == "teacher":
        network.load_state_dict(trained.network.state_dict())
    return network.train()
