"""The experiments with language models: each composes, and trains two steps with tiny networks on a few texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.cli.cache import main as kd_cache
from kd_lightning.config.instantiate import conf_dir
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import build_caches, train_all
from tests.data.corpus.texts import made

Composed = Callable[..., DictConfig]
YEARS = (1790, 1791, 1792, 1794, 1799)


def language_model(folder: Path, vocabulary: int, texts: list[str], positions: int = 64) -> Path:
    """Write a tiny teacher with its own tokenizer, in Hugging Face's form."""
    tokenizer = load_tokenizer(f"bpe:{vocabulary}", texts)
    torch.manual_seed(0)
    network = causal_lm_small(len(tokenizer), positions, hidden_size=16, num_layers=2, num_heads=2).network
    network.save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def shrunk(tmp_path: Path, own_home: Path) -> list[str]:
    """What makes an experiment small: a teacher, texts of some years, short blocks, two steps."""
    texts = made(20)
    for year in YEARS:
        path = tmp_path / "years" / f"{year}_somebody_n.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(made(4, seed=year)))
    language_model(tmp_path / "teacher", 280, texts)
    return [
        f"data.folder={tmp_path / 'years'}", f"teacher.checkpoint={tmp_path / 'teacher'}", "data.block_size=16",
        "data.batch_size=2", "trainer.max_epochs=-1", "trainer.max_steps=2",
        "teacher.precision=float32", "trainer.precision=32-true", "validations=1", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


SHRUNK: dict[str, list[str]] = {
    "lm_sotu": [],
    "lm_live": [],
    "lm_quickstart": ["data.eval_tokens=40"],
    "lm_chat": ["data.chat_template=plain", "data.block_size=64"],
    "lm_draft": [],
    "lm_cross_tokenizer": ["student.hidden_size=8", "student.num_layers=1", "student.num_heads=2"],
    "lm_sequence": ["generated.prompt_tokens=4", "generated.new_tokens=4"],
    "lm_on_policy": ["on_policy.prompt_tokens=4", "on_policy.new_tokens=4"],
}


def test_no_experiment_is_left_out() -> None:
    assert {path.stem for path in (conf_dir() / "experiment").glob("lm_*.yaml")} == {*SHRUNK}


NARROW = ["student.layers=1", "student.width=8"]
GOES_ON = {"lm_on_policy"}
"""From the student of lm_sotu."""


def small(experiment: str, shrunk: list[str], composed: Composed, tmp_path: Path) -> list[str]:
    """Return an experiment with small networks, after what it reads is made."""
    own = [*SHRUNK[experiment], *([] if "student.num_heads=2" in SHRUNK[experiment] else NARROW)]
    if experiment == "lm_chat":
        turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the people"}]
        lines = [json.dumps({"messages": [{**turns[0], "content": f"{i} who?"}, turns[1]]}) for i in range(20)]
        (tmp_path / "years" / "conversations.jsonl").write_text("\n".join(lines))
    if experiment == "lm_draft":
        own += [f"data.tokenizer={tmp_path / 'teacher'}"]
    if experiment == "lm_cross_tokenizer":
        own += [f"data.tokenizer=trimmed:{language_model(tmp_path / 'other', 300, made(9, seed=5))}"]
    if experiment in GOES_ON:
        given = [*shrunk, *NARROW, f"run_dir={tmp_path / 'first'}", "stages=[distill]"]
        train_all(Run(composed("experiment=lm_sotu", *given), Console(file=StringIO())))
        own = [*SHRUNK[experiment], f"student.checkpoint={tmp_path / 'first'}"]
    return [f"experiment={experiment}", *shrunk, *own]


@pytest.mark.parametrize("experiment", SHRUNK)
def test_every_experiment_runs(composed: Composed, shrunk: list[str], tmp_path: Path, experiment: str) -> None:
    """Its stages, losses and schemes are its own."""
    given = small(experiment, shrunk, composed, tmp_path)
    output = StringIO()
    run = Run(composed(*given), Console(file=output, width=200))
    train_all(run)
    record: dict[str, Any] = json.loads((tmp_path / "run/seed_0/distill/stage.json").read_text())
    assert record["steps"] == 2
    if experiment == "lm_cross_tokenizer":
        report = compare(run, "kd-train ...")
        assert set(report["models"]) == {"untrained", "baseline", "distilled"}, "perplexities do not compare"
        assert re.search(
            r"The teacher has tokens of its own\. .*: bits per byte \d\.\d+\.", " ".join(output.getvalue().split())
        )


def test_what_a_teacher_of_other_tokens_predicts_is_stored_once_for_all_seeds(
    composed: Composed, shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`kd cache` builds, shows and verifies it, and a training that may not run the teacher reads it."""
    given = small("lm_cross_tokenizer", shrunk, composed, tmp_path)
    (folder,) = build_caches(Run(composed(*given), Console(file=StringIO())))
    for command in ("info", "verify"):
        with pytest.raises(SystemExit) as ended:
            kd_cache([command, str(folder)])
        assert not ended.value.code
    assert re.search(r"top 64.*next_log_prob 1 per token, float16", " ".join(capsys.readouterr().out.split()))
    run = Run(
        composed(*given, "stages=[distill]", "seeds=2", "teacher.cache=require"), Console(file=StringIO())
    )  # fmt: skip
    train_all(run)
    records = [json.loads((tmp_path / f"run/seed_{seed}/distill/stage.json").read_text()) for seed in (0, 1)]
    assert [record["steps"] for record in records] == [2, 2]


def test_prompts_that_leave_no_room_are_no_trouble_to_the_report(
    composed: Composed, shrunk: list[str], tmp_path: Path
) -> None:
    """Conversations whose prompts fill more than half a block: nothing is timed, and all is scored."""
    given = small("lm_chat", shrunk, composed, tmp_path)
    lines = [{"prompt": f"{number} " + " ".join(made(1, number, (12, 12))), "response": "laws"} for number in range(20)]
    (tmp_path / "years" / "conversations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = Run(composed(*given, "stages=[distill]"), Console(file=StringIO()))
    train_all(run)
    models = compare(run, "kd-train ...")["models"]
    assert all(model["test"]["cross_entropy"]["mean"] > 0 for model in models.values())
    assert not any("generation" in model for model in models.values())


def test_conversations_are_learned_from_a_teacher_with_another_tokenizer(
    composed: Composed, shrunk: list[str], tmp_path: Path
) -> None:
    """Its spans alone are compared, and its report has the bits per byte of both."""
    small("lm_chat", shrunk, composed, tmp_path)
    given = [one for one in shrunk if not one.startswith(("data.folder", "data.block_size"))]
    own = language_model(tmp_path / "other", 300, made(9, seed=5))
    output = StringIO()
    run = Run(
        composed(
            *given, "data=chat", f"data.train_file={tmp_path / 'years' / 'conversations.jsonl'}",
            f"data.tokenizer={own}", "data.chat_template=plain", "data.block_size=64", "data.cross_tokenizer=true",
            "distillation=cross_tokenizer", "teacher.cache=off", "temperature=1", "model@student=causal_lm_small",
            "student.hidden_size=8", "student.num_layers=1", "student.num_heads=2", "stages=[distill]",
        ),
        Console(file=output, width=200),
    )  # fmt: skip
    train_all(run)
    compare(run, "kd-train ...")
    said = " ".join(output.getvalue().split())
    assert re.search(r"The teacher has tokens of its own\. .*: bits per byte \d+\.\d+\.", said)
