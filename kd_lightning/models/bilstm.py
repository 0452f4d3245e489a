"""A bidirectional LSTM, classifier or tagger: the small, fast student."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kd_lightning.models.sizes import check_padding, check_sizes
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.types import ModelOutput

Pooling = Literal["max", "mean", "last", "attention"]

EMBEDDING_RMS = 0.1
"""Root mean square of a fresh word embedding, also of one taken from a teacher."""


class BiLSTM(nn.Module):
    """Embedding, n bidirectional LSTM layers, pooling over the words (or none), linear classifier.

    Padding never touches a word, on either side: each layer is a forward LSTM on the words and a backward LSTM on the
    words reversed *within their length*. This equals `pack_padded_sequence` without copying between layouts, and
    a trace of it is valid for every batch size and length.

    Initialisation: embeddings N(0, 0.1^2) with a zero padding row (small, so that AdamW at 1e-3 moves a rare word
    noticeably), input weights Xavier uniform, recurrent weights orthogonal, biases zero but the forget
    gate's, which is 1 (Jozefowicz et al. 2015).

    Features (see `models.features`): `hidden[0]`, also called `embeddings`, the word embeddings, and `hidden[i]`,
    the states after layer i, `(B, L, 2H)`; before dropout, at the positions of the input, zero at padding. `pooled`,
    `(B, 2H)`, before dropout too.

    Args:
        num_classes: Number of classes C.
        vocab_size: Number of token ids V.
        pad_token_id: The padding id.
        embedding_size: Width of the word embeddings.
        hidden_size: Width H of each direction.
        num_layers: Number of bidirectional layers.
        pooling: How the words' states become one vector `(B, 2H)`: `max` or `mean` over the words, `last` (forward
            state at the last word, backward state at the first), or `attention` (learned weights).
        dropout: Probability of dropping an entry of the embeddings, between layers and before the classifier.
        per_token: Classify each token, by its state, and not the text by what `pooling` makes of all.

    Raises:
        ConfigError: A size below 1, an unknown pooling or a dropout outside [0, 1), a padding id beyond the vocabulary.
    """

    VERSION = 1

    def __init__(
        self,
        num_classes: int,
        vocab_size: int,
        pad_token_id: int = 0,
        embedding_size: int = 128,
        hidden_size: int = 128,
        num_layers: int = 1,
        pooling: Pooling = "max",
        dropout: float = 0.3,
        per_token: bool = False,
    ) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "num_classes": num_classes,
            "vocab_size": vocab_size,
            "pad_token_id": pad_token_id,
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "pooling": pooling,
            "dropout": dropout,
            "per_token": per_token,
        }
        check_sizes(
            dropout, num_classes=num_classes, vocab_size=vocab_size, embedding_size=embedding_size,
            hidden_size=hidden_size, num_layers=num_layers,
        )  # fmt: skip
        check_padding(pad_token_id, vocab_size)
        if pooling not in get_args(Pooling):
            raise ConfigError(f"pooling={pooling!r} is unknown{did_you_mean(str(pooling), get_args(Pooling))}")
        self.pad_token_id, self.pooling, self.per_token = pad_token_id, pooling, per_token
        self.embedding = nn.Embedding(vocab_size, embedding_size, padding_idx=pad_token_id)
        inputs = [embedding_size] + [2 * hidden_size] * (num_layers - 1)
        self.forward_layers = nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for size in inputs)
        self.backward_layers = nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for size in inputs)
        # Without parameters: layer inputs and outputs pass through these, so that hooks can capture them.
        self.states = nn.ModuleList(nn.Identity() for _ in range(num_layers + 1))
        self.feature_names = {f"hidden[{i}]": f"states.{i}" for i in range(num_layers + 1)}
        self.feature_names["embeddings"] = "states.0"
        if pooling == "attention" and not per_token:
            score = nn.Linear(hidden_size, 1, bias=False)
            self.attention = nn.Sequential(nn.Linear(2 * hidden_size, hidden_size), nn.Tanh(), score)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * hidden_size, num_classes)
        self._initialise()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        """Classify a batch.

        Args:
            input_ids: `(B, L)` token ids.
            attention_mask: `(B, L)`, nonzero where there is a word; padding may be on either side. By default
                everything but `pad_token_id`.

        Returns:
            Logits `(B, C)`; with `per_token` `(B, L, C)`.
        """
        mask = input_ids.ne(self.pad_token_id) if attention_mask is None else attention_mask.ne(0)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Words to the front, in order: positions of words keep their number, those of padding get one beyond the end.
        order = torch.where(mask, positions, positions + input_ids.shape[1]).argsort(dim=1)
        lengths = mask.sum(1, keepdim=True).clamp_min(1)  # an empty text becomes one padding token
        hidden = self._encode(input_ids.gather(1, order), lengths, positions, order)
        if self.per_token:
            states = _in_place(hidden, lengths, positions, order)
            return ModelOutput(self.classifier(self.dropout(states)))
        return ModelOutput(self.classifier(self.dropout(self._pool(hidden, lengths, positions))))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the word embeddings, under the name `transformers` gives this method."""
        return self.embedding

    def _encode(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, order: Tensor) -> Tensor:
        """Return the last layer's states `(B, L, 2H)`; those at padding are meaningless."""
        mirrored = lengths - 1 - positions
        reverse = torch.where(mirrored >= 0, mirrored, positions).unsqueeze(2)  # (B, L, 1), its own inverse
        hidden: Tensor = self.embedding(input_ids)
        self._show(0, hidden, lengths, positions, order)
        for i, (ahead, back) in enumerate(zip(self.forward_layers, self.backward_layers, strict=True), start=1):
            hidden = self.dropout(hidden)
            reversed_states = _states(back, hidden.gather(1, reverse.expand_as(hidden)))
            back_in_place = reversed_states.gather(1, reverse.expand_as(reversed_states))
            hidden = torch.cat([_states(ahead, hidden), back_in_place], dim=2)
            self._show(i, hidden, lengths, positions, order)
        return hidden

    def _show(self, layer: int, hidden: Tensor, lengths: Tensor, positions: Tensor, order: Tensor) -> None:
        """Let hooks capture the words' states."""
        if self.states[layer]._forward_hooks:
            self.states[layer](_in_place(hidden, lengths, positions, order))

    def _pool(self, hidden: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
        """Reduce `(B, L, 2H)` to `(B, 2H)` over the words."""
        if self.pooling == "last":
            ahead, back = hidden.chunk(2, dim=2)
            last = (lengths - 1).unsqueeze(2).expand(-1, -1, ahead.shape[2])
            return torch.cat([ahead.gather(1, last).squeeze(1), back[:, 0]], dim=1)
        padding = (positions >= lengths).unsqueeze(2)
        if self.pooling == "max":
            return hidden.masked_fill(padding, float("-inf")).amax(1)
        if self.pooling == "mean":
            return hidden.masked_fill(padding, 0.0).sum(1) / lengths.to(hidden.dtype)
        weights: Tensor = self.attention(hidden).masked_fill(padding, float("-inf")).softmax(1)
        return (weights * hidden).sum(1)

    @torch.no_grad()
    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_RMS)
        self.embedding.weight[self.pad_token_id].zero_()
        for lstm in (*self.forward_layers, *self.backward_layers):
            for name, parameter in lstm.named_parameters():
                gates = parameter.chunk(4)  # torch's order: input, forget, cell, output
                for gate in gates:
                    if name.startswith("weight_ih"):
                        nn.init.xavier_uniform_(gate)
                    elif name.startswith("weight_hh"):
                        nn.init.orthogonal_(gate)
                    else:
                        gate.zero_()
                if name.startswith("bias_ih"):
                    gates[1].fill_(1.0)


def _states(lstm: nn.Module, inputs: Tensor) -> Tensor:
    """Return an LSTM's states `(B, L, H)`; in float32 on a CPU that has no kernel for one in 16 bits."""
    halved = inputs.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if halved and not _has_kernel(torch.get_autocast_dtype("cpu")):
        with torch.autocast("cpu", enabled=False):
            return lstm(inputs.float())[0]  # type: ignore[no-any-return]
    return lstm(inputs)[0]  # type: ignore[no-any-return]


@lru_cache
def _has_kernel(dtype: torch.dtype) -> bool:
    """Return whether this processor computes LSTMs in a dtype; without oneDNN torch's own code does."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    kernels: Any = torch.ops.mkldnn
    return bool(kernels._is_mkldnn_fp16_supported() if dtype == torch.float16 else kernels._is_mkldnn_bf16_supported())


def _in_place(hidden: Tensor, lengths: Tensor, positions: Tensor, order: Tensor) -> Tensor:
    """Return the words' states `(B, L, 2H)` where the words stand in the input, zeros at padding."""
    words = hidden.masked_fill((positions >= lengths).unsqueeze(2), 0.0)
    return words.gather(1, order.argsort(dim=1).unsqueeze(2).expand_as(words))
