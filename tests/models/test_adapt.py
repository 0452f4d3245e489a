from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network, unwrap
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch, ModelOutput

LOGITS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
Named = namedtuple("Named", ["loss", "logits"])


def batch() -> Batch:
    return {
        "input_ids": torch.tensor([[5, 6], [7, 0]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0]]),
        "labels": torch.tensor([0, 1]),
        "index": torch.tensor([3, 4]),
        "teacher_input_ids": torch.zeros(2, 3, dtype=torch.int64),
    }


class Returns(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, input_ids: Tensor) -> object:
        return self.value


class Records(nn.Module):
    """Keeps what it was called with."""

    def record(self, **seen: object) -> Tensor:
        self.seen = {name: value for name, value in seen.items() if value is not None}
        return LOGITS


@pytest.mark.parametrize(
    "value",
    [
        LOGITS,
        (LOGITS, torch.zeros(1)),
        [LOGITS],
        (None, LOGITS),
        {"logits": LOGITS, "loss": 1.0},
        Named(torch.zeros(()), LOGITS),
        ModelOutput(LOGITS),
    ],
    ids=["tensor", "tuple", "list", "none-first", "dict", "namedtuple", "ModelOutput"],
)
def test_every_kind_of_output(value: object) -> None:
    assert run_network(Returns(value), batch()).logits is LOGITS


def test_own_model_output_keeps_its_features() -> None:
    output = ModelOutput(LOGITS, {"hidden": torch.ones(1)})
    assert run_network(Returns(output), batch()) is output


@pytest.mark.parametrize(
    ("value", "says"),
    [("text", "a str"), ({"scores": LOGITS}, "keys scores"), ((1, 2), "a tuple of (int, int)"), (None, "NoneType")],
)
def test_output_without_logits_is_refused(value: object, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_network(Returns(value), batch())
    assert "Returns" in str(error.value)
    assert says in str(error.value)


def test_gets_what_it_names_and_nothing_private() -> None:
    class Greedy(Records):
        def forward(
            self, attention_mask: Tensor, input_ids: Tensor, labels: object = None, index: object = None,
            teacher_input_ids: object = None, token_type_ids: object = None, **rest: object,
        ) -> Tensor:  # fmt: skip
            return self.record(a=attention_mask, i=input_ids, l=labels, x=index, t=teacher_input_ids, **rest)

    network, given = Greedy(), batch()
    run_network(network, given)
    assert network.seen == {"a": given["attention_mask"], "i": given["input_ids"]}


def test_one_required_parameter_of_another_name_gets_the_main_tensor() -> None:
    class Image(Records):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.record(x=x, mask=attention_mask)

    network, given = Image(), batch()
    run_network(network, given)
    assert network.seen == {"x": given["input_ids"], "mask": given["attention_mask"]}
    pixels = torch.rand(2, 3)
    run_network(network, {"pixel_values": pixels, "labels": torch.zeros(2)})
    assert network.seen == {"x": pixels}
    assert run_network(nn.Sequential(nn.Linear(3, 2)), {"pixel_values": pixels}).logits.shape == (2, 2)


@pytest.mark.parametrize("first", ["input_ids", "x"])
def test_a_thin_wrapper_with_kwargs_gets_the_mask_too(first: str) -> None:
    class ByName(Records):
        def forward(self, input_ids: Tensor, **rest: object) -> Tensor:
            return self.record(ids=input_ids, **rest)

    class ByPosition(Records):
        def forward(self, x: Tensor, **rest: object) -> Tensor:
            return self.record(ids=x, **rest)

    network, given = (ByName() if first == "input_ids" else ByPosition()), batch()
    run_network(network, given)
    assert network.seen == {"ids": given["input_ids"], "attention_mask": given["attention_mask"]}


def test_forward_that_cannot_be_called() -> None:
    class Two(nn.Module):
        def forward(self, input_ids: Tensor, prompt: Tensor) -> Tensor:
            return input_ids

    class Nothing(nn.Module):
        def forward(self, prompt: object = None) -> Tensor:
            return LOGITS

    class Labels(nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            return LOGITS

    with pytest.raises(ConfigError, match=r"cannot call Two: its forward needs prompt, .*input_ids, attention_mask \("):
        run_network(Two(), batch())
    with pytest.raises(ConfigError, match="Nothing: its forward takes only prompt"):
        run_network(Nothing(), batch())
    with pytest.raises(ConfigError, match="Labels: its forward needs labels"):
        run_network(Labels(), batch())
    with pytest.raises(ConfigError, match="the batch has no inputs"):
        run_network(nn.Linear(2, 2), {"labels": torch.zeros(2)})


def test_signature_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    network = Returns(LOGITS)
    run_network(network, batch())
    monkeypatch.setattr(inspect, "signature", lambda *_: pytest.fail("signature read again"))
    run_network(network, batch())
    run_network(Returns(LOGITS), batch())


def test_compiled_network_keeps_its_signature() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"logits": (self.table(input_ids) * attention_mask.unsqueeze(2)).sum(1)}

    network = Masked()
    compiled = torch.compile(network, backend="eager")
    assert unwrap(compiled) is network
    torch.testing.assert_close(run_network(compiled, batch()).logits, run_network(network, batch()).logits)


def test_data_parallel_wrapper_is_looked_through() -> None:
    class Masked(Records):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.record(i=input_ids, a=attention_mask)

    network = Masked()
    assert unwrap(torch.compile(nn.DataParallel(network), backend="eager")) is network
    assert run_network(nn.DataParallel(network), batch()).logits is LOGITS


def test_hugging_face_output_and_encoder_without_a_head() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
    }
    network = BertForSequenceClassification(BertConfig(**shape, num_labels=3)).eval()
    expected = network(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).logits
    torch.testing.assert_close(run_network(network, batch()).logits, expected)
    with pytest.raises(
        ConfigError, match=r"BertModel returned a BaseModelOutput\w* with keys last_hidden_state.*model@student=hf"
    ):
        run_network(network.bert, batch())
