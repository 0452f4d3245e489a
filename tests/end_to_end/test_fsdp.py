"""Sharded weights: which layers are put together at a time, what `trainer=fsdp` is, what is refused, a whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from kd_lightning.cli.lightning_config import files
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.transformer import transformer
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.validation import validate
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.sharding import full, shard
from kd_lightning.tasks import Classification
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.distillation import SupervisedModule
from kd_lightning.training.run_folder import load_run
from tests.conftest import tiny_overrides, write_toy_csv
from tests.ranks import SGD
from tests.runtime.test_processes import ROOT, torchrun

PROCESSES = 4


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Four processes of which three are not there: what this one keeps is right, what it is sent is not."""
    dist.init_process_group("fake", rank=0, world_size=PROCESSES, store=FakeStore())
    yield init_device_mesh("cpu", (PROCESSES,))
    dist.destroy_process_group()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the first of two processes that torchrun started."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


def small() -> torch.nn.Module:
    return transformer(vocab_size=40, num_classes=3, pad_token_id=0, hidden_size=8, intermediate_size=16, num_layers=3)


def units(network: torch.nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, FSDPModule)]


def test_each_layer_is_a_unit_and_the_rest_is_one(mesh: DeviceMesh) -> None:
    network = small()
    shapes = {name: weight.shape for name, weight in network.named_parameters()}
    shard(network, mesh)
    assert units(network) == ["", *(f"bert.encoder.layer.{i}" for i in range(3))]
    for name, weight in network.named_parameters():
        assert isinstance(weight, DTensor), name
        assert weight.shape == shapes[name]
        rows = shapes[name][0]
        assert weight.to_local().shape[0] == min(-(-rows // PROCESSES), rows), name


def test_layers_of_recurrent_networks_are_units_too(mesh: DeviceMesh) -> None:
    network = BiLSTM(num_classes=3, vocab_size=40, pad_token_id=0, embedding_size=8, hidden_size=8, num_layers=2)
    shard(network, mesh)
    assert units(network) == ["", *(f"{way}_layers.{i}" for way in ("forward", "backward") for i in range(2))]


def test_a_second_time_nothing_is_sharded(mesh: DeviceMesh) -> None:
    network = small()
    shard(network, mesh)
    before = dict(network.named_parameters())
    shard(network, mesh)
    assert all(weight is before[name] for name, weight in network.named_parameters())


def test_what_surrounds_a_sharded_network_is_sharded_apart(mesh: DeviceMesh) -> None:
    """Projectors may be wider than the network (`precision=bf16-true`), and a unit has one precision."""
    module = SupervisedModule(small().bfloat16(), SGD, task=Classification(3))
    module.extra = torch.nn.Linear(3, 8)
    shard(module.network, mesh, together=True)
    shard(module, mesh)
    assert units(module) == ["", "network", *(f"network.bert.encoder.layer.{i}" for i in range(3))]


def test_a_frozen_teacher_keeps_its_part_in_its_precision(mesh: DeviceMesh) -> None:
    network = small()
    teacher = FrozenTeacher(network, "bf16", sharded=True)
    kinds = {name: weight.dtype for name, weight in teacher.named_parameters()}
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}
    teacher.shard(mesh)
    for name, weight in teacher.named_parameters():
        assert isinstance(weight, DTensor)
        assert not weight.requires_grad
        assert weight.dtype == kinds[name]
    assert not any(isinstance(weight, DTensor) for weight in network.parameters()), "the given network stays whole"


def test_full_leaves_what_is_whole() -> None:
    assert full(3.0) == 3.0
    weight = torch.ones(2)
    assert full(weight) is weight


@pytest.mark.parametrize("options", [{"precision": "int8-dynamic"}, {"compile": True}], ids=str)
def test_teachers_whose_weights_are_no_parameters_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be shared; set teacher\.sharded=false"):
        FrozenTeacher(small(), sharded=True, **options)  # type: ignore[arg-type]


def test_fsdp_is_fsdp2_on_gpus_in_16_bits(composed: Callable[..., DictConfig]) -> None:
    on_gpus, anywhere = composed("trainer=fsdp").trainer, composed("trainer=fsdp2").trainer
    assert (on_gpus.accelerator, on_gpus.precision) == ("gpu", "bf16-mixed")
    assert {key for key in on_gpus if on_gpus[key] != anywhere[key]} == {"accelerator", "precision"}
    eight = composed("trainer=fsdp", "trainer.devices=4", "trainer.num_nodes=2").trainer
    assert eight.strategy.data_parallel_size == 8


SHARED = ["trainer=fsdp2", "teacher.sharded=true", "teacher.cache=off"]


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer=fsdp2", "trainer.strategy=fsdp"], "trainer.strategy=fsdp is torch's older sharding"),
        (
            ["trainer=ddp", "trainer.strategy={_target_: lightning.pytorch.strategies.FSDPStrategy}"],
            "FSDPStrategy is torch's older sharding",
        ),
        (["trainer=cpu", *SHARED[1:]], "teacher.sharded=true shares .* with trainer=fsdp or trainer=fsdp2"),
        (["trainer=ddp", *SHARED[1:]], "teacher.sharded=true shares .* with trainer=fsdp or trainer=fsdp2"),
        ([*SHARED, "trainer.devices=1"], "on several trainer.devices"),
        (SHARED[:2], "teacher.sharded=true with teacher.cache=auto: .* set teacher.cache=off"),
        ([*SHARED, "teacher.checkpoint=[a,b]"], "an ensemble's members are not shared out"),
        ([*SHARED, "teacher.seeds=2"], "an ensemble's members are not shared out"),
        ([*SHARED, "teacher.device=cpu"], "teacher.device=cpu would be all of it"),
        ([*SHARED, "teacher.ema=0.9", "stages=[distill]"], r"leave out .* \(teacher.sharded\)"),
        ([*SHARED, "experiment=multi_task"], "data.tasks: each task has a teacher of its own.*teacher.sharded"),
        (["trainer=fsdp2", "balance=gradnorm"], "trainer=fsdp shards them"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    overrides: list[str], message: str, composed: Callable[..., DictConfig]
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(composed(*overrides))


@pytest.mark.usefixtures("launched")
def test_files_for_kd_cli_have_no_shared_teacher(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="kd-cli loads whole teachers"):
        list(files(Run(composed(*tiny_overrides(toy_csv, tmp_path / "run"), *SHARED))))


@pytest.mark.slow
def test_a_run_with_student_and_teacher_sharded_leaves_whole_networks(tmp_path: Path) -> None:
    """What one process with the same global batch comes to: teacher, baseline, distilled student and their report."""
    csv_file = write_toy_csv(tmp_path / "toy.csv")
    environment = {**os.environ, "KD_LIGHTNING_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def overrides(name: str, processes: int) -> list[str]:
        sizes = [f"data.batch_size={32 // processes}", f"teacher.batch_size={64 // processes}"]
        same = ["student.dropout=0", "teacher.network.dropout=0", "teacher.cache=off", "checkpoint_every_n_steps=5"]
        return [*tiny_overrides(csv_file, tmp_path / name), *sizes, *same]

    train = [sys.executable, "-m", "kd_lightning.cli.train", *overrides("one", 1)]
    one = subprocess.run(train, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert one.returncode == 0, one.stderr
    two = torchrun(environment, *overrides("two", 2), "trainer=fsdp2", "teacher.sharded=true")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("report:") == 1, "one of the processes speaks"
    assert "Warning" not in two.stderr
    for stage in ("teacher", "seed_0/baseline", "seed_0/distill"):
        whole, saved = (load_file(tmp_path / name / stage / "model.safetensors") for name in ("one", "two"))
        assert saved.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=2e-5)
        network = load_run(tmp_path / "two" / stage).network
        assert all(torch.equal(weight, saved[name]) for name, weight in network.state_dict().items())
    reports = [json.loads((tmp_path / name / "report.json").read_text())["models"] for name in ("one", "two")]
    for model, found in reports[0].items():
        for score, value in found["test"].items():
            assert reports[1][model]["test"][score]["mean"] == pytest.approx(value["mean"], abs=1e-4), score
