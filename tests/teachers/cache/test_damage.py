from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers.cache import manifest, shards
from kd_lightning.teachers.cache.manifest import FORMAT, Manifest
from kd_lightning.teachers.cache.shards import Limits
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.cache.upkeep import verify
from kd_lightning.types import ModelOutput
from tests.teachers.cache.examples import KEY, SMALL, Known, full, reads_back, same

KNOWN = Known(60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    full(tmp_path / "cache", KNOWN)
    return tmp_path / "cache"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def refill(cache: TeacherCache) -> int:
    """Answer what is missing; return how many examples that were."""
    asked = 0
    for batch in KNOWN.batches():
        index = batch["index"][~cache.known(batch["index"])]
        if len(index):
            asked += len(index)
            mask = KNOWN.mask(index)
            cache.add(index, KNOWN.say(index, mask), mask)
    cache.flush()
    return asked


def test_one_flipped_bit_in_any_file_is_named(folder: Path) -> None:
    draw = random.Random(0)
    files = sorted(folder.iterdir())
    assert len(files) > 3
    for path in files:
        bits = path.stat().st_size * 8
        for bit in {0, bits - 1, *(draw.randrange(bits) for _ in range(30))}:
            flip(path, bit)
            with pytest.raises(
                CacheError, match=rf"{path.name} (is damaged|cannot be read).*kd-cache verify .*refresh"
            ):
                TeacherCache.open(folder, KEY, 60)
            assert [problem for problem in verify(folder) if str(path) in problem]
            flip(path, bit)
    assert verify(folder) == []
    reads_back(folder, KNOWN)


def test_no_byte_of_the_manifest_is_free(tmp_path: Path) -> None:
    path = full(tmp_path / "cache", Known(3)).folder / "manifest.json"
    for byte in range(path.stat().st_size):
        flip(path, byte * 8 + byte % 8)
        with pytest.raises(CacheError, match=r"manifest\.json"):
            Manifest.read(path)
        flip(path, byte * 8 + byte % 8)


@pytest.mark.parametrize("left", [0, 5, -1])
def test_a_truncated_file_is_named(folder: Path, left: int) -> None:
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:left])
        with pytest.raises(CacheError, match=rf"{path.name} (is damaged|cannot be read)"):
            TeacherCache.open(folder, KEY)
        path.write_bytes(whole)


def test_a_missing_or_lengthened_shard_is_named(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    with pytest.raises(CacheError, match=rf"shard-00001.safetensors is damaged: it has {len(whole) + 1} bytes"):
        TeacherCache.open(folder, KEY)
    path.unlink()
    with pytest.raises(CacheError, match=r"shard-00001.safetensors is missing"):
        TeacherCache.open(folder, KEY)


def test_shards_of_another_cache_are_refused(folder: Path, tmp_path: Path) -> None:
    other = full(tmp_path / "other", Known(60, seed=1)).folder
    name = "shard-00002.safetensors"
    mine, theirs = (folder / name).read_bytes(), (other / name).read_bytes()
    (folder / name).write_bytes(theirs)
    (other / name).write_bytes(mine)
    for place in (folder, other):
        with pytest.raises(CacheError, match=rf"{name} is damaged"):
            TeacherCache.open(place, KEY)


def test_shards_swapped_within_a_cache_are_refused(folder: Path) -> None:
    one, two = folder / "shard-00000.safetensors", folder / "shard-00001.safetensors"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert len(verify(folder)) == 2
    with pytest.raises(CacheError, match=r"shard-00000.safetensors is damaged.* \(and 1 more\)"):
        TeacherCache.open(folder, KEY)


def test_repair_asks_again_only_about_what_was_damaged(folder: Path) -> None:
    records = {record.file: record.examples for record in Manifest.read(folder / "manifest.json").shards}
    flip(folder / "shard-00001.safetensors", 4000)
    (folder / "shard-00003.safetensors").unlink()
    lost = records["shard-00001.safetensors"] + records["shard-00003.safetensors"]
    said: list[str] = []
    cache = TeacherCache.open(folder, KEY, repair=True, say=said.append, limits=SMALL)
    assert len(said) == 2
    assert "shard-00001.safetensors is damaged: its sha256 is not" in said[0]
    assert f"{records['shard-00001.safetensors']} examples will be computed again" in said[0]
    assert "shard-00003.safetensors is missing" in said[1]
    assert len(cache.missing()) == lost
    assert refill(cache) == lost
    reads_back(folder, KNOWN)


def test_an_older_format_is_named(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    with pytest.raises(CacheError, match=r"has format 0, this version reads \d+;"):
        TeacherCache.open(folder)


def test_a_manifest_that_is_no_manifest_is_named(folder: Path) -> None:
    for content in ("[]", "null", "{}", f'{{"format": {FORMAT}}}', "\udcff"):
        (folder / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(CacheError, match=r"manifest.json (is damaged|cannot be read)"):
            TeacherCache.open(folder)


def test_leftovers_are_swept_by_a_writer_and_foreign_files_never_touched(folder: Path) -> None:
    used = {path.name for path in folder.iterdir()}
    number = len(used)
    (folder / ".shard-00009.safetensors.123").write_bytes(b"half")
    (folder / ".manifest.json.123").write_bytes(b"half")
    (folder / ".tmpKthVj7").write_bytes(b"half")  # safetensors' own
    shutil.copy(folder / "shard-00000.safetensors", folder / "shard-00077.safetensors")  # written, not yet named
    save_file({"index": torch.arange(3)}, folder / "shard-00078.safetensors")
    (folder / "shard-00079.safetensors").write_bytes(b"foreign")
    (folder / "notes.txt").write_bytes(b"mine")
    reads_back(folder, KNOWN)
    assert len(list(folder.iterdir())) == number + 7  # readers remove nothing
    cache = TeacherCache.open(folder, KEY, limits=SMALL)
    with cache.writing():
        pass
    foreign = {"shard-00078.safetensors", "shard-00079.safetensors", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == used | foreign
    (folder / "shard-00000.safetensors").unlink()
    cache = TeacherCache.open(folder, KEY, repair=True, limits=SMALL)
    refill(cache)
    assert (folder / "shard-00079.safetensors").read_bytes() == b"foreign"
    assert [record.file for record in cache.manifest.shards][-1] == "shard-00080.safetensors"
    reads_back(folder, KNOWN)


def test_a_cache_replaced_while_in_use_is_not_written_to(folder: Path) -> None:
    cache = TeacherCache.create(folder.with_name("c"), KEY, 60, limits=SMALL)
    with TeacherCache.refreshing(folder.with_name("c"), {**KEY, "data": "d2"}, 60, limits=SMALL) as other:
        refill(other)
    with pytest.raises(CacheError, match="was replaced by another cache"):
        refill(cache)


class TestFullDisk:
    def check(self, folder: Path, room: Iterator[None]) -> None:
        """Fill until the disk is full, make room, go on."""
        cache = TeacherCache.create(folder, KEY, 60, limits=SMALL)
        next(room)
        with pytest.raises(
            CacheError, match=r"(?i)could not be written .*space.*cache_dtype=float16.*KD_LIGHTNING_HOME"
        ):
            refill(cache)
        assert len(cache.manifest.shards) > 0
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        assert verify(folder) == []
        found = TeacherCache.open(folder, KEY, limits=SMALL)
        index = torch.arange(60)[found.known(torch.arange(60))]
        assert len(index) == found.manifest.known > 0
        assert same(found.lookup(index, KNOWN.mask(index)), KNOWN.say(index, KNOWN.mask(index)))
        next(room)
        asked = refill(found)
        assert asked == 60 - len(index)
        reads_back(folder, KNOWN)

    def test_saving_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def room() -> Iterator[None]:
            saved = shards.save_file

            def half(tensors: object, path: Path, metadata: object) -> None:
                if any(path.parent.glob("shard-*")):
                    path.write_bytes(b"half")
                    raise OSError(28, "No space left on device")
                saved(tensors, path, metadata)

            monkeypatch.setattr(shards, "save_file", half)
            yield
            monkeypatch.undo()
            yield

        self.check(tmp_path / "cache", room())

    def test_the_manifest_finds_no_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def room() -> Iterator[None]:
            write = manifest.write_file

            def fails(path: Path, content: str) -> None:
                if "shard-00002" in content:
                    raise OSError(28, "No space left on device")
                write(path, content)

            monkeypatch.setattr(manifest, "write_file", fails)
            yield
            monkeypatch.undo()
            yield

        self.check(tmp_path / "cache", room())

    def test_a_disk_of_64_kb(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, timeout=120
        )
        if mounted.returncode:
            pytest.skip("no right to mount a file system")

        def room() -> Iterator[None]:
            (disk / "ballast").write_bytes(b"x" * 32 * 1024)
            yield
            subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True, timeout=120)
            yield

        try:
            self.check(disk / "cache", room())
        finally:
            subprocess.run(["umount", "-l", disk], check=True, timeout=120)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match=r"cannot write to .*file.*KD_LIGHTNING_HOME"):
        TeacherCache.create(tmp_path / "file" / "cache", KEY, 3)


def test_what_was_added_is_kept_when_the_work_on_it_is_broken_off(tmp_path: Path) -> None:
    cache = TeacherCache.create(tmp_path / "cache", KEY, 60, limits=Limits())

    def broken_off() -> None:
        with cache.writing():
            cache.add(torch.arange(5), ModelOutput(torch.zeros(5, 2)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert TeacherCache.open(tmp_path / "cache", KEY).manifest.known == 5
