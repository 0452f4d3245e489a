from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kd_lightning.cli.cache import main
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.cache.upkeep import locked
from kd_lightning.types import ModelOutput
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
