from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper

from kd_lightning.evaluation import profiling
from kd_lightning.models.adapt import run_network
from kd_lightning.models.onnx import OnnxNetwork
from kd_lightning.models.size import count_parameters
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.onnx_files import onnx_file, weight_files
from kd_lightning.teachers import EnsembleNetwork, FrozenTeacher
from tests.models.onnx_files import keep_weights_in, save, write_tagger

TABLE = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
IDS = torch.tensor([[1, 2, 3], [6, 5, 0]])


@pytest.fixture
def network(tmp_path: Path) -> OnnxNetwork:
    return OnnxNetwork(write_tagger(tmp_path / "model.onnx", TABLE))


def test_its_logits_are_those_of_the_graph(network: OnnxNetwork) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS, "keep": mask.bool(), "index": torch.arange(2)}
    expected = torch.from_numpy(TABLE)[IDS] * mask.unsqueeze(2)
    assert run_network(network, batch).logits.equal(expected)
    assert FrozenTeacher(network, "bf16")(batch).logits.equal(expected)  # a copy of it, whose graph stays as it is
    assert network(input_ids=IDS).equal(torch.from_numpy(TABLE)[IDS])  # no mask: everything counts


def test_each_number_of_threads_has_a_session(network: OnnxNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            network(input_ids=IDS)
            used.append(network._session().get_session_options().intra_op_num_threads)
    finally:
        torch.set_num_threads(before)
    assert used == [1, 2, 1]
    fixed = OnnxNetwork(network.file, threads=3)
    assert fixed._session().get_session_options().intra_op_num_threads == 3


def test_another_process_opens_it_again(network: OnnxNetwork) -> None:
    again = pickle.loads(pickle.dumps(network))
    assert again(input_ids=IDS).equal(network(input_ids=IDS))
    assert copy.deepcopy(network) is network


def test_size_is_that_of_the_file_and_its_weights(network: OnnxNetwork) -> None:
    assert count_parameters(network) == (21, 0)  # all of it is a table
    assert profiling.size(network).bytes == pytest.approx(network.file.stat().st_size, abs=64)
    both = EnsembleNetwork([network, torch.nn.Linear(2, 2)])
    assert count_parameters(both) == (27, 6)


def test_packed_weights_count_singly(tmp_path: Path) -> None:
    columns, rows, block = 8, 32, 16
    node = helper.make_node(
        "MatMulNBits", ["floats", "packed", "scales"], ["logits"], domain="com.microsoft", K=rows, N=columns, bits=4,
        block_size=block,
    )  # fmt: skip
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["floats"]), node]
    network = OnnxNetwork(
        save(
            tmp_path / "packed.onnx", nodes, ["input_ids"], ["logits"],
            table=np.ones((5, rows), np.float32), packed=np.full((columns, rows // block, block // 2), 0x99, np.uint8),
            scales=np.ones(columns * rows // block, np.float32),
        )
    )  # fmt: skip
    assert network(input_ids=torch.tensor([[1, 2]])).shape == (1, 2, columns)
    assert count_parameters(network) == (5 * rows + columns * rows, columns * rows)


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    copies = [helper.make_node("Gather", ["table", "words"], ["logits"])]
    with pytest.raises(ConfigError, match=r"model.onnx reads words; expected nothing but input_ids"):
        OnnxNetwork(save(tmp_path / "model.onnx", copies, ["words"], ["logits"], table=TABLE))
    two = [helper.make_node("Gather", ["table", "input_ids"], [name]) for name in ("starts", "stops")]
    with pytest.raises(ConfigError, match="has the outputs starts, stops; expected one called logits"):
        OnnxNetwork(save(tmp_path / "two.onnx", two, ["input_ids"], ["starts", "stops"], table=TABLE))
    with pytest.raises(ConfigError, match="reads input_ids, and the data have pixel_values"):
        run_network(
            OnnxNetwork(write_tagger(tmp_path / "texts.onnx", TABLE)), {"pixel_values": torch.zeros(1, 1, 2, 2)}
        )


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09" * 50])
def test_a_damaged_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(KDError, match=r"model.onnx: onnxruntime cannot read it: [^\n]+$"):
        OnnxNetwork(path)


def test_weights_outside_its_folder_are_not_read(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.bin").write_bytes(TABLE.tobytes())
    keep_weights_in(write_tagger(inside / "model.onnx", TABLE), TABLE, "../secret.bin")
    with pytest.raises(KDError, match="escapes model directory"):
        OnnxNetwork(inside / "model.onnx")
    with pytest.raises(KDError, match="names weights outside of its folder"):
        weight_files(inside / "model.onnx")


def test_a_file_that_is_not_there_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tasks\.x\.teacher\.checkpoint=.*gone\.onnx: there is no such file$"):
        onnx_file(str(tmp_path / "gone.onnx"), "tasks.x.teacher.checkpoint")
    assert onnx_file(str(tmp_path)) is None


def test_weights_in_files_beside_it_count_as_its_own(tmp_path: Path) -> None:
    keep_weights_in(write_tagger(tmp_path / "model.onnx", TABLE), TABLE, "weights.bin")
    with pytest.raises(KDError, match=r"keeps weights in weights\.bin, which is not beside it"):
        weight_files(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").write_bytes(TABLE.tobytes())
    assert weight_files(tmp_path / "model.onnx") == [tmp_path / "model.onnx", tmp_path / "weights.bin"]
    network = OnnxNetwork(tmp_path / "model.onnx")
    assert network(input_ids=IDS).equal(torch.from_numpy(TABLE)[IDS])
    assert profiling.size(network).bytes >= network.file.stat().st_size + TABLE.nbytes


@pytest.mark.parametrize("ids", [[[1, 2, 99]], [[-100, 0, 1]]])
def test_a_batch_that_it_cannot_compute_is_one_line(network: OnnxNetwork, ids: list[list[int]]) -> None:
    with pytest.raises(KDError, match=r"model.onnx cannot compute input_ids of shape \[1, 3\]: [^\n]+$"):
        network(input_ids=torch.tensor(ids))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_extra_one_line_names_it(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tagger(tmp_path / "model.onnx", TABLE)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"needs onnx and onnxruntime: pip install 'kd-lightning\[export\]'"):
        weight_files(path) if package == "onnx" else OnnxNetwork(path)
