from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_lightning.models.adapt import run_network
from kd_lightning.models.causal_lm import CausalLM, causal_lm, causal_lm_small
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.runtime.errors import ConfigError

V = 20
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "head_dim": 8, "max_position_embeddings": 32, "attn_implementation": "sdpa",
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "Gemma2": {
        "attn_implementation": "eager",
        "final_logit_softcapping": 0.5,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
    },
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "Mistral": {"sliding_window": 4},
}


def network(family: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "pad_token_id": 0, **options, **MORE.get(family, {})})
    kind = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")
    found: PreTrainedModel = kind(config).eval()
    for parameter in found.parameters():  # far from the start, where attention hardly matters
        parameter.data.mul_(5.0)
    return found


def packed(*lengths: int, padding: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (1, sum(lengths) + padding), generator=generator)
    numbers = [7 + number for number, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    positions = [place for length in lengths for place in range(length)] + [0] * padding
    return {
        "input_ids": ids, "document_ids": torch.tensor([numbers]), "position_ids": torch.tensor([positions]),
        "attention_mask": (torch.tensor([numbers]) >= 0).long(),
    }  # fmt: skip


FAMILIES = ["Llama", "GPT2", "Gemma2", "Mistral", "Cohere", "Qwen2", "Qwen3"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_is_predicted_as_if_it_stood_alone(family: str, attention: str) -> None:
    model = CausalLM(network(family, attn_implementation=attention), V).eval()
    batch = packed(3, 6, 1, 5)
    logits = run_network(model, batch).logits
    start = 0
    for length in (3, 6, 1, 5):
        alone = run_network(model, {"input_ids": batch["input_ids"][:, start : start + length]}).logits
        torch.testing.assert_close(logits[:, start : start + length], alone, rtol=1e-4, atol=1e-4)
        start += length
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own_with_caps_and_scales(family: str) -> None:
    own = network(family)
    ids = packed(9)["input_ids"]
    expected = own(ids).logits
    torch.testing.assert_close(CausalLM(own, V).eval()(ids).logits, expected)
    if family == "Gemma2":
        assert expected.abs().max().item() <= 0.5


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Granite"])
def test_a_head_that_caps_or_scales_is_refused_where_a_loss_would_leave_that_out(family: str) -> None:
    with pytest.raises(ConfigError, match=f"logits_in_training=false: {family}ForCausalLM does more"):
        CausalLM(network(family), V, logits_in_training=False)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen2"])
def test_without_logits_the_features_make_them(family: str) -> None:
    own = network(family)
    expected = own(packed(9)["input_ids"]).logits
    model = CausalLM(own, V - 3, logits_in_training=False)
    assert model.eval()(packed(9)["input_ids"]).logits.shape == (1, 11, V - 3)
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    output = model(packed(9)["input_ids"])
    assert output.logits.shape == (1, 11, 0)
    made = output.features["last_hidden"] @ output.features["head"].T
    torch.testing.assert_close(made, expected[..., : V - 3])


def test_rows_beyond_the_vocabulary_are_cut() -> None:
    model = CausalLM(network("Llama"), V - 4)
    assert model(packed(4)["input_ids"]).logits.shape[-1] == V - 4


def test_the_padding_token_is_learned_like_any_other() -> None:
    """The token that pads may end texts too: `padding_idx` would keep its embedding as it was at the start."""
    own = network("Llama", tie_word_embeddings=False)
    assert own.get_input_embeddings().padding_idx == 0  # type: ignore[union-attr]
    model = CausalLM(own, V)
    model(torch.tensor([[3, 0, 5]])).logits.sum().backward()
    assert own.get_input_embeddings().weight.grad[0].abs().sum().item() > 0  # type: ignore[union-attr, index]


def test_a_network_that_reads_ahead_is_refused() -> None:
    bert = transformers.BertLMHeadModel(transformers.BertConfig(**{**SIZES, "is_decoder": False}))
    with pytest.raises(ConfigError, match="BertLMHeadModel predicts a token from later ones"):
        CausalLM(bert, V)


def test_one_that_cannot_keep_documents_apart_refuses_packed_ones_alone() -> None:
    torch.manual_seed(0)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2))
    model = CausalLM(bloom, V).eval()
    batch = packed(3, 4)
    assert run_network(model, {name: batch[name] for name in ("input_ids", "attention_mask")}).logits.shape[-1] == V
    with pytest.raises(ConfigError, match=r"BloomForCausalLM cannot keep packed documents apart: set data\.packing"):
        run_network(model, batch)


def test_a_bare_network_of_transformers_is_refused_for_packed_documents() -> None:
    with pytest.raises(ConfigError, match="cannot call LlamaForCausalLM on packed documents"):
        run_network(network("Llama"), packed(3, 4))


def test_padding_changes_nothing() -> None:
    model = CausalLM(network("Llama"), V).eval()
    some, more = packed(3, 4, padding=0), packed(3, 4, padding=5)
    torch.testing.assert_close(run_network(model, more).logits[:, :7], run_network(model, some).logits)


def test_a_description_builds_it_again(tmp_path: Path) -> None:
    model = causal_lm_small(V, 16, hidden_size=16, num_layers=1, num_heads=2, logits_in_training=False)
    description = describe(model)
    assert description is not None
    again = from_description(description)
    again.load_state_dict(model.state_dict())
    ids = packed(5)["input_ids"]
    assert isinstance(again, CausalLM)
    assert not again.logits_in_training
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied.eval()(ids).logits, model.eval()(ids).logits)


def test_a_small_one_has_the_sizes_it_was_given() -> None:
    model = causal_lm_small(50, 64, hidden_size=32, num_layers=3, num_heads=4, num_key_value_heads=2)
    config = model.network.config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size) == (3, 2, 96)
    assert model.network.get_input_embeddings().weight is model.network.lm_head.weight  # type: ignore[union-attr]
    assert model.network.get_input_embeddings().padding_idx is None  # type: ignore[union-attr]
    assert model(torch.zeros(2, 64, dtype=torch.long)).logits.shape == (2, 64, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3: hidden_size=16 cannot be shared out"),
        ({"num_heads": 16}, "num_heads=16: hidden_size=16 cannot be shared out"),
        ({"num_heads": 2, "num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_heads=2"),
        ({"num_layers": 0}, "num_layers=0 is too small"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        causal_lm_small(V, 16, **{"hidden_size": 16, **options})


class TestPretrained:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        network("Llama").save_pretrained(tmp_path / "llama")
        return tmp_path / "llama"

    def test_a_folder_is_loaded_with_its_weights(self, folder: Path) -> None:
        ids = packed(9)["input_ids"]
        model = causal_lm(str(folder), V, 16)
        assert model.training
        torch.testing.assert_close(model.eval()(ids).logits, network("Llama")(ids).logits)

    def test_padding_rows_are_cut_and_other_vocabularies_refused(self, folder: Path) -> None:
        assert causal_lm(str(folder), V - 3).eval()(packed(4)["input_ids"]).logits.shape[-1] == V - 3
        with pytest.raises(ConfigError, match=r"embeddings for 20 tokens and the data's tokenizer has 25: read with"):
            causal_lm(str(folder), 25)

    def test_blocks_longer_than_its_positions_are_refused(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"data\.block_size=33: .*llama has positions for 32 tokens"):
            causal_lm(str(folder), V, 33)

    @pytest.mark.parametrize(("tied", "lacking"), [(False, "lm_head"), (True, "layers.1.mlp.up")])
    def test_a_checkpoint_that_lacks_weights_is_refused(self, tied: bool, lacking: str, tmp_path: Path) -> None:
        saved = network("Llama", tie_word_embeddings=tied)
        saved.save_pretrained(tmp_path)
        assert causal_lm(str(tmp_path), V)
        saved.save_pretrained(tmp_path, state_dict={k: v for k, v in saved.state_dict().items() if lacking not in k})
        with pytest.raises(ConfigError, match=f"lacks 1 of its weights, such as .*{lacking}[^\\n]*$"):
            causal_lm(str(tmp_path), V)

    def test_another_kind_of_checkpoint_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such folder"):
            causal_lm(str(tmp_path / "nowhere"), V)
        transformers.ViTModel(
            transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ).save_pretrained(tmp_path / "vit")
        with pytest.raises(ConfigError, match="cannot be loaded as a causal language model from this folder"):
            causal_lm(str(tmp_path / "vit"), V)
