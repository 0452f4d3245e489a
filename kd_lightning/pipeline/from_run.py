"""Students that a finished run has trained already, to be trained on: what pre-distillation needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_lightning.models.initialise import Initialise, check_initialise
from kd_lightning.models.new_head import with_new_head
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.training.run_folder import TrainedModel, find_stage, load_run

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData

log = logging.getLogger(__name__)


def from_run(
    checkpoint: str,
    num_classes: int | None = None,
    vocab_size: int | None = None,
    initialise: Initialise = "teacher",
    per_token: bool = False,
    embeds: bool = False,
    data: IndexedData | None = None,
) -> nn.Module:
    """Make a student of a finished run's student.

    Pre-distillation (general distillation in Jiao et al. 2019, arXiv 1909.10351) is two runs: the first teaches what
    needs no labels, such as hidden states or embeddings on a large pool of sentences, the second starts from its
    student. Where the second predicts something else, or other classes, the student has a fresh head
    (`models.new_head`).

    Args:
        checkpoint: A run folder, whose best student is taken, or one of its stage folders.
        num_classes: Number of outputs; None for a language model.
        vocab_size: Number of token ids, for texts: the run's.
        initialise: `teacher`: with the weights it has; `random`: the same network with fresh ones, for the honest
            baseline from nothing.
        per_token: The data need a prediction for each token.
        embeds: They need an embedding.
        data: The data, whose classes and tokens are compared with the run's; None: only their numbers are.

    Returns:
        The network, all of it trainable.

    Raises:
        ConfigError: No finished run, one of other tokens, or a network that only its own code can build, or that can
            have no other head.
    """
    check_initialise(initialise)
    with torch.random.fork_rng():
        try:
            trained = load_run(find_stage(Path(checkpoint)))
        except KDError as error:
            raise ConfigError(f"student.checkpoint={checkpoint}: {error}") from error
    _check_tokens(trained, vocab_size, data)
    description = describe(trained.network)
    if description is None:
        raise ConfigError(
            f"student.checkpoint={checkpoint} holds a {type(trained.network).__name__}, which has no description to "
            "build it anew from: load its weights in the class's own constructor"
        )
    weights, same_head = trained.network.state_dict(), _fits(trained, num_classes, per_token, embeds, data)
    if not same_head:
        description, weights = _other_head(trained, num_classes, per_token, embeds)
        log.info("student.checkpoint=%s: its body, with a new head of %s outputs", checkpoint, num_classes)
    network = from_description(description)
    if initialise == "teacher":
        network.load_state_dict(weights, strict=same_head)
    return network.train()


def _check_tokens(trained: TrainedModel, vocab_size: int | None, data: IndexedData | None) -> None:
    """Refuse a run that reads other tokens.

    Raises:
        ConfigError: Names the tokenizer to set.
    """
    own, reader = trained.tokenizer, None if data is None else data.tokenizer_of("student")
    if own is None or vocab_size is None:
        return
    if len(own) != vocab_size or (reader is not None and own.get_vocab() != reader.get_vocab()):
        raise ConfigError(
            f"student.checkpoint={trained.folder} reads {len(own)} tokens and data.tokenizer makes {vocab_size}, or "
            f"others: read with the run's own, data.tokenizer={trained.folder / 'tokenizer'}"
        )


def _fits(
    trained: TrainedModel, num_classes: int | None, per_token: bool, embeds: bool, data: IndexedData | None
) -> bool:
    """Return whether a run's outputs are those that the data need: of the same kind, number and classes."""
    task = trained.task
    if num_classes is None:
        return True
    if (task.outputs, task.per_token, task.embeds) != (num_classes, per_token, embeds):
        return False
    if data is None:
        return True
    return (task.settings["_target_"], list(trained.class_names)) == (
        data.task.settings["_target_"], list(data.class_names)
    )  # fmt: skip


def _other_head(
    trained: TrainedModel, num_classes: int | None, per_token: bool, embeds: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description of a run's network with another head, and the weights that it keeps.

    Raises:
        ConfigError: It can have none.
    """
    assert num_classes is not None
    try:
        with torch.random.fork_rng():
            network, kept = with_new_head(trained.network, num_classes, per_token, embeds)
    except ConfigError as error:
        raise ConfigError(
            f"student.checkpoint={trained.folder} has {trained.task.outputs} outputs and the data need {num_classes}, "
            f"so its student would get a new head: {error}"
        ) from error
    description, weights = describe(network), network.state_dict()
    assert description is not None
    return description, {name: weights[name] for name in kept}
