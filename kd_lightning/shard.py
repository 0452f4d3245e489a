"""Weights in shards, one a process, put together layer by layer while they are used (torch's FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(module: nn.Module, mesh: DeviceMesh, networks: tuple[nn.Module, ...], methods: tuple[str, ...] = ()) -> None:
    """Shard a module's weights in place, unless they are: those of each layer together, and then the rest.

    Args:
        module: Gets `DTensor`s as parameters.
        mesh: The processes to share them.
        networks: Parts of the module whose layers, the members of their outermost `nn.ModuleList`s, are units of their
            own.
        methods: Methods of the module, other than its forward, that use the weights.
    """
    if isinstance(module, FSDPModule):
        return
    for network in networks:
        for layer in _layers(network):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(module, method)


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if any(True for _ in layer.parameters()))
        else:
            yield from _layers(child)


def full(value: Any) -> Any:
    """Return a tensor of all shards together, any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
