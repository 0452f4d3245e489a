"""The teacher's cache in a run: every `teacher.cache`, what it is keyed by, what shares it, what is refused."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.cli.cache import main as kd_cache
from kd_lightning.models.adapt import run_network
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.preflight import preflight
from kd_lightning.pipeline.run import build_caches, train_all
from kd_lightning.pipeline.stages import plan
from kd_lightning.runtime import memoize
from kd_lightning.runtime.errors import CacheError, ConfigError
from kd_lightning.teachers import CachedTeacher, FrozenTeacher, fit_weights
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.clock import PREDICTING
from kd_lightning.teachers.ensemble import check_scores
from kd_lightning.training.run_folder import load_run
from kd_lightning.types import Batch, ModelOutput
from tests.conftest import tiny_overrides, write_toy_csv
from tests.whole_split import outputs_of

Composed = Callable[..., DictConfig]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The index of every example that a running teacher was asked about."""
    seen: list[int] = []
    forward = FrozenTeacher.forward

    def counted(self: FrozenTeacher, batch: Batch) -> ModelOutput:
        seen.extend(batch["index"].tolist())
        return forward(self, batch)

    monkeypatch.setattr(FrozenTeacher, "forward", counted)
    monkeypatch.setattr("kd_lightning.pipeline.teacher_provider.FrozenTeacher", FrozenTeacher)
    return seen


@pytest.fixture(autouse=True)
def nothing_shared() -> Iterator[None]:
    memoize._KEPT.clear()
    yield
    memoize._KEPT.clear()


def teacher(composed: Composed, folder: Path, *more: str) -> Path:
    """A run of one trained teacher, on what `toy_csv` holds."""
    base = tiny_overrides(write_toy_csv(folder / "toy.csv"), folder / "teacher_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_LIGHTNING_HOME", str(folder / "home"))
        train_all(Run(composed(*base, "stages=[teacher]", *more), Console(file=StringIO())))
    return folder / "teacher_run"


@pytest.fixture(scope="module")
def taught(composed: Composed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained teacher. Copied by who uses it."""
    return teacher(composed, tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def other(composed: Composed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, which reads other tokens. Read only."""
    return teacher(composed, tmp_path_factory.mktemp("other"), "data.tokenizer=wordpiece:150")


@pytest.fixture
def distil(composed: Composed, taught: Path, toy_csv: Path, tmp_path: Path, own_home: Path) -> Callable[..., Run]:
    """Make a pipeline that distils from one trained teacher into a run folder of its own."""
    base = tiny_overrides(toy_csv, tmp_path / "teacher_run")
    shutil.copytree(taught, tmp_path / "teacher_run")
    moved = [o for o in base if not o.startswith(("run_dir", "data.tokenizer"))]
    number = itertools.count()

    def make(*overrides: str) -> Run:
        checkpoint = [] if any(o.startswith("teacher.checkpoint") for o in overrides) else [
            f"teacher.checkpoint={tmp_path / 'teacher_run'}"
        ]  # fmt: skip
        own = [
            *checkpoint,
            "stages=[distill]",
            "teacher.precision=float32",
            f"run_dir={tmp_path / f'run_{next(number)}'}",
        ]
        return Run(composed(*moved, *own, *overrides), Console(file=StringIO(), width=200))

    return make


def said(pipeline: Run) -> str:
    output = pipeline.console.file
    assert isinstance(output, StringIO)
    return output.getvalue()


def stored(home: Path) -> list[Path]:
    return sorted(path.parent for path in home.glob("teacher_outputs/*/manifest.json"))


def test_auto_keeps_the_answers_while_the_first_epoch_trains_and_they_are_those_of_the_running_teacher(
    distil: Callable[..., Run], own_home: Path, asked: list[int]
) -> None:
    pipeline = distil()
    train_all(pipeline)
    assert "outputs are cached as they are computed" in said(pipeline)
    assert set(asked) == set(range(pipeline.data.num_examples))
    again = 4 + 16 + 128  # those of the rehearsal; first batches, of the training and of what the epoch left over
    assert len(asked) <= pipeline.data.num_examples + again, "every other example was asked about once"
    (folder,) = stored(own_home)
    cache = TeacherCache.open(folder)
    assert cache.complete
    loader = pipeline.data.select(tokens="teacher").all_dataloader()
    running = outputs_of(FrozenTeacher(pipeline.teacher.network), loader)
    kept = cache.lookup(torch.arange(pipeline.data.num_examples)).logits
    torch.testing.assert_close(kept, running.logits, rtol=1e-5, atol=1e-6)

    asked.clear()
    again = distil("temperature=8")
    train_all(again)
    assert len(asked) <= 8, "another run of the same teacher and data only rehearses"


def test_seeds_share_one_pass_before_the_first_of_them(distil: Callable[..., Run], asked: list[int]) -> None:
    pipeline = distil("seeds=2")
    train_all(pipeline)
    assert "for all runs" in said(pipeline)
    assert set(asked) == set(range(pipeline.data.num_examples))
    assert len(asked) <= pipeline.data.num_examples + 128 + 4


def outputs_time(pipeline: Run) -> dict[str, float]:
    """Train, and return what the report says that the teacher's outputs took."""
    before: list[float] = []
    train_all(pipeline, begin=lambda: before.append(PREDICTING.seconds))  # after the preflight's four examples
    found: dict[str, float] = compare(pipeline, "")["models"]["teacher"]["outputs_seconds"]
    assert found["total"] == pytest.approx(PREDICTING.seconds - before[0] + found["reused"])
    return found


def test_the_report_has_the_time_of_the_outputs_whoever_asked_for_them(distil: Callable[..., Run]) -> None:
    first = distil()
    while_training = outputs_time(first)
    assert while_training["reused"] == 0
    assert 0 < while_training["training"] <= while_training["total"]
    assert re.search(rf"teacher outputs, s +{while_training['total']:.1f} ", said(first))
    text = (first.folder / "report.md").read_text(encoding="utf-8")
    assert f"The outputs of the teacher took {while_training['total']:.1f} s: 0.0 s in other runs" in text

    later = distil("seeds=2")
    found = outputs_time(later)
    assert found == {"total": while_training["total"], "reused": while_training["total"], "training": 0.0}
    assert re.search(rf"teacher outputs, s +{found['total']:.1f} \({found['total']:.1f} reused\) ", said(later))

    ahead = outputs_time(distil("seeds=2", "teacher.cache_dtype=float16"))
    assert (ahead["reused"], ahead["training"]) == (0, 0)
    assert ahead["total"] > 0

    live = outputs_time(distil("teacher.cache=off"))
    assert live["reused"] == 0
    assert live["total"] > live["training"] > 0, "validation and test, too"

    cut = outputs_time(distil("teacher.cache_top_k=1"))
    assert cut["total"] > cut["training"] > 0, "the report scores the running teacher"


def test_a_grown_set_asks_about_what_is_new_and_its_report_says_what_the_rest_took(
    distil: Callable[..., Run], asked: list[int]
) -> None:
    first = outputs_time(distil("seeds=2"))
    asked.clear()
    grown = distil("seeds=2", "data.views=2", "data.mask_probability=0.5")
    found = outputs_time(grown)
    views = grown.data.sizes["views"]
    assert views < len(asked) <= views + 128 + 4, "the first batch twice, and the preflight's"
    assert found["reused"] == first["total"]
    assert found["total"] > found["reused"]
    (cache,) = grown.providers[0].caches()
    loader = grown.data.select(tokens="teacher").all_dataloader()
    running = outputs_of(FrozenTeacher(grown.teacher.network), loader)
    kept = cache.lookup(torch.arange(grown.data.num_examples)).logits
    torch.testing.assert_close(kept, running.logits, rtol=1e-5, atol=1e-6)
    copied = rf"teacher  outputs of \d+ of {grown.data.num_examples} examples are copied from "
    assert re.search(copied, said(grown))
    asked.clear()
    train_all(distil("seeds=2", "data.views=2", "data.mask_probability=0.5", "teacher.cache=refresh"))
    assert len(set(asked)) == grown.data.num_examples, "a refresh copies nothing"


def test_a_filling_cache_says_how_far_it_is_without_a_terminal(
    distil: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_lightning.runtime.console.EVERY", 0.0)
    ahead = distil("seeds=2")
    train_all(ahead)
    number = ahead.data.num_examples
    found = re.findall(r"teacher  predicted (\d+) of (\d+) examples, (\d+) s left\n", said(ahead))
    assert len(found) == math.ceil(number / 128)
    assert found[-1] == (str(number), str(number), "0")
    meanwhile = distil("teacher.cache_dtype=float16")
    train_all(meanwhile)
    found = re.findall(r"teacher  outputs of (\d+) of (\d+) examples are cached, \d+ s left\n", said(meanwhile))
    assert len(found) > 2
    assert [int(stored) for stored, _ in found] == sorted({int(stored) for stored, _ in found})


def test_points_of_one_process_share_data_teacher_and_open_cache(distil: Callable[..., Run]) -> None:
    first, second = distil(), distil("temperature=4")
    train_all(first)
    compare(first, "")
    train_all(second)
    assert second.data is first.data
    assert second.teacher.network is first.teacher.network
    assert isinstance(first.predicting_teacher, CachedTeacher)
    assert isinstance(second.predicting_teacher, CachedTeacher)
    assert second.predicting_teacher.cache is first.predicting_teacher.cache


def test_require_wants_all_answers_and_says_what_the_nearest_ones_are_for(
    distil: Callable[..., Run], own_home: Path, asked: list[int]
) -> None:
    with pytest.raises(CacheError, match=r"teacher.cache=require, but .* not stored: nothing is in .*kd-cache build"):
        train_all(distil("teacher.cache=require"))
    (folder,) = build_caches(distil())
    assert [folder] == stored(own_home)
    asked.clear()
    train_all(distil("teacher.cache=require"))
    assert len(asked) <= 8
    with pytest.raises(CacheError, match=r"nearest is .*, where data\.max_length was 64, now 32"):
        train_all(distil("teacher.cache=require", "data.max_length=32"))
    with pytest.raises(CacheError, match=r"teacher\.cache_dtype was float32, now float16"):
        train_all(distil("teacher.cache=require", "teacher.cache_dtype=float16"))


def test_refresh_asks_again_and_keeps_nothing_old(distil: Callable[..., Run], asked: list[int]) -> None:
    (folder,) = build_caches(distil())
    before = (folder / "manifest.json").read_text()
    asked.clear()
    pipeline = distil("teacher.cache=refresh")
    train_all(pipeline)
    assert set(range(pipeline.data.num_examples)) == set(asked)
    assert json.loads(before)["created"] <= json.loads((folder / "manifest.json").read_text())["created"]
    assert TeacherCache.open(folder).complete


def test_a_path_holds_the_cache_of_one_teacher_and_refuses_another_by_what_differs(
    distil: Callable[..., Run], tmp_path: Path, own_home: Path
) -> None:
    place = f"teacher.cache={tmp_path / 'answers'}"
    train_all(distil(place, "seeds=2"))
    assert TeacherCache.open(tmp_path / "answers").complete
    assert stored(own_home) == []
    train_all(distil(place))
    with pytest.raises(CacheError, match=r"teacher\.precision was float32, now bf16"):
        train_all(distil(place, "teacher.precision=bf16"))


def test_a_damaged_file_is_named_and_its_answers_are_asked_for_again(
    distil: Callable[..., Run], asked: list[int]
) -> None:
    (folder,) = build_caches(distil())
    shard = next(folder.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    memoize._KEPT.clear()
    with pytest.raises(CacheError, match=shard.name):
        train_all(distil("teacher.cache=require"))
    asked.clear()
    pipeline = distil("seeds=2")
    train_all(pipeline)
    assert shard.name in said(pipeline)
    assert set(asked) == set(range(pipeline.data.num_examples))


def test_top_k_and_half_precision_train(distil: Callable[..., Run], own_home: Path) -> None:
    train_all(distil("teacher.cache_top_k=1", "teacher.cache_dtype=bfloat16"))
    manifest = json.loads((stored(own_home)[0] / "manifest.json").read_text())
    assert manifest["storage"] == {"dtype": "bfloat16", "top_k": 1}


def test_features_are_answered_and_kept(distil: Callable[..., Run], own_home: Path) -> None:
    pipeline = distil("teacher.features=[pooled]", "seeds=2")
    train_all(pipeline)
    cache = TeacherCache.open(stored(own_home)[0])
    batch = next(iter(pipeline.data.select(tokens="teacher").val_dataloader()))
    kept = cache.lookup(batch["index"], batch["attention_mask"]).features["pooled"]
    running = FrozenTeacher(pipeline.teacher.network, features=["pooled"])(batch).features["pooled"]
    torch.testing.assert_close(kept, running, rtol=1e-5, atol=1e-6)


def test_members_with_tokenizers_of_their_own_teach_together(
    distil: Callable[..., Run], other: Path, tmp_path: Path
) -> None:
    second = distil(f"teacher.checkpoint={other}", f"data.tokenizer={other / 'teacher/tokenizer'}")
    members = f"teacher.checkpoint=[{tmp_path / 'teacher_run'},{other}]"
    pipeline = distil(members, "teacher.weights=learned", "teacher.combine=logits")
    first = pipeline.data.teacher_key["tokenizer"]
    assert first != second.data.teacher_key["tokenizer"]
    train_all(pipeline)
    report = compare(pipeline, "")
    assert report["models"]["teacher"]["latency_ms"] is None  # no one batch to time both on
    said = []
    for network, data in zip((m.network for m in pipeline.teacher.members), (pipeline.data, second.data), strict=True):
        said.append(outputs_of(FrozenTeacher(network), data.select(tokens="teacher").val_dataloader()))
    assert torch.equal(said[0].labels, said[1].labels)
    weights = torch.tensor(fit_weights(torch.stack([one.logits for one in said]), said[0].labels, "logits"))
    expected = (weights.view(2, 1, 1) * torch.stack([one.logits for one in said])).sum(0)
    together = outputs_of(pipeline.predicting_teacher, pipeline.data.val_dataloader())
    torch.testing.assert_close(together.logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"teacher\.cache=off: the members of teacher.checkpoint have different tok"):
        train_all(distil(members, "teacher.cache=off"))


def test_what_an_ensembles_settings_refuse(distil: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.weights are those of an ensemble"):
        distil("teacher.weights=[1,2]")
    twice = f"teacher.checkpoint=[{tmp_path / 'teacher_run'},{tmp_path / 'teacher_run'}]"
    with pytest.raises(ConfigError, match=r"teacher\.weights has 3 numbers for 2 members"):
        distil(twice, "teacher.weights=[1,2,3]")
    with pytest.raises(ConfigError, match=r"teacher\.weights='confident' is not"):
        distil(twice, "teacher.weights=confident")
    with pytest.raises(ConfigError, match=r"teacher\.combine='votes' is not"):
        distil(twice, "teacher.combine=votes")


def test_an_ensemble_keeps_its_members_apart_in_a_given_folder_and_has_no_features(
    distil: Callable[..., Run], tmp_path: Path
) -> None:
    twice = f"teacher.checkpoint=[{tmp_path / 'teacher_run'},{tmp_path / 'teacher_run'}]"
    folders = build_caches(distil(twice, f"teacher.cache={tmp_path / 'answers'}"))
    assert all(folder.parent == tmp_path / "answers" for folder in folders)
    with pytest.raises(ConfigError, match=r"teacher\.features"):
        train_all(distil(twice, "teacher.features=[pooled]"))


def test_a_refresh_that_was_killed_before_any_cache_existed_is_begun_anew(
    distil: Callable[..., Run], own_home: Path
) -> None:
    pipeline = distil()
    (folder,) = build_caches(pipeline)
    (folder / "manifest.json").rename(folder / "refresh.json")
    memoize._KEPT.clear()
    with pytest.raises(CacheError, match="not stored: nothing is in"):
        train_all(distil("teacher.cache=require"))
    train_all(distil())
    assert TeacherCache.open(folder).complete


def test_the_command_builds_what_a_run_then_requires(
    distil: Callable[..., Run], toy_csv: Path, tmp_path: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [o for o in tiny_overrides(toy_csv, tmp_path / "built") if not o.startswith("data.tokenizer")]
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as done:
        kd_cache(["build", *base, f"teacher.checkpoint={tmp_path / 'teacher_run'}"])
    assert done.value.code == 0
    assert "240 / 240" in capsys.readouterr().out
    assert TeacherCache.open(stored(own_home)[0]).complete
    train_all(distil("teacher.cache=require"))


def test_no_cache_is_built_where_none_is_kept(distil: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.cache=off"):
        build_caches(distil("teacher.cache=off"))


def test_other_answers_are_other_settings_of_the_stage(distil: Callable[..., Run], tmp_path: Path) -> None:
    place = f"run_dir={tmp_path / 'one'}"
    first = distil(place)
    train_all(first)
    (first.folder / "config.yaml").unlink()  # as after a kill: only the finished stages are there
    with pytest.raises(ConfigError, match=r"outputs\.cache_top_k was None, now 1"):
        train_all(distil(place, "teacher.cache_top_k=1"))
    train_all(distil(place, "teacher.cache=off"))  # where answers come from does not matter


def test_what_changed_on_disk_is_read_again(distil: Callable[..., Run], toy_csv: Path, tmp_path: Path) -> None:
    first = distil()
    write_toy_csv(toy_csv, rows=180)
    assert distil().data.num_examples < first.data.num_examples


def test_the_estimate_counts_long_sentences_too(distil: Callable[..., Run], own_home: Path) -> None:
    pipeline = distil("teacher.features=[embedding]")  # of every token
    (folder,) = build_caches(pipeline)
    shards = [path.stat().st_size for path in folder.glob("shard-*")]
    found = re.search(r"teacher outputs: ([\d.]+) (bytes|kB) an example", said(pipeline))
    assert found is not None
    estimated = float(found[1]) * (1000 if found[2] == "kB" else 1) * pipeline.data.num_examples
    assert sum(shards) == pytest.approx(estimated, rel=0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.cache_top_k=3", r"teacher\.cache_top_k=3 must be below the number of classes, 3"),
        ("teacher.precision=int8-dynamic teacher.compile=true", r"int8-dynamic cannot be compiled"),
        ("teacher.features=[pooledd]", r"pooledd.*did you mean 'pooled'"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_the_teacher_is_trained(
    distil: Callable[..., Run], override: str, message: str
) -> None:
    new = ["teacher.checkpoint=null", "data.tokenizer=wordpiece:90", "stages=[teacher,distill]"]
    pipeline = distil(*new, *override.split())
    with pytest.raises(ConfigError, match=message):
        train_all(pipeline)
    assert not (pipeline.folder / "teacher").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.cache=requrie", r"teacher\.cache='requrie' is neither a mode nor a path.*did you mean 'require'"),
        ("teacher.cache_dtype=int8", r"teacher\.cache_dtype"),
        ("teacher.precision=bfloat16", r"teacher\.precision"),
        ("teacher.cache_views=0", r"teacher\.cache_views=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(
    distil: Callable[..., Run], override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        distil(override)


def test_views_that_are_new_in_each_epoch_cannot_be_kept(distil: Callable[..., Run]) -> None:
    fresh = ["data.views=1", "data.view_sets=null"]
    with pytest.raises(ConfigError, match=r"teacher\.cache_views=K.*teacher\.cache=off"):
        train_all(distil(*fresh))
    train_all(distil(*fresh, "teacher.cache=off", "trainer.max_steps=3"))


def test_sets_of_views_are_all_answered(distil: Callable[..., Run], asked: list[int]) -> None:
    pipeline = distil("data.views=1", "teacher.cache_views=3", "trainer.max_epochs=6")
    train_all(pipeline)
    sizes = pipeline.data.sizes
    assert sizes["views"] == 3 * sizes["train"]
    assert set(range(4 * sizes["train"])) < set(asked)


def test_teachers_of_several_seeds_are_trained_and_teach_together(
    composed: Composed, toy_csv: Path, tmp_path: Path, own_home: Path
) -> None:
    base = tiny_overrides(toy_csv, tmp_path / "run")
    pipeline = Run(
        composed(*base, "teacher.seeds=2", "teacher.weights=[1,3]", "stages=[teacher,distill]"),
        Console(file=StringIO()),
    )
    train_all(pipeline)
    report = compare(pipeline, "")
    first, second = (load_run(tmp_path / "run" / name).network.eval() for name in ("teacher", "teacher_1"))
    batch = next(iter(pipeline.data.val_dataloader()))
    both = [run_network(network, batch).logits.softmax(-1) for network in (first, second)]
    assert not torch.allclose(both[0], both[1])
    together = pipeline.predicting_teacher(batch).logits.softmax(-1)
    torch.testing.assert_close(together, both[0] / 4 + 3 * both[1] / 4, rtol=1e-4, atol=1e-5)
    assert len(stored(own_home)) == 2
    sizes = [sum(p.numel() for p in network.parameters()) for network in (first, second)]
    assert report["models"]["teacher"]["size"]["parameters"] == sum(sizes)
    with pytest.raises(ConfigError, match=r"teacher\.seeds=2 are to be trained, and teacher\.checkpoint"):
        Run(composed(*base, "teacher.seeds=2", f"teacher.checkpoint={tmp_path / 'run'}"))


def test_an_ensemble_is_scored_and_reported_as_it_answers(
    composed: Composed, taught: Path, other: Path, toy_csv: Path, tmp_path: Path, own_home: Path
) -> None:
    """Also without a distillation, and where its members' tokenizers differ."""
    base = [o for o in tiny_overrides(toy_csv, tmp_path / "run") if not o.startswith("data.tokenizer")]
    base.append("trainer.max_steps=2")
    members = f"teacher.checkpoint=[{taught},{other}]"
    pipeline = Run(composed(*base, members, "teacher.weights=[0,1]", "stages=[baseline]"), Console(file=StringIO()))
    train_all(pipeline)
    report = compare(pipeline, "")
    alone = Run(composed(*[o for o in base if not o.startswith("run_dir")], f"run_dir={tmp_path / 'alone'}",
        f"teacher.checkpoint={other}", "stages=[baseline]"), Console(file=StringIO()))  # fmt: skip
    train_all(alone)
    expected = compare(alone, "")["models"]["teacher"]["test"]["accuracy"]["mean"]
    assert report["models"]["teacher"]["test"]["accuracy"]["mean"] == pytest.approx(expected)


def test_scores_have_no_probabilities_to_average() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.combine=probabilities: teachers that predict scores"):
        check_scores(None, "probabilities")
    with pytest.raises(ConfigError, match=r"teacher\.weights=learned needs probabilities"):
        check_scores("learned", "logits")
    check_scores([1.0, 2.0], "logits")


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("cuda", "int8-dynamic", r"teacher\.precision=int8-dynamic needs a CPU"),
        ("cpu", "float16", r"teacher\.precision=float16 needs a GPU"),
        ("cuda", "float16", None),
    ],
)
def test_a_precision_is_held_against_the_device_before_the_teacher_is_trained(
    device: str, precision: str, message: str | None, distil: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rehearsal is on a CPU, whatever the run is on."""
    new = ["teacher.checkpoint=null", "data.tokenizer=wordpiece:90", "stages=[teacher,distill]"]
    pipeline = distil(*new, f"teacher.precision={precision}")
    monkeypatch.setattr(Run, "device", torch.device(device))
    if message is None:
        preflight(pipeline, plan(pipeline))
        return
    with pytest.raises(ConfigError, match=message):
        preflight(pipeline, plan(pipeline))
