from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd_lightning.config.trust import trusting
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.static_embedding import StaticEmbedding
from kd_lightning.pipeline.from_run import from_run
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import Classification, Task, TokenClassification
from kd_lightning.training.run_folder import finish_stage, save_network


def write_student(folder: Path, network: nn.Module, accuracy: float = 0.5, tokenizer: Any = None, **more: Any) -> Path:
    """A finished student, as a run leaves it."""
    task = {"class_names": ["a", "b", "c"], "predicts": 3, "max_length": 16, "texts": 1, "role": "student"}
    save_network(folder, network, more, task, tokenizer)
    finish_stage(folder, {"validation": {"accuracy": accuracy}, "monitor": "accuracy", "mode": "max"})
    return folder


def student() -> BiLSTM:
    return BiLSTM(3, 20, embedding_size=4, hidden_size=4)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_takes_the_weights_of_the_runs_best_student(tmp_path: Path) -> None:
    best, other = student(), student()
    write_student(tmp_path / "seed_0/distill", other, 0.5)
    write_student(tmp_path / "seed_1/distill", best, 0.6)
    found = from_run(str(tmp_path), 3)
    assert same(found, best)
    assert not same(found, other)
    assert found.training
    assert all(parameter.requires_grad for parameter in found.parameters())
    assert same(from_run(str(tmp_path / "seed_0/distill"), 3), other)


def test_at_random_it_is_the_same_network_and_draws_the_same_numbers(tmp_path: Path) -> None:
    trained = student()
    write_student(tmp_path, trained)
    after = []
    for initialise in ("teacher", "random"):
        torch.manual_seed(0)
        network = from_run(str(tmp_path), 3, initialise=initialise)  # type: ignore[arg-type]
        after.append(torch.rand(3))
        assert same(network, trained) is (initialise == "teacher")
    assert torch.equal(*after)
    torch.manual_seed(0)
    assert same(network, student())


def test_for_other_outputs_the_body_stays_and_the_head_is_new(tmp_path: Path) -> None:
    trained = student()
    write_student(tmp_path, trained)
    heads = []
    for initialise in ("teacher", "random"):
        torch.manual_seed(0)
        network = from_run(str(tmp_path), 5, initialise=initialise, per_token=True)  # type: ignore[arg-type]
        assert isinstance(network, BiLSTM)
        assert network.per_token
        assert torch.equal(network.embedding.weight, trained.embedding.weight) is (initialise == "teacher")
        heads.append(network.classifier.weight)
    assert heads[0].shape == (5, 8)
    assert torch.equal(*heads)  # drawn by the second run's seed, whatever the body


class Read:
    """Data as far as a start is compared with them."""

    def __init__(self, names: list[str], tokenizer: Any = None, task: Task | None = None) -> None:
        self.class_names, self.task, self.tokenizer = names, task or Classification(len(names)), tokenizer

    def tokenizer_of(self, role: str) -> Any:
        return self.tokenizer


def test_a_head_stays_only_for_the_same_classes(tmp_path: Path) -> None:
    trained = student()
    write_student(tmp_path, trained)
    same_names, others = Read(["a", "b", "c"]), Read(["a", "b", "d"])
    tags = Read(["a", "b", "c"], task=TokenClassification(["O", "B-X", "I-X"]))
    for data, keeps in ((same_names, True), (others, False), (tags, False)):
        network = from_run(str(tmp_path), 3, data=data)  # type: ignore[arg-type]
        assert isinstance(network, BiLSTM)
        assert torch.equal(network.embedding.weight, trained.embedding.weight)
        assert torch.equal(network.classifier.weight, trained.classifier.weight) is keeps


def test_as_many_tokens_are_not_the_same_tokens(tmp_path: Path) -> None:
    one, other = (load_tokenizer("wordpiece:60", [text]) for text in ("some words to learn", "quite others for it"))
    assert one.get_vocab() != other.get_vocab()
    network = BiLSTM(3, len(one), embedding_size=4, hidden_size=4)
    write_student(tmp_path, network, tokenizer=one)
    names = ["a", "b", "c"]
    assert from_run(str(tmp_path), 3, len(one), data=Read(names, one))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"or others: read with the run's own, data\.tokenizer="):
        from_run(str(tmp_path), 3, len(one), data=Read(names, other))  # type: ignore[arg-type]


class Own(nn.Linear):
    """A user's network, which no description builds."""

    def __init__(self) -> None:
        super().__init__(2, 3)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"student\.checkpoint=.*holds no finished student"):
        from_run(str(tmp_path), 3)
    write_student(tmp_path / "run", student())
    write_student(tmp_path / "static", StaticEmbedding(3, 20))
    with pytest.raises(ConfigError, match=r"has 3 outputs and the data need 2, so .* StaticEmbedding has no body that"):
        from_run(str(tmp_path / "static"), 2)
    tokenizer = load_tokenizer("wordpiece:300", ["some words to learn from", "and some more"])
    write_student(tmp_path / "words", student(), tokenizer=tokenizer)
    assert from_run(str(tmp_path / "words"), 3, len(tokenizer))
    with pytest.raises(ConfigError, match=r"makes 99, or others: .*data\.tokenizer=.*words/tokenizer"):
        from_run(str(tmp_path / "words"), 3, 99)
    with pytest.raises(ConfigError, match="did you mean 'random'"):
        from_run(str(tmp_path / "run"), 3, initialise="randon")  # type: ignore[arg-type]
    write_student(tmp_path / "own", Own(), _target_="tests.pipeline.test_from_run.Own")
    with pytest.raises(ConfigError, match=r"model\.json would run 'tests\.pipeline\.test_from_run\.Own'"):
        from_run(str(tmp_path / "own"), 3)
    with trusting(True), pytest.raises(ConfigError, match="holds a Own, which has no description"):
        from_run(str(tmp_path / "own"), 3)
