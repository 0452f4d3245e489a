"""What a folder that somebody sent may make this program do."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kd_lightning.config import trust
from kd_lightning.config.trust import build_saved, trust_own, trusting
from kd_lightning.export.formats import pt2
from kd_lightning.models.hf import pretrained
from kd_lightning.models.rebuild import from_description
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.training.run_folder import finish_stage, load_run, read_config, save_network

FILE = Path("model.json")
HOSTILE = [
    "pandas.read_pickle", "torch.load", "torch.hub.load", "sympy.sympify", "os.system", "builtins.eval", "evil.Network",
    "kd_lightning.runtime.assets.discard_folder", "kd_lightning.runtime.files.write_file",
    "kd_lightning.models.hf.torch.load",
    "kd_lightning.models.hf.pretrained", "kd_lightning.data.sources.files.Path.unlink",
    "torch.nn.modules.module.torch.load",
    "transformers.AutoModel.from_pretrained", "transformers.pipeline", "timm.create_model",
    "kd_lightning.data.TextFiles.prepare", "torch.nn.Module.load_state_dict", "kd_lightning.models.", "torch.nn..",
]  # fmt: skip


class Mine(nn.Linear):
    """A network of a user's own."""


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_own", set())


@pytest.mark.parametrize("target", HOSTILE)
@pytest.mark.parametrize("inside", [False, True])
def test_a_file_reaches_no_function_of_any_package(target: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra.utils.instantiate", lambda *_, **__: pytest.fail("it was called"))
    saved: dict[str, Any] = {"_target_": target}
    if inside:
        saved = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.ReLU", "deep": {"x": [saved]}}]}
    with pytest.raises(ConfigError, match=r"would run .*--trust") as refused:
        build_saved(saved, FILE)
    assert "\n" not in str(refused.value)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["kd_lightning", "models", "data", "torch", "nn", "hf", "os", "system", "load", ""])))
def test_no_name_but_that_of_a_network_or_data_is_harmless(parts: list[str]) -> None:
    assert not trust._harmless(".".join(parts))


@pytest.mark.parametrize(
    "saved",
    [
        {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2},
        {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.ReLU"}]},
        {"_target_": "kd_lightning.models.text_cnn.TextCNN", "vocab_size": 9, "num_classes": 2},
    ],
)
def test_networks_of_ours_and_torchs_are_built(saved: dict[str, Any]) -> None:
    assert isinstance(build_saved(saved, FILE), nn.Module)


def test_a_class_that_the_users_own_configuration_names_is_built() -> None:
    saved = {"_target_": "tests.config.test_trust.Mine", "in_features": 3, "out_features": 2}
    with pytest.raises(ConfigError, match=r"would run 'tests.config.test_trust.Mine'"):
        build_saved(saved, FILE)
    trust_own({"student": saved})
    assert isinstance(build_saved(saved, FILE), Mine)


def test_a_run_of_a_users_own_class_is_read_if_it_is_trusted(tmp_path: Path) -> None:
    saved = {"_target_": "tests.config.test_trust.Mine", "in_features": 3, "out_features": 2}
    save_network(tmp_path, Mine(3, 2), saved, {"class_names": ["a", "b"], "predicts": 2, "role": "student"}, None)
    finish_stage(tmp_path, {})
    with pytest.raises(ConfigError, match=r"model.json would run .*load_run\(\.\.\., trust=True\)"):
        load_run(tmp_path)
    assert isinstance(load_run(tmp_path, trust=True).network, Mine)
    assert not trust.trusts_all()


def test_a_configuration_is_read_without_resolving_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "config.yaml").write_text("data: {_target_: kd_lightning.data.TextFiles, x: ['${oc.env:SECRET}']}")
    config = read_config(tmp_path)
    assert "hunter2" not in str(config)
    with pytest.raises(ConfigError, match="files of a run hold no"):
        build_saved(config["data"], tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("!!python/object/apply:os.system [exit]")
    with pytest.raises(KDError, match="cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"attn_implementation": "evil/kernel"},
        {"config": {"_attn_implementation": "evil/kernel"}},
        {"config": {"text_config": {"attn_implementation": {"": "sdpa", "vision": "evil/kernel@main"}}}},
    ],
)
def test_a_description_fetches_no_kernel(more: dict[str, Any]) -> None:
    described = {"_target_": "kd_lightning.models.rebuild.hugging_face", "architecture": "BertModel", "config": {}}
    with pytest.raises(ConfigError, match=r"evil/kernel.*expected eager, sdpa"):
        from_description({**described, **more})


def test_a_checkpoint_runs_none_of_its_code_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        pretrained(str(tmp_path), 2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "_attn_implementation": "evil/kernel"}))
    with pytest.raises(ConfigError, match="evil/kernel"):
        pretrained(str(tmp_path), 2)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = torch.export.Dim("batch", min=1, max=100)
    program = torch.export.export(nn.Linear(4, 2), (torch.ones(3, 4),), dynamic_shapes=({0: size},))
    program.example_inputs = None
    file = tmp_path_factory.mktemp("pt2") / "model.pt2"
    torch.export.save(program, file)
    return file


def changed(archive: Path, into: Path, name: str, content: bytes) -> Path:
    """Copy an archive with one member replaced or added."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(into, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for entry in old.infolist():
            if entry.filename != f"{root}/{name}":
                new.writestr(entry.filename, old.read(entry))
        new.writestr(f"{root}/{name}", content)
    return into


def test_a_graph_is_loaded_only_if_it_is_trusted(archive: Path) -> None:
    with pytest.raises(KDError, match=r"may run code when it is loaded.*--trust"):
        pt2.load_graph(archive)
    with trusting():
        assert pt2.load_graph(archive).module()(torch.ones(5, 4)).shape == (5, 2)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data/sample_inputs/model.pt", b"cos\nsystem\n(S'true'\ntR.", "sample_inputs/model.pt"),
        ("data/constants/custom_obj_0", b"cos\nsystem\n(S'true'\ntR.", "custom_obj_0"),
        ("data/aotinductor/model/x.so", b"\x7fELF", "x.so"),
        ("data/weights/model_weights_config.json", b'{"config": {"w": {"use_pickle": true}}}', "names a pickle"),
        (
            "models/model.json",
            b'{"a": [{"expr_str": "__import__(1)"}]}',
            "not arithmetic of sizes",
        ),
        ("models/model.json", b'{"a": [{"expr_str": "s0.__class__"}]}', "not arithmetic of sizes"),
    ],
)
def test_a_trusted_archive_still_holds_nothing_but_a_graph(
    archive: Path, tmp_path: Path, name: str, content: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.export.load", lambda *_: pytest.fail("it was loaded"))
    with trusting(), pytest.raises(KDError, match=said):
        pt2.load_graph(changed(archive, tmp_path / "model.pt2", name, content))
