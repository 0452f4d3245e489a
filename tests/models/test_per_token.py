"""Networks that classify each token: an option of those that classify texts."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import BertConfig, BertForTokenClassification

from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.features import FeatureTap
from kd_lightning.models.from_teacher import embeddings_from_teacher, from_teacher
from kd_lightning.models.hf import finished, pretrained
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.models.text_cnn import TextCNN
from kd_lightning.models.transformer import transformer
from kd_lightning.runtime.errors import ConfigError
from tests.models.test_bilstm import LENGTHS, network, packed_twin, tokens
from tests.models.tiny import SHAPE, batch, tiny

TAGS = ["O", "B-PER", "I-PER"]


def tagger(names: list[str] = TAGS) -> BertForTokenClassification:
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return BertForTokenClassification(BertConfig(**SHAPE, num_hidden_layers=4, **labels))


@pytest.mark.parametrize("layers", [1, 3])
def test_states_of_a_bilstm_are_those_of_torchs_packed_lstm(layers: int) -> None:
    ours = network(layers=layers, per_token=True)
    twin = packed_twin(ours)
    input_ids, mask = tokens()
    logits = run_network(ours, {"input_ids": input_ids, "attention_mask": mask}).logits
    packed = pack_padded_sequence(ours.embedding(input_ids), LENGTHS, batch_first=True, enforce_sorted=False)
    expected = ours.classifier(pad_packed_sequence(twin(packed)[0], batch_first=True)[0])
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-6, rtol=0)
    for padding in ((0, 5), (3, 0)):  # on either side
        wider, wide_mask = (nn.functional.pad(x, padding) for x in (input_ids, mask))
        torch.testing.assert_close(ours(wider, wide_mask).logits[wide_mask.bool()], logits[mask.bool()])


def test_a_bilstm_tagger_has_no_part_that_nothing_trains() -> None:
    ours = network("attention", per_token=True)
    input_ids, mask = tokens()
    ours(input_ids, mask).logits[mask.bool()].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())
    tap = FeatureTap(ours, ["hidden[2]"])
    found = tap({"input_ids": input_ids, "attention_mask": mask})
    torch.testing.assert_close(found.logits, ours.classifier(found.features["hidden[2]"]))


@pytest.mark.parametrize("kind", ["bilstm", "transformer"])
def test_a_tagger_is_described_and_built_again(kind: str) -> None:
    if kind == "bilstm":
        ours: nn.Module = network(per_token=True).float()
    else:
        ours = transformer(3, 20, hidden_size=8, num_heads=2, intermediate_size=12, max_length=16, per_token=True)
    description = describe(ours)
    assert description is not None
    again = from_description(description)
    again.load_state_dict(ours.state_dict())
    input_ids, mask = tokens()
    entries = {"input_ids": input_ids, "attention_mask": mask}
    one, other = (run_network(model.eval(), entries).logits for model in (ours, again))
    assert one.shape == (5, 7, 3)
    assert torch.equal(one, other)


def test_a_pooling_of_single_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pooling=mean: the data need a prediction for each token"):
        transformer(3, 20, hidden_size=8, num_heads=2, pooling="mean", per_token=True)
    tagger().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="pooling=first: the data need a prediction for each token"):
        pretrained(str(tmp_path), 3, pooling="first", per_token=True)


def test_a_finished_tagger_keeps_its_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tagger().save_pretrained(tmp_path)
    found = finished(str(tmp_path), 3, per_token=True)
    torch.testing.assert_close(found.state_dict(), dict(tagger().state_dict()))
    assert "its head is kept, classes in this order: O, B-PER, I-PER" in caplog.text
    assert run_network(found, batch()).logits.shape == (2, 5, 3)


def test_an_encoder_gets_a_head_for_each_token(tmp_path: Path) -> None:
    tiny("bert", num_classes=3).save_pretrained(tmp_path)
    found = pretrained(str(tmp_path), 3, per_token=True)
    assert type(found) is BertForTokenClassification
    torch.testing.assert_close(found.bert.embeddings.state_dict(), tiny("bert").bert.embeddings.state_dict())


def test_a_teacher_of_other_numbers_of_classes_is_refused(tmp_path: Path) -> None:
    tagger(["O", "I-PER", "B-PER"]).save_pretrained(tmp_path / "tags")
    with pytest.raises(ConfigError, match="a token classifier for 3 classes, not a finished teacher for the data's 5"):
        finished(str(tmp_path / "tags"), 5, per_token=True)
    tiny("bert", num_classes=3).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ConfigError, match="is no token classifier, not a finished teacher"):
        finished(str(tmp_path / "classifier"), 3, per_token=True)


def test_a_student_of_a_taggers_layers_keeps_its_head() -> None:
    teacher = tagger()
    student = from_teacher(teacher, 3, layers=2)
    assert type(student) is BertForTokenClassification
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert torch.equal(
        student.bert.encoder.layer[1].output.dense.weight, teacher.bert.encoder.layer[3].output.dense.weight
    )
    assert run_network(student, batch()).logits.shape == (2, 5, 3)


def test_a_tagger_with_its_teachers_embeddings() -> None:
    teacher = tagger()
    student = embeddings_from_teacher(teacher, 3, 30, partial(BiLSTM, embedding_size=6, hidden_size=4), per_token=True)
    assert run_network(student, batch()).logits.shape == (2, 5, 3)
    with pytest.raises(ConfigError, match=r"student\.network takes no per_token"):
        embeddings_from_teacher(teacher, 3, 30, partial(TextCNN, embedding_size=6), per_token=True)
