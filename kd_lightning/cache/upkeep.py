"""What keeps a cache's folder in order: its lock, what is wrong with it, what killed processes left in it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from kd_lightning.cache.manifest import MANIFEST, REFRESH, Manifest, ShardRecord
from kd_lightning.cache.shards import leftovers, shard_problem
from kd_lightning.errors import CacheError
from kd_lightning.files import Busy, alone

Say = Callable[[str], None]

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path, say: Say = log.info, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a cache: `FOLDER.lock` beside it, which the system releases when its holder dies.

    A process that holds it may take it again.

    Args:
        folder: The cache's.
        say: Told, once, whom this process waits for.
        wait: Whether to wait at all.

    Raises:
        CacheError: The lock cannot be made, or another process has it and `wait` is False.
    """
    path = folder.absolute().with_name(f"{folder.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(alone(path, lambda line: say(f"{line}, which writes {folder}"), wait))
        except Busy as holder:
            raise CacheError(f"{folder} is being written by {holder}") from None
        except OSError as error:
            raise CacheError(
                f"cannot write to {path.parent} ({error.strerror}): set KD_LIGHTNING_HOME to a folder of yours"
            ) from error
        yield


def problems(folder: Path, manifest: Manifest) -> dict[ShardRecord, str]:
    """Say what is wrong with each damaged shard, after reading all of them."""
    found = {record: shard_problem(folder, record) for record in manifest.shards}
    return {record: wrong for record, wrong in found.items() if wrong is not None}


def shard_files(folder: Path) -> list[Path]:
    """Return the files of a cache's shards; none where there is no manifest or it is damaged."""
    manifest = _read(folder / MANIFEST)
    return [folder / record.file for record in manifest.shards] if manifest else []


def verify(folder: Path) -> list[str]:
    """Say all that is wrong with a cache; an empty list for one that is whole (complete or not)."""
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except CacheError as error:
        return [str(error)]
    return list(problems(folder, manifest).values())


def remains(folder: Path, refreshing: bool = False) -> list[Path]:
    """Return the files that killed processes left in a cache's folder; to be asked by whoever holds its lock.

    Args:
        folder: The cache's.
        refreshing: Whether this process is building the cache anew; otherwise a begun refresh is such a remainder too.
    """
    found: list[Path] = []
    main, refresh = _read(folder / MANIFEST), _read(folder / REFRESH)
    if main is None and (folder / MANIFEST).exists():
        return []  # nobody knows which shards a damaged manifest names
    used = {record.file for record in main.shards} if main else set()
    if refreshing and refresh is not None:
        used |= {record.file for record in refresh.shards}
    elif (folder / REFRESH).exists():
        found.append(folder / REFRESH)
        found += [folder / record.file for record in (refresh.shards if refresh else []) if record.file not in used]
    for manifest in (main, refresh):
        found += leftovers(folder, used, manifest.fingerprint if manifest else "")
    return sorted({path for path in found if path.exists()})


def sweep(folder: Path, refreshing: bool = False) -> None:
    """Remove what killed processes left; by whoever holds the lock."""
    for path in remains(folder, refreshing):
        path.unlink(missing_ok=True)


def _read(path: Path) -> Manifest | None:
    try:
        return Manifest.read(path)
    except CacheError:
        return None  # callers look whether the file is there
