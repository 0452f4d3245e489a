"""A run whose student learns adapters: killed and resumed, compared with text alone, exported whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kd_lightning.cli.export import main
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.prepare import new_networks
from kd_lightning.pipeline.stages import plan
from kd_lightning.training.run_folder import load_run
from tests import forks
from tests.end_to_end.test_causal_lm import overrides
from tests.runtime.test_processes import torchrun

pytest.importorskip("peft", reason="the extra `lm` is not installed")

__all__ = ["overrides"]  # a fixture
KILL = "+callbacks.kill={_target_: tests.killer.KillAt, stage: distill}"


@pytest.fixture
def settings(overrides: list[str], tmp_path: Path) -> list[str]:
    """A checkpoint of Hugging Face teaches the adapters of another one."""
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    for name, layers in (("large", 2), ("small", 1)):
        torch.manual_seed(layers)
        network = causal_lm_small(len(tokenizer), 32, hidden_size=16, num_layers=layers, num_heads=2).network
        network.save_pretrained(tmp_path / name)
        write_tokenizer(tokenizer, tmp_path / name)
    kept = [one for one in overrides if not one.startswith(("data.tokenizer", "model@", "teacher.network", "student"))]
    return [
        *kept, f"teacher.checkpoint={tmp_path / 'large'}", "stages=[distill]", "model@student=causal_lm_lora",
        f"student.name={tmp_path / 'small'}", "student.r=2", "student.dropout=0.3", "trainer.max_steps=12",
        "checkpoint_every_n_steps=4", "teacher.cache=off",
    ]  # fmt: skip


def test_text_alone_trains_the_same_adapters_from_the_same_start(
    composed: Callable[..., DictConfig], settings: list[str]
) -> None:
    run = Run(composed(*settings, "stages=[baseline,distill]"), Console(file=StringIO()))
    baseline, distilled = (new_networks(run, stage)[0].state_dict() for stage in plan(run))
    assert any("lora_A" in name for name in baseline)
    assert baseline.keys() == distilled.keys()
    assert all(torch.equal(baseline[name], distilled[name]) for name in baseline)


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(settings: list[str], tmp_path: Path) -> None:
    """As one process with their batches together; from each checkpoint of theirs adapters alone go on."""
    home = {"KD_LIGHTNING_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    same = ["student.dropout=0"]
    given = [one for one in settings if not one.startswith(("run_dir=", "student.dropout="))] + same
    one = forks.command("kd-train", *given, f"run_dir={tmp_path / 'one'}", cwd=tmp_path, environment=home)
    assert one.returncode == 0, one.stderr
    halves = ["trainer=ddp", "trainer.precision=32-true", "data.batch_size=2", f"run_dir={tmp_path / 'two'}"]
    environment = {**os.environ, **home}
    killed = torchrun(environment | {"KILL_AT_STEP": "6"}, *given, *halves, KILL)
    assert killed.returncode != 0
    folder = tmp_path / "two" / "seed_0" / "distill"
    checkpoint = torch.load(folder / "checkpoints" / "resume.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all("lora_" in name for name in checkpoint["state_dict"])
    two = torchrun(environment | {"KILL_AT_STEP": "-1"}, *given, *halves, KILL)
    assert two.returncode == 0, two.stderr
    alone, together = (load_file(tmp_path / run / "seed_0/distill/model.safetensors") for run in ("one", "two"))
    assert alone.keys() == together.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-3, atol=1e-5)
    assert any(name.endswith("lora_B.default.weight") and weight.any() for name, weight in together.items())


def test_killed_and_resumed_from_adapters_alone_it_is_the_same_and_exported_whole(
    settings: list[str], tmp_path: Path
) -> None:
    def kd_train(run: str, kill_at: int) -> Path:
        given = [one for one in settings if not one.startswith("run_dir=")]
        environment = {
            "KD_LIGHTNING_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
            "KILL_AT_STEP": str(kill_at),
        }
        result = forks.command(
            "kd-train", *given, KILL, f"run_dir={tmp_path / run}", cwd=tmp_path, environment=environment
        )
        assert result.returncode == (0 if kill_at < 0 else -signal.SIGKILL), result.stderr
        return tmp_path / run / "seed_0" / "distill"

    whole = kd_train("whole", -1)
    killed = kd_train("killed", 6)
    checkpoint = torch.load(killed / "checkpoints" / "resume.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert not (killed / "stage.json").exists()
    kd_train("killed", -1)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.endswith("lora_B.default.weight") and weight.any() for name, weight in ours.items())
    base = load_file(tmp_path / "small" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(ours[f"network.{name}.base_layer.weight"], base[f"{name}.weight"]), "the base was trained"

    main([str(tmp_path / "whole"), "--format", "huggingface", "--out", str(tmp_path / "out")])
    network, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(network(ids).logits, load_run(tmp_path / "whole").network(ids).logits)
    assert not any("lora" in key for key in load_file(tmp_path / "out" / "model.safetensors"))
