"""Word embeddings made small: a factorised table, and principal components of a teacher's table."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FactorizedEmbedding(nn.Module):
    r"""An embedding table of rank r: `E[token] = P a[token]`, with `a` (V, r) and `P` (H, r), no bias.

    V (r) + r H parameters instead of V H: for V = 30,522, H = 384 and r = 64 that is 2.0M instead of 11.7M
    (Lan et al. 2019, ALBERT, arXiv 1909.11942).

    Args:
        num_embeddings: Vocabulary size V.
        rank: r, at most H.
        embedding_dim: Width H of what comes out.
        padding_idx: Token whose row gets no gradient.
        std: Standard deviation of the embeddings after initialisation (BERT's is 0.02).

    Shape: `(*)` int64 -> `(*, H)`.
    """

    VERSION = 1

    def __init__(
        self, num_embeddings: int, rank: int, embedding_dim: int, padding_idx: int | None = None, std: float = 0.02
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(num_embeddings, rank, padding_idx=padding_idx)
        self.projection = nn.Linear(rank, embedding_dim, bias=False)
        self.num_embeddings, self.rank, self.embedding_dim = num_embeddings, rank, embedding_dim
        nn.init.normal_(self.table.weight, std=std)
        nn.init.normal_(self.projection.weight, std=rank**-0.5)  # a sum of r products: keeps std on average

    def forward(self, tokens: Tensor) -> Tensor:
        """Look the tokens up: `(*)` -> `(*, H)`."""
        embedded: Tensor = self.projection(self.table(tokens))
        return embedded

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> float:
        """Become the best rank-r approximation of a full table, by truncated singular value decomposition.

        With `W = U S V^T`, the table becomes `U_r S_r` and the projection `V_r`: of all products of rank r this one
        has the smallest Frobenius error, `sum_{i>r} s_i^2` (Eckart & Young 1936).

        Args:
            weight: The full table, `(V, H)`.

        Returns:
            The share of the table's squared norm that is kept, 0 to 1.
        """
        rows = weight.detach().double().cpu()
        directions, kept = _principal_directions(rows, self.rank)
        self.table.weight.copy_(rows @ directions)
        self.projection.weight.copy_(directions)
        return kept


def principal_components(weight: Tensor, size: int, rms: float) -> Tensor:
    """Reduce an embedding table to its leading principal components.

    Rows are centred on the mean row (a teacher's embeddings share a large common offset, which would otherwise eat
    the first component), projected on the `size` directions of largest variance, and scaled by one common factor so
    that their root mean square is `rms`. Distances between words are thus kept as well as a linear map can, up to
    that factor. Computed on the CPU in float64 from the (H, H) covariance: well under a second for 30,522 x 384.

    Args:
        weight: Full table `(V, H)`.
        size: Width of the result, at most H.
        rms: Root mean square of the result's entries.

    Returns:
        `(V, size)` float32.
    """
    rows = weight.detach().double().cpu()
    rows = rows - rows.mean(0)
    directions, _ = _principal_directions(rows, size)
    reduced = rows @ directions
    reduced = reduced * (rms / reduced.square().mean().sqrt().clamp_min(1e-12))
    return reduced.float()


def _principal_directions(rows: Tensor, count: int) -> tuple[Tensor, float]:
    """Return the leading right singular vectors `(H, count)` and their share of the squared norm."""
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)[:, :count]
    share = float(values[:count].sum() / values.sum().clamp_min(1e-30))
    # An eigenvector's sign is arbitrary and differs between BLAS builds: make its largest entry positive.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return vectors * signs, share
