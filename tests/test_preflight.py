"""A bad configuration ends in one line that names its key, before anything is trained, and leaves no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning import training
from kd_lightning.checks import validate
from kd_lightning.errors import KDError
from kd_lightning.multitask import pipeline_of
from kd_lightning.training import planned_steps, validate_every
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
~optimizer.lr -> fused
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
distillation.weights.kd=-1 -> weights.kd
distillation.weights.kd=null
distillation.terms.kd=null
distillation.terms=null -> distillation
~distillation.terms.kd -> distillation
~distillation.weights.kd -> distillation
+distillation.weights.extra=1 -> distillation
distillation.terms.kd.temperature=nan
distillation.terms.kd.temperature=-1 -> distillation: temperature
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
+trainer.strategy=null -> strategy=None
+trainer.strategy=deepspeed -> trainer
trainer.gradient_clip_val=-1
trainer.gradient_clip_val=nan
trainer.gradient_clip_val=inf
trainer.log_every_n_steps=-1
trainer.precision=8
trainer.devices=ten
trainer.devices=0 -> devices=0
trainer.devices=-2 -> devices
trainer.devices=null
trainer.devices=1.5
trainer.devices=[] -> devices=[]
trainer.num_nodes=0
trainer.num_nodes=-1
trainer.num_nodes=two
trainer.accelerator=quantum -> accelerator='quantum'
trainer.accelerator=null -> accelerator=None
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


def bad(composed: Composed, overrides: list[str]) -> None:
    """Compose and check."""
    validate(composed(*overrides))
