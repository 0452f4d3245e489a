from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification

from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.features import FeatureTap
from kd_lightning.models.from_teacher import from_teacher
from kd_lightning.models.hf import PooledClassifier
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.models.transformer import transformer
from kd_lightning.runtime.errors import ConfigError
from tests.models.tiny import KINDS, VOCABULARY, batch, tiny

NETWORKS = {
    **{kind: lambda kind=kind: tiny(kind, 3) for kind in KINDS},
    "pooled": lambda: PooledClassifier(tiny("distilbert").base_model, 3, "max", dropout=0.25),
    "factorised": lambda: from_teacher(tiny("bert", 3), 3, layers=[0, -1], embedding_rank=2),
    "pooled factorised": lambda: from_teacher(PooledClassifier(tiny("bert").base_model, 3), 3, 1, embedding_rank=2),
    "transformer": lambda: transformer(3, VOCABULARY, hidden_size=8, num_layers=1, intermediate_size=8, max_length=9),
    "bilstm": lambda: BiLSTM(3, VOCABULARY, embedding_size=4, hidden_size=4, pooling="attention"),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "builder", [from_description, lambda d: instantiate(d, _convert_="all")], ids=["ours", "hydra"]
)
def test_round_trip_through_files(name: str, builder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    network = NETWORKS[name]().eval()
    (tmp_path / "network.json").write_text(json.dumps(describe(network)))
    save_file({k: v.clone() for k, v in network.state_dict().items()}, tmp_path / "network.safetensors")

    rebuilt = builder(json.loads((tmp_path / "network.json").read_text()))
    assert type(rebuilt) is type(network)
    assert rebuilt.training
    rebuilt.load_state_dict(load_file(tmp_path / "network.safetensors"))
    assert torch.equal(run_network(rebuilt.eval(), batch()).logits, run_network(network, batch()).logits)
    assert describe(rebuilt) == describe(network)
    dropouts = [m.p for m in network.modules() if isinstance(m, nn.Dropout)]
    assert [m.p for m in rebuilt.modules() if isinstance(m, nn.Dropout)] == dropouts


def test_attention_implementation_survives() -> None:
    network = BertForSequenceClassification._from_config(tiny("bert").config, attn_implementation="eager")
    assert from_description(describe(network)).config._attn_implementation == "eager"  # type: ignore[arg-type, union-attr]


def test_compiled_network_is_looked_into() -> None:
    network = tiny("bert")
    assert describe(torch.compile(network, backend="eager")) == describe(network)  # type: ignore[arg-type]


def test_others_have_no_description() -> None:
    class Own(BertForSequenceClassification):
        pass

    assert describe(nn.Linear(2, 2)) is None
    assert describe(Own(tiny("bert").config)) is None
    assert describe(PooledClassifier(Own(tiny("bert").config).bert, 2)) is not None
    assert describe(PooledClassifier(Own(tiny("bert").config), 2)) is None  # type: ignore[arg-type]


def test_no_path_of_this_machine(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "secret")
    network = BertForSequenceClassification.from_pretrained(tmp_path / "secret")
    assert "secret" not in json.dumps(describe(network))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_target_": "os.system"}, "_target_='os.system' is not a network description"),
        ({"_target_": None}, "_target_=None"),
        ({"architecture": "BertForEverything"}, "'BertForEverything' is not a model class of transformers"),
        ({"architecture": "BertConfig"}, "'BertConfig' is not a model class"),
        ({"architecture": "logging"}, "'logging' is not a model class"),
        ({"surprise": 1}, "does not match .*surprise"),
    ],
)
def test_wrong_descriptions_are_refused(change: dict[str, object], says: str) -> None:
    description = describe(tiny("bert"))
    assert description is not None
    with pytest.raises(ConfigError, match=says):
        from_description({**description, **change})


def test_a_network_whose_attentions_were_tapped_loads_without_the_tap() -> None:
    network = tiny("bert")
    FeatureTap(network, ["attention[-1]"])
    assert describe(network)["attn_implementation"] is None
    assert from_description(describe(network)).config._attn_implementation == "sdpa"
