"""A bad configuration ends in one line that names its key, before anything is trained, and leaves no file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict
from rich.console import Console

from kd_lightning.cli.hydra_errors import explain
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.preflight import check_monitors
from kd_lightning.pipeline.run import train_all
from kd_lightning.pipeline.validation import validate
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.fingerprints import read_json
from kd_lightning.tasks import task_of
from kd_lightning.training import fit
from kd_lightning.training.stage import Training, planned_steps, validate_every
from tests.conftest import tiny_overrides, write_toy_csv

Composed = Callable[..., DictConfig]

# One override a line, and after " -> " what the line must name where that is not the key that was given.
REFUSED = """
optimizer.lr=-1
optimizer.lr=null
optimizer.lr=nan
optimizer.lr=inf
optimizer.lr=fast
optimizer.lr=1e400
optimizer.weight_decay=-1
optimizer.weight_decay=nan
optimizer.weight_decay=inf
optimizer.weight_decay=null
+optimizer.betas=[0.9,1.5] -> optimizer
+optimizer.betas=[-1,0.9] -> optimizer
+optimizer.betas=[0.9]
+optimizer.betas=null
+optimizer.betas=[nan,0.9]
+optimizer.eps=-1 -> optimizer
+optimizer.eps=nan
+optimizer.momentum=0.9
+optimizer.foreach=true -> optimizer
optimizer._target_=torch.optim.AdamX -> AdamX
optimizer._target_=torch.nn.Linear -> optimizer
optimizer._target_=3
optimizer._partial_=false -> optimizer
teacher.optimizer=null
teacher.optimizer.lr=-1
teacher.optimizer.lr=nan
teacher.optimizer.lr=inf
teacher.optimizer.lr=null
teacher.optimizer.weight_decay=-0.1
+teacher.optimizer.betas=[2,3] -> teacher.optimizer
finetune.lr=-1
finetune.lr=nan
finetune.lr=inf
finetune.lr=null
finetune.max_epochs=1.5
distillation.weights.kd=nan
distillation.weights.kd=inf
distillation.weights.kd=-1
distillation.weights.kd=null
distillation.terms.kd=null
distillation.terms=null -> distillation
~distillation.terms.kd -> distillation
~distillation.weights.kd -> distillation
+distillation.weights.extra=1 -> distillation
distillation.terms.kd.temperature=nan
~distillation
distillation._target_=torch.nn.Linear -> distillation
temperature=nan
temperature=inf
alpha=nan
alpha=-0.1
trainer.accumulate_grad_batches=0
trainer.accumulate_grad_batches=-1
trainer.accumulate_grad_batches=null
+trainer.fast_dev_run=true
+trainer.fast_dev_run=3
+trainer.limit_val_batches=0
+trainer.limit_val_batches=0.001
+trainer.limit_val_batches=nan
+trainer.limit_train_batches=0
+trainer.overfit_batches=1
+trainer.overfit_batches=0.5
+trainer.max_time=soon
+trainer.barebones=true
+trainer.enable_checkpointing=false
+trainer.min_steps=100000
+trainer.reload_dataloaders_every_n_epochs=1
+trainer.profiler=fast -> trainer
+trainer.gradient_clip_algorithm=median -> gradient_clip_algorithm
+trainer.deterministic=perhaps
+trainer.plugins=[{_target_: builtins.dict}] -> trainer
+trainer.strategy=ddq -> strategy='ddq'
+trainer.strategy=null
+trainer.strategy=deepspeed -> trainer
trainer.gradient_clip_val=-1
trainer.gradient_clip_val=nan
trainer.gradient_clip_val=inf
trainer.log_every_n_steps=-1
trainer.precision=8
trainer.devices=ten
logger.csv.flush_logs_every_n_steps=0
trainer.devices=0 -> devices=0
trainer.devices=-2 -> devices
trainer.devices=null
trainer.devices=1.5
trainer.devices=[] -> devices=[]
trainer.num_nodes=0
trainer.num_nodes=-1
trainer.num_nodes=two
trainer.accelerator=quantum -> accelerator='quantum'
trainer.accelerator=null
trainer.max_epochs=0
trainer.max_epochs=nan
trainer.max_steps=inf
trainer.max_steps=99999999999999999999999
trainer._target_=lightning.Fabric -> trainer
+teacher.trainer.gradient_clip_val=-1
+teacher.trainer.accumulate_grad_batches=0
+teacher.trainer.limit_val_batches=0
+teacher.trainer.fast_dev_run=true
scheduler.warmup=2
scheduler.warmup=-1
scheduler.warmup=nan
scheduler.warmup=null
~scheduler
scheduler._partial_=false -> scheduler
scheduler._target_=torch.optim.lr_scheduler.StepLR -> scheduler
teacher.scheduler.warmup=2
teacher.scheduler=null
~student
student=null
student=bilstm
student._target_=3
student.num_layers=null
student.hidden_size=wide
student.dropout=nan
student.num_layers=0
student.hidden_size=-8
student.dropout=1.5
teacher.network.num_layers=0
student.pooling=null
~teacher
teacher.device=cuda:99
teacher.device=meta
teacher.device=gpu
teacher.device=xpu:0
teacher.cache=http://host/x
teacher.cache=s3://bucket/x
teacher.cache=/proc/x/y
teacher.cache=/dev/null
teacher.cache=null
teacher.cache_dtype=int8
teacher.precision=int4
teacher.checkpoint=[]
teacher.ema=nan
teacher.weights=[1] -> teacher.weights
teacher.seeds=0
teacher.folds=0
~data
seed=-1
seed=nan
seed=99999999999999999999999
data.seed=-1
data.split_seed=-1
run_dir=null
run_dir=/proc/x
run_dir=/dev/null
tasks=null
tasks=[1]
~tasks
~finetune
callbacks=3
+callbacks.foo=3
+callbacks.foo=null
+callbacks.foo={}
+callbacks.foo={_target_: torch.nn.ReLU}
+callbacks.foo={_target_: lightning.pytorch.callbacks.EarlyStopping}
callbacks.learning_rate.logging_interval=year
+logger.foo=3
+logger.foo={_target_: torch.nn.ReLU}
validations=0
checkpoint_every_n_steps=null
stages=null
stages=teacher
balance=null
resume=null
assistants=[{}]
assistants=3
peers=null
"""


def refusal(cfg: DictConfig, override: str) -> str:
    """Return the line that one override ends in."""
    cfg = copy.deepcopy(cfg)
    try:
        with open_dict(cfg) if override.startswith("+") else nullcontext():
            ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides([override]), cfg)
        validate(cfg)
    except KDError as error:
        return str(error)
    except Exception as error:  # Hydra's, or a defect, of which `explain` knows nothing
        return str(explain(error, [override]) or f"Traceback: {error!r}")
    return "nothing: it was accepted"


def test_a_bad_value_is_one_line_with_its_key(composed: Composed, tmp_path: Path) -> None:
    cases = [line.partition(" -> ")[::2] for line in REFUSED.strip().splitlines()]
    assert len(cases) > 130
    cfg = composed(*tiny_overrides(tmp_path / "no.csv", tmp_path / "run"))
    wrong = []
    for override, named in cases:
        line = refusal(cfg, override)
        key = named or override.lstrip("+~").partition("=")[0]
        if key not in line or line.startswith(("Traceback", "nothing")) or "\n" in line:
            wrong.append(f"{override}: {line}")
    assert not wrong, "\n".join(wrong)
    assert list(tmp_path.iterdir()) == []


def reached(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the line that a run ends in which must not come to its first training."""

    def fail(stage: Training, *others: object) -> None:
        raise AssertionError(f"came to {stage.name}")

    monkeypatch.setattr(fit, "_fit", fail)
    with pytest.raises(KDError) as refused:
        train_all(Run(cfg, Console(quiet=True)))
    return str(refused.value)


STOP = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: "
LATER = [
    (["+student.num_classes=1"], "student: num_classes=1, and the data have 3"),
    (["+student.num_classes=7"], "student: num_classes=7"),
    (["+student.vocab_size=3"], "student"),
    (["distillation.terms.kd.temperature=-1"], "distillation: temperature"),
    (["+student.pad_token_id=100000"], "student: pad_token_id=100000"),
    (["teacher.cache_top_k=3"], "teacher.cache_top_k=3"),
    (["teacher.folds=1000"], "teacher.folds=1000"),
    (["teacher.features=['hidden[99]']"], "hidden[99]"),
    (["model@student=cnn"], "student"),
    (["model@teacher.network=cnn"], "teacher"),
    (["model@student=text_cnn", "student.kernel_sizes=[0]"], "kernel_sizes"),
    (["model@student=transformer", "student.num_heads=3"], "num_heads"),
    (["model@student=transformer", "student.hidden_act=foo"], "hidden_act"),
    (["model@student=transformer", "student.num_layers=0"], "num_layers"),
    (["model@student=embeddings_from_teacher", "student.scale=-1"], "scale"),
    (["distillation=minilm"], "attention"),
    (["optimizer.lr=1e300"], "student: a step at lr=1e+300 makes weights that are no numbers"),
    (["teacher.optimizer.lr=1e300"], "teacher: a step at lr=1e+300 makes weights that are no numbers"),
    (
        [f"{STOP}val/acuracy}}"],
        "callbacks.stop.monitor=val/acuracy is logged by no stage; did you mean 'val/accuracy'",
    ),
    ([f"{STOP}val/agreement}}"], "callbacks.stop.monitor=val/agreement is logged by no stage"),
]


@pytest.mark.parametrize(("overrides", "says"), LATER, ids=lambda value: str(value))
def test_what_does_not_fit_the_data_is_refused_before_any_training(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], says: str
) -> None:
    line = reached(composed(*without_replaced(tiny(tmp_path), overrides), *overrides), monkeypatch)
    assert says in line
    assert "\n" not in line
    assert not (tmp_path / "run").exists()


def tiny(tmp_path: Path) -> list[str]:
    return tiny_overrides(write_toy_csv(tmp_path / "toy.csv", 60), tmp_path / "run")


def without_replaced(base: list[str], overrides: list[str]) -> list[str]:
    """Leave out the keys of networks that the overrides choose anew."""
    chosen = [override.partition("=")[0] for override in overrides if override.startswith("model@")]
    keys = [key.removeprefix("model@") + "." for key in chosen]
    return [b for b in base if not b.startswith((*keys, *(f"{key}=" for key in chosen)))]


class Logs(L.Callback):
    """A user's callback, which may log what others watch."""


def test_what_is_logged_can_be_watched() -> None:
    several = task_of({"domain": 4, "rating": "regression"})
    stop = {"_target_": "lightning.pytorch.callbacks.EarlyStopping"}
    for name in ("train/loss", "val/loss", "val/average", "val/domain/accuracy", "val/rating/rmse"):
        check_monitors({"stop": {**stop, "monitor": name}}, several)
    own = {"stop": {**stop, "monitor": "val/accuracy"}}
    with pytest.raises(ConfigError, match="val/domain/accuracy"):
        check_monitors(own, several)
    check_monitors({**own, "logs": {"_target_": "tests.pipeline.test_preflight.Logs"}}, several)


@pytest.mark.parametrize(("batches", "steps", "validations", "accumulate", "every"), [
    (12, 10, 2, 1, 5), (12, 10, 3, 4, 12), (15, 8, 2, 4, 15), (15, 8, 100, 4, 1), (3, 5, 1, 1000, 15),
])  # fmt: skip
def test_every_training_is_looked_at(batches: int, steps: int, validations: int, accumulate: int, every: int) -> None:
    trainer = {"accumulate_grad_batches": accumulate}
    found = validate_every(batches, steps, validations, trainer)
    assert found == every
    epochs, rest = divmod(
        steps, planned_steps({**trainer, "max_epochs": 1}, labelled=batches, batch_size=1, examples=0)
    )
    assert found <= epochs * batches + rest * accumulate  # the first look comes before the end


def test_an_accumulation_need_not_divide_an_epoch(composed: Composed, tmp_path: Path, own_home: Path) -> None:
    overrides = [*tiny(tmp_path), "trainer.accumulate_grad_batches=2", "stages=[baseline]", "distillation=labels_only"]
    pipeline = Run(composed(*overrides), Console(quiet=True))
    batches = len(pipeline.data.train_dataloader())
    assert batches % 2, "the test is of a rest"
    train_all(pipeline)
    record = read_json(tmp_path / "run" / "seed_0" / "baseline" / "stage.json")
    assert record["steps"] == 2 * (batches // 2 + 1)
    assert record["best_step"] > 0
