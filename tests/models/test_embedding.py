from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.models.embedding import FactorizedEmbedding, principal_components


def test_approximation_is_numpys_truncated_svd() -> None:
    torch.manual_seed(0)
    weight = torch.randn(30, 8)
    embedding = FactorizedEmbedding(30, 3, 8, padding_idx=0)
    kept = embedding.approximate(weight)
    u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(embedding(torch.arange(30)).detach(), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    assert kept == pytest.approx((s[:3] ** 2).sum() / (s**2).sum())


def test_full_rank_is_exact_and_rank_deficient_tables_are_fine() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 2) @ torch.randn(2, 6)
    embedding = FactorizedEmbedding(20, 4, 6)
    assert embedding.approximate(weight) == pytest.approx(1.0)
    torch.testing.assert_close(embedding(torch.arange(20)), weight, atol=1e-5, rtol=1e-4)


def test_fresh_factorised_embedding_has_the_asked_spread_and_shape() -> None:
    torch.manual_seed(0)
    embedding = FactorizedEmbedding(2000, 64, 128, std=0.02)
    rows = embedding(torch.arange(2000).view(20, 100))
    assert rows.shape == (20, 100, 128)
    assert float(rows.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_principal_components_keep_the_variance_of_numpys() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 6) @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1, 0.1])) + 40.0
    reduced = principal_components(weight, 3, rms=0.1).double().numpy()
    centred = weight.double().numpy() - weight.double().numpy().mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    expected = u[:, :3] * s[:3]
    expected *= 0.1 / np.sqrt((expected**2).mean())
    np.testing.assert_allclose(np.abs(reduced), np.abs(expected), atol=1e-6)
    assert np.sqrt((reduced**2).mean()) == pytest.approx(0.1, rel=1e-5)


def test_principal_components_do_not_depend_on_an_eigenvectors_sign() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 5)
    torch.testing.assert_close(
        principal_components(weight, 2, 1.0), principal_components(weight.flip(0), 2, 1.0).flip(0)
    )
