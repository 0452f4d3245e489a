from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_lightning.errors import CacheError
from kd_lightning.losses import SoftTargetLoss
from kd_lightning.models.answers import Answers, network_answers
from kd_lightning.teachers import CachedTeacher, FrozenTeacher, cached, teacher_logits
from kd_lightning.types import ModelOutput

LOGITS = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))


def said(logits: Tensor = LOGITS, index: Tensor | None = None) -> Answers:
    return Answers(torch.arange(len(logits)) if index is None else index, logits, torch.zeros(len(logits)).long())


def refuse() -> Answers:
    raise AssertionError("the teacher was asked again")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "table.safetensors"


def test_the_table_is_looked_up_by_index() -> None:
    output = CachedTeacher(LOGITS)({"index": torch.tensor([7, 0, 7]), "labels": torch.tensor([1, 1, 1])})
    assert torch.equal(output.logits, torch.stack([LOGITS[7], LOGITS[0], LOGITS[7]]))
    assert output.features == {}


def test_to_moves_the_table_and_returns_the_teacher() -> None:
    teacher = CachedTeacher(LOGITS)
    assert teacher.to(torch.device("meta")) is teacher
    assert teacher.logits.device.type == "meta"


def test_written_once_and_read_from_then_on(path: Path) -> None:
    assert torch.equal(teacher_logits(path, "a", 10, said), LOGITS)
    assert torch.equal(teacher_logits(path, "a", 10, refuse), LOGITS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_cached_teacher_says_what_the_running_one_says(path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    inputs, order = torch.randn(10, 4), torch.tensor([3, 1, 0, 2, 9, 8, 7, 6, 5, 4])
    batches = [{"pixel_values": inputs[rows], "index": rows, "labels": rows * 0} for rows in order.split(4)]
    fresh = teacher_logits(path, "a", 10, lambda: network_answers(network, batches))
    running = FrozenTeacher(network)
    for table in (fresh, teacher_logits(path, "a", 10, refuse)):
        for batch in batches:
            torch.testing.assert_close(CachedTeacher(table)(batch).logits, running(batch).logits)


def test_a_fresh_table_can_be_trained_from_and_sent_to_another_process(path: Path) -> None:
    batch = {"pixel_values": torch.randn(10, 4), "index": torch.arange(10), "labels": torch.zeros(10).long()}
    teacher = CachedTeacher(teacher_logits(path, "a", 10, lambda: network_answers(nn.Linear(4, 3), [batch])))
    student = torch.zeros(10, 3, requires_grad=True)
    output = teacher(batch)
    SoftTargetLoss(2.0)(ModelOutput(student), output, batch).backward()
    (student * output.logits).sum().backward()  # autograd saves the teacher's logits
    assert student.grad is not None
    assert torch.equal(pickle.loads(pickle.dumps(teacher)).logits, teacher.logits)
    teacher.logits.share_memory_()  # what torch.multiprocessing does to every tensor it sends


def test_answers_of_another_teacher_are_refused(path: Path) -> None:
    teacher_logits(path, "a", 10, said)
    with pytest.raises(CacheError, match=r"table\.safetensors holds the answers of another teacher"):
        teacher_logits(path, "b", 10, refuse)
    assert torch.equal(teacher_logits(path, "a", 10, refuse), LOGITS)  # and left alone


def test_answers_to_fewer_examples_are_refused(path: Path) -> None:
    teacher_logits(path, "a", 10, said)
    with pytest.raises(CacheError, match="other data"):
        teacher_logits(path, "a", 11, refuse)


@pytest.mark.parametrize("bytes_left", [0, 4, 40, -1])
def test_a_truncated_file_is_refused(path: Path, bytes_left: int) -> None:
    teacher_logits(path, "a", 10, said)
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(CacheError, match=r"table\.safetensors cannot be read .*remove it"):
        teacher_logits(path, "a", 10, refuse)


def test_a_file_of_something_else_is_refused(path: Path) -> None:
    path.parent.mkdir()
    save_file({"weights": LOGITS}, path, metadata={"fingerprint": "a"})
    with pytest.raises(CacheError, match="cannot be read"):
        teacher_logits(path, "a", 10, refuse)
    save_file({"logits": LOGITS}, path)  # no fingerprint at all
    with pytest.raises(CacheError, match="another teacher"):
        teacher_logits(path, "a", 10, refuse)


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 8], list(range(1, 11))])
def test_examples_that_were_left_out_are_noticed_before_anything_is_written(path: Path, index: list[int]) -> None:
    with pytest.raises(CacheError, match=f"shown {len(index)} examples, not each of 10 once"):
        teacher_logits(path, "a", 10, lambda: said(LOGITS[: len(index)], torch.tensor(index)))
    assert not path.parent.exists()


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_in_the_middle_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def half(tensors: dict[str, Tensor], file: str, metadata: dict[str, str]) -> None:
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(cached, "save_file", half)
    with pytest.raises(type(error)):
        teacher_logits(path, "a", 10, said)
    assert list(path.parent.iterdir()) == []
    monkeypatch.undo()
    assert torch.equal(teacher_logits(path, "a", 10, said), LOGITS)


def test_nobody_sees_the_file_before_it_is_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def replace(source: str, target: Path) -> None:
        seen.append((path.exists(), Path(source).parent == path.parent))
        move(source, target)

    move = os.replace
    monkeypatch.setattr(os, "replace", replace)
    teacher_logits(path, "a", 10, said)
    assert seen == [(False, True)]  # written elsewhere in the same folder, then moved in one step
