"""Reads GGUF files, as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VERSION = 1
"""Goes up when `dequantise` writes something else."""


def dequantise(file: Path, folder: Path) -> None:
    """Write a causal language model and its tokenizer in Hugging Face's form, weights in bfloat16.

    Args:
        file: A GGUF file of an architecture that `transformers` reads.
        folder: An empty folder for it.

    Raises:
        OSError: It cannot be read, or is of another architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: Any = {"gguf_file": file.name, "local_files_only": True}
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
    except (ValueError, KeyError, RuntimeError) as error:
        raise OSError(f"{file.name} is no GGUF file of a causal language model ({error})") from error
    _complete(tokenizer, file)
    del read.config.quantization_config  # with it nothing is saved
    with torch.device("meta"):
        network: Any = type(read)(read.config)
    network.load_state_dict(read.state_dict(), assign=True)
    network.tie_weights()
    network.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _complete(tokenizer: Any, file: Path) -> None:
    """Give a tokenizer its file's end of a text and chat template, where `transformers` leaves them out."""
    from gguf import GGUFReader

    fields = GGUFReader(str(file)).fields
    end, template = (fields.get(f"tokenizer.{name}") for name in ("ggml.eos_token_id", "chat_template"))
    if tokenizer.eos_token is None and end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(end.contents()))
    if tokenizer.chat_template is None and template is not None:
        tokenizer.chat_template = template.contents()
