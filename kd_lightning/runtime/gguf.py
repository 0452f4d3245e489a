"""Reads GGUF files, as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
    del read.config.quantization_config  # with it nothing is saved
    with torch.device("meta"):
        network: Any = type(read)(read.config)
    network.load_state_dict(read.state_dict(), assign=True)
    network.tie_weights()
    network.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
