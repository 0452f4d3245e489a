from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from kd_lightning.losses.simkd import SimKDLoss
from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.cnn import CNN, ResNet
from kd_lightning.models.features import FeatureTap
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.models.simkd import SimKDStudent, last_linear, simkd
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch
from tests.models.tiny import VOCABULARY, batch, tiny

BILSTM = partial(BiLSTM, embedding_size=4, hidden_size=5, pooling="attention")
CNN_ = partial(CNN, widths=(3, 4))
Make = Callable[..., tuple[nn.Module, SimKDStudent, Batch]]


def images() -> Batch:
    return {"pixel_values": torch.randn(2, 1, 8, 8), "labels": torch.tensor([0, 1])}


def text_pair(**options: Any) -> tuple[nn.Module, SimKDStudent, Batch]:
    teacher = tiny("bert", 3).eval()
    student = simkd(teacher, 3, BILSTM, vocab_size=VOCABULARY, pad_token_id=1, hidden_size=7, **options)
    return teacher, student, batch()


def image_pair(**options: Any) -> tuple[nn.Module, SimKDStudent, Batch]:
    torch.manual_seed(0)
    teacher = ResNet(3, channels=1, depth=8).eval()
    return teacher, simkd(teacher, 3, CNN_, channels=1, hidden_size=7, **options), images()


PAIRS = pytest.mark.parametrize("pair", [text_pair, image_pair])


@PAIRS
def test_it_predicts_with_the_teachers_classifier(pair: Make) -> None:
    teacher, student, data = pair()
    head = last_linear(teacher)[1]
    assert torch.equal(student.classifier.weight, head.weight)
    assert torch.equal(student.classifier.bias, head.bias)
    assert student.classifier.weight.data_ptr() != head.weight.data_ptr()
    assert not any(p.requires_grad for p in student.classifier.parameters())
    assert all(p.requires_grad for name, p in student.named_parameters() if not name.startswith("classifier"))

    student.eval()
    said = FeatureTap(student, ["pooled", "simkd_projector"])(data)
    assert torch.equal(said.features["pooled"], said.features["simkd_projector"])
    told = FeatureTap(copy.deepcopy(teacher), ["pooled"])(data)
    assert said.features["pooled"].shape == told.features["pooled"].shape
    torch.testing.assert_close(said.logits, head(said.features["pooled"]))
    student.simkd_projector = nn.Identity()  # a student whose feature is the teacher's says what the teacher says
    student.backbone = Says(told.features["pooled"])
    torch.testing.assert_close(run_network(student, data).logits, told.logits)


class Says(nn.Module):
    def __init__(self, feature: torch.Tensor) -> None:
        super().__init__()
        self.feature = feature

    def forward(self, input_ids: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        return self.feature


@PAIRS
def test_its_backbone_reads_what_it_read_before(pair: Make) -> None:
    _, student, data = pair()
    student.eval()
    sizes = student.backbone.arguments
    whole = type(student.backbone)(**sizes).eval()  # type: ignore[operator]
    whole.load_state_dict(student.backbone.state_dict(), strict=False)
    expected = FeatureTap(whole, ["pooled"])(data).features["pooled"]
    torch.testing.assert_close(run_network(student.backbone, data).logits, expected)
    assert "classifier.weight" not in student.backbone.state_dict()


@PAIRS
def test_the_loss_trains_backbone_and_projector(pair: Make) -> None:
    teacher, student, data = pair()
    before = copy.deepcopy(student.classifier.state_dict())
    term = SimKDLoss()
    ask, told = FeatureTap(student, term.needs_student), FeatureTap(copy.deepcopy(teacher), ["pooled"])
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(30):
        value = term(ask(data), told(data), data)
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is not None for p in student.simkd_projector.parameters())
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]
    assert all(torch.equal(value, before[name]) for name, value in student.classifier.state_dict().items())
    reached = [p.grad is not None for p in student.backbone.parameters()]
    assert all(reached), "a parameter of the backbone is idle"


@PAIRS
def test_random_has_nothing_of_the_teacher(pair: Make) -> None:
    teacher, student, _ = pair(initialise="random")
    assert not torch.equal(student.classifier.weight, last_linear(teacher)[1].weight)
    assert all(p.requires_grad for p in student.parameters())


@PAIRS
@pytest.mark.parametrize("initialise", ["teacher", "random"])
def test_it_is_rebuilt_without_its_teacher(pair: Make, initialise: str) -> None:
    _, student, data = pair(initialise=initialise)
    description = describe(student)
    if description is None:
        pytest.skip("kd_lightning.models.rebuild does not know SimKDStudent yet")
    again = from_description(description)
    again.load_state_dict(student.state_dict())
    assert isinstance(again, SimKDStudent)
    torch.testing.assert_close(run_network(again.eval(), data).logits, run_network(student.eval(), data).logits)
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert [name for name, p in again.named_parameters() if not p.requires_grad] == frozen
    assert bool(frozen) == (initialise == "teacher")


def test_a_teacher_without_a_bias() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 3, bias=False))
    student = simkd(teacher, 3, CNN_, channels=1)
    assert student.classifier.bias.tolist() == [0.0, 0.0, 0.0]


def test_features_of_the_backbone_keep_their_names() -> None:
    _, student, data = image_pair()
    features = FeatureTap(student, ["feature_maps[-1]", "pooled"])(data).features
    assert features["feature_maps[-1]"].shape == (2, 4, 4, 4)
    assert features["pooled"].shape == (2, 64)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="has 3 outputs and the data have 4 classes"):
        simkd(tiny("bert", 3), 4, BILSTM, vocab_size=VOCABULARY)
    with pytest.raises(ConfigError, match="ReLU has no linear layer"):
        simkd(nn.ReLU(), 3, BILSTM, vocab_size=VOCABULARY)
    with pytest.raises(ConfigError, match="did you mean 'random'"):
        simkd(tiny("bert", 3), 3, BILSTM, vocab_size=VOCABULARY, initialise="randon")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a single linear layer"):
        SimKDStudent(nn.Linear(3, 2), 4, 2)
