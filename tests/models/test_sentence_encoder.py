from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from kd_lightning.export.formats.sentence_transformers import load, write
from kd_lightning.models.adapt import run_network
from kd_lightning.models.from_teacher import from_teacher
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.models.sentence_encoder import SentenceEncoder, sentence_encoder
from kd_lightning.models.static_embedding import StaticEmbedding, static_embedding, token_outputs
from kd_lightning.runtime.errors import ConfigError
from tests.models.tiny import VOCABULARY, batch, tiny

BATCH = {name: value for name, value in batch().items() if name != "labels"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    tiny("bert").bert.save_pretrained(folder)
    return folder


def as_sentence_transformer(folder: Path, pooling: dict[str, Any], dense: int | None = None, **more: Any) -> Path:
    """Add the files of sentence-transformers; `dense` is how wide its projection is."""
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    places = {kind: "" if kind == "Transformer" else f"{number}_{kind}" for number, kind in enumerate(kinds)}
    listed = [{"idx": n, "name": str(n), "path": places[kind], "type": f"sentence_transformers.models.{kind}"}
              for n, kind in enumerate(kinds)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(listed))
    for kind, content in (
        ("Pooling", pooling),
        ("Dense", {"activation_function": "torch.nn.modules.linear.Identity", **more}),
    ):
        if kind in places:
            (folder / places[kind]).mkdir()
            (folder / places[kind] / "config.json").write_text(json.dumps(content))
    if dense:
        weight = torch.arange(8.0 * dense).view(dense, 8) / 10
        save_file({"linear.weight": weight}, folder / places["Dense"] / "model.safetensors")
    return folder


def states(network: nn.Module) -> torch.Tensor:
    return network.encoder(**BATCH).last_hidden_state  # type: ignore[no-any-return, operator]


def test_it_is_the_mean_of_the_words_with_length_1(checkpoint: Path) -> None:
    network = sentence_encoder(str(checkpoint)).eval()
    mask = BATCH["attention_mask"].unsqueeze(2)
    expected = F.normalize((states(network) * mask).sum(1) / mask.sum(1), dim=1)
    torch.testing.assert_close(run_network(network, BATCH).logits, expected)
    plain = sentence_encoder(str(checkpoint), normalise=False, pooling="first").eval()
    torch.testing.assert_close(run_network(plain, BATCH).logits, states(plain)[:, 0])
    assert sentence_encoder(str(checkpoint)).training


def test_another_width_has_a_new_projection(checkpoint: Path) -> None:
    network = sentence_encoder(str(checkpoint), num_classes=5).eval()
    found = run_network(network, BATCH).logits
    assert found.shape == (2, 5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    "pooling",
    [
        {"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"embedding_dimension": 8, "pooling_mode": "cls"},
    ],
)
def test_a_folder_of_sentence_transformers(checkpoint: Path, pooling: dict[str, Any]) -> None:
    folder = as_sentence_transformer(checkpoint, pooling, dense=3)
    network = sentence_encoder(str(folder)).eval()
    weight = torch.arange(24.0).view(3, 8) / 10
    expected = F.normalize(states(network)[:, 0] @ weight.T, dim=1)
    torch.testing.assert_close(run_network(network, BATCH).logits, expected)
    assert run_network(sentence_encoder(str(folder), num_classes=8).eval(), BATCH).logits.shape == (2, 8)


def without(folder: Path, kind: str) -> None:
    """Take a module out of `modules.json`."""
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([one for one in listed if not one["type"].endswith(kind)]))


def test_modules_decide_whether_it_normalises(checkpoint: Path) -> None:
    folder = as_sentence_transformer(checkpoint, {"pooling_mode": "cls"})
    assert sentence_encoder(str(folder)).normalise is True
    assert sentence_encoder(str(folder), normalise=False).normalise is False
    without(folder, "Normalize")
    network = sentence_encoder(str(folder)).eval()
    torch.testing.assert_close(run_network(network, BATCH).logits, states(network)[:, 0])
    assert sentence_encoder(str(folder), normalise=True).normalise is True


@pytest.mark.parametrize("normalise", [True, False])
def test_an_export_normalises_as_the_student_does(checkpoint: Path, tmp_path: Path, normalise: bool) -> None:
    network = sentence_encoder(str(checkpoint), num_classes=5, normalise=normalise).eval()
    source: Any = SimpleNamespace(network=network, model=SimpleNamespace(max_length=16), held_out=[BATCH])
    (folder := tmp_path / "out").mkdir()
    again: Any = load(folder, write(source, "none", folder))  # type: ignore[arg-type]
    torch.testing.assert_close(run_network(again, BATCH).logits, run_network(network, BATCH).logits)


def test_a_module_in_the_folder_itself(checkpoint: Path) -> None:
    """Its path is empty, which is not the machine's root."""
    folder = as_sentence_transformer(checkpoint, {})
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([listed[0], {**listed[1], "path": ""}]))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pooling_mode": "max"}))
    assert sentence_encoder(str(folder)).pooling == "max"


def test_a_square_projection_is_kept(checkpoint: Path) -> None:
    folder = as_sentence_transformer(checkpoint, {"pooling_mode": "mean"}, dense=8)
    teacher = sentence_encoder(str(folder)).eval()
    again = from_description(describe(teacher) or {}).eval()
    again.load_state_dict(teacher.state_dict())
    student = from_teacher(teacher, 8, layers=4).eval()
    for network in (again, student):
        torch.testing.assert_close(run_network(network, BATCH).logits, run_network(teacher, BATCH).logits)


def test_folders_that_cannot_be_read_so(checkpoint: Path, tmp_path: Path) -> None:
    folder = as_sentence_transformer(checkpoint, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True})
    with pytest.raises(ConfigError, match=r"it pools by \['mean', 'max'\]; expected one of mean, max, cls"):
        sentence_encoder(str(folder))
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([listed[0], {**listed[1], "type": "my.LayerNorm"}]))
    with pytest.raises(ConfigError, match=r"modules\.json has Transformer, LayerNorm; expected Transformer, Pooling"):
        sentence_encoder(str(folder))
    for place in ("../elsewhere", "/etc"):
        (folder / "modules.json").write_text(json.dumps([listed[0], {**listed[1], "path": place}]))
        with pytest.raises(ConfigError, match=r"modules\.json names the folder .*, which is not inside of it"):
            sentence_encoder(str(folder))
    for damaged in ("{}", '["a"]', "[{}]", "no json"):
        (folder / "modules.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"cannot be loaded as a sentence encoder|modules\.json has"):
            sentence_encoder(str(folder))
    with pytest.raises(ConfigError, match="pooling='men' is unknown"):
        sentence_encoder(str(folder), pooling="men")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no such folder"):
        sentence_encoder(str(tmp_path / "none" / "such"))


def test_an_activation_is_refused(checkpoint: Path) -> None:
    more = {"activation_function": "torch.nn.modules.activation.Tanh"}
    folder = as_sentence_transformer(checkpoint, {"pooling_mode": "mean"}, dense=3, **more)
    with pytest.raises(ConfigError, match="its Dense has the activation Tanh"):
        sentence_encoder(str(folder))


def test_all_layers_of_the_teacher_are_the_teacher(checkpoint: Path) -> None:
    teacher = sentence_encoder(str(checkpoint)).eval()
    student = from_teacher(teacher, 8, layers=4).eval()
    assert isinstance(student, SentenceEncoder)
    torch.testing.assert_close(run_network(student, BATCH).logits, run_network(teacher, BATCH).logits)
    half = from_teacher(teacher, 3, layers=2).eval()
    assert run_network(half, BATCH).logits.shape == (2, 3)
    taken = {"layer.0.": "layer.1.", "layer.1.": "layer.3."}
    weights = teacher.state_dict()
    for name, value in half.state_dict().items():
        if not name.startswith("classifier."):
            place = next((new for new in taken if new in name), "")
            assert torch.equal(value, weights[name.replace(place, taken.get(place, ""))])
    for network in (teacher, half):
        again = from_description(describe(network) or {}).eval()
        again.load_state_dict(network.state_dict())
        torch.testing.assert_close(run_network(again, BATCH).logits, run_network(network, BATCH).logits)


STATIC = {"num_classes": 8, "vocab_size": VOCABULARY, "pad_token_id": 1, "special_tokens": [2, 3]}
FRAME = [2, -1, 3]


def test_a_static_embedding_is_the_mean_of_its_tokens_that_count() -> None:
    torch.manual_seed(0)
    network = StaticEmbedding(**STATIC)  # type: ignore[arg-type]
    table = network.embedding.weight
    expected = torch.stack([F.normalize(table[[9, 8]].sum(0), dim=0), F.normalize(table[11], dim=0)])
    torch.testing.assert_close(run_network(network, BATCH).logits, expected)
    padded = {name: F.pad(value, (0, 3)) for name, value in BATCH.items()}
    torch.testing.assert_close(run_network(network, padded).logits, expected)
    empty = network(torch.tensor([[2, 3, 1]])).logits
    assert empty.abs().sum() == 0
    run_network(network, BATCH).logits.sum().backward()
    assert table.grad is not None
    assert table.grad[[1, 2, 3]].abs().sum() == 0
    assert table.grad[[8, 9, 11]].abs().sum() > 0
    again = from_description(describe(network) or {})
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(run_network(again, BATCH).logits, expected)


def test_it_is_made_of_what_the_teacher_outputs_for_each_token(checkpoint: Path) -> None:
    teacher = sentence_encoder(str(checkpoint))
    outputs = token_outputs(teacher, VOCABULARY, FRAME)
    assert teacher.training
    ids = torch.tensor([[2, 9, 3]])
    alone = run_network(teacher.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
    torch.testing.assert_close(outputs[9:10], alone, atol=1e-5, rtol=1e-4)
    student = static_embedding(teacher, **STATIC, single_token=FRAME)  # type: ignore[arg-type]
    assert isinstance(student, StaticEmbedding)
    centred = outputs - outputs.mean(0)
    chance = 1 / torch.arange(2.0, VOCABULARY + 2)
    weights = 1e-4 / (1e-4 + chance / chance.sum())
    torch.testing.assert_close(student.embedding.weight.detach(), centred * weights[:, None], atol=1e-5, rtol=1e-3)


def test_a_narrow_one_has_the_principal_components(checkpoint: Path) -> None:
    teacher = sentence_encoder(str(checkpoint))
    student = static_embedding(teacher, **{**STATIC, "num_classes": 3}, single_token=FRAME, sif=1e9)  # type: ignore[arg-type]
    assert isinstance(student, StaticEmbedding)
    outputs = token_outputs(teacher, VOCABULARY, FRAME).double()
    values = torch.linalg.svdvals(outputs - outputs.mean(0))
    found = torch.linalg.svdvals(student.embedding.weight.detach().double())
    torch.testing.assert_close(found, values[:3], rtol=1e-3, atol=1e-4)


def test_a_random_one_has_nothing_of_the_teacher(checkpoint: Path) -> None:
    teacher = sentence_encoder(str(checkpoint))
    torch.manual_seed(1)
    random = static_embedding(teacher, **STATIC, initialise="random")  # type: ignore[arg-type]
    torch.manual_seed(1)
    fresh = StaticEmbedding(**STATIC)  # type: ignore[arg-type]
    assert torch.equal(random.state_dict()["embedding.weight"], fresh.embedding.weight)


def test_static_embeddings_that_cannot_be(checkpoint: Path) -> None:
    teacher = sentence_encoder(str(checkpoint))
    with pytest.raises(ConfigError, match=r"data.dimensions=9 is above the teacher's width, 8"):
        static_embedding(teacher, 9, VOCABULARY)
    with pytest.raises(ConfigError, match=r"student.sif=0 is not above 0"):
        static_embedding(teacher, 8, VOCABULARY, sif=0)
    with pytest.raises(ConfigError, match="is not a token"):
        StaticEmbedding(8, VOCABULARY, special_tokens=[VOCABULARY])
