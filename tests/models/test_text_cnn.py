from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.models.adapt import run_network
from kd_lightning.models.features import FeatureTap
from kd_lightning.models.rebuild import describe, from_description
from kd_lightning.models.text_cnn import TextCNN
from kd_lightning.runtime.errors import ConfigError

LENGTHS = (7, 1, 4, 2)


def network(**options: Any) -> TextCNN:
    torch.manual_seed(0)
    arguments = {"embedding_size": 6, "num_filters": 5, "kernel_sizes": (1, 2, 3), "dropout": 0.0}
    return TextCNN(3, 20, **(arguments | options)).double()


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 20, (1, length), generator=torch.Generator().manual_seed(seed))


def reference(ours: TextCNN, tokens: list[int]) -> np.ndarray:
    """One text, one detector and one place after the other."""
    words = ours.embedding.weight.detach().numpy()[tokens]
    found = []
    for layer in ours.convolutions:
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()  # type: ignore[union-attr]
        size = weight.shape[2]
        before = size // 2
        padded = np.pad(words, ((before, size - 1 - before), (0, 0)))
        for channel, kernel in enumerate(weight):
            places = [(padded[i : i + size].T * kernel).sum() + bias[channel] for i in range(len(words))]
            found.append(max(0.0, *places))
    linear = ours.classifier
    return linear.weight.detach().numpy() @ np.array(found) + linear.bias.detach().numpy()


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_definition(length: int) -> None:
    ours, tokens = network(), text(length)
    np.testing.assert_allclose(ours(tokens).logits[0].detach(), reference(ours, tokens[0].tolist()), atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("told", [True, False])
def test_padding_changes_nothing(side: str, told: bool) -> None:
    ours = network()
    for length in LENGTHS:
        tokens = text(length)
        zeros = torch.zeros(1, 4, dtype=torch.long)
        padded = torch.cat([zeros, tokens] if side == "left" else [tokens, zeros], 1)
        logits = ours(padded, padded.ne(0).long() if told else None).logits
        torch.testing.assert_close(logits, ours(tokens).logits)


def test_a_mask_hides_words_that_are_no_padding() -> None:
    ours, tokens = network(), text(6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    torch.testing.assert_close(ours(tokens, mask).logits, ours(tokens[:, :4]).logits)


def test_a_text_without_a_word_has_finite_logits_and_gradients() -> None:
    ours = network()
    logits = ours(torch.zeros(2, 3, dtype=torch.long)).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_a_bag_does_not_see_the_order() -> None:
    bag, other = network(kernel_sizes=[1]), network()
    tokens = text(7)
    torch.testing.assert_close(bag(tokens).logits, bag(tokens.flip(1)).logits)
    assert not torch.allclose(other(tokens).logits, other(tokens.flip(1)).logits)


def test_is_rebuilt_from_its_description() -> None:
    ours = network(kernel_sizes=[2, 4]).float()
    description = describe(ours)
    assert description is not None
    twin = from_description(description)
    twin.load_state_dict(ours.state_dict())
    tokens = text(5)
    assert torch.equal(run_network(twin, {"input_ids": tokens}).logits, run_network(ours, {"input_ids": tokens}).logits)


def test_shows_its_embeddings_before_dropout() -> None:
    ours = network(dropout=0.5).train()
    tokens = torch.tensor([[3, 4, 0]])
    features = FeatureTap(ours, ["hidden[0]", "pooled"])({"input_ids": tokens}).features
    torch.testing.assert_close(features["hidden[0]"][0, :2], ours.embedding.weight[[3, 4]])
    assert features["hidden[0]"][0, 2].abs().sum() == 0
    assert features["pooled"].shape == (1, 15)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernel_sizes": []}, "kernel_sizes=0 is too small"),
        ({"kernel_sizes": [2, 0]}, "kernel_sizes=0 is too small"),
        ({"num_filters": 0}, "num_filters=0"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability"),
        ({"pad_token_id": 20}, "pad_token_id=20 is not a token"),
    ],
)
def test_mistakes(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        network(**options)
