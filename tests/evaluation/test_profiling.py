from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_lightning.evaluation import profiling
from kd_lightning.evaluation.profiling import environment, measure_latency, measure_throughput, single_examples, size
from kd_lightning.types import Batch


class Recorder(nn.Module):
    """Writes down who was called, in which mode and on what; may take its time."""

    def __init__(self, name: str, calls: list[tuple[str, int]], seconds: float = 0.0) -> None:
        super().__init__()
        self.name, self.calls, self.seconds = name, calls, seconds
        self.linear = nn.Linear(1, 2)
        self.frozen = nn.Dropout().eval()
        self.states: list[tuple[bool, bool, int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        time.sleep(self.seconds)
        self.calls.append((self.name, int(input_ids[0, 0])))
        self.states.append((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        return self.linear(input_ids[:, :1].float())


def batch_of(*first: int, length: int = 4) -> Batch:
    ids = torch.tensor(first)[:, None].expand(-1, length).clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(len(first)).long()}


def test_networks_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    networks = {"a": Recorder("a", calls), "b": Recorder("b", calls)}
    measured = measure_latency(networks, [batch_of(1), batch_of(2)], rounds=2, warmup=1)
    in_turn = [(name, example) for example in (1, 2) for name in ("a", "b")]
    assert calls == 2 * [call for call in in_turn for _ in range(2)], "each timed call follows one of the same network"
    assert [latency.calls for latency in measured.values()] == [4, 4]


def test_latency_is_in_milliseconds_and_tells_slow_from_fast() -> None:
    networks = {"slow": Recorder("slow", [], 0.02), "fast": Recorder("fast", [], 0.0)}
    measured = measure_latency(networks, [batch_of(i) for i in range(5)])
    assert 20 <= measured["slow"].p50 <= measured["slow"].p95
    assert measured["fast"].p50 < measured["slow"].p50
    assert measured["slow"].device == "cpu"


def test_throughput_counts_examples_per_second() -> None:
    measured = measure_throughput({"slow": Recorder("slow", [], 0.05)}, [batch_of(*range(8)), batch_of(1, 2)])["slow"]
    assert measured.batch_size == 8
    assert 0 < measured.examples_per_second <= 10 / 0.1


def test_mode_and_threads_inside_and_afterwards() -> None:
    network = Recorder("a", []).train()
    network.frozen.eval()
    before = torch.get_num_threads()
    measured = measure_latency({"a": network}, [batch_of(1)], threads=1)
    assert set(network.states) == {(False, True, 1)}
    assert measured["a"].threads == 1
    assert torch.get_num_threads() == before
    assert network.training
    assert network.linear.training
    assert not network.frozen.training


def test_modes_are_restored_after_an_error() -> None:
    network = nn.Module().train()  # has no forward
    with pytest.raises(Exception):  # noqa: B017, PT011 - whichever error the network raises
        measure_latency({"a": network}, [batch_of(1)])
    assert network.training


def test_each_network_may_have_its_own_tokens() -> None:
    calls: list[tuple[str, int]] = []
    networks = {"a": Recorder("a", calls), "b": Recorder("b", calls)}
    measure_latency(networks, {"a": [batch_of(1)], "b": [batch_of(9)]}, warmup=0)
    assert calls == [("a", 1), ("b", 9)]


def test_wrong_batches_are_refused() -> None:
    networks = {"a": Recorder("a", []), "b": Recorder("b", [])}
    with pytest.raises(ValueError, match="single_examples"):
        measure_latency(networks, [batch_of(1, 2)])
    with pytest.raises(ValueError, match="empty"):
        measure_throughput(networks, [])
    with pytest.raises(ValueError, match="no batches for b"):
        measure_latency(networks, {"a": [batch_of(1)]})
    with pytest.raises(ValueError, match="different length"):
        measure_latency(networks, {"a": [batch_of(1)], "b": [batch_of(1), batch_of(2)]})


def test_percentile_is_numpys() -> None:
    values = np.random.default_rng(0).random(37).tolist()
    assert profiling._percentile(values, 0.95) == pytest.approx(np.percentile(values, 95))
    assert profiling._percentile([3.0], 0.95) == 3.0


def test_single_examples_lose_their_padding() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "teacher_input_ids": torch.tensor([[1, 2], [0, 3]]),
        "teacher_attention_mask": torch.tensor([[1, 1], [0, 1]]),
        "labels": torch.tensor([0, 1]),
        "index": torch.tensor([10, 11]),
    }
    examples = single_examples([batch, batch], limit=3)
    assert len(examples) == 3
    assert {name: value.tolist() for name, value in examples[1].items()} == {
        "input_ids": [[8]],
        "attention_mask": [[1]],
        "teacher_input_ids": [[3]],
        "teacher_attention_mask": [[1]],
        "labels": [1],
        "index": [11],
    }


def test_images_pass_through_single_examples() -> None:
    examples = single_examples([{"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.tensor([0, 1])}])
    assert [tuple(example["pixel_values"].shape) for example in examples] == [(1, 3, 4, 4)] * 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 8)
        self.hidden = nn.Linear(8, 8)
        self.out = nn.Linear(8, 100, bias=False)
        self.out.weight = self.embedding.weight


def test_size_is_that_of_the_safetensors_file(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    measured = size(network)
    assert (measured.parameters, measured.parameters_without_embeddings) == (50, 10)
    assert measured.bytes == (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert size(network, tmp_path / "model.safetensors").bytes == 5


def test_tied_weights_are_counted_and_written_once() -> None:
    measured = size(Tied())
    assert measured.parameters == 100 * 8 + 8 * 8 + 8
    assert 4 * measured.parameters < measured.bytes < 4 * measured.parameters + 1000


def test_environment_is_plain_data() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__
    assert found["cores"] >= 1
    assert found["date"].endswith("+00:00")


def test_environment_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        profiling, "__file__", str(tmp_path / "site-packages" / "kd_lightning" / "evaluation" / "profiling.py")
    )
    assert environment()["git_commit"] is None


def test_environment_without_git_or_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "kd_lightning").mkdir()
    monkeypatch.setattr(profiling, "__file__", str(tmp_path / "kd_lightning" / "evaluation" / "profiling.py"))

    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.setattr(profiling, "_version", lambda package: None)
    assert environment()["git_commit"] is None
