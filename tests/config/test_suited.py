"""What is chosen where nothing is set: networks by data and goal, rates and precisions by network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.resolvers import fast_precision, is_faster_in_bfloat16
from kd_lightning.config.suited import OTHER

Composed = Callable[..., DictConfig]
CSV, FOLDER = ["data=text_files", "data.train_file=x.csv"], ["data=image_folder", "data.folder=x"]


@pytest.mark.parametrize(
    ("overrides", "student", "rate", "teacher_rate"),
    [
        (CSV, "embeddings_from_teacher", 2e-3, 1e-4),
        ([*CSV, "goal=fast"], "from_teacher", 3e-4, 1e-4),
        ([*CSV, "goal=accurate"], "from_teacher", 3e-4, 1e-4),
        ([*CSV, "model@student=bilstm"], "BiLSTM", 2e-3, 1e-4),
        ([*CSV, "model@teacher.network=hf", "teacher.network.name=x"], "embeddings_from_teacher", 2e-3, 5e-5),
        ([*CSV, "model@student.network=transformer", "student.scale=25"], "embeddings_from_teacher", 1e-3, 1e-4),
        ([*CSV, "optimizer.lr=0.5", "teacher.optimizer.lr=0.25"], "embeddings_from_teacher", 0.5, 0.25),
        ([*CSV, "optimizer=sgd"], "embeddings_from_teacher", 0.01, 1e-4),
        ([*CSV, "model@student=custom", "student._target_=my.Network"], "Network", OTHER.rate, 1e-4),
        (["data=masked_text", "data.train_file=x"], "masked_lm_small", 1e-3, 1e-4),
        (["data=masked_text", "data.train_file=x", "goal=fast"], "masked_lm_from_teacher", 3e-4, 1e-4),
        (FOLDER, "CNN", 1e-2, 5e-3),
        ([*FOLDER, "goal=accurate"], "ResNet", 5e-3, 5e-3),
        (["experiment=quickstart"], "BiLSTM", 2e-3, 1e-4),
        (["experiment=reviews_3layer", *CSV], "from_teacher", 3e-4, 5e-5),
        (["experiment=quickstart", "goal=fast"], "BiLSTM", 2e-3, 1e-4),
    ],
)
def test_networks_and_rates(
    composed: Composed, overrides: list[str], student: str, rate: float, teacher_rate: float
) -> None:
    cfg = composed(*overrides)
    assert cfg.student._target_.rpartition(".")[2] == student
    assert (cfg.optimizer.lr, cfg.teacher.optimizer.lr) == (rate, teacher_rate)


def test_a_goal_says_how_many_layers_of_the_teacher(composed: Composed) -> None:
    shares = [composed(*CSV, f"goal={goal}").student.layers for goal in ("fast", "accurate")]
    assert 0 < shares[0] < shares[1] < 1


def test_precision_is_fast_where_it_helps(composed: Composed) -> None:
    assert composed(*CSV).trainer.precision == "32-true"
    assert composed(*CSV, "goal=fast").trainer.precision == fast_precision()
    assert composed(*CSV, "goal=fast", "trainer.precision=32-true").trainer.precision == "32-true"


@pytest.mark.parametrize(
    ("vendor", "flags", "faster"),
    [
        ("GenuineIntel", "avx2", False),
        ("GenuineIntel", "avx512_bf16 avx512_vnni", False),
        ("GenuineIntel", "amx_bf16 avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
        ("AuthenticAMD", "avx512_bf16", True),
    ],
)
def test_bfloat16_is_for_processors_that_gain_by_it(vendor: str, flags: str, faster: bool) -> None:
    assert is_faster_in_bfloat16(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags} ht") is faster


def test_transfer_sets_of_the_reviews_are_theirs_alone(composed: Composed) -> None:
    def transfer(*overrides: str) -> Any:
        return OmegaConf.to_container(composed(*overrides).data, resolve=True)["transfer"]  # type: ignore[index,call-overload]

    assert transfer("experiment=reviews_3layer") == ["amazon", "nyt", "tweets"]
    assert transfer("experiment=reviews_3layer", *CSV) == []
    assert transfer("experiment=reviews_3layer", *CSV, "data.transfer=[more.txt]") == ["more.txt"]
