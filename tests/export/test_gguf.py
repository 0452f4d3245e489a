"""A GGUF file holds the student's weights and tokenizer as llama.cpp reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from transformers import AutoTokenizer

from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.data.text.trim import trim_tokenizer
from kd_lightning.evaluation.generation import Decoding, generate
from kd_lightning.export.formats import gguf as format
from kd_lightning.export.load import load_export
from kd_lightning.models.causal_lm import CausalLM, causal_lm
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import CausalLanguageModeling
from kd_lightning.training.run_folder import TrainedModel, load_run
from tests.data.corpus.texts import made
from tests.export.conftest import Exports
from tests.export.runs import lm_run, padded_llama
from tests.models.test_causal_lm import network

gguf = pytest.importorskip("gguf", reason="the extra `lm` is not installed")

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEXTS = ["the people of this union", "  laws\n\nin 1789, it's", "naïve 日本 😀", "<|endoftext|>peace"]


@pytest.fixture(scope="module")
def llama(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student is a small Llama. Read only."""
    return lm_run(tmp_path_factory.mktemp("llama") / "llama")


def values(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(str(file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_it_holds_each_tensor_and_the_sizes(llama: Path, exports: Exports) -> None:
    fields, tensors = values(exports(llama, "gguf") / "model.gguf")
    student: Any = load_run(llama).network
    size = student.vocab_size
    assert len(tensors) == 2 + 2 * 9, "the tied output layer is no tensor of its own"
    assert tensors["token_embd.weight"].data.shape == (size, 32), "rows that no token has are left out"
    state = {name.removeprefix("network.model."): weight.numpy() for name, weight in student.state_dict().items()}
    for ours, theirs in (("norm", "output_norm"), ("layers.1.mlp.gate_proj", "blk.1.ffn_gate"),
                         ("layers.0.self_attn.v_proj", "blk.0.attn_v")):  # fmt: skip
        np.testing.assert_array_equal(tensors[f"{theirs}.weight"].data, state[f"{ours}.weight"])
    q, ours = tensors["blk.0.attn_q.weight"].data, state["layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(q[[0, 1, 2, 3]], ours[[0, 4, 1, 5]])  # of a head of 8: i beside i + 4
    expected = {"block_count": 2, "embedding_length": 32, "attention.head_count": 4, "attention.head_count_kv": 2,
                "context_length": 64, "vocab_size": size, "rope.dimension_count": 8}  # fmt: skip
    assert {name: fields[f"llama.{name}"] for name in expected} == expected
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    tokenizer: Any = load_run(llama).tokenizer
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.token_type"][tokenizer.eos_token_id] == gguf.TokenType.CONTROL


def test_a_file_of_it_teaches_as_a_folder_does(
    llama: Path, exports: Exports, tmp_path: Path, composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network and tokenizer are read from it, and once for all runs."""
    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path / "home"))
    file, trained = exports(llama, "gguf") / "model.gguf", load_run(llama)
    student, own = trained.network, trained.tokenizer
    read = load_tokenizer(str(file))
    assert read.get_vocab() == own.get_vocab()  # type: ignore[union-attr]
    ids = torch.tensor([read(" ".join(TEXTS))["input_ids"]])
    found = causal_lm(str(file), len(read)).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, student.eval()(input_ids=ids).logits, rtol=0.05, atol=0.05)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in made(20)))
    monkeypatch.setattr("kd_lightning.runtime.gguf_files.dequantise", None)  # it is there
    cfg = composed(
        "data=lm_text", f"data.train_file={texts}", "data.block_size=16", "data.batch_size=4", "temperature=1",
        f"teacher.checkpoint={file}", "teacher.precision=float32", "model@student=causal_lm_small",
        "student.hidden_size=8", "student.num_layers=1", "student.num_heads=2", "distillation=sparse_kd",
        "teacher.cache_top_k=8", "trainer.max_epochs=-1", "trainer.max_steps=1", "stages=[distill]", "validations=1",
        f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    train_all(Run(cfg, Console(file=StringIO())))
    assert load_run(tmp_path / "run").tokenizer.get_vocab() == read.get_vocab()  # type: ignore[union-attr]


def test_a_file_that_is_no_model_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path / "home"))
    (tmp_path / "other.gguf").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"other\.gguf is no GGUF file of a causal language model"):
        causal_lm(str(tmp_path / "other.gguf"), 300)
    assert not list((tmp_path / "home" / "gguf").glob("*"))


def test_eight_bits_are_blocks_of_q8_0(llama: Path, exports: Exports) -> None:
    _, tensors = values(exports(llama, "gguf", "int8-weights") / "model.gguf")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"


@pytest.mark.parametrize("trimmed", [False, True])
def test_its_tokenizer_reads_the_same_tokens(llama: Path, tmp_path: Path, trimmed: bool) -> None:
    tokenizer: Any = load_run(llama).tokenizer
    if trimmed:
        tokenizer, _ = trim_tokenizer(tokenizer, tokenizer("the people of the union")["input_ids"])
    tokenizer.chat_template = TEMPLATE
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    format._write_tokenizer(writer, tokenizer, len(tokenizer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="model.gguf")
    assert len(again) == len(tokenizer)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert again.eos_token_id == tokenizer.eos_token_id
    assert again.chat_template == TEMPLATE


def test_kinds_of_splits_have_llama_cpps_names() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    split = {"type": "Split", "pattern": {"Regex": format.LLAMA_3}, "behavior": "Isolated", "invert": False}
    qwen = split | {"pattern": {"Regex": format.LLAMA_3.replace("{1,3}", "")}}
    whole, part = byte_level | {"use_regex": True}, byte_level | {"use_regex": False}
    for steps, normalizer, name in (
        ([digits, whole], None, "smollm"),
        ([split, part], None, "llama-bpe"),
        ([qwen, part], {"type": "NFC"}, "qwen2"),
        ([qwen, part], None, None),
        ([digits, part], None, None),
        ([whole | {"add_prefix_space": True}], None, None),
    ):
        content = json.loads(load_tokenizer("bpe:300", made(9)).backend_tokenizer.to_str())
        content |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "normalizer": normalizer}

        class Backend:
            backend_tokenizer: Any = None

        Backend.backend_tokenizer = type("B", (), {"to_str": staticmethod(lambda: json.dumps(content))})  # noqa: B023
        if name is None:
            with pytest.raises(ConfigError, match=r"llama\.cpp would read other tokens"):
                format.split_name(Backend)
        else:
            assert format.split_name(Backend) == name


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: network("GPT2"), "not gpt2"),
        (lambda: network("Mistral"), "not mistral"),
        (lambda: network("Llama", attention_bias=True), "not llama"),
        (
            lambda: network("Llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "not llama",
        ),
    ],
)
def test_networks_that_llama_cpp_computes_otherwise_are_refused(make: Any, says: str) -> None:
    tokenizer: Any = load_tokenizer("bpe:300", made(9))
    model = TrainedModel(CausalLM(make(), 20), tokenizer, [], 8, 1, Path("run"), CausalLanguageModeling(20))
    with pytest.raises(ConfigError, match=f"only Llama and Qwen2 with plain rotary positions can be written, {says}"):
        format.check(model)


def test_wordpieces_are_refused() -> None:
    size, tokenizer = 150, load_tokenizer("wordpiece:150", made(30))
    model = TrainedModel(padded_llama(size), tokenizer, [], 8, 1, Path("run"), CausalLanguageModeling(size))
    with pytest.raises(ConfigError, match=r"the tokenizer splits texts in a way of its own.*data\.tokenizer=bpe:8000"):
        format.check(model)


def test_qwen2_with_its_biases_is_read_back(home: Path, tmp_path: Path, exports: Exports) -> None:
    def qwen(size: int) -> CausalLM:
        return CausalLM(network("Qwen2", vocab_size=size, max_position_embeddings=64), size)

    run = lm_run(tmp_path / "qwen" / "run", qwen)
    ours, theirs = load_run(run), load_export(exports(run, "gguf"))
    assert generate(theirs, "the people", Decoding(20)) == generate(ours, "the people", Decoding(20))


def test_llama_cpp_predicts_alike(llama: Path, exports: Exports) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    read = llama_cpp.Llama(str(exports(llama, "gguf") / "model.gguf"), logits_all=True, n_ctx=64, verbose=False)
    student = load_run(llama)
    tokenizer: Any = student.tokenizer
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert read.tokenize(text.encode(), add_bos=False, special=True) == ids
        read.reset()
        read.eval(ids)
        with torch.no_grad():
            expected = student.network(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(read.scores[: len(ids)], expected, atol=2e-2, rtol=1e-2)
