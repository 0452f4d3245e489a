"""Configurations that are wrong, or strange: refused in one line before anything is trained, or run to the end."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from faults.kills import prepared
from faults.process import command, forked
from faults.toy import SETTINGS, new_place, write_sentences

VALUES: dict[str, tuple[str, ...]] = {
    "number": ("null", "nan", "inf", "-inf", "-1", "0", "2", "0.5", "1e9", "1e-30", "text", "true", "[1,2]", "{a:1}",
               "''", "10000000000000000000000"),
    "switch": ("null", "2", "maybe", "[]", "nan", "-1", "''"),
    "text": ("null", "''", "no_such_thing", "7", "[a,b]", "{a:1}", "nan", "true", "a/b", "'${nothing}'"),
    "list": ("null", "text", "[]", "[no_such_thing]", "7", "{a:1}", "[null]", "[[]]", "[-1]"),
    "nothing": ("text", "-1", "[]", "{a:1}", "nan", "no_such_file.csv", "true"),
}  # fmt: skip
"""What a key is set to, by the kind of value that it has."""
ENDLESS = re.compile(r"(layers|seeds|folds|epochs|steps|views|view_sets|num_workers|devices|num_nodes)$")
"""Keys for which a huge number is a legal wish for much work."""
SYNTAX = (
    "stages=[teacher", "alpha='0.5", 'name="a', "=3", "alpha==0.5", "alpha", "++", "+", "~", "~nothing", "~student",
    "~teacher", "~data", "~trainer", "alpha=0.5=3", "temperature=${", "temperature=${nothing}", "name=a b", "name=a,b",
    "data={a", "data=}", "stages=]", "teacher.network={_target_:}", "optimizer.betas=[0.9", "@=1", "model@=bilstm",
    "model@student=", "model@nowhere=bilstm", "student=bilstm", "model=bilstm", "optimizer@student=adamw", "data=null",
    "student=null", "teacher=null", "trainer=null", "distillation=null", "optimizer=null", "logger=null", "--nothing",
    "callbacks=null", "hydra=null", "name=a:b", "name=(a)", "name=a\\", "name=%", "stages=teacher,distill", "a b c=1",
    "alpha=0.5 temperature", "data.train_file=", "name=", "run_dir=", "name={", "stages=[teacher,]", "alpha=[0.5",
    "teacher.seeds=two", "student._target_=", "student._target_=os.system", "student._target_=nothing.Nothing",
    "optimizer._target_=torch.optim.Nothing", "distillation.terms=null", "distillation.weights=null", "+x.y.z",
    "experiment=nothing", "sweep=nothing", "logger=nothing", "callbacks=nothing", "hydra/launcher=nothing",
)  # fmt: skip
GROUPS = (
    "model@student=cnn", "model@student=resnet", "model@student=simkd", "model@student=from_run",
    "model@student=minilm", "model@student=custom", "model@student=simkd_cnn", "model@teacher.network=cnn",
    "model@teacher.network=resnet", "model@teacher.network=from_teacher", "model@teacher.network=from_run",
    "data=image_folder", "data=multi_task", "data=hf_dataset", "trainer=gpu", "trainer=fsdp", "trainer=fsdp2",
    "scheduler=nothing", "optimizer=nothing", "model@student=nothing", "data=nothing", "trainer=nothing",
    "distillation=nothing", "experiment=deep_mutual", "experiment=byot", "experiment=teacher_assistant",
    "experiment=born_again", "experiment=mean_teacher", "experiment=ensemble", "experiment=annealing_kd",
    "experiment=tinybert", "experiment=multi_task", "experiment=fashion_resnet", "experiment=reviews_tiny",
    "logger=wandb", "logger=mlflow",
)  # fmt: skip
TOGETHER = (
    "teacher.checkpoint=nowhere", "teacher.checkpoint=[nowhere]", "teacher.checkpoint=DATA", "teacher.checkpoint=[]",
    "teacher.device=cuda:1", "teacher.device=tpu", "teacher.ema=0.99", "teacher.ema=2", "teacher.cache=http://x/y",
    "teacher.cache=s3://x/y", "teacher.cache=/proc/x", "teacher.cache=DATA", "teacher.cache=require",
    "teacher.cache=''", "teacher.seeds=0", "teacher.folds=1000", "teacher.weights=[1,2,3]", "teacher.weights=learned",
    "teacher.folds=0", "teacher.features=[hidden[9]]", "teacher.features=[nothing]", "teacher.cache_top_k=0",
    "teacher.cache_top_k=99", "teacher.sharded=true", "teacher.precision=float16", "teacher.precision=int8-dynamic",
    "teacher.combine=median", "stages=[]", "stages=[distill]", "stages=[finetune]", "stages=[distill,teacher]",
    "stages=[teacher,teacher]", "stages=[baseline,finetune]", "peers=[${student}]", "peers=[{}]", "assistants=[{}]",
    "assistants=[7]", "+trainer.fast_dev_run=true", "+trainer.limit_val_batches=0", "+trainer.overfit_batches=1",
    "trainer.max_steps=0", "+trainer.limit_train_batches=0", "+trainer.limit_train_batches=1",
    "+trainer.max_time=nonsense", "+trainer.enable_checkpointing=false", "+trainer.gradient_clip_algorithm=nothing",
    "trainer.gradient_clip_val=-1", "trainer.accumulate_grad_batches=5", "trainer.accumulate_grad_batches=1000",
    "trainer.accumulate_grad_batches=0", "trainer.devices=0", "trainer.devices=ten", "trainer.devices=[]",
    "trainer.accelerator=gpu", "trainer.max_epochs=0", "trainer.accelerator=nothing", "trainer.precision=8",
    "trainer.precision=64-true", "trainer.num_nodes=0", "+trainer.strategy=nothing", "+trainer.val_check_interval=3",
    "+trainer.callbacks=[]", "+trainer.logger=true", "+trainer.detect_anomaly=true", "+trainer.deterministic=true",
    "+trainer.profiler=nothing", "+trainer.plugins=[1]", "+trainer.min_steps=1000", "+trainer.limit_val_batches=0.0",
    "+trainer.reload_dataloaders_every_n_epochs=-1", "+trainer.benchmark=maybe", "+trainer.inference_mode=false",
    "+trainer.sync_batchnorm=true", "trainer.max_steps=-2", "data.validation_fraction=0.9",
    "data.validation_fraction=1", "data.test_fraction=0", "data.validation_file=DATA", "data.test_file=nowhere.csv",
    "data.validation_file=nowhere.csv", "data.train_file=nowhere.csv", "data.train_file=/",
    "data.transfer=[nowhere.txt]", "data.transfer=[hf:]", "data.tokenizer=nowhere", "data.tokenizer=wordpiece:0",
    "data.tokenizer=wordpiece:x", "data.tokenizer=wordpiece:", "data.text_column=txt", "data.label_column=lable",
    "data.text_pair_column=label", "data.text_column=label", "data.class_names=[a,b,c]", "data.class_names=[food]",
    "data.class_names=[food,food,sport]", "data.format=xml", "data.format=parquet", "data.encoding=nothing",
    "data.encoding=utf-16", "data.max_length=1", "data.max_length=65", "data.max_length=2", "data.batch_size=100000",
    "data.teacher_tokenizer=nowhere", "data.views=1", "data.pool_ratio=0.1", "data.replace_probability=0.5",
    "data.mask_probability=2", "data.replace_by=nothing", "data.crop_share=0", "data.cache_dir=/proc/x",
    "data.cache_dir=DATA", "run_dir=/proc/x", "run_dir=DATA", "run_dir=/", "name=LONG", "shared_dir=DATA",
    "shared_dir=/proc/x", "resume=never", "resume=always", "balance=nothing", "balance=gradnorm", "compile=maybe",
    "balance=uncertainty", "temperature=0", "temperature=-1", "temperature={_target_:kd_lightning.schedules.Linear}",
    "temperature={_target_: kd_lightning.schedules.Linear, start: 4, end: 0}", "alpha=2", "alpha=-0.5",
    "alpha={_target_: kd_lightning.schedules.Linear, start: 2, end: 0}", "distillation.weights.kd=nan",
    "distillation.weights.kd=-1", "distillation.weights={}", "distillation.weights={nothing:1}", "validations=100000",
    "+distillation.terms.more={_target_:torch.nn.ReLU}", "optimizer.lr=-1", "optimizer.lr=null", "optimizer.lr=inf",
    "optimizer.weight_decay=nan", "optimizer.betas=[2,3]", "optimizer.betas=[0.9]", "teacher.optimizer.lr=nan",
    "scheduler.warmup=2", "scheduler.warmup=-1", "teacher.scheduler.warmup=7", "student.num_layers=0",
    "student.dropout=2", "student.dropout=-1", "student.pooling=median", "student.hidden_size=0",
    "student.hidden_size=-8", "teacher.network.num_heads=3", "teacher.network.hidden_act=nothing",
    "teacher.network.max_length=4", "teacher.network.num_layers=0", "teacher.network.hidden_size=17",
    "teacher.trainer.max_steps=0", "teacher.trainer.precision=nothing", "teacher.trainer.nothing=1",
    "+teacher.trainer.limit_val_batches=0", "finetune.lr=-1", "finetune.max_epochs=0", "logger.csv.name=/",
    "logger.csv.flush_logs_every_n_steps=0", "callbacks.learning_rate.logging_interval=year",
    "+callbacks.x={_target_:torch.nn.ReLU}", "+callbacks.x=7",
    "+callbacks.x={_target_:lightning.pytorch.callbacks.EarlyStopping}", "+logger.x={_target_:nothing.Nothing}",
    "checkpoint_every_n_steps=0", "seed=-1", "seeds=0", "teacher.seed=0",
)  # fmt: skip
"""Values that are wrong in themselves or beside the others; some are legal, and have to run to the end."""
HEAD = b"text,label\n"
FILES: dict[str, bytes] = {
    "empty": b"",
    "heading only": HEAD,
    "no heading": b"goal team,sport\nsoup,food\n" * 40,
    "one class": HEAD + b"goal team,sport\n" * 60,
    "one row": HEAD + b"goal team,sport\n",
    "a row of each": HEAD + b"a,b\nc,d\ne,f\n",
    "latin-1": HEAD + "soupé,fooé\n".encode("latin-1") * 40,
    "empty texts": HEAD + b",sport\n,food\n" * 40,
    "empty labels": HEAD + b"goal,\nsoup,\n" * 40,
    "null bytes": HEAD + b"go\x00al,sport\nsoup,food\n" * 40,
    "binary": bytes(range(256)) * 40,
    "no such columns": b"sentence,class\n" + b"goal,sport\nsoup,food\n" * 40,
    "semicolons": b"text;label\n" + b"a;b\nc;d\n" * 40,
    "too many fields": HEAD + b"goal,sport,7,8\nsoup,food\n" * 40,
    "open quote": HEAD + b'"goal,sport\n' * 40,
    "all the same": HEAD + b"goal,sport\ngoal,food\n" * 40,
    "labels as numbers": HEAD + b"goal,1.0\nsoup,2\n" * 40,
    "only -100": HEAD + b"goal,-100\nsoup,-100\n" * 40,
    "a class of one": HEAD + b"goal,a\nsoup,b\n" * 40 + b"it,c\n",
    "no tokens": HEAD + "\u200b,sport\n\u200b\u200b,food\n".encode() * 40,
    "huge field": HEAD + b"x" * 200_000 + b",sport\nsoup,food\n" * 40,
    "nan labels": HEAD + b"goal,nan\nsoup,1\n" * 40,
    "utf-16": "text,label\ngoal,sport\nsoup,food\n".encode("utf-16") * 20,
    "json": b'[{"text": "goal", "label": "sport"}]',
    "twice a column": b"text,text,label\n" + b"a,goal,sport\nb,soup,food\n" * 40,
}


def trials(folder: Path, seed: int, count: int, quick: bool = False) -> list[Callable[[], dict[str, Any]]]:
    """Return so many configurations, drawn by the seed."""
    data = write_sentences(folder / "toy.csv", rows=90)
    for name, content in FILES.items():
        (folder / f"{name}.csv").write_bytes(content)
    draw = random.Random(f"{seed} configurations")
    keys = forked(partial(_keys, str(data)))
    fixed = [*SYNTAX, *GROUPS, *TOGETHER, *(f"data.train_file='{folder / name}.csv'" for name in FILES)]
    draw.shuffle(fixed)
    several = _drawn(draw, keys)
    found, seen = list[Callable[[], dict[str, Any]]](), set[str]()
    while len(found) < count:
        given = fixed.pop() if fixed and draw.random() < 0.6 else next(several)
        if given not in seen:
            seen.add(given)
            given = given.replace("DATA", str(data)).replace("LONG", "a" * 300)
            found.append(partial(trial, folder / f"configuration-{len(found)}", data, given))
    return found


def _keys(data: str) -> dict[str, Any]:
    """Return every key of the run's configuration with its value."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from kd_lightning.config.instantiate import conf_dir
    from kd_lightning.pipeline.resolvers import register_resolvers

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=[*SETTINGS, f"data.train_file={data}"])
    return dict(_flat(OmegaConf.to_container(cfg, resolve=True)))


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            yield from _flat(value, name)
        else:
            yield name, value


def _drawn(draw: random.Random, keys: dict[str, Any]) -> Iterator[str]:
    """Yield configurations without end: a key with another value, or a key misspelt."""
    names = [name for name in keys if not name.startswith("logger.") and name not in ("data.train_file", "run_dir")]
    while True:
        name = draw.choice(names)
        if draw.random() < 0.15:
            yield f"{_misspelt(draw, name)}={keys[name]}"
            continue
        value = draw.choice(VALUES[_kind(keys[name])])
        if not (value.startswith(("1e9", "10000")) and ENDLESS.search(name)):
            yield f"{name}={value}"


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "switch"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "list"


def _misspelt(draw: random.Random, name: str) -> str:
    """Exchange, drop or double a letter."""
    at = draw.choice([i for i, letter in enumerate(name[:-1]) if letter.isalpha() and name[i + 1].isalpha()])
    return (
        name[:at] + draw.choice((name[at + 1] + name[at], name[at + 1], name[at] * 2 + name[at + 1])) + name[at + 2 :]
    )


def trial(root: Path, data: Path, given: str) -> dict[str, Any]:
    """Train with one setting more, and see whether that is refused, how, and when."""
    place = new_place(root)
    line = ["kd-train", *SETTINGS, f"data.train_file={data}", "run_dir=runs/run"]
    ended = command([*line, given], place.work, place.home, prepare=prepared, limit=60)
    begun = [str(file.relative_to(root)) for file in root.rglob("settings.json")]
    said = {
        "group": "configurations", "what": "kd-train", "how": given, "command": f"kd-train ... {given}",
        "first": {"code": ended.code, "err": ended.err[-2000:]},
    }  # fmt: skip
    left = sorted(str(file.relative_to(root)) for file in (root / "work").rglob("*"))
    if ended.code is None:
        return said | {"outcome": "hung"}
    if ended.crashed or ended.code < 0:
        return said | {"outcome": "traceback", "detail": ended.last}
    if ended.code == 0:
        return said | {"outcome": "valid"}
    if begun:
        outcome = "diverged" if "diverged" in ended.last else "late"
    elif not ended.in_one_line:
        outcome = "at length"
    else:
        outcome = "left a folder" if left else "refused in a line"
    return said | {"outcome": outcome, "detail": ended.last}
