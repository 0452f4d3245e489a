"""Images as batches: parts, views, order, resume, and what a teacher's outputs depend on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kd_lightning.data import FashionMNIST
from kd_lightning.data.image.views import ImageViews, make_image_view
from kd_lightning.data.sampler import BucketBatchSampler
from kd_lightning.data.splits import stratified_order
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE, Batch
from tests.data.images import striped, write_fashion

TRAIN, VALIDATION, TEST = 180, 20, 50  # of the 200 training pictures a tenth is held out
SETS = [1, 2, 3, None]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., FashionMNIST]:
    folder = str(write_fashion(tmp_path / "fashion"))
    return lambda **options: FashionMNIST(folder, **({"batch_size": 16, "seed": 3} | options))


def epoch_of(data: FashionMNIST, epoch: int) -> list[Batch]:
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, BucketBatchSampler)
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def joined(batches: list[Batch]) -> Batch:
    """All rows as one batch, in the order of `index`."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    order = whole["index"].argsort(stable=True)
    return {name: value[order] for name, value in whole.items()}


# -- what a batch is ---------------------------------------------------------------------------------------------------


def test_batches_are_the_normalised_pictures_with_their_labels(make: Callable[..., FashionMNIST]) -> None:
    data = make()
    test = joined(list(data.test_dataloader()))
    pixels, labels = striped(TEST, seed=1)
    expected = (pixels[:, None].astype(np.float64) / 255 - 0.286) / 0.353
    assert test["pixel_values"].dtype == torch.float32
    np.testing.assert_allclose(test["pixel_values"].numpy(), expected, atol=1e-6)
    assert test["labels"].tolist() == labels.tolist()
    assert test["index"].tolist() == list(range(TRAIN + VALIDATION, TRAIN + VALIDATION + TEST))
    assert data.model_arguments("student") == {"num_classes": 10, "channels": 1}
    assert data.class_names[3] == "Dress"


def test_every_picture_is_in_one_part(make: Callable[..., FashionMNIST]) -> None:
    data = make()
    data.prepare()
    assert data.sizes == {"train": TRAIN, "views": 0, "transfer": 0, "validation": VALIDATION, "test": TEST}
    whole = joined(list(data.all_dataloader()))
    assert whole["index"].tolist() == list(range(data.num_examples))
    assert len(data.lengths) == data.num_examples
    found = whole["pixel_values"].reshape(TRAIN + VALIDATION + TEST, -1).numpy()
    assert len(np.unique(found, axis=0)) == len(found)
    held = joined(list(data.val_dataloader()))
    assert torch.bincount(held["labels"]).tolist() == [2] * 10, "the classes keep their proportion"


def test_a_smaller_choice_is_part_of_a_larger_and_leaves_the_rest_alone(make: Callable[..., FashionMNIST]) -> None:
    def pictures(data: FashionMNIST, part: str) -> set[bytes]:
        loader = {"train": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}
        return {image.numpy().tobytes() for batch in loader[part]() for image in batch["pixel_values"]}

    few, more, all_of_them = (make(train_examples=count) for count in (30, 75, None))
    assert len(pictures(few, "train")) == 30
    assert pictures(few, "train") < pictures(more, "train") < pictures(all_of_them, "train")
    for part in ("validation", "test"):
        assert pictures(few, part) == pictures(all_of_them, part)
    assert torch.bincount(joined(list(few.train_dataloader()))["labels"]).tolist() == [3] * 10
    assert pictures(make(split_seed=1), "validation") != pictures(all_of_them, "validation")


def test_stratified_order_keeps_proportions_in_every_run() -> None:
    labels = np.array([0] * 600 + [1] * 300 + [2] * 100)
    order = stratified_order(labels, seed=5)
    assert sorted(order) == list(range(1000))
    for start in range(0, 1000, 100):
        counts = np.bincount(labels[order[start : start + 100]], minlength=3)
        assert np.abs(counts - [60, 30, 10]).max() <= 1
    assert not np.array_equal(order, stratified_order(labels, seed=6))


# -- views -------------------------------------------------------------------------------------------------------------


def test_a_view_is_the_picture_moved_and_perhaps_mirrored() -> None:
    image = np.arange(1, 61, dtype=np.uint8).reshape(2, 5, 6)

    def moved(down: int, right: int, mirrored: bool) -> NDArray[np.uint8]:
        found = np.zeros_like(image)
        for c, y, x in np.ndindex(image.shape):
            if 0 <= y + down < 5 and 0 <= x + right < 6:
                found[c, y, x] = image[c, y + down, x + right]
        return found[:, :, ::-1] if mirrored else found

    possible = {moved(d, r, m).tobytes(): (d, r, m) for d in (-1, 0, 1) for r in (-1, 0, 1) for m in (True, False)}
    seen = set()
    for view in range(400):
        made = make_image_view(image, 7, view, 0, crop_padding=1, flip_probability=0.5)
        seen.add(possible[made.tobytes()])
        assert np.array_equal(made, make_image_view(image, 7, view, 0, crop_padding=1, flip_probability=0.5))
    assert len(seen) == 18, "every shift, mirrored or not"
    one = {"crop_padding": 1, "flip_probability": 0.5}
    for changed in ([8, 0, 0], [7, 0, 1]):
        made = [make_image_view(image, changed[0], v, changed[2], **one).tobytes() for v in range(20)]  # type: ignore[arg-type]
        assert made != [make_image_view(image, 7, v, 0, **one).tobytes() for v in range(20)]  # type: ignore[arg-type]
    still = make_image_view(image, 0, 0, 0, crop_padding=0, flip_probability=0.0)
    assert np.array_equal(still, image)


def test_sets_take_turns_and_views_keep_their_labels(make: Callable[..., FashionMNIST]) -> None:
    data = make(views=2, view_sets=3)
    whole = joined(list(data.all_dataloader()))
    assert whole["index"].tolist() == list(range(7 * TRAIN + VALIDATION + TEST))
    for epoch in range(4):
        start = TRAIN + epoch % 3 * 2 * TRAIN
        seen = joined(epoch_of(data, epoch))
        assert seen["index"].tolist() == [*range(TRAIN), *range(start, start + 2 * TRAIN)]
        assert torch.equal(seen["pixel_values"], whole["pixel_values"][seen["index"]])
        assert torch.equal(seen["labels"][TRAIN:], seen["labels"][:TRAIN].repeat_interleave(2))
    views = ImageViews(TRAIN, 2, 0, 4, 0.5)
    original = data._images.pixels[data._rows[11]]
    expected = make_image_view(original, 11, 5, 0, crop_padding=4, flip_probability=0.5)  # the third set's second
    number = 2 * views.per_set + 2 * 11 + 1
    assert np.array_equal(views.make(number, lambda index: data._images.pixels[data._rows[index]]), expected)
    got = whole["pixel_values"][TRAIN + number]
    assert torch.equal(got, data.image_format.normalise(expected[None].copy())[0])


def test_fresh_views_are_those_of_ever_more_sets(make: Callable[..., FashionMNIST]) -> None:
    stored, fresh = make(views=2, view_sets=3), make(views=2, view_sets=None)
    assert len(stored.train_dataloader()) == len(fresh.train_dataloader())
    for epoch in range(3):
        expected, made = epoch_of(stored, epoch), epoch_of(fresh, epoch)
        for one, other in zip(expected, made, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])
            assert torch.equal(other["index"], torch.where(one["index"] < TRAIN, one["index"], -1))
    assert fresh.num_examples == TRAIN + VALIDATION + TEST
    assert not torch.equal(epoch_of(fresh, 3)[0]["pixel_values"], epoch_of(stored, 3)[0]["pixel_values"])


def test_repeatable_says_whether_all_can_be_looked_up(make: Callable[..., FashionMNIST]) -> None:
    assert [make(view_sets=sets, views=1).repeatable for sets in SETS] == [True, True, True, False]
    assert make(view_sets=None).repeatable
    assert joined(epoch_of(make(view_sets=None), 2))["index"].tolist() == list(range(TRAIN))


# -- order and resume --------------------------------------------------------------------------------------------------


def test_order_follows_the_seed_and_the_epoch(make: Callable[..., FashionMNIST]) -> None:
    def order(data: FashionMNIST, epoch: int = 0) -> list[int]:
        return torch.cat([batch["index"] for batch in epoch_of(data, epoch)]).tolist()

    data = make()
    assert order(data) == order(make()) == order(data.with_batches(batch_size=16))
    assert order(data) != order(data, epoch=1)
    assert order(data) != order(data.with_batches(seed=4))
    assert order(data.select(tokens="teacher", pool=False)) == order(data), "all trainings see the same"


class Recorder(L.LightningModule):
    """Notes what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append([batch["index"].tolist(), batch["pixel_values"].double().sum().item()])
        return self.weight * batch["pixel_values"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def fit(data: FashionMNIST, callbacks: list[Any] | None = None, ckpt_path: Path | None = None) -> list[Any]:
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=callbacks, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.parametrize("sets", [2, None])
def test_resumed_in_mid_epoch_with_the_same_views(
    make: Callable[..., FashionMNIST], tmp_path: Path, sets: int | None
) -> None:
    options = {"views": 1, "view_sets": sets, "batch_size": 64}
    epoch = len(make(**options).train_dataloader())
    steps = (epoch, epoch + 2, 2 * epoch + 1)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step in steps:
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    whole = fit(make(**options), [Save()])
    assert len(whole) == 3 * epoch
    for step in steps:
        assert fit(make(**options), ckpt_path=tmp_path / f"{step}.ckpt") == whole[step:]
    with pytest.raises(ConfigError, match="cannot resume: the data's fingerprint"):
        fit(make(batch_size=64), ckpt_path=tmp_path / f"{epoch}.ckpt")


def test_workers_give_the_same_batches(make: Callable[..., FashionMNIST]) -> None:
    for alone, worker in zip(epoch_of(make(views=1), 1), epoch_of(make(views=1, num_workers=1), 1), strict=True):
        assert all(torch.equal(alone[name], worker[name]) for name in alone)


# -- pictures for the teacher to label ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sets", SETS)
def test_what_is_left_out_is_for_the_teacher_to_label(make: Callable[..., FashionMNIST], sets: int | None) -> None:
    data = make(train_examples=30, transfer_examples=40, views=2, view_sets=sets)
    whole = joined(list(make().all_dataloader()))
    for epoch in range(3):
        found = joined(epoch_of(data, epoch))
        assert len(found["index"]) == 30 + 60 + 40
        stored = 60 * (sets or 0)
        transfer = (found["index"] >= 30 + stored) & (found["index"] < 30 + stored + 40)
        assert transfer.sum() == 40
        assert set(found["labels"][transfer].tolist()) == {IGNORE}
        assert (found["labels"][~transfer] != IGNORE).all()
        fresh = found["index"] == -1
        assert fresh.sum() == (60 if sets is None else 0)
        source = {pixels.numpy().tobytes() for pixels in whole["pixel_values"][:TRAIN]}
        shown = [pixels.numpy().tobytes() for pixels in found["pixel_values"][transfer]]
        assert len(set(shown)) == 40
        assert set(shown) <= source
    assert data.sizes["transfer"] == 40
    alone = joined(epoch_of(data.select(pool=False), 0))
    assert len(alone["index"]) == 30 + 60
    assert (alone["labels"] != IGNORE).all()
    expected = joined(epoch_of(make(train_examples=30, views=2, view_sets=sets), 0))
    assert torch.equal(alone["pixel_values"], expected["pixel_values"])
    assert torch.equal(alone["labels"], expected["labels"])


def test_trainings_without_them_do_not_depend_on_them(make: Callable[..., FashionMNIST]) -> None:
    none, some, all_of_them = (make(train_examples=30, transfer_examples=count) for count in (0, 40, None))
    for data in (none, some, all_of_them):
        data.prepare()
    assert all_of_them.sizes["transfer"] == TRAIN - 30
    assert len({data.fingerprint for data in (none, some, all_of_them)}) == 3
    assert {data.select(pool=False).fingerprint for data in (none, some, all_of_them)} == {none.fingerprint}
    mixed = make(train_examples=30, transfer_examples=40, views=1, mixup_probability=1.0)
    assert len(joined(epoch_of(mixed, 0))["index"]) == 30 + 30 + 40
    assert len(joined(epoch_of(mixed.select(pool=False), 0))["index"]) == 30
    assert mixed.select(pool=False).fingerprint == none.fingerprint, "mixed views are for the teacher alone"
    with_views = make(train_examples=30, transfer_examples=40, views=1)
    with_views.prepare()
    assert with_views.select(pool=False).fingerprint not in (none.fingerprint, with_views.fingerprint)


# -- what is stored, and what names it ---------------------------------------------------------------------------------


def test_pictures_are_read_once_and_shared(
    make: Callable[..., FashionMNIST], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(views=1)
    first.prepare()
    data = first._dataset("train", "test")
    content = pickle.dumps(data)
    assert len(content) < 20_000, "a process opens the file, it is not sent the pixels"
    assert torch.equal(pickle.loads(content)[[0, 200]]["pixel_values"], data[[0, 200]]["pixel_values"])
    monkeypatch.setattr("kd_lightning.data.sources.fashion_mnist._pictures", lambda *_: pytest.fail("read again"))
    make().prepare()


@pytest.mark.parametrize("damage", ["cut", "no meta", "flipped"])
def test_damaged_pictures_are_read_again(make: Callable[..., FashionMNIST], tmp_path: Path, damage: str) -> None:
    before = joined(list(make().all_dataloader()))
    (folder,) = (tmp_path / "home" / "images").iterdir()
    if damage == "cut":
        (folder / "pixels.uint8").write_bytes((folder / "pixels.uint8").read_bytes()[:-1])
    elif damage == "flipped":
        pixels = bytearray((folder / "pixels.uint8").read_bytes())
        pixels[1000] ^= 128
        (folder / "pixels.uint8").write_bytes(bytes(pixels))
    else:
        (folder / "meta.json").unlink()
    after = joined(list(make().all_dataloader()))
    assert torch.equal(before["pixel_values"], after["pixel_values"])


def test_teacher_key_is_what_decides_a_teachers_outputs(make: Callable[..., FashionMNIST], tmp_path: Path) -> None:
    def key(**options: Any) -> dict[str, Any]:
        data = make(**options)
        data.prepare()
        return data.teacher_key

    base = key(views=1)
    assert set(base) == {"images", "examples", "pixels", "format", "views"}
    same: list[dict[str, Any]] = [{"batch_size": 4, "eval_batch_size": 7}, {"seed": 9}, {"num_workers": 1}]
    assert all(key(views=1, **options) == base for options in same)
    changes: list[tuple[dict[str, Any], set[str]]] = [
        ({"crop_padding": 1}, {"views"}),
        ({"flip_probability": 0.0}, {"views"}),
        ({"view_sets": 2}, {"images", "examples", "views"}),
        ({"split_seed": 1}, {"images", "views"}),
        ({"train_examples": 30}, {"images", "examples", "views"}),
        ({"mean": [0.5]}, {"format"}),
        ({"std": [0.5]}, {"format"}),
    ]
    for options, names in changes:
        changed = key(views=1, **options)
        assert {name for name in base if base[name] != changed[name]} == names
    assert key() == key(crop_padding=1, flip_probability=0.1), "what makes no view decides nothing"
    assert key(views=2, view_sets=1) != key(views=1, view_sets=2)


def test_the_fingerprint_follows_the_labels_and_what_the_sets_do(
    make: Callable[..., FashionMNIST], tmp_path: Path
) -> None:
    changes: list[dict[str, Any]] = [*({"views": 1, "view_sets": sets} for sets in SETS), {}, {"train_examples": 20}]
    prints = []
    for change in changes:
        data = make(**change)
        data.prepare()
        prints.append(data.fingerprint)
    assert len(set(prints)) == len(prints)
    write_fashion(tmp_path / "other", train=210)
    other = FashionMNIST(str(tmp_path / "other"), train_examples=20)
    other.prepare()
    assert other.fingerprint not in prints


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train_examples": 0}, r"data\.train_examples=0: expected 1 or more"),
        ({"train_examples": 181}, r"data\.train_examples=181, but there are 180 to train on"),
        ({"transfer_examples": 1}, r"data\.transfer_examples=1, but 0 examples are left for it"),
        ({"transfer_examples": -1}, r"data\.transfer_examples=-1: expected 0 or more"),
        ({"validation_fraction": 1.0}, r"cannot hold out the fractions 1 of the training images"),
        ({"crop_padding": -1}, r"data\.crop_padding=-1"),
        ({"flip_probability": 2.0}, r"data\.flip_probability=2\.0: expected a probability"),
        ({"view_sets": 0}, r"data\.view_sets=0: expected 1 or more"),
        ({"mean": [0.1, 0.2]}, r"data\.mean=\[0\.1, 0\.2\]: expected one value for each of 1 channels"),
        ({"std": [0.0]}, r"data\.std=\[0\.0\]: expected values above 0"),
    ],
)
def test_options_out_of_range(make: Callable[..., FashionMNIST], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(**options).prepare()
