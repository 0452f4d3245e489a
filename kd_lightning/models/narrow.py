"""Selects the hidden dimensions, heads and units of a narrower BERT, and cuts weights to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kd_lightning.runtime.errors import ConfigError

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")


@dataclass(frozen=True)
class Cut:
    """What is kept of a BERT, ascending.

    Attributes:
        hidden: Dimensions of the hidden states, the same in all layers, which add to one another.
        rows: Of each layer, the rows of queries, keys and values: those of whole heads.
        units: Of each layer, units of its feed-forward part.
    """

    hidden: Tensor
    rows: Mapping[int, Tensor]
    units: Mapping[int, Tensor]

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """Return a teacher's weight cut to what is kept; `name` is its name in the teacher."""
        first, second = self._axes(name)
        if first is not None:
            weight = weight[first]
        return weight if second is None or weight.ndim < 2 else weight[:, second]

    def _axes(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Return what is kept of a weight's outputs and inputs; None: all."""
        found = _LAYER.search(name)
        layer = int(found[1]) if found else -1
        if ".LayerNorm." in name:
            return self.hidden, None
        if ".attention.self." in name:
            return self.rows[layer], self.hidden
        if ".attention.output." in name:
            return self.hidden, self.rows[layer]
        if ".intermediate." in name:
            return self.units[layer], self.hidden
        if found:
            return self.hidden, self.units[layer]
        if "_embeddings." in name or "classifier." in name or ".decoder." in name:
            return None, self.hidden
        return (self.hidden, self.hidden) if "pooler." in name or ".transform." in name else (None, None)


def narrow_config(config: PreTrainedConfig, width: int) -> None:
    """Return a BERT's configuration at another width, with heads of the same size.

    Raises:
        ConfigError: Not a BERT, or a width that is not a smaller number of whole heads.
    """
    if config.model_type != "bert":
        raise ConfigError(f"width={width}: only a BERT can be made narrower, not {config.model_type}; set width=null")
    size = config.hidden_size // config.num_attention_heads
    if width % size or not size <= width < config.hidden_size:
        raise ConfigError(
            f"width={width}: the teacher is {config.hidden_size} wide, in heads of {size}; give a smaller multiple "
            f"of {size}"
        )
    config.intermediate_size = max(round(config.intermediate_size * width / config.hidden_size), 1)
    config.num_attention_heads = width // size
    config.hidden_size = width


@torch.no_grad()
def important(
    state: Mapping[str, Tensor],
    table: Tensor,
    teacher: PreTrainedConfig,
    student: PreTrainedConfig,
    layers: Sequence[int],
) -> Cut:
    r"""Select by magnitude of weights, which needs no data (Han et al. 2015, arXiv 1506.02626).

    The score of a hidden dimension is its share of the squared norm of each matrix that reads or writes it, summed over
    the word embeddings (less their mean row) and the chosen layers; positions and the gains of LayerNorms do not count.
    A head's score is the product of the norms of its values and of its part of the attention's output; that of a
    feed-forward unit the product of the norms of its input and output weights.

    Args:
        state: The teacher's weights by name.
        table: Its word embeddings, `(V, H)`.
        teacher: Its configuration.
        student: The narrower one.
        layers: Which of its layers the student takes.
    """
    of = {f"{x[1]}.{name[x.end() :]}": value.float() for name, value in state.items() if (x := _LAYER.search(name))}
    worth = _share(table.float() - table.float().mean(0), 0)
    rows, units = {}, {}
    size = teacher.hidden_size // teacher.num_attention_heads
    for layer in sorted(set(layers)):
        values, out = of[f"{layer}.attention.self.value.weight"], of[f"{layer}.attention.output.dense.weight"]
        up, down = of[f"{layer}.intermediate.dense.weight"], of[f"{layer}.output.dense.weight"]
        queries, keys = (of[f"{layer}.attention.self.{name}.weight"] for name in ("query", "key"))
        worth = worth + sum(_share(x, 0) for x in (queries, keys, values, up)) + _share(out, 1) + _share(down, 1)
        heads = _norms(values, size, 0) * _norms(out, size, 1)
        chosen = _largest(heads, student.num_attention_heads)
        rows[layer] = (chosen.unsqueeze(1) * size + torch.arange(size)).flatten()
        units[layer] = _largest(up.norm(dim=1) * down.norm(dim=0), student.intermediate_size)
    return Cut(_largest(worth, student.hidden_size), rows, units)


def _share(matrix: Tensor, other: int) -> Tensor:
    """Return each line's share of a matrix's squared norm, summed over the axis `other`."""
    squares = matrix.square().sum(other)
    return squares / squares.sum().clamp_min(1e-30)


def _norms(matrix: Tensor, size: int, axis: int) -> Tensor:
    """Return the norm of each head's lines of a matrix."""
    return matrix.square().sum(1 - axis).view(-1, size).sum(1).sqrt()


def _largest(worth: Tensor, count: int) -> Tensor:
    """Return the positions of the largest, ascending; among equal ones the first."""
    return worth.cpu().sort(descending=True, stable=True).indices[:count].sort().values
