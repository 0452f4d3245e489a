"""Full disks, folders that cannot be written, names that are too long: one line, whichever command meets them."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kd_lightning.cli.runner import command as one_line
from kd_lightning.runtime.errors import environment_fault
from kd_lightning.runtime.files import replacing, write_file
from tests.forks import command


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond some bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def ends(work: Callable[[], object]) -> str:
    """Return the line in which a command that does some work ends."""
    with pytest.raises(SystemExit) as ended:
        one_line("kd-thing", "nothing is kept")(work)()
    assert ended.value.code == 1
    line = str(ended.value)
    assert line.startswith("kd-thing: ")
    assert "\n" not in line
    return line


WRITERS: dict[str, Callable[[Path], object]] = {
    "ours": lambda path: write_file(path, b"0" * 100_000),
    "torch": lambda path: torch.save(torch.zeros(100_000), path),
    "numpy": lambda path: np.save(path.with_suffix(".npy"), np.zeros(100_000)),
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_whoever_writes(writer: str, tmp_path: Path) -> None:
    with disk_of(10_000):
        line = ends(lambda: WRITERS[writer](tmp_path / "file"))
    assert "another disk" in line


@pytest.mark.parametrize(
    "write", [lambda path: path.write_bytes(b"0" * 100_000), *(WRITERS[name] for name in ("torch", "safetensors"))]
)
def test_a_full_disk_is_named_by_the_file_that_did_not_fit(write: Callable[[Path], object], tmp_path: Path) -> None:
    def work() -> None:
        with disk_of(10_000), replacing(tmp_path / "file.npy") as temporary:
            write(temporary)

    assert f"{tmp_path / 'file.npy'}: " in ends(work)
    assert not list(tmp_path.glob("file*"))


def test_what_goes_wrong_for_another_reason_keeps_its_error(tmp_path: Path) -> None:
    for error in (ValueError("a defect"), OSError(13, "Permission denied", "elsewhere"), OSError("no number")):
        with pytest.raises(type(error)) as raised, replacing(tmp_path / "file"):
            raise error
        assert raised.value is error


def test_what_follows_a_full_disk_is_no_other_fault(tmp_path: Path) -> None:
    def work() -> None:
        try:
            with disk_of(10_000):
                write_file(tmp_path / "file", b"0" * 100_000)
        finally:
            raise RuntimeError("a library's own words")

    assert "File too large" in ends(work)


def test_paths_that_cannot_be_written_are_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path, advice in [
        (tmp_path / "file" / "x", "a part of that path is a file"),
        (tmp_path / ("a" * 300), "choose a shorter name"),
        (Path("/proc/x"), "cannot be created"),
        (tmp_path / "file", "something of that name exists"),
    ]:
        line = ends(path.mkdir)
        assert advice in line
        assert str(path)[:50] in line
        assert len(line) < 300
    assert "choose a new folder" in ends((tmp_path / "folder").rmdir)
    assert "that is a folder" in ends((tmp_path / "folder").read_bytes)


def test_a_closed_folder_is_named() -> None:
    error = PermissionError(13, "Permission denied", "/closed/run")
    assert environment_fault(error) == (
        "/closed/run: Permission denied; choose a folder that can be written, or change its mode"
    )


def test_a_defect_keeps_its_traceback() -> None:
    for error in (ValueError("a defect"), KeyError("x"), OSError("without a number")):
        assert environment_fault(error) is None

    def work() -> None:
        try:
            Path("/nowhere/at/all").read_bytes()
        except FileNotFoundError:
            raise KeyError("a defect while another error is handled") from None

    with pytest.raises(KeyError):
        one_line("kd-thing", "nothing is kept")(work)()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run_dir=file"], "a part of that path is a file"),
        (["run_dir=file/run"], "a part of that path is a file"),
        (["name=" + "a" * 300], "choose a shorter name"),
        (["run_dir=/proc/run"], "/proc/run: "),
    ],
)
def test_a_run_that_cannot_have_its_folder_is_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = command("kd-train", "experiment=quickstart", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
