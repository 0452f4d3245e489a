"""Which teacher outputs are stored, in which precision, and how they are encoded as tensors of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.runtime.errors import CacheError, ConfigError
from kd_lightning.types import AT_ONCE, ModelOutput, SparseLogits

Dtype = Literal["float32", "float16", "bfloat16"]
Kind = Literal["example", "token", "pair", "row"]
Number = TypeVar("Number", float, NDArray[np.int64])


MOST_DENSE = 1024
"""Of more classes the K largest logits of each token are read back without numbers for the others."""


@dataclass(frozen=True)
class Storage:
    """The encoding of stored outputs.

    Attributes:
        dtype: Of logits and features. float32 is exact, float16 is within 2^-11 of each
            number (between 6e-5 and 65504; larger ones are refused), bfloat16 within 2^-8.
        top_k: Keep of every distribution only the K largest logits and the mass of the others, `log(sum(exp(z)))`, in
            float32. Logits per token of more than `MOST_DENSE` classes are read back so (`SparseLogits`), as log
            probabilities, which 16 bits hold best where they matter: never are there V numbers a token. Otherwise the
            others share the mass evenly: `z = log(mass) - log(C - K)`. At temperature 1 the probabilities of the K
            classes and of the others together stay what they were, up to the dtype's rounding; at any other
            temperature the share of the others is an approximation. None keeps all logits.
        drawn: The K logits were drawn (`SampledTeacher`), and are read back so; `rest` is then the threshold.

    Raises:
        ConfigError: Another dtype, or fewer than one logit to keep.
    """

    dtype: Dtype = "float32"
    top_k: int | None = None
    drawn: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            raise ConfigError(f"teacher.cache_dtype={self.dtype!r}: expected one of {', '.join(get_args(Dtype))}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"teacher.cache_top_k={self.top_k}: expected how many logits to keep, 1 or more, or null")


@dataclass(frozen=True)
class Spec:
    """One stored output.

    An example's output is a run of units: a single one for a fixed-width output; n for an output per token, where n is
    the example's number of real tokens; `heads * n * n` numbers for an output per pair of tokens; only the kept rows
    for logits per token.

    Attributes:
        name: `logits`, or the name of a feature.
        kind: Fixed width `(B, ...)`, per token `(B, L, ...)`, per pair of tokens `(B, H, L, L)`, or per kept row of
            logits `(B, L, C)`.
        shape: Of the output without batch and tokens: `(C,)`, `(D,)`, `(H,)`.
        dtype: Of the stored numbers.
        top_k: How many logits are kept, None for all.
        drawn: Whether these were drawn.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: Dtype
    top_k: int | None = None
    drawn: bool = False

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Spec:
        """Return the spec that `to_json` described."""
        return cls(**{**content, "shape": tuple(content["shape"])})

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        per = {"example": "", "token": " per token", "pair": " per pair of tokens", "row": " per kept token"}[self.kind]
        kept = f", {'drawn' if self.drawn else 'top'} {self.top_k}" if self.top_k else ""
        return f"{self.name} {size}{per}, {self.dtype}{kept}"

    def to_json(self) -> dict[str, Any]:
        """Return the spec as plain values."""
        return {**plain(self), "shape": list(self.shape)}

    @cached_property
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors that hold it in a file, with the shape and dtype of one unit of each."""
        name = self.name if self.name == "logits" else f"features.{self.name}"
        number: torch.dtype = getattr(torch, self.dtype)
        if self.top_k is None:
            return {name: (() if self.kind == "pair" else self.shape, number)}
        class_id = torch.int16 if self.shape[-1] <= 2**16 else torch.int32
        leading = self.shape[:-1]
        return {
            name: ((*leading, self.top_k), number),
            f"{name}.class": ((*leading, self.top_k), class_id),
            f"{name}.rest": (leading, torch.float32),
        }

    @property
    def sparse(self) -> bool:
        """Whether it is read back as what is kept of it, and not as all its numbers."""
        return self.drawn or (self.top_k is not None and self.kind in ("token", "row") and self.shape[-1] > MOST_DENSE)

    @cached_property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts.values())

    def units(self, length: Number, square: Number, rows: Number) -> Number | int:
        """Return an example's number of units, from its tokens, their square and its kept rows."""
        if self.kind == "example":
            return 1
        if self.kind == "row":
            return rows
        return length if self.kind == "token" else square * math.prod(self.shape)


def specs_of(output: ModelOutput, mask: Tensor | None, storage: Storage, keep: Tensor | None = None) -> list[Spec]:
    """Derive the specs from a first output.

    With a mask `(B, L)`, an output `(B, H, L, L)` is per pair of tokens, and `(B, L, ...)` of three dimensions or more
    is per token (logits: per row of `keep` `(B, L)`); all others have a fixed width. So a fixed-width feature whose
    second dimension happens to be L must be flattened by the network.

    Raises:
        ConfigError: `teacher.cache_top_k` is not smaller than the number of classes.
        CacheError: The teacher gives other logits than the storage is for.
    """
    given = output.sparse and (output.sparse.values.shape[-1], output.sparse.drawn)
    if given not in (None, (storage.top_k, storage.drawn)):
        raise CacheError(f"the teacher gives {given[0]} logits of each token, and {storage} is for others")
    found = []
    for name, value in named(output).items():
        places = keep if name == "logits" and keep is not None else mask
        tokens = None if places is None else places.shape[1]
        kind: Kind = "example"
        shape = tuple(value.shape[1:])
        if tokens is not None and len(shape) == 3 and shape[1:] == (tokens, tokens):
            kind, shape = "pair", shape[:1]
        elif tokens is not None and len(shape) >= 2 and shape[0] == tokens:
            kind, shape = "token" if keep is None or name != "logits" else "row", shape[1:]
        top_k = storage.top_k if name == "logits" else None
        if top_k is not None and top_k >= shape[-1]:
            raise ConfigError(
                f"teacher.cache_top_k={top_k}: the teacher has {shape[-1]} classes; expected fewer than that, or null"
            )
        found.append(Spec(name, kind, shape, storage.dtype, top_k, storage.drawn and name == "logits"))
    return found


def plain(made: Storage | Spec) -> dict[str, Any]:
    """Return one as plain values; without `drawn` where it is not, as before there was any."""
    return {name: value for name, value in asdict(made).items() if name != "drawn" or value}


def named(output: ModelOutput) -> dict[str, Tensor | SparseLogits]:
    """Return logits, in the form in which the teacher gives them, and features under their names."""
    return {"logits": output.logits if output.sparse is None else output.sparse, **output.features}


def check_shapes(
    specs: list[Spec], output: ModelOutput, index: Tensor, mask: Tensor | None, keep: Tensor | None = None
) -> None:
    """Check that an output has the names and shapes of the first one.

    Raises:
        CacheError: Another set of outputs, or one of another shape.
    """
    values = named(output)
    if values.keys() != {spec.name for spec in specs}:
        expected = ", ".join(spec.name for spec in specs)
        raise CacheError(f"the teacher returned {', '.join(values)}; this cache holds {expected}")
    for spec in specs:
        shape: tuple[int, ...] = spec.shape
        if spec.kind != "example":
            places = keep if spec.kind == "row" and keep is not None else mask
            if places is None:
                raise CacheError(f"{spec.name} is stored for real tokens only: its batches need an attention mask")
            tokens = places.shape[1]
            shape = (*shape, tokens, tokens) if spec.kind == "pair" else (tokens, *shape)
        if tuple(values[spec.name].shape) != (len(index), *shape):
            raise CacheError(
                f"the teacher's {spec.name} is {tuple(values[spec.name].shape)}; expected {(len(index), *shape)} for "
                f"these {len(index)} examples, from its first batch"
            )


def encode(spec: Spec, value: Tensor | SparseLogits, mask: Tensor | None, index: Tensor) -> dict[str, Tensor]:
    """Encode one output of a batch: the units of its examples, concatenated, on the CPU.

    Args:
        spec: Which output.
        value: The batch's output, of `spec.kind`.
        mask: `(B, L)` bool, True at units; None for a network without tokens.
        index: `(B,)`, named in errors.

    Raises:
        CacheError: A number that is not finite, or that float16 cannot hold.
    """
    if isinstance(value, SparseLogits):
        assert mask is not None
        rows, owner = value.at(mask.to(value.device)), index.repeat_interleave(mask.sum(1))
        _check_finite(spec, rows.values, owner)
        return _parts(spec, rows, owner)
    if spec.sparse:
        assert mask is not None
        chosen = mask.to(value.device).flatten().nonzero()[:, 0]
        return _largest(spec, value.detach().flatten(0, 1), chosen, index.repeat_interleave(mask.sum(1)))
    value = value.detach().cpu().float()
    owner = index
    if spec.kind in ("token", "row"):
        assert mask is not None
        value, owner = value[mask], index.repeat_interleave(mask.sum(1))
    elif spec.kind == "pair":
        assert mask is not None
        real = (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(value)
        value, owner = value[real], index[real.nonzero()[:, 0]]
    if spec.top_k is not None:
        return _largest(spec, value, torch.arange(len(value)), owner)
    _check_finite(spec, value, owner)
    (name,) = spec.parts
    found = {name: value.to(spec.parts[name][1], copy=True)}  # what is stored is not for others to change
    _check_finite(spec, found[name], owner)
    return found


def encode_all(
    specs: Sequence[Spec], values: Mapping[str, Tensor | SparseLogits], index: Tensor, mask: Tensor | None,
    keep: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Encode all outputs of a batch, with the examples' `index` and numbers of tokens."""
    tensors: dict[str, Tensor] = {"index": index.clone()}
    for spec in specs:
        tensors |= encode(spec, values[spec.name], keep if spec.kind == "row" else mask, index)
    if mask is not None and any(spec.kind != "example" for spec in specs):
        tensors["length"] = mask.sum(1, dtype=torch.int32)
    if keep is not None and any(spec.kind == "row" for spec in specs):
        tensors["rows"] = keep.sum(1, dtype=torch.int32)
    return tensors


def _largest(spec: Spec, value: Tensor, rows: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """Return the parts of the K largest logits of some rows, a few rows at a time."""
    assert spec.top_k is not None
    kept: list[dict[str, Tensor]] = []
    size = max(AT_ONCE * (1 if value.device.type == "cpu" else 16) // spec.shape[-1], 1)
    for some, whose in zip(rows.split(size), owner.split(size), strict=True):  # type: ignore[no-untyped-call]
        logits = value[some]
        sparse = SparseLogits.of(logits.float(), spec.top_k)
        _check_finite(spec, torch.stack([logits.amin(-1).float(), sparse.values[..., 0]], dim=-1), whose)
        if spec.sparse:
            shift = sparse.values.logsumexp(-1).logaddexp(sparse.rest)
            sparse = sparse._replace(values=sparse.values - shift[..., None], rest=sparse.rest - shift)
        kept.append(_parts(spec, sparse, whose))
    return {name: torch.cat([part[name] for part in kept]) for name in spec.parts}


def _parts(spec: Spec, rows: SparseLogits, owner: Tensor) -> dict[str, Tensor]:
    """Return rows as the tensors of a file."""
    (name, (_, number)), (class_name, (_, class_id)), (rest, _) = spec.parts.items()
    values = rows.values.to(number)
    _check_finite(spec, values, owner)
    # in 16 bits the upper half of 65,536 ids comes out negative
    return {name: values.cpu(), class_name: rows.ids.cpu().to(torch.int32).to(class_id), rest: rows.rest.float().cpu()}


def decode(spec: Spec, parts: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor | SparseLogits:
    """Decode one output of a batch to float32, zero where the mask of a per-token output is False.

    Args:
        spec: Which output.
        parts: The tensors of `spec.parts`, already at their places in the batch, zero elsewhere.
        mask: `(B, L)` bool, for an output per token.
    """
    if spec.top_k is None:
        return next(iter(parts.values())).float()
    name, *more = spec.parts
    classes, ids = spec.shape[-1], parts[more[0]]
    ids = (ids.view(torch.uint16) if ids.dtype == torch.int16 else ids).long()  # as which they were stored
    if spec.sparse:
        return SparseLogits(parts[name].float(), ids, parts[more[1]], classes, spec.drawn)
    rest = parts[more[1]] - math.log(classes - spec.top_k)
    if spec.kind in ("token", "row") and mask is not None:
        rest = rest.masked_fill(~mask.reshape(*mask.shape, *[1] * (rest.ndim - 2)), 0.0)
    dense = rest[..., None].expand(*rest.shape, classes).contiguous()
    return dense.scatter_(-1, ids, parts[name].float())


def _check_finite(spec: Spec, stored: Tensor, owner: Tensor) -> None:
    if torch.isfinite(stored).all():
        return
    first = int((~torch.isfinite(stored)).nonzero()[0, 0])
    where = f"the teacher's {spec.name} for the example with index {int(owner[first])}"
    if stored.dtype == torch.float32:
        raise CacheError(f"{where} has a NaN or an infinite number, which is not stored: fix the teacher")
    largest = torch.finfo(stored.dtype).max
    raise CacheError(
        f"{where} has a number beyond {largest:g}, the largest of {spec.dtype}: set teacher.cache_dtype=float32"
    )
