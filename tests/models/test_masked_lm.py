"""Masked language models: logits of the masked tokens alone, the same as transformers computes for all."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.hint import LayerHintLoss
from kd_lightning.losses.minilmv2 import MiniLMv2Loss
from kd_lightning.models.adapt import run_network
from kd_lightning.models.features import FeatureTap, depth
from kd_lightning.models.masked_lm import MaskedLM, masked_lm, masked_lm_small
from kd_lightning.models.masked_lm_from_teacher import masked_lm_from_teacher
from kd_lightning.models.new_head import with_new_head
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE

V = 30
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 12, "pad_token_id": 0,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "DistilBert": {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24},
    "Electra": {"embedding_size": 8},
    "Albert": {"embedding_size": 8},
    "XLM": {"emb_dim": 16, "n_layers": 3, "n_heads": 4, "pad_index": 0},
    "Flaubert": {"emb_dim": 16, "n_layers": 3, "n_heads": 4, "pad_index": 0},
    "BigBird": {"attention_type": "block_sparse"},
    "ModernBert": dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2),
}
WITH_TUPLE = ("XLM", "Flaubert")
"""Those whose head returns a tuple."""


class OddForMaskedLM(BertForMaskedLM):
    """A head that is more than its modules."""

    def forward(self, *given: Any, **named: Any) -> Any:
        found = super().forward(*given, **named)
        found.logits = 2 * found.logits
        return found


def network(family: str = "Bert", **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{'Bert' if family == 'Odd' else family}Config")(
        **{**SIZES, **MORE.get(family, {}), **options}
    )
    kind = "WithLMHeadModel" if family in WITH_TUPLE else "ForMaskedLM"
    found = OddForMaskedLM(config) if family == "Odd" else getattr(transformers, f"{family}{kind}")(config)
    found.eval()
    for parameter in found.parameters():  # far from the start, where all logits are alike
        parameter.data.mul_(2.0)
    return found


def batch() -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[2, 9, 8, 7, 3, 0], [2, 11, 12, 13, 14, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6]),
        "masked_places": torch.tensor([[2, 0], [1, 4]]), "keep": torch.tensor([[True, False], [True, True]]),
        "labels": torch.tensor([[5, IGNORE], [6, 7]]),
    }  # fmt: skip


@pytest.mark.parametrize(
    "family",
    ["Bert", "Roberta", "Electra", "MPNet", "Albert", "DistilBert", "ModernBert", "BigBird", *WITH_TUPLE, "Odd"],
)
def test_rows_are_those_of_all_logits(family: str) -> None:
    whole = network(family, vocab_size=V + 2)
    model, given = MaskedLM(whole, V).eval(), batch()
    expected = whole(given["input_ids"], attention_mask=given["attention_mask"]).logits
    found = run_network(model, given).logits
    assert found.shape == (2, 2, V)
    for row, column in given["keep"].nonzero().tolist():
        torch.testing.assert_close(
            found[row, column], expected[row, given["masked_places"][row, column], :V], rtol=1e-4, atol=1e-5
        )
    assert run_network(model, {"input_ids": given["input_ids"]}).logits.shape == (2, 6, V)
    assert (model._head == ()) is (family in ("Odd", *WITH_TUPLE))
    assert pickle.loads(pickle.dumps(model))._head == model._head


def test_to_be_looked_at_changes_no_network() -> None:
    """BigBird gives up its sparse attention at the first short text that it reads."""
    whole = network("BigBird")
    assert MaskedLM(whole, V).network.bert.attention_type == whole.config.attention_type == "block_sparse"


def test_the_loss_and_its_gradients_are_those_of_transformers() -> None:
    theirs, given = network(), batch()
    model = MaskedLM(network(), V).eval()
    output = run_network(model, given)
    loss = CrossEntropyLoss()(output, output, given)
    labels = torch.full((2, 6), IGNORE)
    labels[0, 2], labels[1, 1], labels[1, 4] = 5, 6, 7
    expected = theirs(given["input_ids"], attention_mask=given["attention_mask"], labels=labels).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for (name, own), other in zip(model.network.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_pretrained_one_is_what_was_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = network()
    saved.save_pretrained(tmp_path)
    model = masked_lm(str(tmp_path), V, 12)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.network.parameters(), saved.parameters(), strict=True))
    assert not caplog.records
    assert not model.fresh_head
    with pytest.raises(ConfigError, match=r"block_size=13: .* has positions for 12 tokens; set it lower"):
        masked_lm(str(tmp_path), V, 13)
    with pytest.raises(ConfigError, match="has embeddings for 30 tokens and the data's tokenizer has 31"):
        masked_lm(str(tmp_path), V + 1)
    with pytest.raises(ConfigError, match="no such folder"):
        masked_lm("./nowhere", V)


def test_an_encoder_gets_a_new_head_with_its_embedding_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = BertModel(BertConfig(**SIZES))
    encoder.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = masked_lm(str(tmp_path), V)
    assert "no head for masked tokens; it gets a new one, untrained" in caplog.text
    assert model.fresh_head
    decoder = model.network.get_output_embeddings()
    assert decoder.weight is model.network.get_input_embeddings().weight
    assert torch.equal(decoder.weight, encoder.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("headless", [False, True])
def test_a_checkpoint_without_some_of_its_layers_is_refused(tmp_path: Path, headless: bool) -> None:
    saved = BertModel(BertConfig(**SIZES)) if headless else network()
    state = {name: value for name, value in saved.state_dict().items() if "layer.1." not in name}
    saved.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"lacks 16 of its weights, such as bert\.encoder\.layer\.1\.[^\n]*$"):
        masked_lm(str(tmp_path), V)


def test_positions_are_those_that_can_be_used(tmp_path: Path) -> None:
    network("Roberta", max_position_embeddings=12, pad_token_id=1).save_pretrained(tmp_path)
    masked_lm(str(tmp_path), V, 10)
    with pytest.raises(ConfigError, match="has positions for 10 tokens"):
        masked_lm(str(tmp_path), V, 11)


def test_a_small_one_is_rebuilt_of_its_description() -> None:
    model = masked_lm_small(V, 12, hidden_size=16, num_layers=1).eval()
    assert isinstance(model.network, BertForMaskedLM)
    assert model.network.get_output_embeddings().weight is model.network.get_input_embeddings().weight
    description = describe(model)
    assert description is not None
    again = from_description(description).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(run_network(again, batch()).logits, run_network(model, batch()).logits)
    with pytest.raises(ConfigError, match="num_heads=3 does not divide hidden_size=16"):
        masked_lm_small(V, 12, hidden_size=16, num_heads=3)


def test_a_student_has_layers_of_its_teacher_and_its_head() -> None:
    teacher = MaskedLM(network(), V)
    student = masked_lm_from_teacher(teacher, V, 12, layers=[0, 2])
    state, source = student.network.state_dict(), teacher.network.state_dict()
    for name, value in state.items():
        assert torch.equal(value, source[name.replace("layer.1.", "layer.2.")]), name
    whole = masked_lm_from_teacher(teacher, V, layers=3)
    assert torch.equal(run_network(whole.eval(), batch()).logits, run_network(teacher.eval(), batch()).logits)
    fresh = masked_lm_from_teacher(teacher, V, layers=3, initialise="random")
    assert not torch.equal(fresh.network.get_input_embeddings().weight, teacher.network.get_input_embeddings().weight)


def test_a_narrower_student_has_the_teachers_most_important_dimensions() -> None:
    teacher = MaskedLM(network(), V)
    student = masked_lm_from_teacher(teacher, V, layers=2, width=8)
    assert student.network.config.hidden_size == 8
    table, whole = student.network.get_input_embeddings().weight, teacher.network.get_input_embeddings().weight
    kept = [int((whole.T == column[:, None].T).all(1).nonzero()[0, 0]) for column in table.T]
    head = student.network.cls.predictions
    source = teacher.network.cls.predictions
    assert torch.equal(head.transform.dense.weight, source.transform.dense.weight[kept][:, kept])
    assert torch.equal(head.transform.LayerNorm.weight, source.transform.LayerNorm.weight[kept])
    assert torch.equal(head.bias, source.bias)
    assert head.decoder.weight is table


def test_other_teachers_and_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="the teacher Linear is no masked language model"):
        masked_lm_from_teacher(nn.Linear(2, 2), V)
    with pytest.raises(ConfigError, match="layers=4: the teacher has 3 layers"):
        masked_lm_from_teacher(MaskedLM(network(), V), V, layers=4)
    with pytest.raises(ConfigError, match="block_size=13: the teacher has positions for 12"):
        masked_lm_from_teacher(MaskedLM(network(), V), V, 13)


def test_losses_inside_reach_the_layers_of_both_sides() -> None:
    """Hidden states and relations are of all tokens, whatever is masked."""
    student, teacher, given = (
        masked_lm_small(V, 12, hidden_size=8, num_layers=1),
        MaskedLM(network(), V).eval(),
        batch(),
    )
    hint, relations = LayerHintLoss(), MiniLMv2Loss(relation_heads=4)
    hint.plan(lambda kind: depth(student, kind), lambda kind: depth(teacher, kind))
    taps = [
        FeatureTap(side, [*getattr(hint, of), *getattr(relations, of)])
        for side, of in ((student, "needs_student"), (teacher, "needs_teacher"))
    ]
    ours, theirs = (tap(given) for tap in taps)
    assert ours.logits.shape == theirs.logits.shape == (2, 2, V)
    assert {tuple(value.shape[:2]) for value in ours.features.values()} == {(2, 6)}
    hint.connect(ours, theirs, 2)
    (hint(ours, theirs, given) + relations(ours, theirs, given)).backward()
    layer = student.network.bert.encoder.layer[0]
    assert layer.attention.self.query.weight.grad.abs().sum() > 0
    assert layer.output.dense.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("per_token", [False, True])
def test_the_body_goes_on_with_another_head(per_token: bool) -> None:
    model = MaskedLM(network(), V)
    made, kept = with_new_head(model, 3, per_token)
    state, source = made.state_dict(), model.network.bert.state_dict()
    prefix = "bert." if per_token else "encoder."
    assert {name.removeprefix(prefix) for name in kept} == set(source)
    assert all(torch.equal(state[prefix + name], value) for name, value in source.items())
    assert made(batch()["input_ids"]).logits.shape == ((2, 6, 3) if per_token else (2, 3))
