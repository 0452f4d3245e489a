"""What a new cache takes from others of the same teacher."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.manifest import CONTENTS, MANIFEST, Manifest
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.reuse import Contents, Copying, contents_of, write_contents
from kd_lightning.teachers.cache.store import DEFAULT_STORAGE, TeacherCache
from kd_lightning.teachers.cache.upkeep import verify
from kd_lightning.types import Batch
from tests.teachers.cache.examples import KEY, SMALL, Known, same
from tests.teachers.cache.test_fill import Asked

SMALL_SET, GROWN = 40, 60
KNOWN = Known(GROWN)
LARGER = {**KEY, "data": "d2"}


def sentences(index: Tensor, padded: int = 0, left: bool = False, more: int = 0) -> Batch:
    """A batch whose tokens tell examples apart."""
    mask = KNOWN.mask(index, padded, left)
    tokens = mask * (1000 * (1 + index[:, None]) + mask.cumsum(1)) + more
    return {"input_ids": tokens, "attention_mask": mask, "index": index, "labels": index}


def digests(rows: Tensor) -> Contents:
    """The digests of a set whose example i is example `rows[i]` of all."""
    batch = sentences(rows)
    return contents_of([{**batch, "index": torch.arange(len(rows))}], len(rows))


def begin(contents: Contents, others: list[Path], said: list[str], folder: Path, manifest: Manifest) -> None:
    manifest.contents = write_contents(folder, contents)
    Copying(folder, manifest, contents, said.append).take_all(others)


def created(folder: Path, rows: Tensor, others: list[Path], said: list[str], storage: Storage = DEFAULT_STORAGE,
            key: dict[str, object] = LARGER) -> TeacherCache:  # fmt: skip
    own = partial(begin, digests(rows), others, said)
    return TeacherCache.create(folder, key, len(rows), storage, limits=SMALL, begin=own)


def answered(cache: TeacherCache, rows: Tensor, asked: Asked) -> int:
    """Fill a cache of a set whose example i is example `rows[i]` of all."""

    def teacher(batch: Batch) -> object:
        return asked({**batch, "index": rows[batch["index"]]})

    parts = torch.arange(len(rows)).split(8)
    return fill(cache, teacher, [{"index": part, "attention_mask": KNOWN.mask(rows[part])} for part in parts])  # type: ignore[arg-type]


@pytest.fixture
def smaller(tmp_path: Path) -> TeacherCache:
    """A complete cache of the first examples, in several shards."""
    cache = created(tmp_path / "smaller", torch.arange(SMALL_SET), [], [], key=KEY)
    cache.run = "run_1"
    answered(cache, torch.arange(SMALL_SET), Asked(KNOWN))
    assert len(cache.manifest.shards) > 1
    return cache


def test_a_digest_is_of_what_is_read_however_it_is_padded() -> None:
    index = torch.arange(20)
    plain = contents_of([sentences(index)], 20)
    assert len(set(plain.tolist())) == 20 - int((KNOWN.lengths[:20] == 0).sum()) + 1, "empty ones are alike"
    for other in (sentences(index, padded=15), sentences(index, left=True), sentences(index.flip(0))):
        assert (contents_of([other], 20) == plain).all()
    assert (contents_of([sentences(part) for part in index.split(3)], 20) == plain).all()
    full = KNOWN.lengths[:20].numpy() > 0
    batch = sentences(index)
    for name, value in (("input_ids", batch["input_ids"] + 1), ("keep", batch["attention_mask"].bool()),
                        ("token_type_ids", batch["attention_mask"])):  # fmt: skip
        assert (contents_of([{**batch, name: value}], 20) != plain)[full].all()
    assert (contents_of([{**batch, "labels": index + 1}], 20) == plain).all()
    pixels = torch.rand(3, 1, 2, 2)
    found = [contents_of([{"pixel_values": x, "index": torch.arange(3)}], 3) for x in (pixels, pixels.flip(0))]
    assert (found[0] == found[1][::-1]).all()


def test_a_grown_set_takes_what_is_there_and_the_teacher_predicts_the_rest(
    tmp_path: Path, smaller: TeacherCache
) -> None:
    rows = torch.cat([torch.arange(GROWN).flip(0), torch.tensor([3, 3, 55])])  # another order, and some twice
    said: list[str] = []
    cache = created(tmp_path / "grown", rows, [tmp_path / "grown", smaller.folder], said)
    there = rows < SMALL_SET
    empty = KNOWN.lengths[rows] == 0
    assert torch.equal(cache.known(torch.arange(len(rows)))[~empty], there[~empty])
    assert said == [f"teacher  outputs of {cache.stored} of {len(rows)} examples are copied from {smaller.folder}"]
    copied = (there & ~empty).nonzero().squeeze(1)
    assert same(cache.lookup(copied, KNOWN.mask(rows[copied])), KNOWN.say(rows[copied], KNOWN.mask(rows[copied])))
    assert cache.manifest.seconds() == cache.manifest.seconds("run_1") == pytest.approx(smaller.manifest.seconds())
    asked = Asked(KNOWN)
    answered(cache, rows, asked)
    assert set(asked.index) >= set(range(SMALL_SET, GROWN)) - set(rows[empty].tolist())
    assert set(asked.index) <= set(range(SMALL_SET, GROWN))
    again = TeacherCache.open(tmp_path / "grown", LARGER, len(rows))
    assert again.complete
    assert verify(again.folder) == []
    assert same(again.lookup(copied, KNOWN.mask(rows[copied])), KNOWN.say(rows[copied], KNOWN.mask(rows[copied])))


@pytest.mark.parametrize(
    ("key", "storage"),
    [({**LARGER, "teacher": {"weights": "a2", "precision": "32-true"}}, Storage()), (LARGER, Storage("float16"))],
)
def test_nothing_is_taken_from_another_teacher_or_storage(
    tmp_path: Path, smaller: TeacherCache, key: dict[str, object], storage: Storage
) -> None:
    said: list[str] = []
    cache = created(tmp_path / "other", torch.arange(SMALL_SET), [smaller.folder], said, storage, key)
    assert cache.stored == 0
    assert said == []


@pytest.mark.parametrize("file", [CONTENTS, MANIFEST, "shard-00000.safetensors"])
def test_what_is_damaged_is_named_and_not_taken(tmp_path: Path, smaller: TeacherCache, file: str) -> None:
    path = smaller.folder / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert verify(smaller.folder)
    said: list[str] = []
    cache = created(tmp_path / "grown", torch.arange(GROWN), [smaller.folder], said)
    assert cache.stored == 0
    assert file in said[0]
    assert said[0].endswith("nothing is copied from it")
    assert path.read_bytes() == content


def test_digests_of_other_examples_are_not_believed(tmp_path: Path, smaller: TeacherCache) -> None:
    manifest = Manifest.read(smaller.folder / MANIFEST)
    manifest.contents = write_contents(smaller.folder, digests(torch.arange(3)))
    manifest.write(smaller.folder / MANIFEST)
    said: list[str] = []
    assert created(tmp_path / "grown", torch.arange(GROWN), [smaller.folder], said).stored == 0
    assert "has digests of 3 examples, not of 40" in said[0]
    manifest.num_examples = 3
    manifest.write(smaller.folder / MANIFEST)
    assert created(tmp_path / "more", torch.arange(GROWN), [smaller.folder], said).stored == 0
    assert "holds examples that its cache does not have" in said[1]


def test_a_kill_while_it_copies_leaves_nothing_half_taken(
    tmp_path: Path, smaller: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", lambda *_: (_ for _ in ()).throw(CacheError("killed")))
        with pytest.raises(CacheError, match="killed"):
            created(tmp_path / "grown", torch.arange(GROWN), [smaller.folder], said)
    left = set((tmp_path / "grown").glob("shard-*"))
    assert left
    assert not (tmp_path / "grown" / MANIFEST).exists()
    cache = created(tmp_path / "grown", torch.arange(GROWN), [smaller.folder], said)
    assert cache.stored >= SMALL_SET
    answered(cache, torch.arange(GROWN), Asked(KNOWN))
    assert cache.complete
    assert not left & set((tmp_path / "grown").glob("shard-*")), "the writer swept them"


def test_a_set_of_nothing_new_asks_nothing(tmp_path: Path, smaller: TeacherCache) -> None:
    rows = torch.from_numpy(np.random.default_rng(0).permutation(SMALL_SET))
    cache = created(tmp_path / "same", rows, [smaller.folder], [])
    assert cache.complete
    index = (KNOWN.lengths[rows] > 0).nonzero().squeeze(1)  # this teacher tells empty inputs apart
    mask = KNOWN.mask(rows[index])
    assert same(cache.lookup(index, mask), KNOWN.say(rows[index], mask))


def test_which_tokens_are_masked_is_part_of_what_is_read_and_the_padding_of_their_places_is_not() -> None:
    def found(*batches: Batch) -> list[bytes]:
        return list(contents_of(batches, 2))

    batch: Batch = {
        "input_ids": torch.tensor([[2, 9, 8, 3], [2, 9, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "masked_places": torch.tensor([[1, 2], [1, 0]]), "keep": torch.tensor([[True, True], [True, False]]),
        "index": torch.arange(2),
    }  # fmt: skip
    alone = [{name: entry[i : i + 1] for name, entry in batch.items()} for i in (0, 1)]
    for name in ("masked_places", "keep"):
        alone[1][name] = alone[1][name][:, :1]
    assert found(batch) == found(*alone)
    other = found({**batch, "masked_places": torch.tensor([[1, 2], [2, 0]])})
    assert other[0] == found(batch)[0]
    assert other[1] != found(batch)[1]
