"""What is wrong with what language models are given is said before any training, by key or by file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from tokenizers import AddedToken
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import build_caches, train_all
from kd_lightning.runtime.errors import KDError
from tests.data.corpus.texts import made

pytestmark = pytest.mark.usefixtures("own_home")
Composed = Callable[..., DictConfig]
TEXTS = made(40)
USER, BOT = {"role": "user", "content": "who"}, {"role": "assistant", "content": "we the people"}
SMALL = ("model@student=causal_lm_small", "student.hidden_size=16", "student.num_layers=1", "student.num_heads=2")
SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 16, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


class Given:
    """A folder of inputs, and the overrides of a small run on them."""

    def __init__(self, folder: Path, composed: Composed) -> None:
        self.folder, self.composed = folder, composed
        self.tokenizer("tokenizer")
        self.records("texts.jsonl", [{"text": text} for text in TEXTS])

    def records(self, name: str, records: list[Any]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    def tokenizer(self, name: str, change: Callable[[Any], object] = lambda _: None) -> Any:
        tokenizer = load_tokenizer("bpe:300", TEXTS)
        change(tokenizer)
        write_tokenizer(tokenizer, self.folder / name)
        return tokenizer

    def teacher(self, network: Any, tokenizer: str = "tokenizer") -> Path:
        """Save a checkpoint with a tokenizer of its own."""
        place = self.folder / "teacher"
        network.save_pretrained(place)
        for file in (self.folder / tokenizer).iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        return place

    def run(self, *overrides: str, student: Sequence[str] = SMALL) -> Run:
        """Return a small run on them."""
        cfg = self.composed(
            "data=lm_text", f"data.train_file={self.folder / 'texts.jsonl'}",
            f"data.tokenizer={self.folder / 'tokenizer'}", "data.block_size=16", "data.batch_size=4",
            "model@teacher.network=causal_lm_small", "teacher.network.hidden_size=16", "teacher.network.num_layers=1",
            "teacher.network.num_heads=2", *student, "teacher.trainer.max_epochs=1", "trainer.max_steps=2",
            "teacher.precision=float32", "temperature=1", f"run_dir={self.folder / 'run'}", *overrides,
        )  # fmt: skip
        return Run(cfg, Console(file=StringIO(), width=120))

    def refused(self, *overrides: str, student: Sequence[str] = SMALL) -> str:
        """Return the message of a run that must not begin to train."""
        with pytest.raises(KDError) as caught:
            train_all(self.run(*overrides, student=student))
        trained = [file for kind in ("*.safetensors", "*.ckpt") for file in (self.folder / "run").rglob(kind)]
        assert not trained, "something was trained"
        message = str(caught.value)
        assert "\n" not in message.strip()
        return message


@pytest.fixture
def given(tmp_path: Path, composed: Composed) -> Given:
    return Given(tmp_path, composed)


def llama(rows: int, **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SIZES, **more))


def test_an_empty_file(given: Given) -> None:
    (given.folder / "empty.txt").write_text("")
    message = given.refused(f"data.train_file={given.folder / 'empty.txt'}")
    assert "empty.txt" in message


def test_one_document_only(given: Given) -> None:
    (given.folder / "one.txt").write_text(" ".join(TEXTS))
    message = given.refused(f"data.train_file={given.folder / 'one.txt'}")
    assert "data.train_file" in message
    assert "document" in message


def test_a_block_longer_than_the_positions_of_the_teacher(given: Given) -> None:
    place = given.teacher(llama(300, max_position_embeddings=8))
    message = given.refused(f"teacher.checkpoint={place}", "stages=[baseline,distill]")
    assert "data.block_size=16" in message
    assert "8" in message


def test_a_file_that_is_not_utf_8(given: Given) -> None:
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    lines[6] = b'{"text": "caf\xe9"}'
    (given.folder / "latin.jsonl").write_bytes(b"\n".join(lines))
    message = given.refused(f"data.train_file={given.folder / 'latin.jsonl'}")
    assert "latin.jsonl" in message
    assert "line 7" in message
    assert "data.encoding" in message


@pytest.mark.parametrize(
    ("turns", "expected"),
    [([USER], "no assistant's turn"), ([USER, {"role": "asistant", "content": "x"}], "unknown role 'asistant'")],
)
def test_chats_without_assistant_or_with_unknown_roles(given: Given, turns: list[Any], expected: str) -> None:
    path = given.records("chats.jsonl", [{"messages": [USER, BOT]}] * 3 + [{"messages": turns}])
    message = given.refused("data=chat", f"data.train_file={path}", "data.chat_template=plain")
    assert "chats.jsonl" in message
    assert "line 4" in message
    assert expected in message


def test_a_tokenizer_without_a_chat_template(given: Given) -> None:
    path = given.records("chats.jsonl", [{"messages": [{**USER, "content": str(i)}, BOT]} for i in range(20)])
    assert "data.chat_template" in given.refused("data=chat", f"data.train_file={path}")


def test_a_tokenizer_without_an_end_of_text(given: Given) -> None:
    def without(tokenizer: Any) -> None:
        tokenizer.eos_token = None

    given.tokenizer("endless", without)
    message = given.refused(f"data.tokenizer={given.folder / 'endless'}")
    assert "data.end_of_text" in message
    assert "endless" in message


def test_tokenizers_that_differ_in_an_added_token_only(given: Given) -> None:
    given.tokenizer("added", lambda tokenizer: tokenizer.add_tokens([AddedToken("<|tool|>", special=True)]))
    place = given.teacher(llama(301), "added")
    message = given.refused(f"teacher.checkpoint={place}", "stages=[baseline,distill]")
    assert "data.tokenizer=" in message
    assert "differ in" in message


def test_embeddings_with_fewer_rows_than_the_vocabulary(given: Given) -> None:
    place = given.teacher(llama(290))
    message = given.refused(f"teacher.checkpoint={place}", "stages=[baseline,distill]")
    assert "290" in message
    assert "300" in message


def test_a_teacher_with_soft_capping_that_leaves_out_its_output_layer(given: Given) -> None:
    torch.manual_seed(0)
    place = given.teacher(
        Gemma2ForCausalLM(Gemma2Config(vocab_size=300, head_dim=8, final_logit_softcapping=5.0, **SIZES))
    )
    message = given.refused(
        f"teacher.checkpoint={place}", "stages=[baseline,distill]",
        student=("model@student=causal_lm_from_teacher", "student.layers=1", "student.logits_in_training=false"),
    )  # fmt: skip
    assert "logits_in_training" in message
    assert "caps" in message


@pytest.mark.parametrize("network", ["causal_lm", "causal_lm_lora"])
def test_a_pretrained_student_that_has_more_tokens_than_a_trimmed_vocabulary(given: Given, network: str) -> None:
    """As few more as embeddings are padded by: they would be read by other tokens' numbers, and nobody would see it."""
    place = given.teacher(llama(300))
    few = given.records("few.jsonl", [{"text": f"people {number}"} for number in range(40)])
    message = given.refused(
        f"teacher.checkpoint={place}", "stages=[baseline,distill]", f"data.tokenizer=trimmed:{place}",
        f"data.train_file={few}",
        student=(f"model@student={network}", f"student.name={place}"),
    )  # fmt: skip
    assert re.search(r"student: \S+ has embeddings for 300 tokens, of which data\.tokenizer=trimmed:NAME keeps 2\d\d: "
                     r"set data\.tokenizer=NAME", message)  # fmt: skip


@pytest.mark.parametrize("network", ["causal_lm", "causal_lm_lora"])
def test_a_pretrained_student_with_as_many_other_tokens(given: Given, network: str) -> None:
    """Nothing but its tokenizer tells."""
    write_tokenizer(load_tokenizer("bpe:300", [text[::-1] for text in TEXTS]), given.folder / "reversed")
    own = given.teacher(llama(300), "reversed")
    message = given.refused(
        "stages=[baseline]", f"data.tokenizer={given.folder / 'tokenizer'}",
        student=(f"model@student={network}", f"student.name={own}"),
    )  # fmt: skip
    assert re.search(
        r"student: name=\S+ has a tokenizer of its own, which differs from the data's in their vocab", message
    )
    assert f"set data.tokenizer={own}" in message


def test_a_cache_of_other_blocks(given: Given) -> None:
    """In the same folder, or as the nearest that there is."""
    taught = ("stages=[distill]", f"teacher.checkpoint={given.teacher(llama(300))}", "distillation=soft_target")
    place = given.folder / "outputs"
    build_caches(given.run(*taught, f"teacher.cache={place}"))
    build_caches(given.run(*taught, "teacher.cache=auto"))
    for cache in (place, "require"):
        message = given.refused(*taught, f"teacher.cache={cache}", "data.block_size=8")
        assert re.search(r"data\.block_size was 16, now 8", message)


def test_a_tokenizer_with_nothing_to_pad_with(given: Given) -> None:
    def bare(tokenizer: Any) -> None:
        tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = None

    given.tokenizer("bare", bare)
    message = given.refused(f"data.tokenizer={given.folder / 'bare'}")
    assert re.search(r"data\.tokenizer='\S+bare' has no token to pad with; set pad_token", message)


def test_teachers_without_a_fold_of_the_texts(given: Given) -> None:
    message = given.refused("teacher.folds=2")
    assert message.startswith("teacher.folds=2: blocks share documents")
    assert "set 1" in message


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["teacher.cache_samples=8"], r"teacher\.cache_samples=8: .* not the likeliest: set teacher\.cache_top_k"),
        (["teacher.cache=off", "teacher.calibrate=true"], r"teacher\.calibrate=true: likelihoods of .* set it to auto"),
        (["teacher.cache=off", "on_policy.share=0.5", "on_policy.prompt_tokens=4"],
         r"data\.cross_tokenizer=true with on_policy\.share=0\.5: .* set on_policy\.share=0"),
    ],
)  # fmt: skip
def test_a_teacher_of_other_tokens_that_is_drawn_from_or_reads_the_students_texts(
    given: Given, more: list[str], expected: str
) -> None:
    given.tokenizer("added", lambda tokenizer: tokenizer.add_tokens([AddedToken("<|tool|>", special=True)]))
    place = given.teacher(llama(301), "added")
    crossed = ["data.cross_tokenizer=true", "distillation=cross_tokenizer", f"teacher.checkpoint={place}"]
    assert re.search(expected, given.refused(*crossed, *more, "stages=[distill]"))
