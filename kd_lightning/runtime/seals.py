"""Checksums: JSON files that contain their own, and the sha256 of files of any kind."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kd_lightning.runtime.borders import json_text
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.files import write_file

CHECKSUM = "checksum"


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object in one step, with a checksum of itself."""
    write_file(path, sealed_text(content))


def read_sealed(path: Path, remedy: str, required: bool = True) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Args:
        path: The file.
        remedy: What the user can do if it is damaged; ends the error's line.
        required: Whether to refuse a file without a checksum, which another program may have written.

    Raises:
        KDError: It is missing, or differs from what was written.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe's writer would be waited for
            raise OSError("it is no file")
        text = path.read_bytes()
        content = json.loads(text)
        if isinstance(content, dict) and CHECKSUM not in content and not required:
            return content
        whole = isinstance(content, dict) and sealed_text(content).encode() == text
    except (OSError, ValueError, RecursionError) as error:
        raise KDError(f"{path} cannot be read ({error}): {remedy}") from error
    if not whole:
        raise KDError(f"{path} is damaged, its checksum does not match: {remedy}")
    return {key: value for key, value in content.items() if key != CHECKSUM}


def sealed_text(content: Mapping[str, Any]) -> str:
    """Return a JSON object's text with a checksum of its other entries."""
    plain = {str(key): value for key, value in content.items() if key != CHECKSUM}
    checksum = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    return json_text({**plain, CHECKSUM: checksum})


def sha256(path: Path) -> str:
    """Return the sha256 of a file: computed once per process, unless the file changes."""
    stat = path.stat()
    return _sha256(path.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, *stamp: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of files in a folder by name; a subfolder stands for all files in it."""
    found = {path for name in names for path in _below(folder / name)}
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(found)}


def check_seal(folder: Path, seal: Mapping[str, str], names: Iterable[str], remedy: str) -> None:
    """Refuse files that differ from the seal, and new files in sealed folders.

    Args:
        folder: Their folder.
        seal: What `seal` returned.
        names: Which of the sealed files and folders are checked.
        remedy: What the user can do; ends the error's line.

    Raises:
        KDError: Names the first file that is missing, damaged or foreign.
    """
    chosen = set(names)
    for name, expected in seal.items():
        if name.partition("/")[0] not in chosen:
            continue
        try:
            found = sha256(folder / name)
        except FileNotFoundError:
            raise KDError(f"{folder / name} is missing: {remedy}") from None
        except OSError as error:
            raise KDError(f"{folder / name} cannot be read ({error.strerror}): {remedy}") from error
        if found != expected:
            raise KDError(f"{folder / name} is damaged: it differs from what was written: {remedy}")
    for path in (path for name in sorted(chosen) for path in _below(folder / name)):
        if path.relative_to(folder).as_posix() not in seal:
            raise KDError(f"{path} did not exist when {folder} was written: {remedy}")


def _below(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []
