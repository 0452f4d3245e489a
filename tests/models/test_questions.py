"""Networks for question answering of transformers: classifiers of tokens by another name, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForQuestionAnswering,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    ElectraConfig,
    EsmConfig,
    EsmForTokenClassification,
    LongformerConfig,
    LongformerForQuestionAnswering,
    LongformerForTokenClassification,
    RobertaConfig,
)

from kd_lightning.export.formats import huggingface
from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.embedding import FactorizedEmbedding
from kd_lightning.models.hf import pretrained
from kd_lightning.models.questions import finished_for_questions
from kd_lightning.models.spans import for_questions
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import QuestionAnswering
from kd_lightning.training.run_folder import TrainedModel
from tests.models.tiny import batch

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 40,
}  # fmt: skip
CONFIGS = {
    "bert": BertConfig(**SIZES), "roberta": RobertaConfig(**SIZES, pad_token_id=0),
    "electra": ElectraConfig(**SIZES, embedding_size=8), "albert": AlbertConfig(**SIZES, embedding_size=8),
    "distilbert": DistilBertConfig(vocab_size=60, dim=8, n_layers=2, n_heads=2, hidden_dim=12),
}  # fmt: skip


def logits_of(network: nn.Module) -> torch.Tensor:
    given = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        output: Any = network.eval()(**given)
    return torch.stack([output.start_logits, output.end_logits], -1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_finished_network_has_equal_logits_as_a_classifier_of_tokens_and_back(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs: Any = AutoModelForQuestionAnswering.from_config(CONFIGS[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = finished_for_questions(str(tmp_path / "theirs"))
    assert ours.training
    assert type(ours).__name__.endswith("ForTokenClassification")
    assert torch.equal(run_network(ours.eval(), batch()).logits, logits_of(theirs))
    back: Any = for_questions(ours)
    assert type(back) is type(theirs)
    back.save_pretrained(tmp_path / "back")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "back")
    assert torch.equal(logits_of(again), logits_of(theirs))
    published = QuestionAnswering().as_published(str(tmp_path / "back"), {})
    assert type(published.network) is type(theirs)
    assert torch.equal(run_network(published.eval(), batch()).logits, logits_of(theirs))


def test_classes_that_attend_differently_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LongformerConfig(**SIZES, attention_window=4, pad_token_id=0, initializer_range=0.5)
    LongformerForQuestionAnswering(config).save_pretrained(tmp_path)
    for make in (
        lambda: finished_for_questions(str(tmp_path)), lambda: for_questions(LongformerForTokenClassification(config))
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"Longformer.* compute different logits with the same weights"):
            make()


def test_other_networks_are_refused(tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is no network for question answering.*model@teacher\.network=hf"):
        finished_for_questions(str(tmp_path))
    with pytest.raises(ConfigError, match="BiLSTM is no network of transformers"):
        for_questions(BiLSTM(2, 20, per_token=True))


def test_an_export_without_such_a_class_is_refused_before_anything_is_written() -> None:
    sizes = {"vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = EsmForTokenClassification(EsmConfig(**sizes, intermediate_size=12, pad_token_id=0, mask_token_id=4))
    model = TrainedModel(network, None, ["start", "end"], 40, 2, Path("run"), QuestionAnswering())
    with pytest.raises(ConfigError, match="--format huggingface: transformers has no AutoModelForQuestionAnswering of"):
        huggingface.check(model)
    words = BertForTokenClassification(BertConfig(**SIZES))
    words.set_input_embeddings(FactorizedEmbedding(60, 4, 8, 0))
    huggingface.check(replace(model, network=words))
    assert isinstance(words.get_input_embeddings(), FactorizedEmbedding)


def test_only_networks_for_question_answering_keep_their_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs: Any = AutoModelForQuestionAnswering.from_config(CONFIGS["bert"])
    theirs.save_pretrained(tmp_path / "spans")
    ours = pretrained(str(tmp_path / "spans"), 2, per_token=True, spans=True)
    assert ours.training
    assert torch.equal(run_network(ours.eval(), batch()).logits, logits_of(theirs))
    for kind in (BertForTokenClassification, BertForSequenceClassification):
        tagger = kind(BertConfig(**SIZES, num_labels=2))
        tagger.save_pretrained(tmp_path / kind.__name__)
        fresh: Any = pretrained(str(tmp_path / kind.__name__), 2, per_token=True, spans=True)
        assert type(fresh) is BertForTokenClassification
        assert not torch.equal(fresh.classifier.weight, tagger.classifier.weight)
        assert not fresh.classifier.bias.any()
        encoder = fresh.bert.encoder.state_dict()
        torch.testing.assert_close(encoder, tagger.bert.encoder.state_dict())
