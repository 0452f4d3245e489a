from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd_lightning.runtime import gguf_files
from kd_lightning.runtime.gguf import dequantise

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
WIDTH, LAYERS = 32, 2
TOKENS = ["<|end|>", *map(chr, range(97, 123)), "Ġ", "th", "the"]


def write(path: Path) -> dict[str, np.ndarray]:
    """Write a small Llama as llama.cpp would: float32, apart from an embedding of 8 bits."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages }}")
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH),
                "attn_output": (WIDTH, WIDTH), "ffn_gate": (2 * WIDTH, WIDTH), "ffn_up": (2 * WIDTH, WIDTH),
                "ffn_down": (WIDTH, 2 * WIDTH), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
            }.items()
        }  # fmt: skip
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in weights.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        if name == "token_embd":
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_becomes_a_folder_of_hugging_face(tmp_path: Path) -> None:
    weights = write(tmp_path / "small.gguf")
    (tmp_path / "folder").mkdir()
    dequantise(tmp_path / "small.gguf", tmp_path / "folder")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert network.dtype == torch.bfloat16
    assert network.config.num_hidden_layers == LAYERS
    assert not hasattr(network.config, "quantization_config")
    down = network.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(down.float(), torch.from_numpy(weights["blk.1.ffn_down"]), rtol=0.01, atol=0.01)
    embedded = network.get_input_embeddings().weight
    torch.testing.assert_close(embedded.float(), torch.from_numpy(weights["token_embd"]), rtol=0.02, atol=0.03)
    assert network.lm_head.weight is embedded
    assert tokenizer.convert_ids_to_tokens(tokenizer("thee")["input_ids"]) == ["the", "e"]
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|end|>", "{{ messages }}")


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"no model")
    with pytest.raises(OSError, match=r"other\.gguf is no GGUF file of a causal language model"):
        dequantise(tmp_path / "other.gguf", tmp_path / "folder")


def test_a_damaged_folder_is_written_anew_and_other_versions_have_one_of_their_own(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def fake(file: Path, folder: Path) -> None:
        written.append(file)
        for name in ("config.json", "weights"):
            (folder / name).write_text(f"{name} of {file.name}")

    monkeypatch.setattr(gguf_files, "dequantise", fake)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    folder = gguf_files.folder_of(str(file))
    assert folder == gguf_files.folder_of(str(file))
    assert folder.is_relative_to(own_home)
    assert len(written) == 1
    for damage in (
        lambda: (folder / "weights").write_text("weights of other.gguf"),
        lambda: (folder / "weights").unlink(),
        lambda: (folder / gguf_files.SEAL).unlink(),
    ):
        count = len(written)
        damage()
        assert gguf_files.folder_of(str(file)) == folder
        assert len(written) == count + 1
        assert (folder / "weights").read_text() == "weights of model.gguf"
    for name, value in (("version", lambda package: "0.0"), ("VERSION", 99)):
        monkeypatch.setattr(gguf_files, name, value)
        assert gguf_files.folder_of(str(file)) != folder
    assert len(written) == 6
