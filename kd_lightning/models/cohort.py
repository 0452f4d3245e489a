"""Several students that train side by side and learn from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network
from kd_lightning.types import Batch


class Cohort(nn.Module):
    """Peers that read the same batch, for deep mutual learning (`kd_lightning.losses.deep_mutual`).

    Its logits are the first peer's, which is *the* student: only it is selected on validation, saved and reported.
    All peers' logits are the feature `peers`, `(B, K, C)` or `(B, K, L, V)`.

    Args:
        networks: The peers, the student first.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.peers = Peers(networks)

    def forward(self, **batch: Tensor) -> Tensor:
        """Run every peer and return the first one's logits."""
        logits: Tensor = self.peers(batch)
        return logits[:, 0]


def joined(student: nn.Module, peers: Sequence[nn.Module]) -> nn.Module:
    """Return the student of a cohort, or the network itself."""
    return Cohort([student, *peers]) if peers else student


class Peers(nn.ModuleList):
    """The peers as one module, so that a tap can capture all their logits."""

    def forward(self, batch: Batch) -> Tensor:
        """Return the peers' logits, stacked on axis 1."""
        return torch.stack([run_network(network, batch).logits for network in self], dim=1)
