from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, ViTConfig, ViTForImageClassification
from transformers.utils import logging as transformers_logging

from kd_lightning.models import hf
from kd_lightning.models.adapt import run_network
from kd_lightning.models.hf import PooledClassifier, finished, pretrained
from kd_lightning.runtime.errors import ConfigError
from tests.models.tiny import KINDS, batch, tiny


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of the network fails the test."""
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was touched"))


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    tiny("bert", num_classes=3).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    tiny("bert").bert.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_finished_classifier_keeps_its_head(classifier: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    network = pretrained(str(classifier), num_classes=3)
    torch.testing.assert_close(network.state_dict(), dict(tiny("bert", num_classes=3).state_dict()))
    assert network.training
    assert "its head is kept, classes in this order: LABEL_0, LABEL_1, LABEL_2" in caplog.text


def test_head_of_another_number_of_classes_is_replaced(classifier: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = pretrained(str(classifier), num_classes=5)
    assert run_network(network, batch()).logits.shape == (2, 5)
    assert "a classifier for 3 classes; its head is replaced by a new one for 5" in caplog.text
    torch.testing.assert_close(network.bert.state_dict(), tiny("bert", num_classes=3).bert.state_dict())


def test_only_a_classifier_for_the_datas_classes_is_a_finished_teacher(classifier: Path, encoder: Path) -> None:
    torch.testing.assert_close(finished(str(classifier), 3).state_dict(), pretrained(str(classifier), 3).state_dict())
    with pytest.raises(ConfigError, match=r"a classifier for 3 classes, not a finished teacher for the data's 2"):
        finished(str(classifier), 2)
    with pytest.raises(ConfigError, match=r"an encoder without a head.*teacher.network.name="):
        finished(str(encoder), 2)


def test_frozen_layers_are_the_embeddings_and_the_lowest(classifier: Path) -> None:
    network = pretrained(str(classifier), num_classes=3, frozen_layers=2)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in network.named_parameters()} - trained
    assert frozen
    assert all(
        name.startswith(("bert.embeddings.", "bert.encoder.layer.0.", "bert.encoder.layer.1.")) for name in frozen
    )
    assert not any(name.startswith(("bert.embeddings.", "bert.encoder.layer.0.")) for name in trained)
    with pytest.raises(ConfigError, match="frozen_layers=9: the encoder has 4 layers"):
        pretrained(str(classifier), num_classes=3, frozen_layers=9)


def test_encoder_gets_a_new_head_quietly(
    encoder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    network = pretrained(str(encoder), num_classes=2)
    assert run_network(network, batch()).logits.shape == (2, 2)
    assert [record.name for record in caplog.records] == ["kd_lightning.models.hf"]
    assert "new classification head for 2 classes" in caplog.text
    printed = capfd.readouterr()
    assert "Loading weights" not in printed.err
    assert "REPORT" not in printed.err + printed.out
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_attention_implementation_and_float32(classifier: Path, tmp_path: Path) -> None:
    assert pretrained(str(classifier), 3).config._attn_implementation == "sdpa"
    assert pretrained(str(classifier), 3, attn_implementation="eager").config._attn_implementation == "eager"
    tiny("bert", 3).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {p.dtype for p in pretrained(str(tmp_path / "half"), 3).parameters()} == {torch.float32}


def test_the_asset_is_found_by_name(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "fetch", {"minilm": encoder}.__getitem__)
    assert isinstance(pretrained("minilm", 2, pooling="mean"), PooledClassifier)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "max", "first"])
def test_pooled_classifier_pools_words_only(kind: str, pooling: str) -> None:
    network = PooledClassifier(tiny(kind).base_model, 3, pooling).eval()  # type: ignore[arg-type]
    given = batch()
    logits = run_network(network, given).logits
    for row, mask in enumerate(given["attention_mask"]):
        words = given["input_ids"][row : row + 1, : int(mask.sum())]
        states = network.encoder(input_ids=words).last_hidden_state[0]
        pooled = {"mean": states.mean(0), "max": states.max(0).values, "first": states[0]}[pooling]
        torch.testing.assert_close(logits[row], network.classifier(pooled))
    torch.testing.assert_close(network(words).logits, logits[1:])  # no mask: all words


def test_pooled_classifier_trains_every_parameter() -> None:
    network = PooledClassifier(tiny("bert").base_model, 3)
    run_network(network, batch()).logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("pooling", ["mean", "checkpoint"])
def test_mistakes_are_one_line(pooling: str, tmp_path: Path) -> None:
    def message(name: object) -> str:
        with pytest.raises(ConfigError) as error:
            pretrained(str(name), 2, pooling=pooling)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
        assert f"name='{name}'" in str(error.value)
        return str(error.value)

    assert "no such folder" in message("./nowhere")
    assert "no such folder" in message("runs/nowhere/teacher")
    assert "without config.json" in message(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    assert "this folder" in message(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "this folder" in message(tmp_path)
    assert "is a file" in message(tmp_path / "config.json")


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(
        ConfigError, match=r"name='nobody/nothing' .* hub \(not reachable, or no such name\): We couldn't"
    ):
        pretrained("nobody/nothing", 2)


def test_unknown_pooling() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        pretrained("minilm", 2, pooling="meen")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        PooledClassifier(AutoModel.from_config(tiny("bert").config), 2, "meen")  # type: ignore[arg-type]


def test_an_image_classifier_is_loaded_with_its_head(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    network = ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **sizes)
    ).eval()
    network.save_pretrained(tmp_path)
    pictures = {"pixel_values": torch.randn(2, 1, 8, 8)}
    loaded = finished(str(tmp_path), 3).eval()
    torch.testing.assert_close(run_network(loaded, pictures).logits, network(**pictures).logits)
    assert pretrained(str(tmp_path), 5)(**pictures).logits.shape == (2, 5)
