"""Caches that were made to do harm, and removals beside what must stay."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_lightning.cli.cache import main
from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers.cache import manifest
from kd_lightning.teachers.cache.manifest import MANIFEST, REFRESH, Manifest, ShardRecord
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.cache.upkeep import remains, sweep
from tests.teachers.cache.examples import KEY, Known, full

KNOWN = Known(40)


def prune(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[str, int | str | None]:
    with pytest.raises(SystemExit) as left:
        main(["prune", *map(str, arguments)])
    return capsys.readouterr().out, left.value.code


def naming(folder: Path, name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a manifest, with a checksum that fits, whose only shard is this file."""
    with monkeypatch.context() as patch:
        patch.setattr(manifest.ShardRecord, "__post_init__", lambda _: None, raising=True)
        old = Manifest.read(folder / MANIFEST)
        old.shards = [ShardRecord(file, 40, 7, "0" * 64)]
        old.write(folder / name)


@pytest.mark.parametrize("name", [MANIFEST, REFRESH])
@pytest.mark.parametrize(
    "outside", ["../../victim.txt", "/victim.txt", "victim.txt", "shard-00000.safetensors/../victim.txt"]
)
def test_a_manifest_reaches_no_file_but_shards_of_its_own_folder(
    tmp_path: Path, name: str, outside: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "caches" / "cache"
    full(folder, KNOWN)
    gc.collect()
    victims = [tmp_path / "victim.txt", folder / "victim.txt"]
    for victim in victims:
        victim.write_text("precious")
    naming(folder, name, str(victims[0]) if outside.startswith("/") else outside, monkeypatch)
    if name == MANIFEST:
        with pytest.raises(CacheError, match="not the name of a shard"):
            TeacherCache.open(folder, KEY, repair=True)
    sweep(folder)
    for option in ([], ["--incomplete"], ["--damaged"], ["--all"]):
        prune(capsys, folder, *option) if (folder / MANIFEST).exists() else None
    assert [victim.read_text() for victim in victims] == ["precious", "precious"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text() | st.from_regex(r"[./\\]*shard-\d*\.safetensors[./\n]*"))
def test_names_of_shards_have_one_form(name: str) -> None:
    try:
        record = ShardRecord(name, 1, 1, "")
    except ValueError:
        return
    number = record.file.removeprefix("shard-").removesuffix(".safetensors")
    assert number.isascii()
    assert number.isdigit()
    assert Path("/a", record.file).parent == Path("/a")


def test_a_folder_that_is_named_like_a_shard_is_no_remainder(tmp_path: Path) -> None:
    full(tmp_path / "cache", KNOWN)
    (tmp_path / "cache" / ".shard-00007.safetensors.5").mkdir()
    assert remains(tmp_path / "cache") == []


def test_prune_leaves_what_is_not_the_caches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full(tmp_path / "mine", KNOWN)
    gc.collect()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    prune(capsys, "--all", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text(json.dumps({"name": "a browser's extension"}))
    (tmp_path / "web" / "page.html").write_text("precious")
    with pytest.raises(SystemExit, match="holds no teacher outputs"):
        main(["prune", "--all", str(tmp_path / "web")])
    assert len(list((tmp_path / "web").iterdir())) == 2


def test_prune_through_a_link_removes_the_cache_and_keeps_the_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full(tmp_path / "cache", KNOWN)
    gc.collect()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    assert prune(capsys, "--all", tmp_path / "link")[1] == 0
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("days", ["-1", "nan", "0"])
def test_an_age_that_every_cache_has_is_refused(tmp_path: Path, days: str) -> None:
    full(tmp_path / "cache", KNOWN)
    with pytest.raises(SystemExit, match=f"kd-cache: --older-than {days}: give days, more than 0"):
        main(["prune", f"--older-than={days}", str(tmp_path / "cache")])
    assert TeacherCache.open(tmp_path / "cache", KEY).complete


def test_what_is_read_is_not_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = full(tmp_path / "cache", KNOWN)
    out, code = prune(capsys, "--all", tmp_path / "cache")
    assert code == 0
    assert f"left alone: {tmp_path / 'cache'} is being read by another process" in out
    assert cache.complete
    del cache
    gc.collect()
    prune(capsys, "--all", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_vanished_is_one_line(tmp_path: Path) -> None:
    cache = full(tmp_path / "cache", KNOWN)
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    with pytest.raises(CacheError, match="holds no teacher outputs"), cache.writing():
        pass


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="no /proc")
@pytest.mark.timeout(60)
def test_a_place_where_nothing_can_be_made_is_one_line() -> None:
    with pytest.raises(CacheError, match="cannot write to /proc"):
        TeacherCache.create(Path("/proc/nowhere"), KEY, 40)
