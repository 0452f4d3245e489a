"""Students of some of a language model's layers, or of its embeddings at another width."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from kd_lightning.models.causal_lm import CausalLM, causal_lm_small
from kd_lightning.models.causal_lm_from_teacher import causal_lm_from_teacher, narrow
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.runtime.errors import ConfigError
from tests import ROOT

V = 20
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def teacher(**options: Any) -> CausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_layers": 4, "num_heads": 6, "num_key_value_heads": 2, **options}
    network = causal_lm_small(V, 16, **sizes)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.3)  # also the gains of normalisations
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("tied", [True, False])
def test_all_layers_predict_as_the_teacher_and_some_are_its_own(tied: bool) -> None:
    source = teacher(tie_embeddings=tied)
    before = copy.deepcopy(source.state_dict())
    student = causal_lm_from_teacher(source, V, 16, layers=4)
    torch.testing.assert_close(student.eval()(IDS).logits, source(IDS).logits)
    some = causal_lm_from_teacher(source, V, layers=[2, -1])
    inner: Any = some.network
    of_teacher: Any = source.network
    assert len(inner.model.layers) == 2
    for new, old in ((0, 2), (1, 3)):
        for one, other in zip(
            inner.model.layers[new].parameters(), of_teacher.model.layers[old].parameters(), strict=True
        ):
            assert torch.equal(one, other)
    assert torch.equal(inner.model.norm.weight, of_teacher.model.norm.weight)
    assert (inner.lm_head.weight is inner.model.embed_tokens.weight) == tied
    assert some.training
    some(IDS).logits.square().sum().backward()
    torch.optim.SGD(some.parameters(), lr=1.0).step()
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


def test_other_decoders_give_their_layers_too() -> None:
    torch.manual_seed(0)
    inner = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=8, n_layer=3, n_head=2, n_positions=16))
    source = CausalLM(inner, V).eval()
    torch.testing.assert_close(causal_lm_from_teacher(source, V, layers=3).eval()(IDS).logits, source(IDS).logits)
    assert len(causal_lm_from_teacher(source, V, layers=2).network.transformer.h) == 2  # type: ignore[arg-type, union-attr]
    with pytest.raises(ConfigError, match="width=4: only models of Llama's kind can be made narrower, not gpt2"):
        causal_lm_from_teacher(source, V, width=4, layers=1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_narrower_one_has_the_principal_components_of_the_embeddings(tied: bool) -> None:
    source = teacher(tie_embeddings=tied)
    student: Any = causal_lm_from_teacher(source, V, 16, layers=2, width=12)
    for of in ("get_input_embeddings", "get_output_embeddings"):
        rows = getattr(source.network, of)().weight.double().numpy()
        u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        expected = np.abs(u[:, :12] * s[:12])
        found = getattr(student.network, of)().weight.detach().abs().numpy()
        np.testing.assert_allclose(found / found.max(), expected / expected.max(), atol=1e-5)
    config = student.network.config
    sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert sizes == (12, 3, 1, 4)
    assert student(IDS).logits.shape == (1, 5, V)
    again = from_description(describe(student))  # type: ignore[arg-type]
    again.load_state_dict(student.state_dict())
    torch.testing.assert_close(again.eval()(IDS).logits, student.eval()(IDS).logits)


def test_smollm2_at_288_has_six_heads_in_two_groups() -> None:
    config = causal_lm_small(V, 8, 576, 1, 9, 3).network.config
    narrow(config, 288)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 2, 48)


@pytest.mark.parametrize("width", [None, 12])
def test_at_random_it_takes_nothing_and_draws_the_same_numbers(width: int | None) -> None:
    source, states, after = teacher(), [], []
    for initialise in ("teacher", "random"):
        torch.manual_seed(5)
        student = causal_lm_from_teacher(source, V, layers=2, width=width, initialise=initialise)  # type: ignore[arg-type]
        states.append(student.state_dict())
        after.append(torch.rand(1))
    assert torch.equal(*after)
    assert {k: v.shape for k, v in states[0].items()} == {k: v.shape for k, v in states[1].items()}
    of_teacher = source.state_dict()
    assert not any(torch.equal(value, of_teacher[name]) for name, value in states[1].items() if name in of_teacher)


def test_a_teacher_in_half_precision_has_a_student_in_float32() -> None:
    source = teacher().to(torch.bfloat16)
    assert {p.dtype for p in causal_lm_from_teacher(source, V, layers=1).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": 5}, "layers=5: the teacher has 4 layers"),
        ({"width": 24}, "width=24: the teacher is 24 wide; give a smaller even number"),
        ({"width": 7}, "width=7"),
        ({"block_size": 17}, r"data\.block_size=17: the teacher has positions for 16 tokens"),
        ({"initialise": "teachr"}, "did you mean 'teacher'"),
    ],
)
def test_mistakes(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        causal_lm_from_teacher(teacher(), V, **options)
    with pytest.raises(ConfigError, match="the teacher Linear is no causal language model"):
        causal_lm_from_teacher(nn.Linear(2, 2), V)


def test_hidden_states_come_first_and_alone() -> None:
    node = OmegaConf.load(ROOT / "conf/distillation/hidden_then_logits.yaml")
    OmegaConf.register_new_resolver("one_minus", lambda value: 1 - float(value), replace=True)
    weights = instantiate(OmegaConf.merge({"alpha": 0.75, "temperature": 1.0}, node).weights)
    assert {name: weight(0.19) for name, weight in weights.items()} == {"hidden": 1, "ce": 0, "kd": 0}
    assert {name: weight(0.2) for name, weight in weights.items()} == {"hidden": 0, "ce": 0.25, "kd": 0.75}
