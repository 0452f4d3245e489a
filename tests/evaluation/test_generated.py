"""Generation is timed, and drafts are accepted, as counted by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from kd_lightning.evaluation.generated import (
    Acceptance,
    measure_drafts,
    measure_generation,
    prompts_of,
    samples,
)
from kd_lightning.evaluation.generation import Decoding, generate
from kd_lightning.models.causal_lm import CausalLM, causal_lm_small
from kd_lightning.tasks import CausalLanguageModeling, Classification
from kd_lightning.types import IGNORE
from tests.evaluation.test_generation import model, tokenizer

__all__ = ["model", "tokenizer"]
V, PROMPTS = 40, [[3, 1, 4], [1, 5, 9, 2, 6], [5]]


def small(seed: int, rows: int = V) -> CausalLM:
    """A random model far from uniform, with rows beyond the vocabulary that would be likeliest."""
    torch.manual_seed(seed)
    inner = causal_lm_small(rows, 64, hidden_size=16, num_layers=1, num_heads=2, tie_embeddings=False).network
    with torch.no_grad():
        inner.lm_head.weight.mul_(20)
        inner.lm_head.weight[V:] *= 9
    return CausalLM(inner, V).eval()


@pytest.fixture(scope="module")
def large() -> CausalLM:
    return small(0, rows=V + 3)


@pytest.fixture(scope="module")
def near(large: CausalLM) -> CausalLM:
    """The large one, a little disturbed."""
    draft = small(0)
    weights = {name: value[: len(draft.state_dict()[name])] for name, value in large.state_dict().items()}
    torch.manual_seed(1)
    draft.load_state_dict({name: value + 0.003 * torch.randn_like(value) for name, value in weights.items()})
    return draft


def likeliest(network: CausalLM, ids: list[int], count: int) -> list[int]:
    """Return the likeliest tokens after others, without a cache."""
    new: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            new.append(int(network(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def by_hand(large: CausalLM, draft: CausalLM, new: int, k: int) -> Acceptance:
    """Propose, check and add one, pass by pass."""
    accepted = proposed = passes = 0
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + new:
            offered = likeliest(draft, ids, min(k, len(prompt) + new - len(ids) - 1))
            chosen = likeliest(large, ids, len(offered) + 1)  # those of the draft as far as both agree
            same = next((i for i, (a, b) in enumerate(zip(offered, chosen, strict=False)) if a != b), len(offered))
            ids += chosen[: same + 1]
            accepted, proposed, passes = accepted + same, proposed + len(offered), passes + 1
    return Acceptance(accepted / proposed, 0.0, len(PROMPTS) * new / passes)


def test_a_draft_is_accepted_as_counted_by_hand(large: CausalLM, near: CausalLM) -> None:
    found = measure_drafts(large, {"near": near, "other": nn.Linear(2, 2)}, PROMPTS, 16, proposed=3)
    assert set(found) == {"near"}
    expected = by_hand(large, near, 16, 3)
    assert 0.1 < expected.rate < 0.95
    assert found["near"].greedy.rate == pytest.approx(expected.rate)
    assert found["near"].greedy.per_pass == pytest.approx(expected.per_pass)
    assert found["near"].greedy.standard_error > 0
    assert found["near"].speed_up > 0
    again = measure_drafts(large, {"near": near}, PROMPTS, 16, proposed=3)
    assert again["near"].sampled == found["near"].sampled  # by its seed
    others = [measure_drafts(large, {"near": near}, PROMPTS, 16, proposed=3, seed=seed) for seed in (7, 8)]
    assert {one["near"].sampled for one in others} != {found["near"].sampled}


def test_all_that_the_target_itself_proposes_is_accepted(large: CausalLM) -> None:
    found = measure_drafts(large, {"same": copy.deepcopy(large)}, PROMPTS, 14, proposed=4)["same"]
    for acceptance in (found.greedy, found.sampled):
        assert acceptance == Acceptance(1.0, 0.0, pytest.approx(14 / 3))  # type: ignore[arg-type]  # 5, 5 and 4
    assert (found.proposed, found.prompts, found.new_tokens) == (4, 3, 14)


def test_drawn_tokens_are_accepted_by_what_two_distributions_share(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    pair = {"p": small(0), "q": small(1)}
    for name, chances in (("p", p), ("q", q)):

        def constant(hidden: Tensor, chances: Tensor = chances) -> Tensor:
            logits = torch.full((*hidden.shape[:-1], V), -torch.inf)
            logits[..., :3] = chances.log()
            return logits

        monkeypatch.setattr(pair[name].network.lm_head, "forward", constant)
    found = measure_drafts(pair["p"], {"q": pair["q"]}, [[1]] * 5, 40, proposed=2)["q"]
    shared = float(torch.minimum(p, q).sum())
    expected = (shared + shared**2) / 2
    assert found.sampled.rate == pytest.approx(expected, abs=4 * found.sampled.standard_error)
    assert 0 < found.sampled.standard_error < 0.1
    assert found.greedy.rate == 0.0  # the likeliest differ


def test_models_of_other_tokens_do_not_draft(large: CausalLM) -> None:
    other = CausalLM(small(1).network, V - 1)
    assert measure_drafts(large, {"other": other}, PROMPTS, 8) == {}
    assert measure_drafts(nn.Linear(2, 2), {"large": large}, PROMPTS, 8) == {}


def test_speed_is_that_of_so_many_tokens_whatever_would_end_a_text(large: CausalLM, near: CausalLM) -> None:
    inner: Any = near.network
    before = inner.generation_config = GenerationConfig(eos_token_id=list(range(V)), repetition_penalty=3.0)
    near.train()
    found = measure_generation({"large": large, "near": near, "other": nn.Linear(2, 2)}, PROMPTS, 9)
    assert set(found) == {"large", "near"}
    for one in found.values():
        assert (one.prompts, one.new_tokens, one.prompt_tokens, one.device) == (3, 9, 3, "cpu")
        assert one.prefill_per_second == pytest.approx(1000 * 3 / one.first_token_ms, rel=5)
        assert one.decode_per_second > 0
    assert inner.generation_config is before
    assert near.training
    assert large.network.config.vocab_size == V + 3
    assert not large.network._forward_hooks


def test_samples_are_what_predict_prints(model: Any) -> None:
    ids = model.tokenizer("the people of")["input_ids"]
    (found,) = samples({"student": model.network, "other": nn.Linear(2, 2)}, [ids], model.tokenizer, 12)
    assert found["prompt"] == "the people of"
    said = generate(model, "the people of", Decoding(12))["text"]
    assert list(found["models"]) == ["student"]
    assert said.startswith(found["models"]["student"])  # up to the first special token
    assert found["models"]["student"]


def test_prompts_are_the_beginnings_of_documents() -> None:
    ids = torch.arange(20).reshape(2, 10)
    document = torch.tensor([[0] * 6 + [1] * 4, [1] + [2] * 7 + [-1] * 2])
    labels = torch.where(document >= 0, ids, IGNORE)
    labels[:, 0] = labels[0, 6] = labels[1, 1] = IGNORE
    batch = {
        "input_ids": ids, "attention_mask": (document >= 0).long(), "labels": labels, "document_ids": document,
        "index": torch.arange(2),
    }  # fmt: skip
    task = CausalLanguageModeling(V)
    assert [one.tolist() for one in task.prompts(batch, 3)] == [[0, 1, 2], [6, 7], [11, 12, 13]]
    assert prompts_of(task, iter([batch, batch]), 3, 2, 3) == [[6, 7], [6, 7]]
    assert prompts_of(task, iter([batch, batch]), 3, 3, 2) == [[0, 1, 2], [6, 7]]
    counts = torch.zeros(2, 10, dtype=torch.bool)
    counts[0, 4] = counts[1, 6] = True  # rows that predict a token that counts
    batch["labels"] = torch.full_like(ids, IGNORE)
    batch["labels"][0, 5], batch["labels"][1, 7] = 5, 17
    assert [one.tolist() for one in task.prompts(batch | {"keep": counts}, 2)] == [
        [0, 1, 2, 3, 4],
        [11, 12, 13, 14, 15, 16],
    ]
    assert prompts_of(Classification(3), iter([batch]), 3, 3, 2) == []
