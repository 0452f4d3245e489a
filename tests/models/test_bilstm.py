from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.runtime.errors import ConfigError

LENGTHS = torch.tensor([7, 1, 4, 6, 2])


def tokens(length: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(length) < LENGTHS.unsqueeze(1)
    return torch.randint(1, 20, (5, length)) * mask, mask.long()


def network(pooling: str = "max", layers: int = 2, **options: object) -> BiLSTM:
    torch.manual_seed(0)
    arguments = {"embedding_size": 6, "hidden_size": 5, "num_layers": layers, "pooling": pooling, "dropout": 0.0}
    return BiLSTM(3, 20, **(arguments | options)).double()  # type: ignore[arg-type]


def packed_twin(ours: BiLSTM) -> nn.LSTM:
    """torch's own bidirectional LSTM with the same weights."""
    first: nn.LSTM = ours.forward_layers[0]  # type: ignore[assignment]
    layers = len(ours.forward_layers)
    twin = nn.LSTM(first.input_size, first.hidden_size, layers, batch_first=True, bidirectional=True).double()
    with torch.no_grad():
        for i, (ahead, back) in enumerate(zip(ours.forward_layers, ours.backward_layers, strict=True)):
            for lstm, suffix in ((ahead, ""), (back, "_reverse")):
                for name, value in lstm.named_parameters():
                    getattr(twin, name[:-1] + str(i) + suffix).copy_(value)
    return twin


def reference_logits(ours: BiLSTM, twin: nn.LSTM, embedded: Tensor) -> Tensor:
    """The same classifier written with packed sequences and one example after the other."""
    packed = pack_padded_sequence(embedded, LENGTHS, batch_first=True, enforce_sorted=False)
    hidden, _ = pad_packed_sequence(twin(packed)[0], batch_first=True)
    pooled = []
    for states, length in zip(hidden, LENGTHS, strict=True):
        words = states[: int(length)]
        half = words.shape[1] // 2
        pooled.append(
            {
                "max": lambda words=words: words.max(0).values,
                "mean": lambda words=words: words.mean(0),
                "last": lambda words=words, half=half: torch.cat([words[-1, :half], words[0, half:]]),
                "attention": lambda words=words: ours.attention(words).softmax(0).T[0] @ words,
            }[ours.pooling]()
        )
    return ours.classifier(torch.stack(pooled))


@pytest.mark.parametrize(("pooling", "layers"), list(itertools.product(["max", "mean", "last", "attention"], [1, 3])))
def test_equals_torchs_packed_lstm_in_values_and_gradients(pooling: str, layers: int) -> None:
    ours = network(pooling, layers)
    twin = packed_twin(ours)
    input_ids, mask = tokens()
    logits = run_network(ours, {"input_ids": input_ids, "attention_mask": mask}).logits
    embedded = ours.embedding.weight.detach().clone().requires_grad_()
    expected = reference_logits(ours, twin, embedded[input_ids])
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)

    weights = torch.randn_like(logits)
    (expected * weights).sum().backward()
    ours.zero_grad()
    (logits * weights).sum().backward()
    torch.testing.assert_close(ours.embedding.weight.grad[1:], embedded.grad[1:], atol=1e-6, rtol=0)
    for i, (ahead, back) in enumerate(zip(ours.forward_layers, ours.backward_layers, strict=True)):
        for lstm, suffix in ((ahead, ""), (back, "_reverse")):
            for name, parameter in lstm.named_parameters():
                torch.testing.assert_close(
                    parameter.grad, getattr(twin, name[:-1] + str(i) + suffix).grad, atol=1e-6, rtol=0
                )


@pytest.mark.parametrize("pooling", ["max", "mean", "last", "attention"])
def test_more_padding_left_padding_and_no_mask_change_nothing(pooling: str) -> None:
    ours = network(pooling)
    input_ids, mask = tokens()
    expected = ours(input_ids, mask).logits
    for padding in ((0, 5), (3, 0)):
        wider, wider_mask = (nn.functional.pad(x, padding) for x in (input_ids, mask))
        torch.testing.assert_close(ours(wider, wider_mask).logits, expected)
        torch.testing.assert_close(ours(wider).logits, expected)
    other = input_ids + 7 * (1 - mask)  # what stands under the padding is never read
    torch.testing.assert_close(ours(other, mask).logits, expected)
    torch.testing.assert_close(
        torch.cat([ours(i[None], m[None]).logits for i, m in zip(input_ids, mask, strict=True)]), expected
    )


@pytest.mark.parametrize("pooling", ["max", "mean", "last", "attention"])
def test_text_without_a_word_is_finite_with_finite_gradients(pooling: str) -> None:
    ours = network(pooling)
    logits = ours(torch.zeros(2, 4, dtype=torch.int64)).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_gradient_reaches_every_parameter() -> None:
    for pooling in ("max", "mean", "last", "attention"):
        ours = network(pooling)
        ours(*tokens()).logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters()), pooling


def test_initialisation_is_what_the_docstring_says() -> None:
    torch.manual_seed(0)
    ours = BiLSTM(2, 5000, pad_token_id=3, hidden_size=16)
    weight = ours.embedding.weight.detach()
    assert not weight[3].any()
    assert float(weight.std()) == pytest.approx(0.1, rel=0.02)
    lstm: nn.LSTM = ours.forward_layers[0]  # type: ignore[assignment]
    bias = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach()
    assert bias.tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 32
    for gate in lstm.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(16), atol=1e-5, rtol=0)


def test_dropout_acts_in_training_only() -> None:
    ours = network(dropout=0.5)
    given = tokens()
    assert not torch.equal(ours(*given).logits, ours(*given).logits)
    ours.eval()
    assert torch.equal(ours(*given).logits, ours(*given).logits)


def test_bfloat16_is_finite() -> None:
    for pooling in ("max", "mean", "last", "attention"):
        ours = network(pooling).float()
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(*tokens()).logits.isfinite().all()


class Logits(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids, attention_mask).logits
        return logits


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_to_a_graph_for_every_batch_size_and_length() -> None:
    ours = Logits(network().float().eval())
    graph = torch.jit.trace(ours, tokens())  # type: ignore[no-untyped-call]
    longer, longer_mask = (nn.functional.pad(x, (0, 4))[:3] for x in tokens())
    longer[0, 7:], longer_mask[0, 7:] = 5, 1
    torch.testing.assert_close(graph(longer, longer_mask), ours(longer, longer_mask))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pooling": "mox"}, "did you mean 'max'"),
        ({"hidden_size": 0}, "hidden_size=0 is too small"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"pad_token_id": 20}, "pad_token_id=20 .* 0 to 19"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        BiLSTM(2, 20, **options)  # type: ignore[arg-type]


def test_without_a_kernel_in_16_bits_the_lstm_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processors without AVX512: torch refuses an LSTM in bfloat16 there, where nothing is trained."""
    network = BiLSTM(3, 20, embedding_size=4, hidden_size=4).eval()
    states: list[torch.Tensor] = []
    network.states[1].register_forward_hook(lambda module, inputs, output: states.append(output))
    monkeypatch.setattr("kd_lightning.models.bilstm._has_kernel", lambda dtype: False)
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    with torch.inference_mode():
        network(ids)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(ids).logits
    assert states[1].dtype == torch.float32
    assert torch.equal(*states)
    assert logits.dtype == torch.bfloat16  # what is linear is in 16 bits
