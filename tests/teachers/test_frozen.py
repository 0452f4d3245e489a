from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from kd_lightning.losses import SoftTargetLoss
from kd_lightning.models.adapt import run_network
from kd_lightning.models.transformer import transformer
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.teachers.frozen import Precision
from kd_lightning.types import Batch, ModelOutput


class Network(nn.Module):
    """Everything about it that a forgotten `eval()` or `requires_grad_(False)` would change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values: Tensor, shift: Tensor | None = None) -> ModelOutput:
        hidden = self.linear(pixel_values)
        logits = self.dropout(self.norm(hidden))
        return ModelOutput(logits if shift is None else logits + shift, {"hidden": hidden})


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    network = Network()
    network.train()
    network(torch.randn(16, 4))  # BatchNorm statistics that are not the initial ones
    return network


@pytest.fixture
def batch() -> Batch:
    return {"pixel_values": torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), "index": torch.arange(8)}


def test_it_answers_as_the_network_does_in_eval_mode(network: Network, batch: Batch) -> None:
    expected = run_network(copy.deepcopy(network).eval(), batch)
    output = FrozenTeacher(network)(batch)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.features["hidden"], expected.features["hidden"])


def test_it_stays_in_eval_mode_whoever_asks_for_training(network: Network, batch: Batch) -> None:
    teacher = FrozenTeacher(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = teacher(batch).logits
    nn.Sequential(teacher).train()
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher(batch).logits, first)  # no dropout
    for name, value in network.state_dict().items():  # no BatchNorm statistics
        assert torch.equal(value, before[name]), name


def test_its_parameters_are_frozen_and_its_output_has_no_graph(network: Network, batch: Batch) -> None:
    teacher = FrozenTeacher(network)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    output = teacher(batch)
    for value in (output.logits, *output.features.values()):
        assert not value.requires_grad


def test_its_output_can_be_saved_for_a_backward_pass(network: Network, batch: Batch) -> None:
    output = FrozenTeacher(network)(batch)
    assert not output.logits.is_inference()
    assert not output.features["hidden"].is_inference()
    student = torch.zeros(8, 3, requires_grad=True)
    SoftTargetLoss(2.0)(ModelOutput(student), output, batch).backward()
    ((student - output.logits) * output.logits * output.features["hidden"]).sum().backward()
    assert student.grad is not None


def test_where_the_batch_has_entries_for_the_teacher_it_reads_those(network: Network, batch: Batch) -> None:
    teacher, own = FrozenTeacher(network), torch.full((8, 4), 2.0)
    expected = teacher({"pixel_values": own}).logits
    both = {**batch, "teacher_pixel_values": own}
    assert torch.equal(teacher(both).logits, expected)
    assert not torch.equal(teacher(batch).logits, expected)
    # the student's entries are not mixed in: `shift` is none of the teacher's
    assert torch.equal(teacher({**both, "shift": torch.ones(3)}).logits, expected)
    assert torch.equal(teacher({**both, "teacher_shift": torch.ones(3)}).logits, expected + 1)
    assert set(both) == {"pixel_values", "index", "teacher_pixel_values"}  # and the batch is left as it was


def test_bf16_is_autocast_bit_by_bit(network: Network, batch: Batch) -> None:
    teacher = FrozenTeacher(network, precision="bf16", features=["linear"])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = run_network(copy.deepcopy(network).eval(), batch)
    output = teacher(batch)
    assert output.logits.dtype == torch.float32  # for the losses
    assert output.features["linear"].dtype == torch.bfloat16
    assert torch.equal(output.logits, expected.logits.float())
    assert torch.equal(output.features["linear"], expected.features["hidden"])
    assert {p.dtype for p in teacher.network.linear.parameters()} == {torch.bfloat16}  # cast once, not at each call
    assert teacher.network.norm.weight.dtype == torch.float32


def test_a_tied_embedding_keeps_its_precision() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embedding(input_ids))

    torch.manual_seed(0)
    network, batch = Tied(), {"input_ids": torch.tensor([[1, 2], [3, 4]])}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = network(**batch).float()
    assert torch.equal(FrozenTeacher(network, "bf16")(batch).logits, expected)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "int8-dynamic"}, {"features": ["linear"]}])
def test_the_network_that_was_given_is_left_alone(network: Network, batch: Batch, options: dict[str, Any]) -> None:
    before = copy.deepcopy(network)
    FrozenTeacher(network, **options)(batch)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert str(network) == str(before)  # the same modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    for name, value in network.state_dict().items():
        assert value.dtype == before.state_dict()[name].dtype
        assert torch.equal(value, before.state_dict()[name])


def test_in_float32_it_is_the_network_itself(network: Network) -> None:
    assert FrozenTeacher(network).network is network


@pytest.mark.parametrize("precision", ["float32", "int8-dynamic"])
def test_its_precision_also_inside_the_students_autocast(network: Network, batch: Batch, precision: Precision) -> None:
    teacher = FrozenTeacher(network, precision, features=["norm"])
    expected = teacher(batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = teacher(batch)
    assert output.features["norm"].dtype == torch.float32
    assert torch.equal(output.logits, expected.logits)


def test_int8_answers_nearly_as_float32() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5))
    batch = {"pixel_values": torch.randn(16, 32)}
    exact, quantised = FrozenTeacher(network)(batch).logits, FrozenTeacher(network, "int8-dynamic")(batch).logits
    assert quantised.dtype == torch.float32
    assert not torch.equal(quantised, exact)
    assert (quantised - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize(
    "network", [nn.Conv2d(3, 2, 1), nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8), nn.Linear(8, 2))]
)
def test_int8_refuses_what_it_cannot_quantise(network: nn.Module) -> None:
    with pytest.raises(ConfigError, match=rf"teacher\.precision=int8-dynamic: {type(network).__name__} "):
        FrozenTeacher(network, "int8-dynamic")


def test_precisions_are_checked(network: Network, batch: Batch) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.precision='int8_dynamic' is unknown; did you mean 'int8-dynamic'"):
        FrozenTeacher(network, "int8_dynamic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"teacher\.compile=false"):
        FrozenTeacher(network, "int8-dynamic", compile=True)
    half = FrozenTeacher(network, "float16")
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        half(batch)
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        half.to(torch.device("cpu"))
    with pytest.raises(ConfigError, match="int8-dynamic needs a CPU"):
        FrozenTeacher(network, "int8-dynamic").to(torch.device("cuda"))


def test_8_bits_are_those_of_bitsandbytes_on_a_gpu(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(ConfigError, match=r"8bit needs a GPU and bitsandbytes \(pip install bitsandbytes\)"):
        FrozenTeacher(network, "8bit")

    class Linear8bitLt(nn.Linear):
        def __init__(self, inputs: int, outputs: int, bias: bool, has_fp16_weights: bool) -> None:
            assert not has_fp16_weights
            super().__init__(inputs, outputs, bias)

    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", SimpleNamespace(Linear8bitLt=Linear8bitLt))
    whole = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 6, bias=False)), nn.Linear(6, 2))
    teacher = FrozenTeacher(whole, "8bit")
    kinds = [type(module).__name__ for module in teacher.network.modules() if isinstance(module, nn.Linear)]
    assert kinds == ["Linear8bitLt", "Linear8bitLt", "Linear"]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in teacher.network.state_dict().items())
    assert type(whole[0]) is nn.Linear
    with pytest.raises(ConfigError, match="8bit needs a GPU"):
        teacher.to(torch.device("cpu"))
    with pytest.raises(ConfigError, match="no linear layers but its last"):
        FrozenTeacher(nn.Linear(2, 2), "8bit")
    with pytest.raises(ConfigError, match=r"precision=8bit: such weights cannot be shared"):
        FrozenTeacher(whole, "8bit", sharded=True)


def test_features_come_along_without_a_graph(network: Network, batch: Batch) -> None:
    output = FrozenTeacher(network, features=["linear", "pooled"])(batch)
    torch.testing.assert_close(output.features["pooled"], batch["pixel_values"])
    torch.testing.assert_close(output.features["linear"], network.linear(batch["pixel_values"]).detach())
    assert not output.features["linear"].is_inference()
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        FrozenTeacher(network, features=["linaer"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_compiled_it_says_the_same(precision: Precision) -> None:
    torch.manual_seed(0)
    network = transformer(3, 50, hidden_size=16, num_layers=1, intermediate_size=32).eval()
    names = ["hidden[1]", "pooled"]
    plain, compiled = FrozenTeacher(network, precision, names), FrozenTeacher(network, precision, names, compile=True)
    assert list(compiled.network.state_dict()) == list(network.state_dict())
    for size, length in ((4, 7), (6, 9)):
        mask = torch.arange(length) < torch.randint(1, length + 1, (size, 1))
        batch = {"input_ids": torch.randint(1, 50, (size, length)) * mask, "attention_mask": mask.long()}
        expected, output = plain(batch), compiled(batch)
        close = {"rtol": 1e-4, "atol": 1e-5} if precision == "float32" else {"rtol": 0.05, "atol": 0.02}
        torch.testing.assert_close(output.logits, expected.logits, **close)
        assert not output.logits.requires_grad
        assert not output.logits.is_inference()
        for name in names:
            torch.testing.assert_close(output.features[name], expected.features[name], **close)


def test_to_moves_it_and_returns_it(network: Network) -> None:
    teacher = FrozenTeacher(network)
    assert teacher.to(torch.device("cpu")) is teacher
    assert next(teacher.to(torch.device("meta")).parameters()).device.type == "meta"


@pytest.mark.parametrize(("precision", "share"), [("float32", 1e-5), ("bf16", 0.02), ("int8-dynamic", 0.2)])
def test_how_far_an_answer_depends_on_the_batch_it_was_asked_in(precision: Precision, share: float) -> None:
    """What a cache holds was asked in one batch; asked in another, or alone, the answer may be off by this share."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    network = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=3, initializer_range=0.3, **sizes))
    tokens, lengths = torch.randint(1, 100, (16, 20)), torch.randint(3, 21, (16,))
    mask = (torch.arange(20) < lengths[:, None]).long()
    teacher = FrozenTeacher(network, precision)
    together = teacher({"input_ids": tokens, "attention_mask": mask}).logits
    alone = [
        teacher({"input_ids": tokens[i : i + 1, :n], "attention_mask": mask[i : i + 1, :n]}).logits
        for i, n in enumerate(lengths.tolist())
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=share * float(together.abs().max()))


class WithoutKernel(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("could not create a primitive descriptor for the LSTM forward propagation primitive")


def test_a_precision_that_the_processor_has_no_kernel_for_is_named() -> None:
    batch = {"pixel_values": torch.ones(2, 3)}
    with pytest.raises(ConfigError, match=r"teacher\.precision=bf16: this cpu cannot compute WithoutKernel so; set"):
        FrozenTeacher(WithoutKernel(3, 2), "bf16")(batch)
    with pytest.raises(RuntimeError, match="primitive descriptor"):
        FrozenTeacher(WithoutKernel(3, 2))(batch)
