from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from kd_lightning.cli.cache import main
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.runtime import memoize
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.cache.upkeep import locked
from kd_lightning.types import ModelOutput
from tests.data.corpus.texts import WORDS
from tests.teachers.cache.examples import KEY, Known, full

KNOWN = Known(40, classes=9)


@pytest.fixture
def root(own_home: Path) -> Path:
    return own_home / "teacher_outputs"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[str, int | str | None]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return capsys.readouterr().out, left.value.code


def partial(folder: Path) -> None:
    cache = TeacherCache.create(folder, KEY, 40)
    cache.add(torch.arange(10), ModelOutput(torch.zeros(10, 2)))
    cache.flush()


def damage(folder: Path) -> None:
    path = folder / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_info_shows_what_is_stored(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "info") == (f"no teacher outputs in {root}\n", 0)
    full(root / "a", KNOWN, storage=Storage("float16", 4))
    partial(root / "b")
    damage(root / "b")
    (root / "c").mkdir()
    (root / "c" / "manifest.json").write_text("{")
    (root / "no cache").mkdir()
    out, code = run(capsys, "info")
    assert code == 0
    for heading in ("teacher", "data", "outputs", "examples", "size", "an example", "age", "verified"):
        assert heading in out
    for shown in (
        "logits 9, float16, top 4",
        "vector 4 x 2, float16",
        "hidden 5 per token",
        "map 2 per pair of tokens",
    ):
        assert shown in out
    assert "40 / 40" in out
    assert "10 / 40" in out
    assert "yes" in out
    assert "shard-00000.safetensors is damaged" in out
    assert "manifest.json is damaged" in out
    assert "no cache" not in out
    assert "10 / 40" not in run(capsys, "info", root / "a")[0]


def test_verify_exits_with_1_when_something_is_damaged(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full(root / "a", KNOWN)
    partial(root / "b")
    assert run(capsys, "verify", root / "a", root / "b")[1] == 0
    damage(root / "b")
    out, code = run(capsys, "verify", root / "a", root / "b")
    assert code == 1
    assert f"{root / 'a'}: every file is intact" in out
    assert "shard-00000.safetensors is damaged" in out
    out, code = run(capsys, "verify", root / "nowhere")
    assert code == 1
    assert "holds no teacher outputs" in out


def test_prune_without_a_filter_removes_leftovers_only(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full(root / "a", KNOWN)
    (root / "a" / ".shard-00099.safetensors.5").write_bytes(b"12345")
    (root / "a" / "refresh.json").write_bytes(b"{")
    out, code = run(capsys, "prune", "--dry-run")
    assert code == 0
    assert out.count("would remove") == 3
    assert (root / "a" / "refresh.json").exists()
    out, _ = run(capsys, "prune")
    assert "shard-00099.safetensors.5, 5 bytes (left by a process that was killed)" in out
    assert "removed 6 bytes in all" in out
    assert TeacherCache.open(root / "a", KEY).complete
    assert run(capsys, "prune")[0] == "removed 0 bytes in all\n"


def test_prune_removes_what_matches(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full(root / "whole", KNOWN)
    partial(root / "part")
    partial(root / "bad")
    damage(root / "bad")
    full(root / "old", KNOWN)
    for path in (*(root / "old").iterdir(), root / "old"):
        os.utime(path, (time.time() - 10 * 86_400,) * 2)

    def left() -> set[str]:
        return {path.name for path in root.iterdir() if path.is_dir()}

    out, _ = run(capsys, "prune", "--older-than", "9", "--dry-run")
    assert "would remove" in out
    assert left() == {"whole", "part", "bad", "old"}
    out, _ = run(capsys, "prune", "--older-than", "9")
    assert "not written to for 10 d" in out
    assert left() == {"whole", "part", "bad"}
    run(capsys, "prune", "--damaged")
    assert left() == {"whole", "part"}
    out, _ = run(capsys, "prune", "--incomplete")
    assert "holds 10 of 40 examples" in out
    assert left() == {"whole"}
    run(capsys, "prune", "--all")
    assert left() == set()


def test_prune_leaves_alone_what_is_being_written_and_what_is_no_cache(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full(root / "a", KNOWN)
    code = (
        "import signal, sys; from pathlib import Path; from kd_lightning.teachers.cache.upkeep import locked\n"
        "signal.alarm(120)\n"
        f"with locked(Path({str(root / 'a')!r})): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"  # nothing, where it has died; it holds for two minutes at most
        out, _ = run(capsys, "prune", "--all")
        assert f"left alone: {root / 'a'} is being written by process {holder.pid} on" in out
        holder.communicate(timeout=120)
    assert TeacherCache.open(root / "a", KEY).complete
    (root / "other").mkdir()
    (root / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"^kd-cache: .* holds no teacher outputs") as refused:
        main(["prune", "--all", str(root / "other")])
    assert refused.value.code == 2
    assert (root / "other" / "thesis.txt").exists()
    with locked(root / "a", wait=False):
        pass


def test_build_says_in_one_line_what_is_wrong(capsys: pytest.CaptureFixture[str], own_home: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["build", "data=nonsense"])
    assert refused.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("kd-cache: data=nonsense: there is no such choice")


def test_help_needs_no_torch() -> None:
    code = "import sys; from kd_lightning.cli.cache import _parser; _parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.fixture
def language_model(tmp_path: Path, own_home: Path) -> list[str]:
    """The overrides of a language model's cache of top 8, of 24 blocks or more."""
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(30)) for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer("bpe:280", texts)
    torch.manual_seed(0)
    network = causal_lm_small(len(tokenizer), 32, hidden_size=16, num_layers=1, num_heads=2).network
    network.save_pretrained(tmp_path / "llama")
    write_tokenizer(tokenizer, tmp_path / "llama")
    return [
        "data=lm_text", f"data.train_file={tmp_path / 'texts.jsonl'}", "data.block_size=32", "trainer.max_steps=1",
        f"teacher.checkpoint={tmp_path / 'llama'}", "teacher.precision=float32", "stages=[distill]", "temperature=1",
        "model@student=causal_lm_small", "student.hidden_size=16", "student.num_layers=1", "student.num_heads=2",
        "distillation=sparse_kd", "teacher.cache_top_k=8", "teacher.predict_batch_size=4",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def build(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str, int | str | None]:
    memoize._KEPT.clear()  # as in a process of its own
    with pytest.raises(SystemExit) as left:
        main(["build", *arguments])
    printed = capsys.readouterr()
    return printed.out, printed.err, left.value.code


def test_a_language_models_cache_is_built_shown_and_checked(
    language_model: list[str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, code = build(capsys, *language_model)
    assert code == 0
    assert "per token, float32, top 8" in out
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    assert f"{TeacherCache.open(folder).manifest.num_examples} / " in run(capsys, "info")[0]
    assert run(capsys, "verify", folder) == (f"{folder}: every file is intact\n", 0)
    damage(folder)
    assert run(capsys, "verify", folder)[1] == 1
    out, _, _ = build(capsys, *language_model)  # repairs it
    assert run(capsys, "verify", folder)[1] == 0


def outputs(folder: Path) -> tuple[torch.Tensor, ...]:
    cache = TeacherCache.open(folder)
    assert cache.complete
    lengths = cache._places.length
    mask = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
    found = cache.lookup(torch.arange(len(mask)), mask)
    return found.logits, mask


def test_the_tasks_of_an_array_fill_one_cache(
    language_model: list[str], root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(capsys, *language_model)
    (whole,) = (path for path in root.iterdir() if path.is_dir())
    expected, mask = outputs(whole)
    moved = whole.rename(root.parent / "whole")
    for name, value in {"MIN": 2, "STEP": 3, "COUNT": 3}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    stored = []
    for task in (5, 2, 5, 8):  # one of them twice, as after a requeue
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        out, _, code = build(capsys, "--share", "array", *language_model)
        assert code == 0
        stored.append(TeacherCache.open(whole).stored)
        assert f"{stored[-1]:,} / {len(mask):,}" in out
    assert 0 < stored[0] < stored[1] == stored[2] < stored[3] == len(mask)
    assert moved.is_dir()
    found, again = outputs(whole)
    assert torch.equal(mask, again)
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-4)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "6")
    assert "task 6 is not one of 3 from 2 on in steps of 3" in build(capsys, "--share", "array", *language_model)[1]


def test_processes_of_one_command_share_the_work(
    language_model: list[str], root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is one of two in each of two jobs: four shares."""
    monkeypatch.setattr("kd_lightning.runtime.processes.join", lambda: None)  # here one after the other
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # which a process of rank 1 would leave to the tests after it
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    stored = []
    for rank, job in ((0, "1/2"), (1, "1/2"), (0, "2/2"), (1, "2/2")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        out, error, code = build(
            capsys, "--share", job, *language_model, "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"
        )
        assert code == 0, error
        (folder,) = (path for path in root.iterdir() if path.is_dir())
        stored.append(TeacherCache.open(folder).stored)
        assert ("teacher outputs" in out) == (rank == 0 or len(stored) == 4)
    assert stored == sorted(set(stored))
    assert TeacherCache.open(folder).complete


@pytest.mark.slow
def test_torchruns_processes_share_the_work(language_model: list[str], root: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29617",
        "-m", "kd_lightning.cli.cache", "build", *language_model, "trainer=ddp", "trainer.devices=2",
        "trainer.accelerator=cpu",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert found.returncode == 0, found.stderr
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    cache = TeacherCache.open(folder)
    assert cache.complete
    assert len(cache.manifest.shards) == 2
    assert "teacher outputs" in found.stdout


@pytest.mark.parametrize(
    ("share", "more", "message"),
    [
        ("0/2", [], "--share 0/2: give I/N, such as 1/8 to 8/8, or array"),
        ("3/2", [], "--share 3/2: give I/N"),
        ("half", [], "--share half: give I/N"),
        ("array", [], "--share array: this is no task of a SLURM array"),
        ("1/2", ["teacher.cache=refresh"], "teacher.cache=refresh replaces a cache as a whole"),
        (
            "1/2",
            ["teacher.checkpoint=null", "stages=[teacher,distill]", "model@teacher.network=causal_lm_small",
             "data.tokenizer=bpe:280"],
            "a cache is built in shares from a finished teacher",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_one_line(
    share: str, more: list[str], message: str, language_model: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    _, error, code = build(capsys, "--share", share, *language_model, *more)
    assert code == 2
    assert error.splitlines()[-1].startswith(f"kd-cache: {message}")
