"""Weights in shards, one per process, gathered layer by layer while in use (torch's FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(network: nn.Module, mesh: DeviceMesh, together: bool = False) -> None:
    """Shard a network's weights in place, unless they are sharded: layer by layer, then the rest.

    Layers are the members of its outermost `nn.ModuleList`s.

    Args:
        network: Gets `DTensor`s as parameters.
        mesh: The processes to share them.
        together: Whether the rest stays gathered from the forward pass to the backward pass, for code outside of the
            network that uses its weights (a loss on the classifier's).
    """
    if isinstance(network, FSDPModule):
        return
    for layer in _layers(network):
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=not together)


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if not isinstance(layer, FSDPModule) and _has_weights(layer))
        elif not isinstance(child, FSDPModule):
            yield from _layers(child)


def _has_weights(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def full(value: Any) -> Any:
    """Gather a sharded tensor; return any other unchanged."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
