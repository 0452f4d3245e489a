from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModel,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.cnn import CNN
from kd_lightning.models.features import FeatureTap, depth
from kd_lightning.models.hf import PooledClassifier
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch, ModelOutput

BERT = {
    "vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 16,
    "max_position_embeddings": 16,
}  # fmt: skip
BATCH: Batch = {
    "input_ids": torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    "labels": torch.tensor([0, 1]),
    "index": torch.tensor([0, 1]),
}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=3, attn_implementation="sdpa")).eval()


def direct(network: PreTrainedModel) -> dict[str, tuple[Tensor, ...]]:
    """What the encoder says itself, in eager attention."""
    encoder = copy.deepcopy(network)
    encoder.set_attn_implementation("eager")
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    output = encoder.base_model(**inputs, output_hidden_states=True, output_attentions=True)
    return {"hidden": output.hidden_states, "attention": output.attentions}


def test_hidden_states_of_a_hugging_face_network() -> None:
    network, expected = bert(), direct(bert())["hidden"]
    names = ["hidden[0]", "hidden[2]", "hidden[-1]", "hidden[-4]", "embeddings"]
    output = FeatureTap(network, names)(BATCH)
    assert list(output.features) == names
    for name, position in zip(names, (0, 2, 3, 0, 0), strict=True):
        torch.testing.assert_close(output.features[name], expected[position], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, run_network(bert(), BATCH).logits)
    assert network.config._attn_implementation == "sdpa"  # attentions were not asked for


def test_attention_probabilities() -> None:
    network, expected = bert(), direct(bert())["attention"]
    output = FeatureTap(network, ["attention[0]", "attention[-1]"])(BATCH)
    for name, position in (("attention[0]", 0), ("attention[-1]", 2)):
        found = output.features[name]
        assert found.shape == (2, 2, 4, 4)
        torch.testing.assert_close(found, expected[position])
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 4))
        assert found[1, :, :, 3].abs().max() < 1e-6  # nobody attends to padding
    torch.testing.assert_close(output.logits, run_network(bert(), BATCH).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "network",
    [
        bert(),
        RobertaForSequenceClassification(RobertaConfig(**BERT, num_labels=3, pad_token_id=0)),
        DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=30, dim=8, n_heads=2, n_layers=3, hidden_dim=16, num_labels=3)
        ),
        PooledClassifier(AutoModel.from_config(BertConfig(**BERT)), 3),
        BiLSTM(3, 30, embedding_size=8, hidden_size=4),
        nn.Sequential(nn.Embedding(30, 8), nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten(), nn.ReLU(), nn.Linear(8, 3)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_pooled_is_what_the_head_reads(network: nn.Module) -> None:
    output = FeatureTap(network.eval(), ["pooled"])(BATCH)
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    assert output.features["pooled"].shape == (2, 8)
    torch.testing.assert_close(head(output.features["pooled"]), output.logits)


def test_inside_a_pooled_classifier() -> None:
    torch.manual_seed(0)
    network = PooledClassifier(AutoModel.from_config(BertConfig(**BERT)), 3).eval()
    expected = direct(network.encoder)  # type: ignore[arg-type]
    names = ["hidden[-1]", "attention[1]", "encoder.encoder.layer.0.output", "encoder.embeddings"]
    features = FeatureTap(network, names)(BATCH).features
    torch.testing.assert_close(features["hidden[-1]"], expected["hidden"][3])
    torch.testing.assert_close(features["attention[1]"], expected["attention"][1])
    torch.testing.assert_close(features["encoder.encoder.layer.0.output"], expected["hidden"][1])
    torch.testing.assert_close(features["encoder.embeddings"], expected["hidden"][0])


def test_modules_by_their_path_whatever_they_return() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[None, dict[str, Tensor]]:
            return None, {"twice": 2 * x}

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.pair, self.lstm = nn.Embedding(30, 4), Pair(), nn.LSTM(4, 3, batch_first=True)

        def forward(self, input_ids: Tensor) -> ModelOutput:
            states = self.lstm(self.pair(self.table(input_ids))[1]["twice"])[0]
            return ModelOutput(states[:, -1], {"own": states})

    network = Own()
    output = FeatureTap(network, ("pair", "lstm", "table"))(BATCH)
    table = network.table(BATCH["input_ids"])
    assert torch.equal(output.features["table"], table)
    assert torch.equal(output.features["pair"], 2 * table)
    assert torch.equal(output.features["lstm"], output.features["own"])  # the network's own are kept
    output.features["pair"].sum().backward()  # a student's features have a graph
    assert network.table.weight.grad is not None


def test_nothing_is_kept_or_asked_for_outside_of_a_call() -> None:
    network = bert()
    tap = FeatureTap(network, ["hidden[1]", "pooled", "bert.encoder.layer.0"])
    first = tap(BATCH)
    assert tap._read == {}
    network(input_ids=torch.tensor([[1, 2]]))
    assert tap._read == {}
    assert network(input_ids=BATCH["input_ids"]).hidden_states is None
    second = tap(BATCH)
    for name in tap.names:
        assert torch.equal(first.features[name], second.features[name])
        assert first.features[name] is not second.features[name]


def test_without_names_the_network_is_not_touched() -> None:
    network = bert()
    assert FeatureTap(network)(BATCH).features == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda tap: pickle.loads(pickle.dumps(tap))], ids=["copy", "pickle"])
def test_a_copy_reads_its_own_network(clone) -> None:  # type: ignore[no-untyped-def]
    tap = FeatureTap(bert(), ["hidden[1]", "attention[0]", "qkv[1]", "pooled", "bert.encoder.layer.0"])
    expected = tap(BATCH)  # also after a call
    twin = clone(tap)
    with torch.no_grad():
        for parameter in tap.network.parameters():
            parameter.zero_()
    for name, value in twin(BATCH).features.items():
        torch.testing.assert_close(value, expected.features[name])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hidden[4]", r"'hidden\[4\]': BertForSequenceClassification has 3 layers; hidden\[i\] takes i from -4 to 3"),
        ("attention[3]", r"attention\[i\] takes i from -3 to 2"),
        ("attention[-4]", "from -3 to 2"),
        ("hiden[2]", r"did you mean 'hidden\[2\]'"),
        ("poled", "did you mean 'pooled'"),
        ("encoder.layer.1.output", r"did you mean .*'bert\.encoder\.layer\.1\.output'"),
        ("qkv[-4]", r"qkv\[i\] takes i from -3 to 2"),
        ("qvk[2]", r"did you mean 'qkv\[2\]'"),
        (
            "feature_maps[0]",
            r"has no feature_maps\[i\]; it has hidden\[0..3\], attention\[0..2\], qkv\[0..2\], embeddings",
        ),
        ("", r"valid: .*bert, classifier, dropout, .*hidden\[3\], pooled"),
    ],
)
def test_an_unknown_name_lists_the_nearest(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FeatureTap(bert(), [name])


def test_names_that_this_kind_of_network_does_not_have() -> None:
    says = r"feature 'qkv\[0\]': BiLSTM has no qkv\[i\]; it has pooled, hidden\[0..2\], embeddings, its modules"
    with pytest.raises(ConfigError, match=says):
        FeatureTap(BiLSTM(3, 30, num_layers=2), ["qkv[0]"])
    two_stacks = BartForSequenceClassification(
        BartConfig(vocab_size=30, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                   decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8)
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"BartForSequenceClassification has no hidden\[i\]; it has pooled, its"):
        FeatureTap(two_stacks, ["hidden[0]"])
    with pytest.raises(ConfigError, match="has none of this name"):
        FeatureTap(nn.ReLU(), ["pooled"])


def test_a_module_that_does_not_run_is_named() -> None:
    network = bert()
    network.unused = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="'unused': its module did not run"):
        FeatureTap(network, ["unused"])(BATCH)


def test_attention_that_cannot_be_switched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = bert()
    monkeypatch.setattr(BertForSequenceClassification, "_can_set_attn_implementation", classmethod(lambda _: False))
    with pytest.raises(ConfigError, match=r"uses sdpa attention.*attn_implementation=eager"):
        FeatureTap(network, ["attention[0]"])


# -- attention --------------------------------------------------------------------------------------------------------


def test_in_training_attentions_are_probabilities_and_the_network_goes_on_with_dropped_ones() -> None:
    shape = {**BERT, "attention_probs_dropout_prob": 0.5, "num_labels": 3}
    torch.manual_seed(0)
    network = BertForSequenceClassification(BertConfig(**shape, attn_implementation="eager")).train()
    untouched = copy.deepcopy(network)
    tap = FeatureTap(network, ["attention[0]", "attention[2]", "hidden[1]"])
    torch.manual_seed(1)
    output = tap(BATCH)
    for name in ("attention[0]", "attention[2]"):
        torch.testing.assert_close(output.features[name].sum(-1), torch.ones(2, 2, 4))
        assert output.features[name][0].min() > 0  # nothing is dropped
    torch.manual_seed(1)
    torch.testing.assert_close(output.logits, run_network(untouched, BATCH).logits)  # but here it is, as ever
    torch.manual_seed(2)
    assert not torch.equal(tap(BATCH).features["hidden[1]"], output.features["hidden[1]"])

    output.features["attention[2]"].square().sum().backward()
    layers = network.bert.encoder.layer
    assert layers[2].attention.self.query.weight.grad.abs().sum() > 0
    assert layers[0].output.dense.weight.grad.abs().sum() > 0


def test_asking_for_attentions_changes_nothing_else() -> None:
    network = bert().train()
    network.bert.embeddings.requires_grad_(False)
    network.dropout.eval()
    before = copy.deepcopy(network)
    FeatureTap(network, ["attention[0]"])
    assert network.config.to_json_string() == before.config.to_json_string()
    assert [m.training for m in network.modules()] == [m.training for m in before.modules()]
    for (name, ours), (theirs, value) in zip(network.named_parameters(), before.named_parameters(), strict=True):
        assert (name, ours.requires_grad) == (theirs, value.requires_grad)
        assert torch.equal(ours, value)


def test_a_new_process_can_read_attentions(tmp_path: Path) -> None:
    tap = FeatureTap(bert(), ["attention[1]"])
    torch.save({"tap": tap, "batch": BATCH}, tmp_path / "tap.pt")
    code = (
        "import sys, torch; x = torch.load(sys.argv[1], weights_only=False);"
        "torch.save(x['tap'](x['batch']).features['attention[1]'], sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tap.pt"), str(tmp_path / "out.pt")], check=True, timeout=120
    )
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), tap(BATCH).features["attention[1]"])


def test_networks_that_only_their_own_outputs_tell() -> None:
    """ALBERT's layers share their weights; MPNet is older than the attention interface."""
    albert = AlbertForSequenceClassification(AlbertConfig(**BERT, embedding_size=6, num_labels=3)).eval()
    mpnet = MPNetForSequenceClassification(MPNetConfig(**BERT, num_labels=3)).eval()
    names = ["hidden[0]", "hidden[1]", "hidden[-1]", "attention[0]", "attention[-1]"]
    for network in (albert, mpnet):
        expected = direct(network)
        features = FeatureTap(network, names)(BATCH).features
        for name, (kind, position) in zip(
            names, [("hidden", 0), ("hidden", 1), ("hidden", 3), ("attention", 0), ("attention", 2)], strict=True
        ):
            torch.testing.assert_close(features[name], expected[kind][position])
        assert depth(network, "hidden") == depth(network, "attention") == 3
    with pytest.raises(ConfigError, match=r"AlbertForSequenceClassification has no qkv\[i\]; it has hidden"):
        depth(albert, "qkv")


def test_a_decoder_with_fewer_keys_than_queries() -> None:
    config = LlamaConfig(vocab_size=30, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_labels=3,
                         num_hidden_layers=2, intermediate_size=16, pad_token_id=0)  # fmt: skip
    network = LlamaForSequenceClassification(config).eval()
    output = FeatureTap(network, ["hidden[-1]", "attention[0]", "model.norm"])(BATCH)
    torch.testing.assert_close(network.model.norm(output.features["hidden[-1]"]), output.features["model.norm"])
    torch.testing.assert_close(output.features["attention[0]"], direct(network)["attention"][0])
    with pytest.raises(
        ConfigError, match=r"'qkv\[0\]': query, key and value are \[\(2, 4, 8\), \(2, 4, 4\).*one width"
    ):
        FeatureTap(network, ["qkv[0]"])(BATCH)


# -- depth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "depths"),
    [
        (bert(), {"hidden": 3, "attention": 3, "qkv": 3}),
        (PooledClassifier(AutoModel.from_config(BertConfig(**BERT)), 3), {"hidden": 3, "attention": 3, "qkv": 3}),
        (torch.compile(BiLSTM(3, 30, num_layers=2), backend="eager"), {"hidden": 2}),
        (CNN(3, widths=(4, 8, 8, 8)), {"feature_maps": 4}),
        (nn.Linear(2, 2), {}),
    ],
    ids=["bert", "pooled", "bilstm", "cnn", "linear"],
)
def test_depth(network: nn.Module, depths: dict[str, int]) -> None:
    for kind in ("hidden", "attention", "qkv", "feature_maps"):
        if kind in depths:
            assert depth(network, kind) == depths[kind]
        else:
            with pytest.raises(ConfigError, match=rf"has no {kind}\[i\]; it has .*its modules by their names"):
                depth(network, kind)
