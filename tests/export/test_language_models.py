"""An exported language model predicts and generates as the student does, in every format."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig, pipeline

from kd_lightning.cli.export import main as kd_export
from kd_lightning.cli.predict import main as kd_predict
from kd_lightning.data.corpus.blocks import unpacked
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.evaluation.generation import Decoding, generate
from kd_lightning.export import parity
from kd_lightning.export.exported import read_exported
from kd_lightning.export.load import load_export
from kd_lightning.export.step import set_ends
from kd_lightning.models.adapt import run_network
from kd_lightning.models.causal_lm import CausalLM, causal_lm_lora
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.seals import seal, write_sealed
from kd_lightning.tasks.evaluation import evaluate, of_network
from kd_lightning.training.run_folder import finish_stage, load_run, read_stage
from tests.data.corpus.texts import data, made
from tests.evaluation.test_generation import TEMPLATE
from tests.export.conftest import Exports
from tests.export.fresh import OURS, ROOT, predictions
from tests.export.runs import lm_run, padded_llama, spread_out
from tests.models.test_causal_lm import network

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("gguf", reason="the extra `lm` is not installed")
peft: Any = pytest.importorskip("peft", reason="the extra `lm` is not installed")

PROMPTS = ("the people of", "12. laws")
WHOLE = ["safetensors", "huggingface", "pt2", "onnx", "gguf"]


@pytest.fixture(scope="module")
def llama(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student is a small Llama. Read only."""
    return lm_run(tmp_path_factory.mktemp("llama") / "llama")


@pytest.mark.parametrize("format", WHOLE)
def test_it_generates_alike(llama: Path, exports: Exports, format: str) -> None:
    out = exports(llama, format)
    found = read_exported(out).parity
    assert found["agreement"] == found["generated"] == 1
    assert found["kl"] < 1e-5
    ours, theirs = load_run(llama), load_export(out, trust=True)
    for prompt in PROMPTS:
        expected = generate(ours, prompt, Decoding(20))
        assert expected["tokens"] > 5
        assert generate(theirs, prompt, Decoding(20)) == expected
    drawn = Decoding(20, temperature=1.0, top_p=0.9, seed=3)
    assert generate(theirs, "the people", drawn) == generate(ours, "the people", drawn)


@pytest.mark.parametrize(
    ("format", "quantize"),
    [("safetensors", "int8-weights"), ("onnx", "int8-weights"), ("gguf", "int8-weights"), ("huggingface", "bf16"),
     ("gguf", "fp16"), ("gguf", "bf16"), *(pytest.param(*one, marks=pytest.mark.slow) for one in
     (("pt2", "int8-weights"), ("pt2", "bf16"), ("onnx", "fp16")))],
)  # fmt: skip
def test_in_fewer_bits_it_is_smaller_and_near(llama: Path, exports: Exports, format: str, quantize: str) -> None:
    exported, whole = read_exported(exports(llama, format, quantize)), read_exported(exports(llama, format))
    assert exported.parity["largest_difference"] > 1e-6
    assert exported.parity["kl"] < 0.02
    assert exported.parity["generated"] >= 0.95
    if format != "pt2":  # of which most is the graph
        assert exported.bytes < 0.85 * whole.bytes


def test_the_file_of_tied_tables_has_one(llama: Path, exports: Exports) -> None:
    student: Any = load_run(llama).network
    size = sum(weight.nbytes for weight in student.parameters())
    for format in ("safetensors", "huggingface", "gguf"):
        assert read_exported(exports(llama, format)).bytes < size + 20_000, format


def test_onnx_has_the_names_of_optimum_and_a_cache(llama: Path, exports: Exports) -> None:
    import onnxruntime

    out = exports(llama, "onnx")
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    cached = [f"{layer}.{what}" for layer in range(2) for what in ("key", "value")]
    assert [one.name for one in session.get_inputs()] == [
        "input_ids", "attention_mask", *(f"past_key_values.{name}" for name in cached)
    ]  # fmt: skip
    assert [one.name for one in session.get_outputs()] == ["logits", *(f"present.{name}" for name in cached)]
    assert [one.shape for one in session.get_inputs()][:3] == [
        ["batch", "length"], ["batch", "past + length"], ["batch", 2, "past", 8]
    ]  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    tokenizer: Any = load_run(llama).tokenizer
    assert (config["model_type"], config["vocab_size"]) == ("llama", len(tokenizer))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_padding_on_the_left_and_steps_of_any_length_change_nothing(llama: Path, exports: Exports, format: str) -> None:
    student, graph = load_run(llama).network, load_export(exports(llama, format), trust=True).network
    ids = torch.randint(0, 200, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.inference_mode():
        whole = student(ids[:1]).logits, student(ids[1:, 4:]).logits
        for cuts in ((1, 2), (5, 6), (8, 9)):
            past, logits, begin = None, [], 0
            for end in (*cuts, 9):
                if end > begin:
                    step: Any = graph(ids[:, begin:end], mask[:, :end], past)
                    past, begin = step.past_key_values, end
                    logits.append(step.logits)
            found = torch.cat(logits, 1)
            torch.testing.assert_close(found[:1], whole[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found[1:, 4:], whole[1], rtol=1e-4, atol=1e-4)
    packed = {"input_ids": ids, "document_ids": mask, "position_ids": mask}
    with pytest.raises(Exception, match="packed documents"):
        run_network(graph, packed)


def test_it_is_used_from_the_command_line(llama: Path, exports: Exports, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for folder in (llama, exports(llama, "onnx"), exports(llama, "gguf")):
        kd_predict([str(folder), *PROMPTS, "--json", "--max-new-tokens", "12"])
        lines.append(capsys.readouterr().out.splitlines()[-2:])
    assert lines[0] == lines[1] == lines[2]


def test_onnxruntime_alone_continues_texts_alike(llama: Path, exports: Exports, tmp_path: Path) -> None:
    [script] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "language_models.md").read_text("utf-8"), re.DOTALL)
    without = (*OURS, "torch", "transformers", "onnx")
    [found] = predictions(script, [exports(llama, "onnx")], PROMPTS, without, tmp_path)
    expected = [generate(load_run(llama), prompt, Decoding(20))["text"] for prompt in PROMPTS]
    assert [line["text"] for line in found] == expected


@pytest.mark.slow
def test_dynamic_quantisation_is_refused_for_what_it_does(home: Path, tmp_path: Path) -> None:
    """Few activations are far larger than the others, as in large language models: 8 bits then hold these alone."""
    run = lm_run(tmp_path / "lm" / "run", partial(padded_llama, tie_embeddings=False))
    file = run / "seed_0" / "distill" / "model.safetensors"
    weights = load_file(file)
    weights["network.model.norm.weight"][0] *= 500
    weights["network.lm_head.weight"][:, 0] = 0
    save_file(weights, file)
    finish_stage(file.parent, {key: value for key, value in read_stage(file.parent).items() if key != "files"})
    options = [str(run), "--format", "onnx", "--out"]
    with pytest.raises(SystemExit, match=r"onnx int8-dynamic differs from the student \(.*KL \d.*allowed 0.02"):
        kd_export([*options, str(tmp_path / "dynamic"), "--quantize", "int8-dynamic"])
    assert not (tmp_path / "dynamic").exists()
    kd_export([*options, str(tmp_path / "weights"), "--quantize", "int8-weights"])
    assert read_exported(tmp_path / "weights").parity["kl"] < 0.02


def test_another_continuation_is_noticed(llama: Path) -> None:
    ours, other = (load_run(llama).network for _ in range(2))
    batches = [{"input_ids": torch.randint(0, 200, (3, 20)), "index": torch.arange(3)}]
    batches[0]["attention_mask"] = torch.ones_like(batches[0]["input_ids"])
    assert parity.generated_alike(ours, other, batches) == 1
    with torch.no_grad():
        other.network.model.norm.weight.neg_()  # type: ignore[union-attr]
    assert parity.generated_alike(ours, other, batches) < 0.5  # type: ignore[operator]


@pytest.mark.parametrize("family", ["Gemma2", "GPT2", "Mistral", "Cohere", "Qwen2", "Qwen3"])
def test_other_architectures_go_on_from_their_cache_too(family: str) -> None:
    from kd_lightning.export.step import _Step, _tensors

    model = CausalLM(network(family), 20).eval()
    ids = torch.randint(0, 20, (2, 9))
    with torch.inference_mode():
        whole = model(ids).logits
        cache: Any = _tensors(model.network(ids[:, :1], use_cache=True).past_key_values)
        step = _Step(model)
        first = step(ids[:, 1:7], torch.ones(2, 7, dtype=torch.long), *cache)
        then = step(ids[:, 7:], torch.ones(2, 9, dtype=torch.long), *first[1:])
    torch.testing.assert_close(torch.cat([first[0], then[0]], 1), whole[:, 1:], rtol=1e-3, atol=1e-3)
    assert np.isfinite(whole.numpy()).all()


@pytest.fixture(scope="module")
def chatty(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a trimmed vocabulary and a chat template, whose turns end otherwise than texts do."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer: Any = load_tokenizer("bpe:330", [*made(30), "zebra quartz zebra quartz jumbo jumbo"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    tokenizer.chat_template = TEMPLATE
    write_tokenizer(tokenizer, folder / "tokenizer")
    return lm_run(folder / "run", tokenizer=f"trimmed:{folder / 'tokenizer'}")


class TestHuggingFace:
    """A folder that `transformers` uses without us."""

    def test_it_is_whole(self, chatty: Path, exports: Exports) -> None:
        out, student = exports(chatty, "huggingface"), load_run(chatty)
        ours: Any = student.tokenizer
        tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
        assert len(tokenizer) == len(ours) == student.network.vocab_size < 330
        assert tokenizer.chat_template == TEMPLATE
        ids = torch.tensor([tokenizer("the laws of peace")["input_ids"]])
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits[..., : len(ours)], student.network(ids).logits)
        done = ours.convert_tokens_to_ids("<|done|>")
        assert model.config.eos_token_id == ours.eos_token_id
        assert model.generation_config.eos_token_id == sorted([ours.eos_token_id, done])
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert tokenizer.model_max_length == 64

    def test_a_pipeline_chats_as_we_do(self, chatty: Path, exports: Exports) -> None:
        out = exports(chatty, "huggingface")
        chat = pipeline("text-generation", str(out))
        [found] = chat([{"role": "user", "content": "peace?"}], max_new_tokens=8, do_sample=False)
        expected = generate(load_run(chatty), "peace?", Decoding(8, chat=True))
        assert found["generated_text"][-1]["content"] == expected["text"]

    def test_what_ended_texts_of_its_checkpoint_still_does(self, chatty: Path) -> None:
        tokenizer: Any = load_run(chatty).tokenizer
        config, generation = PreTrainedConfig(eos_token_id=[7, 9]), GenerationConfig()
        set_ends(config, generation, tokenizer)
        assert set(generation.eos_token_id) == {
            7,
            9,
            tokenizer.eos_token_id,
            tokenizer.convert_tokens_to_ids("<|done|>"),
        }


@pytest.fixture(scope="module")
def lora(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student has adapters on a pretrained model beside it. Read only."""
    folder = tmp_path_factory.mktemp("lora")

    def make(size: int) -> CausalLM:
        base = padded_llama(size)
        spread_out(base)
        base.network.save_pretrained(folder / "base")
        return causal_lm_lora(str(folder / "base"), size, r=2)

    def train(network: Any) -> None:
        torch.manual_seed(1)
        for weight in network.parameters():
            if weight.requires_grad:
                weight.data.normal_(std=0.3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.export.runs.spread_out", train)
        return lm_run(folder / "run", make, network_settings={"name": str(folder / "base")})


class TestAdapters:
    @pytest.mark.parametrize("format", ["peft", "safetensors", "gguf"])
    def test_they_are_exported_alone_or_merged(self, lora: Path, exports: Exports, format: str) -> None:
        out = exports(lora, format)
        found = load_export(out)
        assert read_exported(out).parity["generated"] == 1
        assert not any("lora" in name for name in found.network.state_dict())
        expected = generate(load_run(lora), "the people", Decoding(12))
        assert generate(found, "the people", Decoding(12)) == expected

    def test_peft_loads_them_without_us(self, lora: Path, exports: Exports) -> None:
        out, student = exports(lora, "peft"), load_run(lora).network
        assert read_exported(out).bytes < 30_000
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            logits = peft.AutoPeftModelForCausalLM.from_pretrained(str(out))(ids).logits
            torch.testing.assert_close(logits[..., : student.vocab_size], student(ids).logits, rtol=1e-4, atol=1e-4)

    def test_without_the_model_that_they_are_for_it_is_one_line(
        self, lora: Path, exports: Exports, tmp_path: Path
    ) -> None:
        base = lora.parent / "base"
        base.rename(tmp_path / "moved")
        with pytest.raises(KDError, match=r"has adapters alone, and the model that they are for is not there: .*base"):
            load_export(exports(lora, "peft"))
        (tmp_path / "moved").rename(base)


def test_the_card_tells_of_tokens_and_the_cache(llama: Path, exports: Exports) -> None:
    card = (exports(llama, "onnx") / "README.md").read_text(encoding="utf-8")
    assert "`past_key_values.N.key`, `past_key_values.N.value`" in card
    assert "docs/language_models.md of kd_lightning has a script" in card
    assert "the same next token for 100.00% of tokens" in card
    assert "of the tokens that it generates greedily 100.0% are the student's" in card
    assert "| perplexity |" in card
    assert "It was trained on texts of at most 24 tokens." in card
    assert "is ignored" not in card
    assert "llama-cli -m model.gguf" in (exports(llama, "gguf") / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_documents_that_are_read_one_a_row_are_predicted_as_in_their_blocks(tmp_path: Path, packing: str) -> None:
    corpus = data(tmp_path, made(30, words=(2, 20)), block_size=40, packing=packing, eval_batch_size=4)
    corpus.prepare()
    task, model = corpus.task, padded_llama(corpus.task.outputs).eval()
    blocks = list(corpus.val_dataloader())
    rows = [one for batch in blocks for one in unpacked(batch)]
    assert all("document_ids" not in one for one in rows)
    assert max(one["input_ids"].numel() for one in rows) <= max(one["input_ids"].numel() for one in blocks)
    one, other = (evaluate(task, of_network(model), batches).scores for batches in (blocks, rows))
    assert one == pytest.approx(other, rel=1e-5)
    assert sum(int((one["labels"] != -100).sum()) for one in rows) == sum(
        int((one["labels"] != -100).sum()) for one in blocks
    )


@pytest.mark.parametrize("format", ["huggingface", "onnx"])
def test_a_configuration_that_names_an_attention_of_elsewhere_is_refused(
    llama: Path, exports: Exports, tmp_path: Path, format: str
) -> None:
    out = Path(shutil.copytree(exports(llama, format), tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "_attn_implementation": "evil/kernel"}))
    read = json.loads((out / "export.json").read_text())
    write_sealed(out / "export.json", {**read, "files": seal(out, read["files"])})
    with pytest.raises(KDError, match=r"_attn_implementation='evil/kernel': expected eager"):
        load_export(out)


def test_adapters_of_another_shape_than_they_are_described_are_refused(
    lora: Path, exports: Exports, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(exports(lora, "peft"), tmp_path / "out"))
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    read = json.loads((out / "export.json").read_text())
    write_sealed(out / "export.json", {**read, "files": seal(out, read["files"])})
    with pytest.raises(KDError, match="holds other adapters than its configuration describes"):
        load_export(out)
