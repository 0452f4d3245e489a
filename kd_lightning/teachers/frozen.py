"""A teacher that runs: a frozen network."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from torch import nn

from kd_lightning.losses.cross_tokenizer import next_log_probs
from kd_lightning.models.adapt import unwrap
from kd_lightning.models.features import FeatureTap
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.runtime.sharding import shard
from kd_lightning.teachers.clock import PREDICTING
from kd_lightning.types import NEXT_LOG_PROB, Batch, ModelOutput

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

VERSION = 1
"""Raised when a network of the same weights has other outputs or features: stored ones are then not used any more."""

Precision = Literal["float32", "bf16", "float16", "8bit", "int8-dynamic"]

_PREFIX = "teacher_"
_HALF = {"bf16": torch.bfloat16, "float16": torch.float16}


class Teacher(ABC):
    """Base class of teachers: returns outputs for a batch, without gradients, on a device.

    Attributes:
        notes: Its entries in the record of a training.
    """

    notes: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the teacher's output for the batch."""

    @abstractmethod
    def to(self, device: torch.device) -> Teacher:
        """Move to a device."""

    def flush(self) -> None:  # noqa: B027 - most teachers store nothing
        """Store outputs that are not stored yet, before a checkpoint and when a training ends."""

    def around(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Return the loader of training batches, with outputs computed ahead of the step, if any."""
        return loader


class WrappedTeacher(Teacher):
    """Base class of teachers that change what another one returns.

    Args:
        inner: The other teacher. What it computes ahead of a step is changed where it is read.
    """

    def __init__(self, inner: Teacher) -> None:
        self.inner, self.notes = inner, inner.notes

    def to(self, device: torch.device) -> Self:
        """Move the other teacher to a device."""
        self.inner = self.inner.to(device)
        return self

    def flush(self) -> None:
        """Flush the other teacher."""
        self.inner.flush()

    def around(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Return the loader as the other teacher does."""
        return self.inner.around(loader)


class FrozenTeacher(nn.Module, Teacher):
    """Runs a frozen network: always in eval mode, without gradients, under `inference_mode`.

    The distilling module keeps it outside its own module tree, so it is in no optimizer, DDP wrapper or checkpoint. If
    the batch has entries for the teacher (`teacher_input_ids`, from another tokenizer), the network gets those; and of
    its logits those at `teacher_rows` are returned at the batch's `keep`, zero elsewhere.

    The precision is independent of the student's:

    * `float32`: as the weights are stored.
    * `bf16`, `float16` (GPU): autocast. The weights that autocast would cast at every call, those of linear layers and
      convolutions, are cast once; the outputs are the same bit by bit.
    * `8bit` (GPU, with bitsandbytes): weights of linear layers but the output layer in 8 bits, computed with outliers
      of their inputs in 16 (Dettmers et al. 2022, arXiv 2208.07339); autocast to float16.
    * `int8-dynamic` (CPU): weights of linear layers in 8 bits with a scale for each output channel, their inputs in 7
      bits with a scale for each batch, so that outputs depend on the other examples of the batch. They differ visibly
      from float32: for a CPU without bfloat16.

    Args:
        network: Any network. In float32, without features and uncompiled, it is frozen in place; otherwise it is copied
            and left unchanged.
        precision: What the network computes in; logits are always float32.
        features: What to return with the logits; see `kd_lightning.models.features`. `next_log_prob` too, of a network
            of logits per token.
        compile: Compile the forward pass, once for all batch sizes and lengths; needs a C++ compiler on a CPU.
        sharded: Whether the processes of a training share the weights (`shard`), each holding a shard of every layer;
            the network is copied.

    Raises:
        ConfigError: An unknown precision, or one that this network or device cannot compute in; an unknown feature;
            sharded weights that are quantised or compiled.
    """

    def __init__(
        self,
        network: nn.Module,
        precision: Precision = "float32",
        features: Sequence[str] = (),
        compile: bool = False,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        if precision not in get_args(Precision):
            hint = did_you_mean(str(precision), get_args(Precision))
            raise ConfigError(f"teacher.precision={precision!r} is unknown{hint}")
        if precision == "int8-dynamic" and compile:
            raise ConfigError("teacher.precision=int8-dynamic cannot be compiled: set teacher.compile=false")
        if sharded and (precision in ("int8-dynamic", "8bit") or compile):
            key = "compile=true" if compile else f"precision={precision}"
            raise ConfigError(f"teacher.{key}: such weights cannot be shared; set teacher.sharded=false")
        inside = [name for name in features if name != NEXT_LOG_PROB]
        if precision != "float32" or inside or compile or sharded:
            network = copy.deepcopy(unwrap(network))
        if precision == "int8-dynamic":
            network = _quantised(network)
        elif precision == "8bit":
            _in_8_bits(network)
        elif precision in _HALF:
            _cast_once(network, _HALF[precision])
        self.network, self.precision = network.requires_grad_(False), precision
        self.features, self.sharded = tuple(features), sharded
        self._tap = FeatureTap(network, inside)
        if compile:
            network.compile(dynamic=True)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever `mode` is: dropout stays off and BatchNorm keeps its statistics."""
        return super().train(False)

    def to(self, device: torch.device) -> Self:  # type: ignore[override]
        """Move to a device.

        Raises:
            ConfigError: The device cannot compute in the teacher's precision.
        """
        self.check(device)
        return super().to(device)

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the weights over the processes, which must then all call the teacher together.

        A layer's weights are gathered while it computes. The outputs stay the same, bit by bit.
        """
        shard(self.network, mesh)

    def forward(self, batch: Batch) -> ModelOutput:
        """Return the network's output without a graph: float32 logits, features as computed."""
        own = {key.removeprefix(_PREFIX): value for key, value in batch.items() if key.startswith(_PREFIX)}
        keep, batch = batch.get("keep"), own or batch
        device = next(iter(batch.values())).device
        self.check(device)
        with PREDICTING.running(device), torch.inference_mode(), self.autocast(device), self._computing(device):
            output = self._tap(batch)
        # A clone is an ordinary tensor: autograd refuses to save inference tensors for a loss's backward pass.
        features = {name: x.clone() if x.is_inference() else x for name, x in output.features.items()}
        logits = output.logits.to(torch.float32, copy=True)
        if NEXT_LOG_PROB in self.features:
            features[NEXT_LOG_PROB] = self._next_log_probs(logits, batch)
        if keep is not None and "rows" in own:
            moved = logits.new_zeros(*keep.shape, logits.shape[-1])
            moved[keep] = logits[own["rows"]]
            logits = moved
        return ModelOutput(logits, features, output.sparse)

    def _next_log_probs(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the feature `next_log_prob`, 0 at padding.

        Raises:
            ConfigError: The network gives no logits for each token of the text.
        """
        ids = batch.get("input_ids")
        if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape or not logits.shape[-1]:
            raise ConfigError(
                f"the teacher's {NEXT_LOG_PROB} needs all its logits for each token, and it gives "
                f"{tuple(logits.shape)}: use a language model, without teacher.url"
            )
        found = next_log_probs(logits, ids)
        mask = batch.get("attention_mask")
        return found if mask is None else found.masked_fill(mask[..., None] == 0, 0.0)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context in which the network computes in this precision."""
        half = torch.float16 if self.precision == "8bit" else _HALF.get(self.precision)
        # Disabled, it also keeps the student's autocast out.
        return torch.autocast(device.type, half or torch.bfloat16, half is not None)

    @contextmanager
    def _computing(self, device: torch.device) -> Iterator[None]:
        """Name the precision where torch has no kernel for it on this processor, such as of an LSTM in bf16."""
        try:
            yield
        except RuntimeError as error:
            if self.precision == "float32" or "primitive" not in str(error):
                raise
            raise ConfigError(
                f"teacher.precision={self.precision}: this {device.type} cannot compute "
                f"{type(unwrap(self.network)).__name__} so; set teacher.precision=float32"
            ) from error

    def check(self, device: torch.device) -> None:
        """Refuse a device that cannot compute in the teacher's precision.

        Raises:
            ConfigError: Names the precision and those that the device can compute in.
        """
        if self.precision in ("float16", "8bit") and device.type == "cpu":
            raise ConfigError(
                f"teacher.precision={self.precision} needs a GPU; on a CPU use bf16, float32 or int8-dynamic"
            )
        if self.precision == "int8-dynamic" and device.type == "cuda":
            raise ConfigError("teacher.precision=int8-dynamic needs a CPU; on a GPU use bf16 or float16")


def _cast_once(network: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights that autocast would cast at each call in their final precision; the others stay."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dtype == torch.float32:  # a new one: a tied embedding keeps its precision
                    setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def _in_8_bits(network: nn.Module) -> None:
    """Replace linear layers but the output layer, which is registered last, by those of bitsandbytes."""
    try:
        from bitsandbytes.nn import Linear8bitLt
    except ImportError as error:
        raise ConfigError(
            "teacher.precision=8bit needs a GPU and bitsandbytes (pip install bitsandbytes); otherwise use bf16"
        ) from error
    linear = {name: module for name, module in network.named_modules() if type(module) is nn.Linear}
    if len(linear) < 2:
        raise ConfigError(
            f"teacher.precision=8bit: {type(network).__name__} has no linear layers but its last to quantise; use bf16"
        )
    for name in list(linear)[:-1]:
        old, (place, _, own) = linear[name], name.rpartition(".")
        new = Linear8bitLt(old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())  # in 8 bits once it is on a GPU
        setattr(network.get_submodule(place), own, new)


def _quantised(network: nn.Module) -> nn.Module:
    """Return the network with its linear layers in 8 bits."""
    kinds = {type(module) for module in network.modules()}
    if nn.Linear not in kinds or nn.TransformerEncoderLayer in kinds:
        why = "uses nn.TransformerEncoderLayer, which can't be" if nn.Linear in kinds else "has no linear layers to be"
        raise ConfigError(f"teacher.precision=int8-dynamic: {type(network).__name__} {why} quantised; use bf16")
    # torch 2.13 still has this and announces torchao as its successor, which is no dependency of ours.
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised: nn.Module = quantize_dynamic(  # type: ignore[no-untyped-call]
            network, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True
        )
    return quantised
