from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.instantiate import build, conf_dir
from kd_lightning.pipeline.validation import check_folder, validate
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training import schedules
from kd_lightning.training.objective import Objective
from kd_lightning.training.run_folder import finish_stage, write_config

Composed = Callable[..., DictConfig]
CONF = conf_dir()
NAMELESS = ("hf", "timm", "custom", "from_run", "causal_lm", "causal_lm_lora")
"""Networks that need a name, a folder or a class."""


@pytest.mark.parametrize("experiment", [None, *sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))])
def test_every_experiment_composes_and_validates(composed: Composed, experiment: str | None) -> None:
    cfg = composed(*([f"experiment={experiment}"] if experiment else []))
    validate(cfg)
    assert cfg.name == (experiment or "run")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "override",
    [f"{group}={name}" for group in ("optimizer", "scheduler", "callbacks") for name in options(group)]
    + ["distillation=soft_target"]
    + [f"logger={name}" for name in options("logger")]
    + [f"model@student={name}" for name in options("model") if name not in NAMELESS]
    + ["trainer=cpu", "trainer=ddp"],
)
def test_every_option_validates(composed: Composed, override: str) -> None:
    cfg = composed(override)
    package = override.removeprefix("logger=")
    if package in ("mlflow", "wandb") and importlib.util.find_spec(package) is None:
        with pytest.raises(ConfigError, match=rf"logger\.{package}: .* needs a package that is missing"):
            validate(cfg)
        return
    validate(cfg)
    group = override.partition("=")[0]
    assert cfg[group.partition("@")[2] or group], "the choice fills its node"


def test_every_distillation_validates(composed: Composed) -> None:
    """As the file stands; that each trains, tests/config/test_catalog.py says."""
    cfg = composed()
    for name in options("distillation"):
        cfg.distillation = OmegaConf.load(CONF / "distillation" / f"{name}.yaml")
        validate(cfg)


def test_temperature_and_alpha_reach_the_objective(composed: Composed) -> None:
    """Every other file is built, and trained with, in tests/config/test_catalog.py."""
    objective = build(composed("distillation=soft_target", "temperature=3", "alpha=0.25").distillation)
    assert isinstance(objective, Objective)
    assert objective.weights == {"ce": 0.75, "kd": 0.25}
    assert objective.settings(0.0) == {"weight/ce": 0.75, "weight/kd": 0.25, "kd/temperature": 3}


def test_temperature_and_alpha_may_be_schedules(composed: Composed) -> None:
    linear = "{_target_: kd_lightning.schedules.Linear, start: 1.0, end: 0.5}"
    warm = "{_target_: kd_lightning.schedules.Step, values: [8, 2], boundaries: [0.5]}"
    cfg = composed(f"alpha={linear}", f"temperature={warm}")
    validate(cfg)
    objective = build(cfg.distillation)
    assert isinstance(objective.weights["ce"], schedules.OneMinus)
    assert objective.settings(0.5) == {"weight/ce": 0.25, "weight/kd": 0.75, "kd/temperature": 2}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["temperature=0"], "temperature=0 must be above 0"),
        (["optimizer.lr=null"], "optimizer.lr=null is not a number"),
        (["+optimizer.betas=[0.9]"], "optimizer.betas=[0.9] is not a list of 2"),
        (["distillation.weights.kd=-1"], "distillation.weights.kd must not be negative"),
        (["teacher.trainer.max_epochs=many"], "teacher.trainer.max_epochs='many' is not"),
        (["+teacher.trainer.max_epoch=3"], "takes no 'max_epoch'; did you mean 'max_epochs'"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 must be at least 1"),
        (["data.batch_size=null"], "data.batch_size=null is not a whole number"),
        (["+trainer.callbacks=[]"], "trainer.callbacks is set by the pipeline"),
        (["trainer.devices=2"], "use trainer=ddp (ddp_spawn) on one machine"),
        (["temperature={_target_: kd_lightning.schedules.Linear, start: 4, end: 0}"], "temperature=0 must be above 0"),
        (["alpha={_target_: kd_lightning.schedules.Linear, start: 0.5, end: 2}"], "must be between 0"),
        (["alpha=1.5"], "alpha=1.5 must be between 0"),
        (["trainer.precision=16-mixed"], "16-mixed needs a GPU"),
        (["trainer.max_epochs=-1"], "trainer.max_epochs or trainer.max_steps"),
        (["trainer.max_epochs=many"], "trainer.max_epochs='many' is not"),
        (["+trainer.max_epoch=3"], "lightning.Trainer takes no 'max_epoch'; did you mean 'max_epochs'"),
        (["model@student=bilstm", "+student.hidden=3"], "takes no 'hidden'; did you mean 'hidden_size'"),
        (["model@student=bilstm", "student.hidden_size=wide"], "student.hidden_size='wide' is not a whole number"),
        (["model@student=bilstm", "student.pooling=middle"], "student.pooling='middle' is not"),
        (["distillation.terms.kd._target_=kd_lightning.losses.SoftTarget"], "did you mean 'SoftTargetLoss'"),
        (["+distillation.terms.kd.temprature=3"], "distillation.terms.kd.temprature"),
        (["model@student=hf"], "student.name needs a value"),
        (["model@student=custom"], "student._target_ needs a value"),
        (["data.batch_size=big"], "data.batch_size='big' is not a whole number"),
        (["+data.views_count=2"], "data.views_count"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_with_the_key_and_the_mend(composed: Composed, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        validate(composed(*overrides))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["gpu", "fsdp"])
def test_a_gpu_trainer_without_a_gpu_is_refused(composed: Composed, name: str) -> None:
    with pytest.raises(ConfigError, match="needs a GPU, and torch finds none here"):
        validate(composed(f"trainer={name}"))


def test_tokenizers_follow_from_the_networks(composed: Composed, tmp_path: Path) -> None:
    def tokenizers(*overrides: str) -> tuple[str, str | None]:
        data = composed(*overrides).data
        return data.tokenizer, data.teacher_tokenizer

    assert tokenizers() == ("minilm", "minilm")
    assert tokenizers("model@teacher.network=lstm_teacher") == ("minilm", None)
    assert tokenizers("model@teacher.network=hf", "teacher.network.name=bert") == ("bert", "bert")
    assert tokenizers("model@student=hf", "student.name=other") == ("other", "minilm")
    assert tokenizers("teacher.checkpoint=finished") == ("finished", "finished")
    saved = tmp_path / "teacher" / "tokenizer"
    saved.mkdir(parents=True)
    assert tokenizers(f"teacher.checkpoint={tmp_path}") == (str(saved), str(saved))


def test_build_fills_in_only_what_is_not_set(composed: Composed) -> None:
    node = OmegaConf.create({"_target_": "torch.nn.Linear", "in_features": 3})
    layer = build(node, out_features=5, in_features=9, vocab_size=7)
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (3, 5)


def test_a_missing_extra_is_one_line(composed: Composed, tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(ConfigError, match=r"WandbLogger needs a package that is missing: .*wandb"):
        build(composed("logger=wandb").logger.wandb, save_dir=str(tmp_path))


def test_a_users_mistake_inside_a_constructor_is_not_wrapped() -> None:
    node = {"_target_": "kd_lightning.schedules.Linear", "start": 1.0, "end": 0.0, "until": 2.0}
    with pytest.raises(ConfigError, match="share of the training"):
        build(node)


def test_a_finished_run_of_other_keys_or_settings_is_refused_in_a_line(composed: Composed, tmp_path: Path) -> None:
    cfg = validate(composed("seeds=3"))
    kept = cfg.as_dict() | {"seeds": 1}
    write_config(tmp_path, OmegaConf.to_yaml(kept | {"alpha": 0.5}))
    finish_stage(tmp_path / "seed_0/baseline", {})
    check_folder(tmp_path, cfg)  # it was killed before its distillation
    finish_stage(tmp_path / "seed_0/distill", {})
    write_config(tmp_path, OmegaConf.to_yaml(kept | {"logger": {}, "resume": "never"}))
    check_folder(tmp_path, cfg)  # more seeds are welcome, and what decides no result may differ
    write_config(tmp_path, OmegaConf.to_yaml(kept | {"alpha": 0.5, "stages": ["teacher"]}))
    check_folder(tmp_path, cfg)  # its report compares no students
    write_config(tmp_path, OmegaConf.to_yaml(kept | {"alpha": 0.5}))
    with pytest.raises(ConfigError, match=r"finished run with other settings \(alpha was 0.5, now 0.9\)"):
        check_folder(tmp_path, cfg)
    write_config(tmp_path, OmegaConf.to_yaml(kept | {"temprature": 3}))
    with pytest.raises(ConfigError, match=r"holds a run of another version \(temprature: there is no such key"):
        check_folder(tmp_path, cfg)
