"""GGUF, for llama.cpp: language models of Llama's and Qwen2's kind, with their tokenizer.

8 bits are llama.cpp's Q8_0: blocks of 32 weights with a scale each.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kd_lightning.export.formats import Written
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.hf import quiet_loading
from kd_lightning.runtime.errors import ConfigError, KDError

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FILE = "model.gguf"
QUANTIZE = ("none", "int8-weights", "fp16", "bf16")
NEEDS: tuple[str, ...] = ("gguf",)
READS: tuple[str, ...] = ("gguf", "accelerate")

KINDS = {"none": "F32", "int8-weights": "Q8_0", "fp16": "F16", "bf16": "BF16"}
"""The type of matrices by precision; vectors are float32."""

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {LLAMA_3: "llama-bpe", LLAMA_3.replace("{1,3}", ""): "qwen2"}
"""llama.cpp's names of the patterns by which a text is split into words."""


def check(model: TrainedModel) -> None:
    """Refuse networks and tokenizers that llama.cpp would compute otherwise."""
    network = model.network
    if not isinstance(network, CausalLM):
        raise ConfigError(f"--format gguf: {type(network).__name__} is no causal language model; use onnx, safetensors")
    config: Any = network.network.config
    rope = config.rope_parameters if config.model_type in ("llama", "qwen2") else {}
    plain = not (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))
    plain = plain and config.hidden_act == "silu" if rope else False
    if not plain or rope.get("rope_type", "default") != "default" or getattr(config, "use_sliding_window", False):
        raise ConfigError(
            f"--format gguf: only Llama and Qwen2 with plain rotary positions can be written, not {config.model_type}: "
            "use huggingface, which llama.cpp's convert_hf_to_gguf.py reads, or onnx"
        )
    split_name(model.tokenizer)


def split_name(tokenizer: Any) -> str:
    """Return llama.cpp's name of how a tokenizer splits a text into words.

    Raises:
        ConfigError: It is no tokenizer of byte pairs, or none that llama.cpp knows.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    pre, normalizer = content["pre_tokenizer"] or {}, (content["normalizer"] or {}).get("type")
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if content["model"]["type"] == "BPE" and kinds[-1] == "ByteLevel" and not last["add_prefix_space"]:
        found = None
        if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
            found = SPLITS.get(steps[0]["pattern"].get("Regex"))
        elif last["use_regex"] and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            found = "smollm"
        elif last["use_regex"] and kinds == ["ByteLevel"]:
            found = "gpt-2"
        if found is not None and normalizer == ("NFC" if found == "qwen2" else None):
            return found
    raise ConfigError(
        "--format gguf: the tokenizer splits texts in a way of its own, and llama.cpp would read other tokens: use one "
        "of GPT-2's, SmolLM's, Llama 3's or Qwen2's kind (data.tokenizer=bpe:8000 is), or another format"
    )


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Write weights, sizes and tokenizer, read them back, and compare each tensor."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize
    from gguf.quants import quantize as in_blocks

    model: Any = source.network
    config, kind = model.network.config, GGMLQuantizationType[KINDS[quantize]]
    writer = GGUFWriter(str(folder / FILE), config.model_type)
    writer.add_name(config.model_type)  # no path of this machine
    writer.add_file_type(LlamaFileType["ALL_F32" if quantize == "none" else f"MOSTLY_{kind.name}"])
    _write_sizes(writer, config, model.vocab_size)
    _write_tokenizer(writer, source.model.tokenizer, model.vocab_size)
    written: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors(model):
        own = kind if tensor.ndim > 1 else GGMLQuantizationType.F32
        if own is GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
            own = GGMLQuantizationType.F16  # as llama.cpp has it where blocks do not fit
        data = in_blocks(tensor, own)
        writer.add_tensor(name, data, raw_dtype=own)
        written[name] = dequantize(data, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {tensor.name: tensor for tensor in GGUFReader(str(folder / FILE)).tensors}
    for name, tensor in written.items():
        if not np.array_equal(dequantize(found[name].data, found[name].tensor_type), tensor, equal_nan=True):
            raise KDError(f"{FILE}: {name} is read back with other values than were written")
    return Written(["input_ids", "attention_mask"])


def tensors(model: CausalLM) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield a network's tensors by llama.cpp's names, float32, with as many rows as there are tokens."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    network: Any = model.network
    config = network.config
    names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    tables = (network.get_input_embeddings().weight, network.get_output_embeddings().weight)
    for name, weight in network.named_parameters():
        if tied and name.startswith("lm_head"):
            continue
        tensor = weight.detach().float()
        if any(weight is table for table in tables):
            tensor = tensor[: model.vocab_size]
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # transformers rotates entry i with i + D / 2, llama.cpp 2 i with 2 i + 1
            halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, -1)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        yield str(names.get_name(name, (".weight", ".bias"))), tensor.contiguous().numpy()


def _write_sizes(writer: Any, config: Any, vocab_size: int) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    from gguf import TokenType

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [TokenType.UNUSED] * size
    for token, number in content["model"]["vocab"].items():
        tokens[number], kinds[number] = token, TokenType.NORMAL
    for one in content["added_tokens"]:
        tokens[one["id"]] = one["content"]
        kinds[one["id"]] = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in content["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    encoded = tokenizer("a", verbose=False)["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and encoded[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and encoded[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Read it with `transformers`, in float32."""
    from transformers import AutoModelForCausalLM

    with quiet_loading(hide_bar=True), redirect_stderr(io.StringIO()):  # it has bars of its own
        network = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=FILE, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    return CausalLM(network, network.config.vocab_size).eval()
