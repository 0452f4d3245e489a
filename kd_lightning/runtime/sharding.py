"""Weights in shards, one a process, put together layer by layer while they are used (torch's FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(network: nn.Module, mesh: DeviceMesh, together: bool = False) -> None:
    """Shard a network's weights in place, unless they are: those of each layer together, and then the rest.

    Layers are the members of its outermost `nn.ModuleList`s.

    Args:
        network: Gets `DTensor`s as parameters.
        mesh: The processes to share them.
        together: Whether the rest stays together from the forward pass to the backward pass, where others than the
            network read weights of it (a loss that reads the classifier's).
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
    """Return a tensor of all shards together, any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
