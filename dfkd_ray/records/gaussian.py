"""Sampling from a record's Gaussians: x = mean + L z with L L^T = covariance and z ~ N(0, 1).

L is a Cholesky factor, or a factor of low rank. It is never the covariance itself: the samples would have
the covariance's square.
"""

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

SHRINKAGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def cholesky(covariance: Float[Tensor, "d d"]) -> tuple[Float64[Tensor, "d d"], float]:
    """Lower-triangular L with L L^T = (1 - a) C + a (tr C / d) I, and a: the first of `SHRINKAGES` that succeeds.

    a is in [0, 1]; 0 means that the covariance was used unchanged. A matrix counts as singular if some unit's variance,
    given the units before it, is below the rounding error of its own variance (d times the epsilon of `covariance`'s
    dtype). An all-zero covariance gives zeros and a = 0.
    Source: Ledoit, Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices" (the target).
    """
    matrix = _checked(covariance)
    size = len(matrix)
    variances = matrix.diagonal()
    if not matrix.any():
        return matrix, 0.0
    tolerance = size * torch.finfo(covariance.dtype).eps
    for shrinkage in SHRINKAGES:
        shrunk = (1 - shrinkage) * matrix
        shrunk.diagonal().add_(shrinkage * variances.mean())
        factor, info = torch.linalg.cholesky_ex(shrunk)
        if info == 0 and bool((factor.diagonal().square() > tolerance * shrunk.diagonal()).all()):
            return factor, shrinkage
    raise AssertionError("a positive multiple of the identity has a Cholesky factor")


def sample(
    mean: Float[Tensor, " d"], factor: Float[Tensor, "d r"], num: int, generator: torch.Generator
) -> Float32[Tensor, "{num} d"]:
    """`num` independent samples of N(mean, factor factor^T), as rows, in the units of the mean."""
    z = torch.randn(num, factor.shape[1], dtype=factor.dtype, generator=generator, device=generator.device)
    return (mean + z @ factor.T).float()


def _checked(covariance: Tensor) -> Tensor:
    """A symmetric float64 copy."""
    matrix = covariance.double()
    if not matrix.isfinite().all():
        raise ValueError(
            f"{int((~matrix.isfinite()).sum())} of {matrix.numel()} entries of the covariance are NaN or infinite: "
            "the record is damaged; fit it again"
        )
    largest = float(matrix.diagonal().max())
    asymmetry = float((matrix - matrix.T).abs().max())
    if float(matrix.diagonal().min()) < 0 or asymmetry > 1e-5 * largest:
        raise ValueError(
            f"not a covariance: smallest variance {float(matrix.diagonal().min()):.3g}, largest {largest:.3g}, "
            f"largest asymmetry {asymmetry:.3g}; expected a symmetric matrix with variances of at least 0"
        )
    return (matrix + matrix.T) / 2
