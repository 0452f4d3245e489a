"""Finished networks for question answering."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from kd_lightning.models.hf import cannot_load, locate, quiet_loading, read_config
from kd_lightning.models.spans import KIND, as_tokens
from kd_lightning.runtime.errors import ConfigError


def finished_for_questions(name: str) -> nn.Module:
    """Load a finished network for question answering as a classifier of tokens, logits `(B, L, 2)`.

    Raises:
        ConfigError: As `load_for_questions`, or no classifier of tokens computes the same.
    """
    network: nn.Module = as_tokens(load_for_questions(name))
    return network.train()


def load_for_questions(name: str) -> PreTrainedModel:
    """Load a finished network for question answering.

    Args:
        name: A folder, or a name on the Hugging Face hub.

    Raises:
        ConfigError: There is none, or it is another network.
    """
    source, local = locate(name)
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        with quiet_loading(hide_bar=local):
            config = read_config(source, name, options)
            if not any(str(one).endswith(KIND) for one in config.architectures or ()):
                raise ConfigError(
                    f"{name} is no network for question answering, not a finished teacher: to fine-tune it first, use "
                    f"model@teacher.network=hf teacher.network.name={name} and no teacher.checkpoint"
                )
            found: Any = AutoModelForQuestionAnswering.from_pretrained(source, dtype="float32", **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(cannot_load(name, "a network for question answering", local, error)) from error
    return found  # type: ignore[no-any-return]
