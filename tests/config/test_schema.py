"""The keys of a configuration: every one has a type and a doc, and a mistake is refused in one line that names it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args

import pytest
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config import schema
from kd_lightning.config.instantiate import conf_dir, to_dict
from kd_lightning.config.parsing import docs
from kd_lightning.config.schema import (
    OUTPUTS,
    FinetuneConfig,
    GeneratedConfig,
    OnPolicyConfig,
    RunConfig,
    TaskConfig,
    TeacherConfig,
)
from kd_lightning.config.values import Range, check_value, words
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers import ensemble, frozen
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.training.loss_balancing import POLICIES

Composed = Callable[..., DictConfig]
KINDS = (RunConfig, TeacherConfig, OnPolicyConfig, GeneratedConfig, FinetuneConfig, TaskConfig)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_doc(kind: type) -> None:
    assert list(docs(kind)) == [one.name for one in fields(kind)]
    assert all(text.endswith(".") and len(text) > 12 for text in docs(kind).values())


def test_the_keys_are_those_of_the_configuration(composed: Composed) -> None:
    cfg = to_dict(composed())
    assert {one.name for one in fields(RunConfig)} == set(cfg)
    assert {one.name for one in fields(TeacherConfig)} == set(cfg["teacher"])
    assert {one.name for one in fields(OnPolicyConfig)} == set(cfg["on_policy"])
    assert {one.name for one in fields(GeneratedConfig)} == set(cfg["generated"])
    assert {one.name for one in fields(FinetuneConfig)} == set(cfg["finetune"])


def test_choices_are_those_of_the_classes_that_take_them() -> None:
    assert get_args(schema.Precision) == get_args(frozen.Precision)
    assert get_args(schema.Combine) == get_args(ensemble.Combine)
    assert get_args(schema.Balance) == tuple(POLICIES)
    for dtype in get_args(schema.StoredDtype):
        assert Storage(dtype, None).dtype == dtype


@pytest.mark.parametrize("experiment", [None, *sorted(p.stem for p in (conf_dir() / "experiment").glob("*.yaml"))])
def test_a_composed_configuration_is_parsed_and_given_back(composed: Composed, experiment: str | None) -> None:
    composition = composed(*([f"experiment={experiment}"] if experiment else []))
    cfg = RunConfig.parse(composition)
    plain = cfg.as_dict()
    assert RunConfig.parse(plain) == cfg
    assert plain == to_dict(composition) | {"tasks": plain["tasks"]}
    assert plain == to_dict(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(plain)))), "as config.yaml keeps it"


def test_a_configuration_does_not_change(composed: Composed) -> None:
    composition = composed()
    cfg = RunConfig.parse(composition)
    with pytest.raises(FrozenInstanceError):
        cfg.seed = 2  # type: ignore[misc]
    cfg.as_dict()["trainer"]["max_epochs"] = 100
    assert cfg.trainer == to_dict(composition.trainer)


MISTAKES = [
    (["+temprature=4"], "temprature: there is no such key; did you mean 'temperature'?"),
    (["+teacher.bath_size=8"], "teacher.bath_size: there is no such key; did you mean 'batch_size'"),
    (["+tasks.a.wieght=2"], "tasks.a.wieght: there is no such key; did you mean 'weight'?"),
    (["+tasks.a.teacher.bath_size=8"], "tasks.a.teacher.bath_size: there is no such key; did you mean 'batch_size'"),
    (["+tasks.a.teacher.batch_size=0"], "tasks.a.teacher.batch_size=0 must be at least 1"),
    (["+tasks.a.teacher.cache=maybe"], "tasks.a.teacher.cache='maybe' is neither a mode nor a path"),
    (["+tasks.a.weight=-2"], "tasks.a.weight=-2 must be at least 0"),
    (["+tasks.a=2"], "tasks.a=2 is no group of keys"),
    (["finetune=2"], "finetune=2 is no group of keys"),
    (["~seeds"], "seeds was removed (~seeds), and no run can do without it"),
    (["~teacher.seed"], "teacher.seed was removed (~teacher.seed), and no run can do without it"),
    (["~student"], "student was removed (~student), and no run can do without it"),
    (["teacher.batch_size=abc"], "teacher.batch_size='abc' is not a whole number, at least 1"),
    (["teacher.batch_size='8'"], "teacher.batch_size='8' is not a whole number"),
    (["teacher.batch_size=2.5"], "teacher.batch_size=2.5 is not a whole number"),
    (["teacher.batch_size=null"], "teacher.batch_size needs a value: a whole number, at least 1"),
    (["teacher.validations=0"], "teacher.validations=0 must be at least 1"),
    (["teacher.cache_top_k=0"], "teacher.cache_top_k=0 must be at least 1"),
    (["teacher.ema=1"], "teacher.ema=1 must be at least 0 and below 1"),
    (["teacher.precision=fp16"], "teacher.precision='fp16' is not one of float32, bf16, float16, 8bit, int8-dynamic"),
    (
        ["teacher.weights=[1,much]"],
        "teacher.weights=[1, 'much'] is not a list of numbers or one of learned",
    ),
    (["teacher.checkpoint=[]"], "teacher.checkpoint=[] names no teacher"),
    (["teacher.cache=maybe"], "teacher.cache='maybe' is neither a mode nor a path"),
    (["teacher.cache=of"], "did you mean 'off'?"),
    (["finetune.lr=abc"], "finetune.lr='abc' is not a number"),
    (["finetune.lr=-1"], "finetune.lr=-1 must be at least 0"),
    (["compile=1"], "compile=1 is not true or false"),
    (["seed=-1"], "seed=-1 must be at least 0"),
    (["seed=true"], "seed=True is not a whole number"),
    (["seeds=0"], "seeds=0 must be at least 1"),
    (
        ["stages=[teacher,distil]"],
        "stages[1]='distil' is not one of teacher, baseline, distill, finetune; did you",
    ),
    (["stages=distill"], "stages='distill' is not a list of teacher, baseline, distill, finetune"),
    (["stages=[distill,teacher]"], "in this order"),
    (["stages=[]"], "must be some of"),
    (["stages=[teacher,finetune]"], "needs distill before it"),
    (["resume=perhaps"], "resume='perhaps' is not one of auto, never"),
    (["balance=gradnrm"], "balance='gradnrm' is not one of fixed, unit_initial, gradnorm, uncertainty; did you mean"),
    (["temperature=warm"], "temperature='warm' is not a number or a schedule"),
    (["temperature=inf"], "temperature=inf must be a finite number"),
    (["name=/tmp/x"], "name=/tmp/x: a name is that of a folder inside runs/"),
    (["peers=[bilstm]"], "peers[0]='bilstm' is not a group of keys"),
    (["data=text_files"], "data.train_file needs a value: kd-train data.train_file=..."),
]


@pytest.mark.parametrize(("overrides", "says"), MISTAKES, ids=[" ".join(overrides) for overrides, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_key(composed: Composed, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        RunConfig.parse(composed(*overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("choice", ["data", "model@student", "model@teacher.network", "optimizer@teacher.optimizer"])
def test_a_text_in_place_of_a_group_says_how_one_is_chosen(composed: Composed, choice: str) -> None:
    cfg, key = to_dict(composed()), choice.rpartition("@")[2]
    group, _, name = key.rpartition(".")
    (cfg[group] if group else cfg)[name] = "bilstm"
    says = f"{key}='bilstm' is no group of keys; to choose one: {choice}=NAME"
    with pytest.raises(ConfigError, match=f"^{re.escape(says)}$"):
        RunConfig.parse(cfg)


def test_what_follows_from_the_keys(composed: Composed) -> None:
    cfg = RunConfig.parse(composed("seed=3", "seeds=2", "teacher.seeds=4", "finetune.lr=0.5", "finetune.max_epochs=7"))
    assert cfg.seed_list == [3, 4]
    assert cfg.teacher.number == 4
    assert cfg.teacher_trainer == {**cfg.trainer, **cfg.teacher.trainer}
    assert cfg.finetune_optimizer == {**cfg.optimizer, "lr": 0.5}
    assert (cfg.finetune_trainer["max_epochs"], cfg.finetune_trainer["max_steps"]) == (7, -1)
    assert cfg.teacher.chosen(OUTPUTS) == {
        "precision": cfg.teacher.precision, "cache_dtype": "float32", "cache_top_k": None, "cache_samples": None,
        "combine": "probabilities", "weights": None, "folds": 1, "calibrate": "auto",
    }  # fmt: skip
    several = RunConfig.parse(composed("teacher.checkpoint=[a,b]", "teacher.cache=require")).teacher
    assert several.number == 2
    alone = several.of_assistant()
    assert (alone.number, alone.checkpoint, alone.cache) == (1, None, "auto")
    assert RunConfig.parse(composed("teacher.folds=5")).teacher.number == 5


def test_a_task_overrides_the_teacher_of_all(composed: Composed) -> None:
    cfg = RunConfig.parse(composed("experiment=multi_task", "+tasks.domain.weight=2"))
    assert cfg.losses == {
        "distillation": cfg.distillation, "tasks.rating.distillation": cfg.tasks["rating"].distillation,
    }  # fmt: skip
    domain, rating, sentiment = (cfg.of_task(name) for name in ("domain", "rating", "sentiment"))
    assert sentiment.teacher == cfg.teacher
    assert domain.teacher.trainer["max_steps"] == 200
    assert domain.teacher.network == {**cfg.teacher.network, "frozen_layers": 2}
    assert (domain.stages, domain.tasks, domain.run_dir) == (["teacher"], {}, f"{cfg.run_dir}/tasks/domain")
    assert domain.data["labels"] == "domain"
    assert domain.distillation == cfg.distillation
    assert rating.distillation == cfg.tasks["rating"].distillation
    assert RunConfig.parse(rating.as_dict()) == rating


def test_a_task_whose_teacher_is_another_class_takes_none_of_the_arguments(composed: Composed) -> None:
    teacher = RunConfig.parse(composed()).teacher
    own: dict[str, Any] = {"network": {"_target_": "my.Network", "width": 3}, "seeds": 2}
    assert teacher.overridden(own).network == own["network"]
    assert teacher.overridden(own).number == 2


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        (list[float] | None, "a list of numbers or null"),
        (tuple[float, float], "a list of 2 (a number and a number)"),
        (list[dict[str, Any]], "a list of groups of keys"),
        (schema.Schedule, "a number or a schedule of kd_lightning.schedules"),
        (schema.Count, "a whole number, at least 1"),
        (schema.Combine, "one of probabilities, logits"),
    ],
)
def test_types_in_words(expected: Any, says: str) -> None:
    assert words(expected) == says


def test_a_range_holds_its_lower_end_only() -> None:
    assert 0 in Range(0, 1)
    assert 1 not in Range(0, 1)
    check_value("key", None, int | None)
    check_value("key", [1, 2.5], list[float])
    with pytest.raises(ConfigError, match=re.escape("key[1]='x' is not a number")):
        check_value("key", [1, "x"], list[float])


def test_the_schema_is_read_without_torch() -> None:
    program = "import sys, kd_lightning.config.schema; print({'torch', 'jsonargparse'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "set()"
