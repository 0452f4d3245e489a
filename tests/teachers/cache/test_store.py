from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_lightning.runtime.errors import CacheError, ConfigError
from kd_lightning.teachers.cache import outputs
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.shards import Limits
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.types import ModelOutput, SparseLogits
from tests.teachers.cache.examples import KEY, MAPPED, SMALL, Known, dense_top_k, full, reads_back, same

ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


@pytest.mark.parametrize("limits", [SMALL, MAPPED])
def test_what_was_added_comes_back_to_the_bit_at_once_and_after_opening(folder: Path, limits: Limits) -> None:
    known = Known(200)
    cache = TeacherCache.create(folder, KEY, 200, limits=limits)
    added: list[torch.Tensor] = []
    for batch in known.batches():
        cache.add(batch["index"], known.ask(batch), batch["attention_mask"])
        added.append(batch["index"])
        index = torch.cat(added)[-20:]
        mask = known.mask(index)
        assert same(cache.lookup(index, mask), known.say(index, mask))
        assert cache.known(index).all()
    assert cache.complete
    assert len(cache.missing()) == 0
    cache.flush()
    assert len(cache.manifest.shards) > 3
    reads_back(folder, known, limits)


@pytest.mark.parametrize("limits", [SMALL, MAPPED])
def test_any_padding_reads_the_same_tokens(folder: Path, limits: Limits) -> None:
    known = Known(50)
    cache = full(folder, known, limits)
    index = torch.tensor([3, 49, 3, 0, 17])
    for padded, left in [(0, False), (14, False), (14, True), (0, True)]:
        mask = known.mask(index, padded, left)
        assert same(cache.lookup(index, mask), known.say(index, mask))
    gaps = torch.zeros(5, 20, dtype=torch.long)
    for row, n in zip(gaps, known.lengths[index], strict=True):
        row[torch.randperm(20)[:n]] = 1
    assert same(cache.lookup(index, gaps), known.say(index, gaps))


@pytest.mark.parametrize(
    ("limits", "dtype", "top_k"),
    [(SMALL, "float32", None), (SMALL, "float16", 4), (MAPPED, "float32", 4), (MAPPED, "bfloat16", None)],
)
def test_100k_random_lookups_equal_a_numpy_reference(
    folder: Path, limits: Limits, dtype: str, top_k: int | None
) -> None:
    known = Known(500, classes=11)
    cache = full(folder, known, limits, Storage(dtype, top_k))  # type: ignore[arg-type]
    cache = TeacherCache.open(folder, KEY, 500, limits=limits)
    logits, vector = known.logits.numpy(), known.vector.numpy()
    if top_k is not None:
        logits = dense_top_k(logits, top_k)
    generator = np.random.default_rng(0)
    for size in [1] * 10 + [990] * 101:
        index = generator.integers(0, 500, size)
        mask = known.mask(torch.from_numpy(index))
        found = cache.lookup(torch.from_numpy(index), mask)
        near = 1e-5 if top_k is not None else 0.0  # the mass of the rest is a sum in float32
        for got, expected in ((found.logits.numpy(), logits[index]), (found.features["vector"].numpy(), vector[index])):
            np.testing.assert_allclose(got, expected, rtol=ROUNDING[dtype], atol=near + ROUNDING[dtype] * 1e-2)
    expected = known.say(torch.from_numpy(index), mask)
    for name in ("hidden", "map"):
        torch.testing.assert_close(found.features[name], expected.features[name], rtol=ROUNDING[dtype], atol=1e-7)
        if dtype == "float32":
            assert torch.equal(found.features[name], expected.features[name])


@pytest.mark.parametrize("limits", [SMALL, MAPPED])
def test_top_k_keeps_the_probabilities_and_the_mass_of_the_rest(folder: Path, limits: Limits) -> None:
    known = Known(40, classes=30)
    cache = full(folder, known, limits, Storage(top_k=5))
    index = torch.arange(40)
    kept = cache.lookup(index, known.mask(index)).logits.softmax(1)
    true = known.logits.softmax(1)
    top = true.topk(5).indices
    torch.testing.assert_close(kept.gather(1, top), true.gather(1, top))
    torch.testing.assert_close(kept.sum(1) - kept.gather(1, top).sum(1), true.sum(1) - true.gather(1, top).sum(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_a_language_model_are_kept_for_real_tokens(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "MOST_DENSE", 11)
    known = Known(60, classes=12)
    cache = TeacherCache.create(folder, KEY, 60, Storage(dtype, 3), limits=SMALL)  # type: ignore[arg-type]
    for batch in known.batches():
        mask = batch["attention_mask"].bool()
        scores = torch.full((*mask.shape, 12), float("nan"))  # what a teacher says of padding is nobody's business
        scores[mask] = torch.cat([known.scores[i] for i in batch["index"]])
        cache.add(batch["index"], ModelOutput(scores), mask)
    for found in (cache, pickle.loads(pickle.dumps(cache))):
        index = torch.tensor([5, 59, 0, 5])
        mask = known.mask(index, padded=15).bool()
        output = found.lookup(index, mask)
        got = output.sparse
        assert got is not None
        assert (output.logits.shape, got.values.shape, got.classes) == ((4, 15, 0), (4, 15, 3), 12)
        for name, value in (("values", got.values), ("ids", got.ids), ("rest", got.rest)):
            assert (value[~mask] == 0).all(), name
        said = torch.cat([known.scores[i] for i in index])
        expected = SparseLogits.of(said.log_softmax(-1), 3)
        assert got.ids[mask].tolist() == expected.ids.tolist()
        np.testing.assert_allclose(got.values[mask], expected.values, rtol=ROUNDING[dtype], atol=1e-5)
        np.testing.assert_allclose(got.rest[mask], expected.rest, atol=1e-5)


@pytest.mark.parametrize(("classes", "bytes_an_id"), [(300, 2), (40_000, 2), (65_536, 2), (65_537, 4)])
def test_ids_of_a_vocabulary_take_as_few_bytes_as_they_can(folder: Path, classes: int, bytes_an_id: int) -> None:
    logits = torch.zeros(3, classes)
    largest = [classes - 1, 0, min(classes - 1, 2**15)]
    logits[torch.arange(3), largest] = 9.0
    cache = TeacherCache.create(folder, KEY, 3, Storage(top_k=1), limits=MAPPED)
    cache.add(torch.arange(3), ModelOutput(logits))
    assert cache.lookup(torch.arange(3)).logits.argmax(1).tolist() == largest
    (spec,) = cache.manifest.specs
    assert spec.unit_bytes == 4 + bytes_an_id + 4


def test_rows_are_looked_through_some_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "MOST_DENSE", 11)
    logits = torch.randn(8, 5, 12)
    mask = torch.ones(8, 5, dtype=torch.bool)
    found = []
    for number, at_once in enumerate((12, 24, 10**6)):
        monkeypatch.setattr(outputs, "AT_ONCE", at_once)
        cache = TeacherCache.create(folder / str(number), KEY, 8, Storage(top_k=3), limits=SMALL)
        cache.add(torch.arange(8), ModelOutput(logits), mask)
        sparse = cache.lookup(torch.arange(8), mask).sparse
        assert sparse is not None
        found.append(sparse)
    for other in found[1:]:
        torch.testing.assert_close(other[:3], found[0][:3])


def test_resident_and_mapped_answers_are_equal(folder: Path) -> None:
    known = Known(120)
    full(folder, known)
    index = torch.randint(0, 120, (64,))
    mask = known.mask(index)
    one, other = (TeacherCache.open(folder, limits=limits).lookup(index, mask) for limits in (SMALL, MAPPED))
    assert same(one, other)


def test_known_rows_are_not_stored_twice_and_the_first_answer_stays(folder: Path) -> None:
    known, other = Known(20), Known(20, seed=1)
    cache = TeacherCache.create(folder, KEY, 20, limits=SMALL)
    index = torch.tensor([4, 2, 4])
    cache.add(index, known.say(index, known.mask(index), features=False))
    both = torch.tensor([2, 7])
    cache.add(both, other.say(both, other.mask(both), features=False))
    assert torch.equal(cache.lookup(torch.tensor([4, 2])).logits, known.logits[[4, 2]])
    assert torch.equal(cache.lookup(torch.tensor([7])).logits, other.logits[[7]])
    assert cache.known(torch.arange(5)).tolist() == [False, False, True, False, True]
    assert cache.missing().tolist() == [0, 1, 3, 5, 6, *range(8, 20)]
    cache.flush()
    assert cache.manifest.known == 3


def test_lookups_in_inference_mode_serve_autograd(folder: Path) -> None:
    known = Known(20)
    with torch.inference_mode():
        cache = full(folder, known)
        index = torch.arange(20)
        found = cache.lookup(index, known.mask(index))
        more = TeacherCache.open(folder, limits=MAPPED).lookup(index, known.mask(index))
    for tensor in (found.logits, found.features["hidden"], more.logits, more.features["map"]):
        weight = torch.ones_like(tensor, requires_grad=True)
        (weight * tensor).sum().backward()
        assert torch.equal(weight.grad, tensor)  # type: ignore[arg-type]
        assert not tensor.requires_grad


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("limits", [SMALL, MAPPED])
def test_what_the_teacher_returned_may_change_afterwards(folder: Path, limits: Limits, inference: bool) -> None:
    cache = TeacherCache.create(folder, {"teacher": "x"}, 4, limits=limits)
    with torch.inference_mode(inference):
        logits = torch.arange(8.0).view(4, 2)
        index = torch.arange(4)
        cache.add(index, ModelOutput(logits))
        logits.zero_()
        index.zero_()
    assert torch.equal(cache.lookup(torch.arange(4)).logits, torch.arange(8.0).view(4, 2))
    cache.flush()
    assert torch.equal(TeacherCache.open(folder).lookup(torch.arange(4)).logits, torch.arange(8.0).view(4, 2))
    weight = torch.ones(4, 2, requires_grad=True)
    (weight * cache.lookup(torch.arange(4)).logits).sum().backward()


def test_lookups_are_copies(folder: Path) -> None:
    known = Known(20)
    for limits in (SMALL, MAPPED):
        cache = full(folder, known, limits)
        index = torch.arange(20)
        for tensor in (
            cache.lookup(index, known.mask(index)).logits,
            *cache.lookup(index, known.mask(index)).features.values(),
        ):
            tensor.zero_()
        assert same(cache.lookup(index, known.mask(index)), known.say(index, known.mask(index)))
    reads_back(folder, known)


@pytest.mark.parametrize("limits", [SMALL, MAPPED])
def test_unknown_examples_are_named(folder: Path, limits: Limits) -> None:
    known = Known(20)
    cache = TeacherCache.create(folder, KEY, 20, limits=limits)
    index = torch.arange(10)
    with pytest.raises(CacheError, match=r"lacks 10 of these 10 examples, the first of them with index 0"):
        cache.lookup(index)
    cache.add(index, known.say(index, known.mask(index), features=False))
    with pytest.raises(CacheError, match=r"lacks 1 of these 2 examples, the first of them with index 12"):
        cache.lookup(torch.tensor([3, 12]))
    rest = torch.arange(10, 20)
    cache.add(rest, known.say(rest, known.mask(rest), features=False))
    for outside in (20, -1):
        with pytest.raises(CacheError, match=rf"index {outside}; the cache is for 20 examples"):
            cache.lookup(torch.tensor([3, outside]))
        with pytest.raises(CacheError, match=rf"index {outside}; the cache is for 20 examples"):
            cache.add(torch.tensor([outside]), ModelOutput(torch.zeros(1, 3)))


def test_another_number_of_tokens_is_refused(folder: Path) -> None:
    known = Known(20)
    cache = full(folder, known)
    index = torch.tensor([5, 1])
    mask = known.mask(index)
    mask[1, -1] = 0
    with pytest.raises(CacheError, match=r"index 1 has 8 tokens in this batch and 9 in the cache"):
        cache.lookup(index, mask)
    with pytest.raises(CacheError, match="hidden is stored for real tokens only: its batches need an attention mask"):
        cache.lookup(index)


def test_answers_unlike_the_first_are_refused(folder: Path) -> None:
    known = Known(20)
    cache = TeacherCache.create(folder, KEY, 20, limits=SMALL)
    index, later = torch.arange(4), torch.arange(4, 8)
    cache.add(index, known.say(index, known.mask(index)), known.mask(index))
    mask = known.mask(later)
    said = known.say(later, mask)
    with pytest.raises(CacheError, match=r"returned logits; this cache holds logits, vector, hidden, map"):
        cache.add(later, ModelOutput(said.logits), mask)
    with pytest.raises(CacheError, match=r"logits is \(4, 2\); expected \(4, 3\) for these 4 examples"):
        cache.add(later, ModelOutput(said.logits[:, :2], said.features), mask)
    with pytest.raises(CacheError, match="hidden is stored for real tokens only"):
        cache.add(later, said)
    assert cache.missing().tolist() == list(range(4, 20))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_but_not_in_padding(folder: Path, bad: float) -> None:
    known = Known(20)
    cache = TeacherCache.create(folder, KEY, 20, limits=SMALL)
    index = torch.tensor([6, 1, 0])
    mask = known.mask(index, padded=12)
    cache.add(index, known.say(index, mask, outside=bad), mask)
    assert same(cache.lookup(index, mask), known.say(index, mask))
    index = torch.tensor([8, 9])
    mask = known.mask(index)
    said = known.say(index, mask)
    said.logits[1, 2] = bad
    with pytest.raises(CacheError, match=r"logits for the example with index 9 has a NaN or an infinite number"):
        cache.add(index, said, mask)
    said = known.say(index, mask)
    said.features["map"][1, 1, 0, 0] = bad
    with pytest.raises(CacheError, match=r"map for the example with index 9"):
        cache.add(index, said, mask)
    assert not cache.known(index).any()


def test_float16_refuses_what_it_cannot_hold(folder: Path) -> None:
    cache = TeacherCache.create(folder, KEY, 20, Storage("float16"), limits=SMALL)
    logits = torch.zeros(3, 2)
    logits[2, 0] = 70_000.0
    with pytest.raises(CacheError, match=r"index 7 has a number beyond 65504, .* teacher.cache_dtype=float32"):
        cache.add(torch.tensor([5, 6, 7]), ModelOutput(logits))


def test_settings_that_cannot_be_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher.cache_dtype='int4': expected one of float32, float16, bfloat16"):
        Storage("int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"teacher.cache_top_k=0"):
        Storage(top_k=0)
    cache = TeacherCache.create(folder, KEY, 20, Storage(top_k=3))
    with pytest.raises(ConfigError, match=r"teacher.cache_top_k=3: the teacher has 3 classes"):
        cache.add(torch.arange(2), ModelOutput(torch.zeros(2, 3)))


def test_a_cache_of_something_else_is_refused_and_says_what_changed(folder: Path) -> None:
    full(folder, Known(20))
    changed = {**KEY, "teacher": {"weights": "b2", "precision": "32-true"}}
    for call in (
        lambda: TeacherCache.open(folder, changed),
        lambda: TeacherCache.create(folder, changed, 20),
    ):
        with pytest.raises(
            CacheError, match=r"another teacher or data set: teacher\.weights was a1, now b2; .*refresh"
        ):
            call()
    with pytest.raises(CacheError, match="is for 20 examples, the data has 21"):
        TeacherCache.open(folder, KEY, 21)
    with pytest.raises(CacheError, match=r"was stored as Storage\(dtype='float32'.*'float16'"):
        TeacherCache.create(folder, KEY, 20, Storage("float16"))
    with pytest.raises(CacheError, match=r"holds no teacher outputs: there is no manifest\.json"):
        TeacherCache.open(folder.with_name("elsewhere"), KEY)
    assert TeacherCache.create(folder, KEY, 20).complete


def test_a_shard_says_in_a_bit_each_whose_answers_it_holds(folder: Path) -> None:
    cache = TeacherCache.create(folder, KEY, 100_000)
    logits = torch.randn(100_000, 2)
    for index in torch.randperm(100_000).split(5000):
        cache.add(index, ModelOutput(logits[index]))
    cache.flush()
    assert cache.manifest.shards[0].bytes < 1.05 * logits.nbytes
    index = torch.randint(0, 100_000, (500,))
    assert torch.equal(TeacherCache.open(folder).lookup(index).logits, logits[index])
    few = TeacherCache.create(folder.with_name("few"), KEY, 100_000)
    few.add(torch.tensor([99_999, 7]), ModelOutput(logits[[99_999, 7]]))
    few.flush()
    assert few.manifest.shards[0].bytes < 500
    few = TeacherCache.open(few.folder)
    assert torch.equal(few.lookup(torch.tensor([7, 99_999])).logits, logits[[7, 99_999]])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured where Linux says it")
def test_opening_takes_no_memory_for_the_answers(folder: Path) -> None:
    cache = TeacherCache.create(folder, KEY, 100, limits=Limits(shard_bytes=10**9, resident_bytes=0))
    cache.add(torch.arange(100), ModelOutput(torch.ones(100, 160_000)))
    cache.flush()
    assert cache.manifest.shards[0].bytes > 64_000_000
    del cache

    def held() -> int:
        return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

    before = held()
    opened = pickle.loads(pickle.dumps(TeacherCache.open(folder, limits=Limits(resident_bytes=0))))
    assert torch.equal(opened.lookup(torch.tensor([99])).logits, torch.ones(1, 160_000))
    assert held() - before < 8_000_000


def test_an_old_shard_is_written_when_time_has_passed(folder: Path) -> None:
    cache = TeacherCache.create(folder, KEY, 20, limits=Limits(shard_seconds=0.0))
    cache.add(torch.tensor([1]), ModelOutput(torch.zeros(1, 2)))
    assert TeacherCache.open(folder).known(torch.arange(3)).tolist() == [False, True, False]


def test_pickling_sends_the_path_and_no_answers(folder: Path) -> None:
    known = Known(200)
    cache = TeacherCache.create(folder, KEY, 200, limits=Limits(shard_bytes=10**9))
    for batch in known.batches():
        cache.add(batch["index"], known.ask(batch), batch["attention_mask"])
    assert cache.manifest.shards == []
    sent = pickle.dumps(cache)  # writes what is waiting first
    assert len(sent) < 1000
    index = torch.arange(200)
    assert same(pickle.loads(sent).lookup(index, known.mask(index)), known.say(index, known.mask(index)))


def test_to_moves_tables_and_answers(folder: Path) -> None:
    known = Known(20)
    cache = full(folder, known)
    assert cache.to("meta") is cache
    found = cache.lookup(torch.arange(3), known.mask(torch.arange(3)))
    assert {found.logits.device.type, *(value.device.type for value in found.features.values())} == {"meta"}


def test_a_refresh_takes_over_only_when_it_is_complete(folder: Path) -> None:
    old, new = Known(20), Known(20, seed=1)
    reader = full(folder, old)

    def partly() -> None:
        with TeacherCache.refreshing(folder, KEY, 20, limits=SMALL) as cache:
            batch = new.batches()[0]
            cache.add(batch["index"], new.ask(batch), batch["attention_mask"])
            cache.flush()
            reads_back(folder, old)

    def broken_off() -> None:
        with TeacherCache.refreshing(folder, KEY, 20, limits=SMALL) as cache:
            for batch in new.batches():
                cache.add(batch["index"], new.ask(batch), batch["attention_mask"])
            cache.flush()
            raise KeyboardInterrupt

    with pytest.raises(CacheError, match="was not refreshed: 12 examples are missing"):
        partly()
    with pytest.raises(KeyboardInterrupt):
        broken_off()
    reads_back(folder, old)
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", *(record.file for record in reader.manifest.shards)
    }  # fmt: skip
    with TeacherCache.refreshing(folder, KEY, 20, limits=SMALL) as cache:
        for batch in new.batches():
            cache.add(batch["index"], new.ask(batch), batch["attention_mask"])
    reads_back(folder, new)
    index = torch.arange(20)
    assert same(cache.lookup(index, new.mask(index)), new.say(index, new.mask(index)))
    assert same(reader.lookup(index, old.mask(index)), old.say(index, old.mask(index)))  # whoever reads goes on
    assert len(list(folder.iterdir())) == 1 + len(cache.manifest.shards)


def test_a_refresh_where_there_was_nothing(folder: Path) -> None:
    known = Known(20)
    with TeacherCache.refreshing(folder, KEY, 20, limits=SMALL) as cache:
        assert not (folder / "manifest.json").exists()
        for batch in known.batches():
            cache.add(batch["index"], known.ask(batch), batch["attention_mask"])
    reads_back(folder, known)
