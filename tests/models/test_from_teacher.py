from __future__ import annotations

import copy
import logging
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification, BartConfig, BartForSequenceClassification

from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.from_teacher import embeddings_from_teacher, from_teacher
from kd_lightning.models.hf import PooledClassifier
from kd_lightning.models.text_cnn import TextCNN
from kd_lightning.models.transformer import transformer
from kd_lightning.runtime.errors import ConfigError
from tests.models.tiny import KINDS, SHAPE, VOCABULARY, batch, tiny

STACKS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "electra": "electra.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "pooled": "encoder.encoder.layer",
}


def teacher(kind: str, num_classes: int = 2) -> nn.Module:
    """A frozen teacher in eval mode, as the pipeline hands it over."""
    network = (
        PooledClassifier(tiny("bert").base_model, num_classes, "max") if kind == "pooled" else tiny(kind, num_classes)
    )
    return network.eval().requires_grad_(False)


def same(network: nn.Module, state: dict[str, Tensor]) -> bool:
    now = network.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", STACKS)
def test_copies_chosen_layers_and_everything_else(kind: str) -> None:
    source = teacher(kind)
    before = copy.deepcopy(source.state_dict())
    config = str(getattr(source, "config", None))
    student = from_teacher(source, 2, layers=[3, 0])
    stack = STACKS[kind]
    taken = student.state_dict()
    for name, value in taken.items():
        for new, old in ((0, 3), (1, 0)):
            if name.startswith(f"{stack}.{new}."):
                name = name.replace(f"{stack}.{new}.", f"{stack}.{old}.")
                break
        assert torch.equal(value, before[name]), name
    assert sum(name.startswith(f"{stack}.2") for name in taken) == 0
    assert type(student) is type(source)

    assert student.training
    assert all(p.requires_grad for p in student.parameters())
    run_network(student, batch()).logits.square().sum().backward()
    torch.optim.SGD(student.parameters(), lr=1.0).step()
    assert same(source, before)
    assert str(getattr(source, "config", None)) == config
    assert not source.training
    assert not any(p.requires_grad or p.grad is not None for p in source.parameters())


@pytest.mark.parametrize("kind", STACKS)
def test_all_layers_give_the_teachers_logits(kind: str) -> None:
    source = teacher(kind)
    student = from_teacher(torch.compile(source, backend="eager"), 2, layers=4).eval()  # type: ignore[arg-type]
    torch.testing.assert_close(run_network(student, batch()).logits, run_network(source, batch()).logits)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [(1, [3]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), ([-1], [3]), ([0, -2], [0, 2]), ((1, 1), [1, 1])],
)
def test_which_layers(layers: int | list[int], chosen: list[int]) -> None:
    source = teacher("bert")
    student = from_teacher(source, 2, layers=layers)
    assert student.config.num_hidden_layers == len(chosen)
    for new, old in enumerate(chosen):
        weight = source.bert.encoder.layer[old].output.dense.weight
        assert torch.equal(student.bert.encoder.layer[new].output.dense.weight, weight)


def test_three_of_six_as_documented() -> None:
    source = tiny("bert", layers=6)
    student = from_teacher(source, 2, layers=3)
    for new, old in enumerate([1, 3, 5]):
        assert torch.equal(
            student.bert.encoder.layer[new].output.dense.weight, source.bert.encoder.layer[old].output.dense.weight
        )


@pytest.mark.parametrize("kind", STACKS)
def test_head_follows_the_number_of_classes_and_copy_head(kind: str) -> None:
    source = teacher(kind, num_classes=3)

    def head(network: nn.Module) -> Tensor:
        return next(p for name, p in network.state_dict().items() if name.startswith("classifier") and p.ndim == 2)

    assert torch.equal(head(from_teacher(source, 3)), head(source))
    assert not torch.equal(head(from_teacher(source, 3, copy_head=False)), head(source))
    other = from_teacher(source, 5)
    assert run_network(other, batch()).logits.shape == (2, 5)
    table = "word_embeddings.weight"
    assert [torch.equal(v, source.state_dict()[k]) for k, v in other.state_dict().items() if k.endswith(table)] == [
        True
    ]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("kind", STACKS)
def test_random_initialisation_has_the_same_shapes_and_nothing_of_the_teacher(kind: str, rank: int | None) -> None:
    source = teacher(kind)
    torch.manual_seed(5)
    copied = from_teacher(source, 2, embedding_rank=rank)
    after_copy = torch.rand(1)
    torch.manual_seed(5)
    fresh = from_teacher(source, 2, embedding_rank=rank, initialise="random")
    assert torch.equal(after_copy, torch.rand(1))  # what follows, such as the data's order, is the same for both
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in copied.state_dict().items()}
    teachers = source.state_dict()
    shared = [
        name
        for name, value in fresh.state_dict().items()
        if value.ndim == 2 and name in teachers and torch.equal(value, teachers[name])
    ]
    assert shared == []
    assert fresh.training
    assert all(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize("kind", STACKS)
def test_factorised_embeddings_are_the_truncated_svd(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = teacher(kind)
    part = source.encoder if kind == "pooled" else source
    table = part.get_input_embeddings().weight
    student = from_teacher(source, 2, embedding_rank=3)
    ours = (student.encoder if kind == "pooled" else student).get_input_embeddings()(torch.arange(VOCABULARY))
    u, s, vt = np.linalg.svd(table.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(ours.detach(), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-6)
    assert f"rank 3: {100 * (s[:3] ** 2).sum() / (s**2).sum():.1f}% of" in caplog.text


def test_a_factorised_teacher_passes_its_factorisation_on() -> None:
    first = from_teacher(teacher("bert"), 2, layers=4, embedding_rank=4)
    again, smaller = from_teacher(first, 2, layers=2), from_teacher(first, 2, layers=2, embedding_rank=2)
    words = torch.arange(VOCABULARY)
    torch.testing.assert_close(again.get_input_embeddings()(words), first.get_input_embeddings()(words))
    assert smaller.get_input_embeddings().rank == 2


def test_student_of_a_half_precision_teacher_trains_in_float32() -> None:
    source = tiny("bert").to(torch.bfloat16)
    source.config.dtype = torch.bfloat16
    assert {p.dtype for p in from_teacher(source, 2).parameters()} == {torch.float32}


def test_per_layer_config_lists_follow_the_layers() -> None:
    source = tiny("bert")
    source.config.layer_types = ["a", "b", "c", "d"]
    from kd_lightning.models.from_teacher import student_config

    assert student_config(source.config, [3, 1], 2).layer_types == ["d", "b"]
    assert source.config.layer_types == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": 5}, "layers=5: the teacher has 4 layers, give a number from 1 to 4"),
        ({"layers": 0}, "layers=0"),
        ({"layers": [4]}, r"layers=\[4\]: the teacher has 4 layers, give numbers from 0 to 3"),
        ({"layers": [-5]}, "from -4 to -1"),
        ({"layers": []}, r"layers=\[\]"),
        ({"embedding_rank": 8}, "embedding_rank=8 does not make 8-wide embeddings smaller: give 1 to 7"),
        ({"embedding_rank": 0}, "embedding_rank=0"),
        ({"initialise": "teachr"}, "did you mean 'teacher'"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_teacher(teacher("bert"), 2, **options)  # type: ignore[arg-type]


def test_wrong_teachers_are_refused() -> None:
    with pytest.raises(ConfigError, match="not Linear: use another student"):
        from_teacher(nn.Linear(2, 2), 2)
    with pytest.raises(ConfigError, match="BertModel has no classifier"):
        from_teacher(tiny("bert").base_model, 2)
    sizes = {"d_model": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 30}
    bart = BartConfig(**sizes, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=8, decoder_ffn_dim=8)
    with pytest.raises(ConfigError, match="not BartForSequenceClassification"):
        from_teacher(BartForSequenceClassification(bart), 2)
    albert = AlbertForSequenceClassification(AlbertConfig(**SHAPE, embedding_size=6, num_hidden_layers=4))
    with pytest.raises(ConfigError, match="no list of 4 equal layers"):
        from_teacher(albert, 2)


SMALL: Any = partial(BiLSTM, embedding_size=4, hidden_size=4)
STUDENTS: list[Any] = [
    SMALL,
    partial(TextCNN, embedding_size=4),
    partial(transformer, hidden_size=4, num_heads=2),
    partial(transformer, hidden_size=4, num_heads=2, pooling="mean"),
]


def expected_components(rows: np.ndarray, rms: float) -> np.ndarray:
    """Four principal components of a table, by another algorithm, up to signs."""
    u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    expected: np.ndarray = u[:, :4] * s[:4]
    expected *= rms / np.sqrt((expected**2).mean())
    expected[1] = 0
    return expected


@pytest.mark.parametrize("kind", [*KINDS, "pooled"])
def test_embeddings_are_principal_components_of_the_teachers_table(kind: str) -> None:
    source = teacher(kind)
    before = copy.deepcopy(source.state_dict())
    torch.manual_seed(0)
    fresh = SMALL(3, VOCABULARY, 1).embedding.weight.detach()
    torch.manual_seed(0)
    student: Any = embeddings_from_teacher(source, 3, VOCABULARY, SMALL, pad_token_id=1, scale=5)
    part: Any = source.encoder if kind == "pooled" else source
    rows = part.get_input_embeddings().weight.double().numpy()
    expected = expected_components(rows, 5 * float(fresh.square().mean().sqrt()))
    np.testing.assert_allclose(student.embedding.weight.detach().abs(), np.abs(expected), atol=1e-6)
    run_network(student, batch()).logits.sum().backward()
    torch.optim.SGD(student.parameters(), lr=1.0).step()
    assert same(source, before)


@pytest.mark.parametrize("network", STUDENTS)
def test_at_random_a_student_takes_nothing_and_draws_the_same_numbers(network: Any) -> None:
    source, states = teacher("bert"), {}
    for initialise in ("teacher", "random"):
        torch.manual_seed(0)
        states[initialise] = embeddings_from_teacher(
            source, 3, VOCABULARY, network, initialise=initialise,  # type: ignore[arg-type]
        ).state_dict()  # fmt: skip
    differ = [name for name in states["random"] if not torch.equal(states["random"][name], states["teacher"][name])]
    assert len(differ) == 1
    assert differ[0].endswith(("embedding.weight", "word_embeddings.weight"))


def test_padded_tables_and_factorised_teachers_are_read() -> None:
    student: Any = embeddings_from_teacher(teacher("bert"), 2, VOCABULARY - 7, SMALL)
    assert student.embedding.num_embeddings == 23
    factorised = from_teacher(teacher("bert"), 2, embedding_rank=4)
    student = embeddings_from_teacher(factorised, 2, VOCABULARY, SMALL)
    assert student.embedding.weight.abs().sum() > 0


class Mute(nn.Module):
    """It says not where its embeddings are."""

    def __init__(self, num_classes: int, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()


def test_mistakes_with_embeddings() -> None:
    with pytest.raises(ConfigError, match=r"30 tokens and the student's vocabulary has 31: .*data.tokenizer"):
        embeddings_from_teacher(teacher("bert"), 2, 31, SMALL)
    with pytest.raises(ConfigError, match=r"student\.network: .* 9 wide, are wider than the teacher's: give at most 8"):
        embeddings_from_teacher(teacher("bert"), 2, VOCABULARY, partial(BiLSTM, embedding_size=9))
    with pytest.raises(ConfigError, match=r"student\.network takes no num_classes, pad_token_id, vocab_size"):
        embeddings_from_teacher(teacher("bert"), 2, VOCABULARY, nn.Linear)
    with pytest.raises(ConfigError, match=r"student\.network: Mute has no word embeddings"):
        embeddings_from_teacher(teacher("bert"), 2, VOCABULARY, Mute)
    with pytest.raises(ConfigError, match=r"Linear has no word embeddings.*model@student=bilstm"):
        embeddings_from_teacher(nn.Linear(2, 2), 2, VOCABULARY, SMALL)
    with pytest.raises(ConfigError, match="did you mean 'random'"):
        embeddings_from_teacher(teacher("bert"), 2, VOCABULARY, SMALL, initialise="randon")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"student\.scale=0 is not above 0"):
        embeddings_from_teacher(teacher("bert"), 2, VOCABULARY, SMALL, scale=0)
