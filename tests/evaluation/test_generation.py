"""A language model generates as its logits have it, whatever pads, ends and begins its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.evaluation.generation import Decoding, generate
from kd_lightning.models.causal_lm import CausalLM, causal_lm_small
from kd_lightning.runtime.errors import ConfigError, DataError, KDError
from kd_lightning.tasks import CausalLanguageModeling
from kd_lightning.training.run_folder import TrainedModel
from tests.data.corpus.texts import TEXT, made

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte pairs whose padding is their end of text."""
    return load_tokenizer("bpe:300", made(30))


@pytest.fixture
def model(tokenizer: Any) -> TrainedModel:
    """With three rows of embeddings that no token has, which would be likeliest."""
    torch.manual_seed(0)
    size = len(tokenizer)
    inner = causal_lm_small(size + 3, 64, hidden_size=16, num_layers=1, num_heads=2, tie_embeddings=False).network
    with torch.no_grad():
        inner.lm_head.weight.mul_(30)  # far from uniform
        inner.lm_head.weight[size:] = 100 * inner.lm_head.weight[:3]
    network = CausalLM(inner, size).eval()
    return TrainedModel(network, tokenizer, [], 64, 1, Path("run"), CausalLanguageModeling(size))


def by_hand(model: TrainedModel, prompt: str, count: int) -> tuple[str, int]:
    """Take the likeliest token each time, without a cache."""
    tokenizer: Any = model.tokenizer
    ids = tokenizer(prompt)["input_ids"]
    begin = len(ids)
    with torch.no_grad():
        while len(ids) < begin + count and (len(ids) == begin or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model.network(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[begin:], skip_special_tokens=True), len(ids) - begin


@pytest.mark.parametrize("prompt", ["the people of", "laws", "é😀"])
def test_greedy_text_is_that_of_the_logits_token_by_token(model: TrainedModel, prompt: str) -> None:
    pieces: list[str] = []
    found = generate(model, prompt, Decoding(max_new_tokens=20), pieces.append)
    text, tokens = by_hand(model, prompt, 20)
    assert (found["text"], found["tokens"]) == (text, tokens)
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_the_end_of_a_text_ends_it_though_it_pads_too(model: TrainedModel) -> None:
    tokenizer: Any = model.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    head: Any = model.network.network.lm_head  # type: ignore[union-attr]
    hidden: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: hidden.append(given[0][0, -1]))
    generate(model, "the people", Decoding(max_new_tokens=3))
    handle.remove()
    with torch.no_grad():
        head.weight[tokenizer.eos_token_id] = 1e3 * hidden[2]  # the third token ends the text
    found = generate(model, "the people", Decoding(max_new_tokens=10))
    assert found["finish_reason"] == "stop"
    assert found["tokens"] <= 3
    assert tokenizer.eos_token not in found["text"]


def test_samples_follow_their_seed_and_nothing_else(model: TrainedModel) -> None:
    drawn = Decoding(max_new_tokens=16, temperature=1.0, seed=3)
    first = generate(model, "the people", drawn)
    torch.manual_seed(17)
    before = torch.get_rng_state()
    generate(model, "another", drawn)
    assert generate(model, "the people", drawn) == first
    assert torch.equal(before, torch.get_rng_state())
    others = {generate(model, "the people", Decoding(16, 1.0, seed=seed))["text"] for seed in range(6)}
    assert len(others) > 1
    greedy = generate(model, "the people", Decoding(16))
    assert generate(model, "the people", Decoding(16, 1.0, top_p=1e-6)) == greedy


def test_a_text_is_cut_where_the_networks_positions_end(model: TrainedModel) -> None:
    tokenizer: Any = model.tokenizer
    prompt = " ".join([TEXT] * 9)
    ids = tokenizer(prompt)["input_ids"]
    fits = tokenizer.decode(ids[:60])
    found = generate(model, fits, Decoding(max_new_tokens=50))
    assert found["tokens"] <= 64 - len(tokenizer(fits)["input_ids"])
    assert found["finish_reason"] == "length"
    with pytest.raises(DataError, match=rf"a prompt has {len(ids)} tokens, and the network positions for 64"):
        generate(model, prompt, Decoding())


def test_a_prompt_begins_as_training_texts_do_and_does_not_end(model: TrainedModel) -> None:
    model.tokenizer = load_tokenizer("wordpiece:150", made(30))  # [CLS] text [SEP]
    seen: list[torch.Tensor] = []
    inner: Any = model.network.network
    inner.model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    generate(model, "people", Decoding(max_new_tokens=1))
    tokens = model.tokenizer.convert_ids_to_tokens(seen[0][0].tolist())
    assert tokens[0] == "[CLS]"
    assert "[SEP]" not in tokens


class TestChat:
    @pytest.fixture
    def chat(self, model: TrainedModel, tmp_path: Path) -> TrainedModel:
        write_tokenizer(model.tokenizer, tmp_path / "tokenizer")  # type: ignore[arg-type]
        model.tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
        model.tokenizer.chat_template = TEMPLATE
        return model

    def test_a_prompt_is_one_user_turn_that_waits_for_its_reply(self, chat: TrainedModel) -> None:
        said = generate(chat, "hello", Decoding(8, chat=True))
        assert said == generate(chat, "<|turn|>user: hello<|done|>\n<|turn|>assistant: ", Decoding(8))

    def test_the_end_of_a_turn_ends_a_reply_though_texts_end_otherwise(
        self, chat: TrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenizer: Any = chat.tokenizer
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
        done = tokenizer.convert_tokens_to_ids("<|done|>")
        chat.network.vocab_size = len(tokenizer)
        with torch.no_grad():
            inner: Any = chat.network.network
            inner.lm_head.weight.zero_()
            inner.model.norm.weight.fill_(1)
        monkeypatch.setattr(
            inner.lm_head, "forward",
            lambda hidden: nn.functional.one_hot(torch.full(hidden.shape[:2], done), len(tokenizer) + 2).float(),
        )  # fmt: skip
        found = generate(chat, "hello", Decoding(8, chat=True))
        assert found == {"text": "", "tokens": 1, "finish_reason": "stop"}
        assert generate(chat, "hello", Decoding(8))["finish_reason"] == "length"

    def test_templates_that_are_missing_or_refuse_are_one_line(self, chat: TrainedModel, model: TrainedModel) -> None:
        chat.tokenizer.chat_template = "{{ raise_exception('no users here') }}"  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match=r"--chat: the chat template of run cannot hold .*\(no users here\)"):
            generate(chat, "hello", Decoding(chat=True))
        chat.tokenizer.chat_template = None  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match="--chat: the tokenizer of run has no chat template"):
            generate(chat, "hello", Decoding(chat=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0"),
        ({"top_p": 0.5}, "nothing is drawn at --temperature 0"),
        ({"seed": -1}, "--sampling-seed -1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Decoding(**options)


def test_networks_that_generate_nothing_are_refused(model: TrainedModel) -> None:
    with pytest.raises(DataError, match="nothing that the tokenizer knows"):
        generate(model, "", Decoding())
    with torch.no_grad():
        next(model.network.parameters()).fill_(torch.nan)
    with pytest.raises(KDError, match="predicts NaN"):
        generate(model, "the people", Decoding())
    model.network = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="is a Linear and generates no text"):
        generate(model, "the people", Decoding())
