"""Fréchet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): the one computation behind FID.

With covariances S = R^T R the last trace is the nuclear norm (sum of singular values) of R1 R2^T. R may be the
symmetric root of a covariance, or centred features over (N - 1)^(1/2): no product of covariances is needed, and few
samples of many features are cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """mean `(F,)` and the symmetric root `(F, F)` of the covariance, float64."""

    mean: Tensor
    root: Tensor

    @classmethod
    def of_moments(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """From mean `(F,)` and covariance `(F, F)`."""
        eigenvalues, axes = torch.linalg.eigh(covariance.double())
        return cls(mean.double(), axes * eigenvalues.clamp_min(0).sqrt() @ axes.T)

    @classmethod
    def of_features(cls, features: Tensor) -> Gaussian:
        """Fitted to features `(N, F)`, at least two."""
        features = features.double()
        return cls.of_moments(features.mean(dim=0), torch.cov(features.T))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance of two Gaussians.

    Raises:
        ValueError: if they have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared")
    return float(_distance(a.mean - b.mean, a.root, b.root, a.root @ b.root))


def frechet_of_features(x: Tensor, real: Gaussian, weights: Tensor | None = None) -> Tensor:
    """Fréchet distance of a Gaussian fitted to features `x` `(N, F)` to that of real ones.

    Args:
        weights: `(R, N)`, how often each sample counts; for `resampled`.

    Returns:
        `()`, or `(R,)` with weights; float64.
    """
    x, n = x.double(), len(x)
    projected, found = x @ real.root, []
    for w in torch.ones(1, n, dtype=x.dtype) if weights is None else weights:
        share, scale = w.to(x.device) / n, (w.to(x.device) / (n - 1)).sqrt()[:, None]
        mean = share @ x
        found.append(
            _distance(mean - real.mean, scale * (x - mean), real.root, scale * (projected - share @ projected))
        )
    return found[0] if weights is None else torch.stack(found)


def _distance(gap: Tensor, a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """From the means' difference `(F,)`, roots a `(N, F)` and b `(M, F)` of the covariances, and a b^T."""
    return gap.square().sum() + a.square().sum() + b.square().sum() - 2 * _nuclear_norm(product)


def _nuclear_norm(matrix: Tensor) -> Tensor:
    N, M = matrix.shape
    if max(N, M) < 2 * min(N, M):
        return torch.linalg.svdvals(matrix).sum()
    # a long one by its small Gram matrix: much cheaper, and less accurate only in singular values near zero
    gram = matrix @ matrix.T if N < M else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
