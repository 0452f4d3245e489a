"""A run whose teacher a server runs: its likeliest tokens are stored as a loaded teacher's, and teach as they do."""

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

from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.models.served import KEY
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import build_caches, train_all
from kd_lightning.runtime import memoize
from kd_lightning.runtime.errors import CacheError, ConfigError, KDError
from kd_lightning.teachers.cache import outputs
from kd_lightning.teachers.cache.store import TeacherCache
from tests.data.corpus.texts import WORDS
from tests.inference_server import Serving, running

Composed = Callable[..., DictConfig]


@pytest.fixture(autouse=True)
def nothing_shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(outputs, "MOST_DENSE", 8)  # read back sparse, as of a large vocabulary
    memoize._KEPT.clear()
    yield
    memoize._KEPT.clear()


@pytest.fixture
def serving(tmp_path: Path, own_home: Path) -> Iterator[Serving]:
    """A served model that is on disk, too, and texts."""
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(12 + i % 7)) for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer("bpe:280", texts)
    torch.manual_seed(0)
    model = causal_lm_small(len(tokenizer), 64, hidden_size=16, num_layers=1, num_heads=2).eval()
    model.network.lm_head.weight.data.mul_(30.0)  # type: ignore[operator, union-attr]
    model.network.save_pretrained(tmp_path / "llama")
    write_tokenizer(tokenizer, tmp_path / "llama")
    with running(Serving(model, tokenizer)) as found:
        yield found


def common(tmp_path: Path, name: str) -> list[str]:
    return [
        "data=lm_text", f"data.train_file={tmp_path / 'texts.jsonl'}", f"data.tokenizer={tmp_path / 'llama'}",
        "data.block_size=48", "data.batch_size=4", "model@student=causal_lm_small", "student.hidden_size=16",
        "student.num_layers=1", "student.num_heads=2", "trainer.max_steps=6", "validations=1", "temperature=1",
        "trainer.precision=32-true", "distillation=sparse_kd", "stages=[distill]",
        "teacher.cache_top_k=8", "teacher.precision=float32", f"run_dir={tmp_path / name}",
    ]  # fmt: skip


def served(serving: Serving, *more: str) -> list[str]:
    return [f"teacher.url={serving.url}", "teacher.model=tiny", "teacher.retries=0", *more]


def run_of(cfg: DictConfig) -> Run:
    return Run(cfg, Console(file=StringIO(), width=200))


def test_its_cache_is_that_of_the_model_and_trains_without_the_server(
    composed: Composed, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret-key")
    loaded = run_of(composed(*common(tmp_path, "loaded"), f"teacher.checkpoint={tmp_path / 'llama'}"))
    from_server = run_of(composed(*common(tmp_path, "served"), *served(serving)))
    (one,), (other,) = build_caches(loaded), build_caches(from_server)
    assert one != other
    stored, expected = TeacherCache.open(other), TeacherCache.open(one)
    assert stored.manifest.specs == expected.manifest.specs
    assert stored.manifest.teacher == "tiny, served"
    for batch in from_server.data.select(tokens="teacher").all_dataloader():
        keep = from_server.task.compared(batch)["keep"]
        found, right = (cache.lookup(batch["index"], batch["attention_mask"]) for cache in (stored, expected))
        assert found.sparse is not None
        assert right.sparse is not None
        for one_part, other_part in zip(found.sparse.at(keep)[:3], right.sparse.at(keep)[:3], strict=True):
            torch.testing.assert_close(one_part, other_part, rtol=1e-4, atol=1e-4)

    asked = len(serving.seen)
    reports = {}
    for run in (loaded, from_server):
        train_all(run)
        reports[run.folder.name] = compare(run, "kd-train ...")
    assert len(serving.seen) == asked  # all of it was stored
    scores = {name: report["models"]["distilled"]["test"] for name, report in reports.items()}
    near = pytest.approx(scores["loaded"]["cross_entropy"]["mean"], rel=1e-3)
    assert scores["served"]["cross_entropy"]["mean"] == near
    assert scores["served"]["agreement"]["mean"] == pytest.approx(scores["loaded"]["agreement"]["mean"], abs=0.02)
    assert list(reports["served"]["models"]) == ["teacher", "untrained", "distilled"]
    check_row(reports["served"], reports["loaded"])
    assert "The teacher, tiny, is served" in (tmp_path / "served" / "report.md").read_text()
    written = [path for path in (tmp_path / "served").rglob("*") if path.is_file()]
    written += [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert written
    assert not any(b"secret-key" in path.read_bytes() for path in written)

    memoize._KEPT.clear()
    again = ["teacher.cache=require", "seed=1", "stages=[distill]"]
    serving.failures = 10**6  # the server is gone, or on another port
    moved = [f"teacher.url={serving.url.replace('127.0.0.1', 'localhost')}", "teacher.model=tiny"]
    train_all(run_of(composed(*common(tmp_path, "later"), *moved, *again)))


def check_row(served: dict[str, Any], loaded: dict[str, Any]) -> None:
    """What the likeliest tokens tell is what the whole model has; the rest is not known, and why."""
    row, whole = (report["models"]["teacher"] for report in (served, loaded))
    assert row["title"] == "teacher, served"
    for split in ("test", "validation"):
        assert row[split]["accuracy"]["mean"] == pytest.approx(whole[split]["accuracy"]["mean"])
        assert row[split].keys() == {"cross_entropy", "perplexity", "bits_per_byte", "accuracy"}
        assert all(one["mean"] is None for name, one in row[split].items() if name != "accuracy")
    assert row["test"]["accuracy"]["standard_error"] == pytest.approx(whole["test"]["accuracy"]["standard_error"])
    assert row["size"] is row.get("generation") is None
    assert row["outputs_seconds"]["total"] > 0
    assert any("Its own loss is not known: the server gives no probability" in line for line in served["warnings"])
    assert served["distillation_ratio"]["mean"] is None
    assert served["data"]["standard_error"] == served["models"]["distilled"]["test"]["cross_entropy"]["standard_error"]


def test_in_a_small_vocabulary_its_row_is_the_same(
    composed: Composed, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There what is stored is read back with the tail spread over all other tokens, which is nobody's loss."""
    monkeypatch.setattr(outputs, "MOST_DENSE", 1024)
    reports = {}
    for name, teacher in (("loaded", [f"teacher.checkpoint={tmp_path / 'llama'}"]), ("served", served(serving))):
        run = run_of(composed(*common(tmp_path, name), *teacher))
        train_all(run)
        reports[name] = compare(run, "kd-train ...")
    check_row(reports["served"], reports["loaded"])


def test_another_model_under_the_same_name_is_noticed(composed: Composed, serving: Serving, tmp_path: Path) -> None:
    cfg = composed(*common(tmp_path, "run"), *served(serving, "teacher.predict_batch_size=4"))
    build_caches(run_of(cfg), (0, 3))
    memoize._KEPT.clear()
    torch.manual_seed(1)
    other = causal_lm_small(len(serving.tokenizer), 64, hidden_size=16, num_layers=1, num_heads=2).eval()
    serving.network, first = other, serving.network
    for start in (lambda run: build_caches(run, (1, 3)), build_caches, train_all):
        memoize._KEPT.clear()
        with pytest.raises(CacheError, match=r"holds the outputs of another teacher\.model=tiny: of example \d+ \d+%"):
            start(run_of(cfg))
    serving.network = first
    memoize._KEPT.clear()
    (folder,) = build_caches(run_of(cfg))
    assert TeacherCache.open(folder).complete


def test_chats_and_live_steps(composed: Composed, serving: Serving, tmp_path: Path) -> None:
    """Only the rows of the assistant's tokens are kept; without a cache each step reads the server."""
    chats = [{"prompt": f"{WORDS[i % 5]} {i}", "response": " ".join(WORDS[i % 7 : i % 7 + 4])} for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    ours = [one for one in common(tmp_path, "chat") if not one.startswith(("data=", "data.train_file"))]
    ours += ["data=chat", f"data.train_file={tmp_path / 'chats.jsonl'}", "data.chat_template=plain"]
    cached = run_of(composed(*ours, *served(serving)))
    train_all(cached)
    (cache,) = cached.providers[0].caches()
    assert str(cache.manifest.specs[0]).endswith("per kept token, float32, top 8")
    live = run_of(composed(*ours, *served(serving, "teacher.cache=off"), f"run_dir={tmp_path / 'live'}"))
    train_all(live)
    for run in (cached, live):
        assert compare(run, "kd-train ...")["models"]["distilled"]["test"]["kl_to_teacher"]["mean"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["teacher.cache_top_k=null"], "teacher.url needs teacher.cache_top_k"),
        (["teacher.model=null"], "teacher.url needs teacher.model"),
        (["teacher.checkpoint=some/folder"], "teacher.url and teacher.checkpoint are two teachers"),
        (["teacher.url=localhost"], "teacher.url=localhost: expected http://HOST:PORT"),
        (["teacher.url=null", "teacher.checkpoint=some/folder"], "teacher.model names a served model"),
        (["teacher.compile=true", "teacher.calibrate=true"], "leave out teacher.compile, teacher.calibrate"),
        (["distillation=soft_target"], "it compares all logits, and the teacher gives only some of them"),
        (["model@student=causal_lm_from_teacher", "~student.hidden_size", "~student.num_heads", "~student.num_layers",
          "student.layers=1"], "takes the teacher's weights, which a server or an ONNX file does not give"),
        (["teacher.cache_top_k=25"], "HTTP 400: Requested prompt logprobs of 25, greater than 20"),
        (["data.tokenizer=bpe:265"], "tokens: give the server's own"),
        (["data.tokenizer=${tokenizer_of:student}"], "data.tokenizer='tiny': expected"),
        (["teacher.dialect=openai"], "teacher.dialect='openai' is not one of vllm, sglang, llama.cpp"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    more: list[str], message: str, composed: Composed, serving: Serving, tmp_path: Path
) -> None:
    keys = {one.partition("=")[0] for one in more} - {"model@student"}
    base = [one for one in (*common(tmp_path, "run"), *served(serving)) if one.partition("=")[0] not in keys]
    if any("model@student" in one for one in more):
        base = [one for one in base if "student" not in one]
        more = [one for one in more if not one.startswith("~")]
    with pytest.raises(ConfigError) as refused:
        train_all(run_of(composed(*base, *more)))
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "home").glob("teacher_outputs/*/shard*"))


def test_a_server_that_is_not_there_is_one_line_before_anything_is_trained(
    composed: Composed, serving: Serving, tmp_path: Path
) -> None:
    serving.failures = 10**6
    with pytest.raises(KDError, match=r"fails \(HTTP 503: the model is being loaded\), after 1 attempts"):
        train_all(run_of(composed(*common(tmp_path, "run"), *served(serving))))
    assert not (tmp_path / "run").exists()


def test_it_is_no_teacher_of_anything_else(composed: Composed, serving: Serving, tmp_path: Path, toy_csv: Path) -> None:
    from tests.conftest import tiny_overrides

    small: Any = [one for one in tiny_overrides(toy_csv, tmp_path / "run") if "teacher." not in one]
    with pytest.raises(ConfigError, match="a server gives the tokens that follow a text"):
        train_all(
            run_of(
                composed(
                    *small,
                    *served(serving),
                    "teacher.cache_top_k=2",
                    "stages=[distill]",
                    "data.teacher_tokenizer=wordpiece:400",
                )
            )
        )
