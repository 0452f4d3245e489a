"""Files are whole or not there, have the mode that the umask gives, and nothing half-written outlives its writer."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pytest
import torch
from safetensors.torch import save_file

from kd_lightning.export.write import filled
from kd_lightning.runtime.assets import new_folder
from kd_lightning.runtime.errors import environment_fault
from kd_lightning.runtime.files import (
    Busy,
    alone,
    holder,
    remove_temporary,
    replacing,
    temporary_folder,
    temporary_name,
    write_file,
)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def private(path: Path) -> None:
    """Write as a library that makes its files its own user's."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


@pytest.mark.parametrize(
    "write",
    [
        private,
        lambda path: path.write_text("a"),
        lambda path: torch.save({"a": torch.ones(2)}, path),
        lambda path: save_file({"a": torch.ones(2)}, path),
    ],
)
def test_a_files_mode_is_the_umasks_whoever_writes_it(
    tmp_path: Path, umask: int, write: Callable[[Path], None]
) -> None:
    with replacing(tmp_path / "file") as temporary:
        write(temporary)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folders_mode_is_the_umasks(tmp_path: Path, umask: int) -> None:
    with new_folder(tmp_path / "cache") as folder:
        write_file(folder / "a", "a")
    with filled(tmp_path / "export") as folder:
        write_file(folder / "a", "a")
    for name in ("cache", "export"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_writer_that_writes_nothing_leaves_the_old_file(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old"


def killed_writer(folder: Path) -> None:
    """Have a process die in the middle of writing a file and a folder."""
    code = (
        "import os, signal, sys; from pathlib import Path; from kd_lightning.runtime.files import *\n"
        f"with replacing(Path({str(folder / 'file')!r})) as path, temporary_folder(path.parent, 'cache') as place:\n"
        "    path.write_text('half'); (place / 'part').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == -9


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    killed_writer(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    here = f"{os.getpid()}@{socket.gethostname()}.tmp"
    kept = [".mine.tmp", "mine.1@here.tmp", f".file.0.{here}", ".file.0.999999999@elsewhere.tmp", ".hidden"]
    for name in kept:
        (tmp_path / name).write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    remove_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "link"}
    os.utime(tmp_path / kept[3], (0, 0))
    remove_temporary(tmp_path)
    assert not (tmp_path / kept[3]).exists(), "nobody elsewhere writes for days"
    remove_temporary(tmp_path, alone=True)
    assert {path.name for path in tmp_path.iterdir()} == {".mine.tmp", "mine.1@here.tmp", ".hidden", "link"}


def test_what_safetensors_left_goes_when_nobody_else_writes(tmp_path: Path) -> None:
    kept = [".tmpabc", ".tmp_notes", "x.tmpabc123"]
    for name in (".tmpKthVj7", *kept):
        (tmp_path / name).write_text("half")
    remove_temporary(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    remove_temporary(tmp_path, alone=True)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_a_folder_that_a_link_stands_for_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    write_file(tmp_path / "theirs/file", "theirs")
    (tmp_path / ".cache.0.999999999@elsewhere.tmp").symlink_to(tmp_path / "theirs", target_is_directory=True)
    remove_temporary(tmp_path, alone=True)
    assert (tmp_path / "theirs/file").read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("make", [new_folder, filled])
def test_the_next_one_that_makes_a_folder_cleans_up(tmp_path: Path, make: Callable[[Path], object]) -> None:
    killed_writer(tmp_path)
    with make(tmp_path / "made") as folder:  # type: ignore[attr-defined]
        write_file(folder / "a", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_no_two_temporary_names_are_alike() -> None:
    assert len({temporary_name("a") for _ in range(9)}) == 9


def test_a_temporary_folder_is_gone_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), temporary_folder(tmp_path, "a"):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_only_a_lock_that_is_not_there_is_held_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "file").touch()
    assert holder(tmp_path / "none") is None
    assert holder(tmp_path / "file") is None
    assert holder(tmp_path / "pipe") == "unknown (pipe: not a plain file)"
    assert holder(tmp_path / "folder") == "unknown (folder: not a plain file)"
    assert str(holder(tmp_path / "link")).startswith("unknown (link: ")
    assert str(holder(tmp_path / "file/lock")).startswith("unknown (lock: ")


def test_a_pipe_is_no_lock_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe") as raised, alone(tmp_path / "pipe", print):
        pass
    assert "remove it" in str(environment_fault(raised.value))


def test_of_a_holders_name_one_short_line_is_shown(tmp_path: Path) -> None:
    with filelock.FileLock(tmp_path / "lock"):
        for given, shown in (("\x1b[2Ja\nb", "\\x1b[2Ja"), ("x" * 999, "x" * 200), ("\n", "another process")):
            (tmp_path / "lock").write_text(given)
            assert holder(tmp_path / "lock") == shown
            with pytest.raises(Busy) as busy, alone(tmp_path / "lock", print, wait=False):
                pass
            assert str(busy.value) == shown


def test_who_looks_at_a_lock_does_not_keep_it_from_its_holder(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    descriptor = os.open(tmp_path / "lock", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as `holder` does
    threading.Thread(target=lambda: (time.sleep(0.2), os.close(descriptor))).start()
    with alone(tmp_path / "lock", print, wait=False):
        assert str(holder(tmp_path / "lock")).startswith("process ")
