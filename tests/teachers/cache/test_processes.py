from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import count as numbers
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.cache.upkeep import locked, verify
from kd_lightning.types import Batch, ModelOutput
from tests.teachers.cache.examples import KEY, MAPPED, SMALL, Known, count, full, reads_back, same
from tests.waiting import end_of, wait_for

SPAWN = multiprocessing.get_context("spawn")
FORKS = multiprocessing.get_context("forkserver")
"""Processes as new as spawned ones, of one that has imported this file."""
FORKS.set_forkserver_preload([__name__])
NUMBER = 600


def killed_at(folder: Path, event: int) -> Callable[[], None]:
    """Have this process kill itself when it has opened or renamed files in a folder, or called this, so often."""
    number = numbers(1)

    def happens() -> None:
        if next(number) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(what: str, arguments: tuple[Any, ...]) -> None:
        if what in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(f"{folder}{os.sep}"):
            happens()

    sys.addaudithook(audit)
    return happens


def build(folder: Path, seed: int, pause: float, refresh: bool = False, event: int | None = None) -> None:
    """Fill a cache, slowly, and note each example that the teacher was asked about; die at an event."""
    torch.set_num_threads(1)
    known = Known(NUMBER)
    happens = killed_at(folder, event) if event is not None else lambda: None

    def ask(batch: Batch) -> ModelOutput:
        happens()
        count(folder.parent, len(batch["index"]))
        time.sleep(pause)
        return known.ask(batch)

    if refresh:
        with TeacherCache.refreshing(folder, KEY, NUMBER, limits=SMALL) as cache:
            fill(cache, ask, known.batches(10, seed))
    else:
        cache = TeacherCache.create(folder, KEY, NUMBER, limits=SMALL)
        fill(cache, ask, known.batches(10, seed))


def share(folder: Path, seed: int, ready: Any) -> None:
    """Add to a cache without its lock, as the processes of one training do."""
    torch.set_num_threads(1)
    known = Known(NUMBER)
    cache = TeacherCache.create(folder, KEY, NUMBER, limits=SMALL)
    ready.wait(120)
    for batch in known.batches(10, seed):
        if not cache.known(batch["index"]).all():
            count(folder.parent, len(batch["index"]))
            cache.add(batch["index"], known.ask(batch), batch["attention_mask"])
    cache.flush()


def read(cache: TeacherCache, seed: int, answer: Any) -> None:
    known = Known(NUMBER)
    torch.manual_seed(seed)
    good = 0
    for _ in range(20):
        index = torch.randint(0, NUMBER, (32,))
        good += same(cache.lookup(index, known.mask(index)), known.say(index, known.mask(index)))
    answer.put(good)


def started(*processes: Any) -> list[Any]:
    for process in processes:
        process.start()
    return list(processes)


def joined(processes: list[Any]) -> None:
    for process in processes:
        assert end_of(process) == 0


@pytest.mark.parametrize("refresh", [False, True])
def test_killed_at_any_moment_it_is_whole_and_gone_on_from(tmp_path: Path, refresh: bool) -> None:
    folder = tmp_path / "cache"
    old = Known(NUMBER, seed=1)
    if refresh:
        full(folder, old)
    draw = random.Random(int(refresh))
    stored = 0
    for _ in range(1 if refresh else 3):
        event = draw.randrange(4, 280 if refresh else 100)  # of 300 or more; the third makes the manifest
        [process] = started(FORKS.Process(target=build, args=(folder, 0, 0.0, refresh, event)))
        assert end_of(process) == -signal.SIGKILL, f"it did not come to event {event}"
        assert verify(folder) == []
        if refresh:
            reads_back(folder, old)
            continue
        cache = TeacherCache.open(folder, KEY, limits=SMALL)
        known = Known(NUMBER)
        index = torch.arange(NUMBER)[cache.known(torch.arange(NUMBER))]
        assert len(index) >= stored  # what was in files stays
        stored = len(index)
        if stored:
            assert same(cache.lookup(index, known.mask(index)), known.say(index, known.mask(index)))
    (tmp_path / "asked").unlink(missing_ok=True)  # the kills may have come before the first batch
    build(folder, 3, 0.0, refresh)
    reads_back(folder, Known(NUMBER))
    asked = (tmp_path / "asked").stat().st_size if (tmp_path / "asked").exists() else 0  # all may be stored already
    assert asked <= (NUMBER if refresh else NUMBER - stored) + 10  # the first batch twice
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "manifest.json",
        *(r["file"] for r in json.loads((folder / "manifest.json").read_text())["shards"]),
    }


def test_two_builders_ask_about_each_example_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    joined(started(*(FORKS.Process(target=build, args=(folder, seed, 0.005)) for seed in (0, 1))))
    reads_back(folder, Known(NUMBER))
    assert (tmp_path / "asked").stat().st_size == NUMBER + 10  # the first batch twice, by one of them


def test_two_that_share_the_work_end_with_one_good_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    ready = FORKS.Barrier(2)
    joined(started(*(FORKS.Process(target=share, args=(folder, seed, ready)) for seed in (0, 1))))
    reads_back(folder, Known(NUMBER))
    assert len({r["file"] for r in json.loads((folder / "manifest.json").read_text())["shards"]}) > 5


def test_spawned_processes_read_what_they_were_sent(tmp_path: Path) -> None:
    caches = [full(tmp_path / "cache", Known(NUMBER), limits) for limits in (SMALL, MAPPED)]
    answer = SPAWN.Queue()
    readers = started(*(SPAWN.Process(target=read, args=(cache, 0, answer)) for cache in caches))
    joined(readers)  # which write no more than a pipe holds
    assert [answer.get(timeout=10) for _ in readers] == [20, 20]


def hold(folder: Path, held: Any, release: Any) -> None:
    with locked(folder):
        held.set()
        release.wait(60)


def test_who_waits_is_told_for_whom(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = TeacherCache.create(folder, KEY, 5)
    held, release = FORKS.Event(), FORKS.Event()
    [process] = started(FORKS.Process(target=hold, args=(folder, held, release)))
    wait_for(held.is_set, "the lock to be held", process)
    with pytest.raises(CacheError, match=f"is being written by process {process.pid} on "), locked(folder, wait=False):
        pass
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        release.set()

    with cache.writing(say):  # for a minute at most: then the holder lets go
        assert len(said) == 1
        assert f"waiting for process {process.pid} on " in said[0]
    joined([process])


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    held, release = FORKS.Event(), FORKS.Event()
    [process] = started(FORKS.Process(target=hold, args=(tmp_path / "cache", held, release)))
    wait_for(held.is_set, "the lock to be held", process)
    os.kill(process.pid, signal.SIGKILL)
    end_of(process)
    with locked(tmp_path / "cache", wait=False), locked(tmp_path / "cache", wait=False):  # and may be taken twice
        assert f"process {os.getpid()} on " in (tmp_path / "cache.lock").read_text()
