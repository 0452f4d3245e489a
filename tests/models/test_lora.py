"""Adapters alone are trained, change nothing at first, and merge into the same predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kd_lightning.models import causal_lm as causal_lm_module
from kd_lightning.models.causal_lm import CausalLM, causal_lm, causal_lm_lora, causal_lm_small
from kd_lightning.models.lora import adapted, merged
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.runtime.errors import ConfigError

pytest.importorskip("peft", reason="the extra `lm` is not installed")

V = 30
IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    causal_lm_small(V, 16, hidden_size=16, num_layers=2, num_heads=2).network.save_pretrained(folder)
    return str(folder)


def trained(model: CausalLM) -> CausalLM:
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_()
    return model.eval()


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(base: str) -> None:
    model = causal_lm_lora(base, V, r=4)
    learned = {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad}
    assert learned
    assert all("lora_" in name for name in learned)
    assert not any("lm_head" in name for name in learned)
    assert len(list(adapted(model))) == 2 * 7
    torch.testing.assert_close(model.eval()(IDS).logits, causal_lm(base, V).eval()(IDS).logits)
    assert {name for name, _ in model.named_parameters()} - set(learned) == set(model.unchanged) - {
        "network.lm_head.weight"
    }


def test_a_checkpoint_is_tried_once_with_or_without_adapters(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    probe = causal_lm_module._is_causal
    monkeypatch.setattr(causal_lm_module, "_is_causal", lambda network: tried.append(network) or probe(network))
    causal_lm_lora(base, V)
    assert len(tried) == 1


def test_the_seed_decides_the_adapters(base: str) -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(causal_lm_lora(base, V, r=4, targets=["q_proj", "v_proj"]).state_dict())
    same = [all(torch.equal(found[0][name], other[name]) for name in other) for other in found[1:]]
    assert same == [True, False]


def test_merged_it_predicts_the_same_without_peft(base: str) -> None:
    model = trained(causal_lm_lora(base, V, r=4, alpha=8))
    whole: Any = merged(model)
    torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (whole(IDS).logits - causal_lm(base, V).eval()(IDS).logits).abs().max() > 0.01
    assert set(whole.state_dict()) == set(causal_lm(base, V).state_dict())
    assert whole.arguments == {"vocab_size": V, "logits_in_training": True}
    assert list(adapted(model)), "the student itself was changed"
    plain = causal_lm(base, V)
    assert merged(plain) is plain


def test_a_run_folder_builds_it_again(base: str) -> None:
    model = trained(causal_lm_lora(base, V, r=2, alpha=3, dropout=0.1, targets=["up_proj"], logits_in_training=False))
    description: Any = describe(model)
    again: Any = from_description(description).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    assert again.lora == model.lora
    with pytest.raises(ConfigError, match="does not match"):
        from_description({**description, "lora": {"rank": 3}})


def test_hidden_states_reach_the_loss_with_a_gradient_for_adapters_alone(base: str) -> None:
    model = causal_lm_lora(base, V, r=2, logits_in_training=False)
    model(IDS).features["last_hidden"].sum().backward()
    assert {name.split(".")[-3] for name, weight in model.named_parameters() if weight.grad is not None} == {
        "lora_A", "lora_B",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, "r=0: give a rank of at least 1"),
        ({"alpha": 0.0}, "alpha=0: give a number above 0"),
        ({"dropout": 1.0}, "dropout=1: give a probability below 1"),
        ({"targets": ".*"}, r"targets='\.\*': give a list of layers' names"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ["query"]}, r"targets=\['query'\]: LlamaForCausalLM has the linear layers down_proj, .*q_proj"),
        ({"targets": ["embed_tokens"]}, r"has the linear layers down_proj"),
        ({"targets": ["lm_head"]}, "the output layer cannot have adapters"),
    ],
)
def test_what_cannot_be_is_one_line(base: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        causal_lm_lora(base, V, **options)


def test_without_peft_it_says_what_to_install(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kd-lightning\[lm\]'"):
        CausalLM(causal_lm(base, V).network, V, lora={"r": 2})


def test_gpt2s_layers_have_adapters_too() -> None:
    from tests.models.test_causal_lm import network

    model = trained(CausalLM(network("GPT2"), 20, lora={"r": 2, "targets": ["c_attn"]}))
    whole = merged(model)
    assert not any(isinstance(layer, nn.Dropout) and "lora" in name for name, layer in whole.named_modules())
    torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
