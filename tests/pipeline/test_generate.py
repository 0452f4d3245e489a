"""The teacher's generated texts: drawn once, kept, gone on with after a kill, and distilled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.data import kept_texts
from kd_lightning.pipeline import generate
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.generate import add_texts
from kd_lightning.pipeline.run import build_caches, train_all
from kd_lightning.runtime import memoize
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.errors import CacheError, ConfigError
from kd_lightning.teachers import FrozenTeacher
from tests.data.corpus.texts import made, written
from tests.end_to_end.test_lm_experiments import language_model

Composed = Callable[..., DictConfig]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kept_texts, "PIECE", 4)
    memoize._KEPT.clear()
    yield
    memoize._KEPT.clear()


@pytest.fixture
def started(composed: Composed, tmp_path: Path, own_home: Path) -> Callable[..., Run]:
    """Return a run with a tiny teacher that generates."""
    texts = made(20)
    file = written(tmp_path, texts[:6])
    folder = language_model(tmp_path / "teacher", 280, texts)
    common = [
        "data=lm_text", f"data.train_file={file}", f"data.tokenizer={folder}", f"teacher.checkpoint={folder}",
        "data.block_size=16", "data.batch_size=4", "model@student=causal_lm_small", "student.hidden_size=8",
        "student.num_layers=1", "student.num_heads=2", "trainer.max_epochs=-1", "trainer.max_steps=2", "validations=1",
        "trainer.precision=32-true", "teacher.precision=float32", "distillation=sparse_kd", "temperature=1",
        "stages=[distill]", "generated.texts=1", "generated.prompt_tokens=3", "generated.new_tokens=5",
        "teacher.predict_batch_size=3",
    ]  # fmt: skip

    def start(*own: str, name: str = "run") -> Run:
        cfg = composed(*common, f"run_dir={tmp_path / name}", *own)
        return Run(cfg, Console(file=StringIO(), width=300))

    return start


def printed(run: Run) -> str:
    file: Any = run.console.file
    return str(file.getvalue())


def kept() -> list[tuple[list[int], list[int]]]:
    """Return all kept prompts, with what was generated."""
    found = []
    for path in sorted((home() / "generated").glob("*/0*.json")):
        for one in json.loads(path.read_text())["texts"]:
            found.append(tuple([int(token) for token in one[part].split()] for part in ("prompt", "new")))
    return found  # type: ignore[return-value]


def test_greedy_texts_are_the_teachers_likeliest_tokens(started: Callable[..., Run]) -> None:
    run = started()
    prompts, (end,) = run.data.prompts(3), {run.data.tokenizer_of("teacher").eos_token_id}  # type: ignore[attr-defined, union-attr]
    add_texts(run)
    network: Any = run.teacher.network
    assert [prompt for prompt, _ in kept()] == prompts
    for prompt, new in kept()[::5]:
        ids = list(prompt)
        while len(ids) < len(prompt) + 5 and ids[-1] != end:
            with torch.no_grad():
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        assert new == ids[len(prompt) :]
    assert (
        f"teacher  generated {len(prompts)} of {len(prompts)} texts, {sum(len(new) for _, new in kept())} tokens in"
        in (printed(run))
    )
    [settings] = (home() / "generated").glob("*/settings.json")
    assert json.loads(settings.read_text())["new_tokens"] == 5


def test_a_killed_generation_goes_on_and_a_damaged_piece_is_made_again(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = ["generated.temperature=1.0", "generated.texts=2", "generated.seed=3"]
    run, calls, real = started(*drawn), [], generate.continuations

    def dying(*given: Any) -> Any:
        calls.append(given[-1])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(generate, "continuations", dying)
    with pytest.raises(KeyboardInterrupt):
        add_texts(run)
    assert len(kept()) == 8  # two pieces of four, each generated as three and one
    add_texts(again := started(*drawn))
    assert len(calls) - len(set(calls)) == 2  # the third piece's draws, of which the second one was cut off
    whole, fingerprint = kept(), again.data.fingerprint
    half = len(whole) // 2
    assert [prompt for prompt, _ in whole[:half]] == [prompt for prompt, _ in whole[half:]]
    assert whole[:half] != whole[half:]
    third = sorted((home() / "generated").glob("*/0*.json"))[2]
    third.write_text(third.read_text().replace('"new": "', '"new": "1'))
    count = len(calls)
    add_texts(mended := started(*drawn))
    assert len(calls) == count + 2
    assert f"{third} is damaged" in printed(mended)
    assert (kept(), mended.data.fingerprint) == (whole, fingerprint)
    add_texts(other := started(*drawn[:2], "generated.seed=4"))
    assert other.data.fingerprint != fingerprint


@pytest.mark.slow
def test_a_student_learns_from_them_and_from_kept_outputs(started: Callable[..., Run], tmp_path: Path) -> None:
    """The baseline has the text alone and as many steps; the cache has the originals' outputs and those of texts."""
    plain = started("generated.texts=0", name="plain")
    build_caches(plain)
    stages = "stages=[baseline,distill]"
    train_all(run := started(stages))
    count = plain.data.num_examples
    assert f"outputs of {count} of {run.data.num_examples} examples are copied from" in printed(run)
    [cache] = run.providers[0].caches()
    assert cache.complete
    assert run.data.num_examples > plain.data.num_examples
    records = [json.loads((tmp_path / f"run/seed_0/{name}/stage.json").read_text()) for name in ("baseline", "distill")]
    assert [one["settings"]["data"] for one in records] == [
        plain.data.select(pool=False).fingerprint,
        run.data.fingerprint,
    ]
    assert [one["steps"] for one in records] == [2, 2]
    compare(run, "kd-train")
    train_all(again := started(stages, "teacher.cache=require"))
    compare(again, "kd-train")


def test_hard_labels_alone_need_no_outputs(started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = FrozenTeacher.forward
    monkeypatch.setattr(FrozenTeacher, "forward", lambda own, b: read.extend(b["index"].tolist()) or real(own, b))
    train_all(run := started("distillation=labels_only", "generated.originals=false", "teacher.cache=off"))
    validation = run.data._spans["validation"]
    assert read
    assert set(read) <= set(validation)  # for the log of agreement


def test_required_outputs_need_kept_texts(started: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match="its generated texts are not kept"):
        train_all(started("teacher.cache=require"))
    build_caches(started())
    train_all(started("teacher.cache=require"))
    with pytest.raises(CacheError, match="outputs are not stored"):
        train_all(started("teacher.cache=require", "teacher.cache_top_k=8", name="other"))


WRONG = {
    "generated.new_tokens=14": "generated.prompt_tokens=3 and generated.new_tokens=14: .* data.block_size=16 together",
    "generated.texts=2": "generated.texts=2: the likeliest tokens are one text a prompt",
    "teacher.sharded=true": "generated.texts=1: one teacher .* leave out teacher.sharded",
    "generated.seed=-1": "generated.seed=-1 must be at least 0",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_generated(started: Callable[..., Run], given: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[given]):
        train_all(started(*given.split()))
    assert not (home() / "generated").exists()


def test_a_teacher_generates_as_soon_as_the_run_has_trained_it(started: Callable[..., Run], tmp_path: Path) -> None:
    own = [
        "stages=[teacher,distill]", "teacher.checkpoint=null", "model@teacher.network=causal_lm_small",
        "teacher.network.hidden_size=8", "teacher.network.num_layers=1", "teacher.network.num_heads=2",
        "teacher.trainer.max_epochs=1", "teacher.validations=1", "teacher.batch_size=4",
    ]  # fmt: skip
    train_all(run := started(*own))
    lines = printed(run)
    assert lines.index("teacher  step") < lines.index("teacher  generated") < lines.index("distill, seed 0")
    assert run.data.sizes["generated"]
    assert [prompt for prompt, _ in kept()] == started("generated.texts=0", name="other").data.prompts(3)  # type: ignore[attr-defined]
