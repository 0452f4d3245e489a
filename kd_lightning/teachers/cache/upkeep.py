"""Upkeep of a cache's folder: locks, checks, and cleaning up after killed processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from kd_lightning.runtime.errors import CacheError
from kd_lightning.runtime.files import Busy, alone
from kd_lightning.teachers.cache.manifest import CONTENTS, MANIFEST, REFRESH, Manifest, ShardRecord, own_files, remedy
from kd_lightning.teachers.cache.shards import leftovers, shard_problem

Say = Callable[[str], None]

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path, say: Say = log.info, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a cache, `FOLDER.lock` beside it, which the system releases when its holder dies.

    The lock is reentrant within a process.

    Args:
        folder: The cache's.
        say: Receives a line with the process that this one waits for.
        wait: Whether to wait at all.

    Raises:
        CacheError: The lock cannot be created, or another process holds it and `wait` is False.
    """
    path = folder.absolute().with_name(f"{folder.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(alone(path, lambda line: say(f"{line}, which writes {folder}"), wait))
        except Busy as holder:
            raise CacheError(f"{folder} is being written by {holder}") from None
        except OSError as error:
            raise _not_writable(path.parent, error) from error
        yield


class InUse:
    """Protects a cache from `kd-cache prune` while this object exists.

    It is a shared lock on the folder itself, which the system releases when the process dies. On file systems without
    such locks (some network ones) it has no effect.

    Args:
        folder: The cache's.
        make: Create the folder if it does not exist.

    Raises:
        CacheError: There is none, it cannot be created, or it is being removed.
    """

    def __init__(self, folder: Path, make: bool = False) -> None:
        begun = time.monotonic()
        while not self._hold(folder, make):
            if time.monotonic() - begun > 10:
                raise CacheError(f"{folder} is being removed by another process: run again")
            time.sleep(0.05)

    def _hold(self, folder: Path, make: bool) -> bool:
        try:
            if make:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(folder, error) from error
        try:
            held = _lock_folder(folder, fcntl.LOCK_SH)
        except FileNotFoundError as error:
            raise CacheError(f"{folder} holds no teacher outputs: there is no {MANIFEST}") from error
        except OSError as error:
            raise CacheError(f"{folder} cannot be read ({error.strerror})") from error
        if held is None:
            return False
        self._release = weakref.finalize(self, os.close, held)
        return folder.exists() and os.path.samestat(os.fstat(held), folder.stat())  # not removed a moment ago


@contextlib.contextmanager
def unread(folder: Path) -> Iterator[None]:
    """Keep other processes from opening a cache.

    Raises:
        CacheError: A process is reading it.
    """
    held = _lock_folder(folder, fcntl.LOCK_EX)
    if held is None:
        raise CacheError(f"{folder} is being read by another process")
    try:
        yield
    finally:
        os.close(held)


def _lock_folder(folder: Path, kind: int) -> int | None:
    """Return a descriptor that holds this lock, None if another process holds a conflicting one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without such locks
        log.debug("%s cannot be locked", folder)
    return descriptor


def remove_cache(folder: Path) -> None:
    """Remove a cache's files, and the folder if nothing else is in it; the caller holds the lock.

    The manifest goes first, so that other processes find no cache rather than a damaged one.
    """
    for path in own_files(folder):
        path.unlink(missing_ok=True)
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def problems(folder: Path, manifest: Manifest) -> dict[ShardRecord, str]:
    """Return what is wrong with each damaged shard, after reading all of them."""
    found = {record: shard_problem(folder, record) for record in manifest.shards}
    return {record: wrong for record, wrong in found.items() if wrong is not None}


def drop_damaged(folder: Path, say: Say) -> Manifest:
    """Remove damaged shards, whose examples are predicted again, and return the manifest of the rest.

    Args:
        folder: The cache's.
        say: Receives a line for each shard.
    """
    with locked(folder, say):
        manifest = Manifest.read(folder / MANIFEST)
        wrong = problems(folder, manifest)
        manifest.shards = [record for record in manifest.shards if record not in wrong]
        manifest.write(folder / MANIFEST)
        for record, problem in wrong.items():
            say(f"{problem}: dropped, its {record.examples} examples will be computed again")
            (folder / record.file).unlink(missing_ok=True)
    return manifest


def read_contents(folder: Path, manifest: Manifest) -> bytes:
    """Return the digests of what the teacher reads of each example; none where the cache has none.

    Raises:
        CacheError: They are missing, or not what was written.
    """
    if not manifest.contents:
        return b""
    try:
        found = (folder / CONTENTS).read_bytes()
    except OSError as error:
        raise CacheError(f"{folder / CONTENTS} cannot be read ({error.strerror}); {remedy(folder)}") from error
    if hashlib.sha256(found).hexdigest() != manifest.contents:
        raise CacheError(f"{folder / CONTENTS} is damaged: it is not what was written; {remedy(folder)}")
    return found


def shard_files(folder: Path) -> list[Path]:
    """Return the files of a cache's shards; none if the manifest is missing or damaged."""
    manifest = _read(folder / MANIFEST)
    return [folder / record.file for record in manifest.shards] if manifest else []


def verify(folder: Path) -> list[str]:
    """Return everything that is wrong with a cache; an empty list for an intact one, complete or not."""
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except CacheError as error:
        return [str(error)]
    found = list(problems(folder, manifest).values())
    try:
        read_contents(folder, manifest)
    except CacheError as error:
        found.append(str(error))
    return found


def remains(folder: Path, refreshing: bool = False) -> list[Path]:
    """Return the files that killed processes left in a cache's folder; the caller holds the lock.

    Args:
        folder: The cache's.
        refreshing: Whether this process is rebuilding the cache; otherwise an unfinished refresh is a remainder too.
    """
    found: list[Path] = []
    main, refresh = _read(folder / MANIFEST), _read(folder / REFRESH)
    if main is None and (folder / MANIFEST).exists():
        return []  # a damaged manifest does not say which shards are in use
    used = {record.file for record in main.shards} if main else set()
    if refreshing and refresh is not None:
        used |= {record.file for record in refresh.shards}
    elif (folder / REFRESH).exists():
        found.append(folder / REFRESH)
        found += [folder / record.file for record in (refresh.shards if refresh else []) if record.file not in used]
    for manifest in (main, refresh):
        found += leftovers(folder, used, manifest.fingerprint if manifest else "")
    return sorted({path for path in found if path.is_file()})


def sweep(folder: Path, refreshing: bool = False) -> None:
    """Remove the files that killed processes left; the caller holds the lock."""
    for path in remains(folder, refreshing):
        path.unlink(missing_ok=True)


def _not_writable(folder: Path, error: OSError) -> CacheError:
    return CacheError(f"cannot write to {folder} ({error.strerror}): set KD_LIGHTNING_HOME to a folder of yours")


def _read(path: Path) -> Manifest | None:
    try:
        return Manifest.read(path)
    except CacheError:
        return None  # callers check whether the file exists
