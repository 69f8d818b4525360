"""The size of a Gaussian record: factors in float16, and their ranks chosen by explained variance within a limit.

A factor's columns are put in the order of their length, so that the first r are the best factor of rank r. Columns are
taken in the order of the share of their layer's variance that they explain for each byte, until the limit is reached.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

MAX_BYTES = 32_000_000  # of one record; README.md beside this module has what smaller ones cost in accuracy
HEADER = 2**16  # reserved for the header of the file
MAX_ROUNDING = 1e-3  # of float16, relative to the factor's norm; a factor with values out of its range stays float32
# The factor of a spectral record's coefficients has at least this share of its columns when coefficients are left out.
LEAST_RANK = 0.25


def part_bytes(num_classes: int, num_units: int, rank: int) -> int:
    """Bytes of the float32 means and the float16 factors of a part."""
    return num_classes * num_units * (4 + 2 * rank)


def stored(factor: Float[Tensor, "classes d r"]) -> Float[Tensor, "classes d r"]:
    """The factor as float16 or, where that rounds too much (values out of its range), as float32."""
    half = factor.half()
    close = (half.to(factor.dtype) - factor).norm() <= MAX_ROUNDING * factor.norm()  # false for infinity
    return half if bool(close) else factor.float()


def cut(
    factors: dict[str, Float64[Tensor, "classes d r"]], max_bytes: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Factors in storage types with at most `max_bytes` together, each with one column or more.

    Also returns, for each factor that lost columns, the share of its variance that is left: the mean over classes of
    ||first r columns||^2 / ||factor||^2.
    """
    found = {name: stored(factor) for name, factor in factors.items()}
    if sum(factor.nbytes for factor in found.values()) <= max_bytes:
        return found, {}
    ordered = {name: principal(factor) for name, factor in factors.items()}
    shares = {name: explained(factor) for name, factor in ordered.items()}
    column_bytes = {name: factor[:, :, :1].nbytes for name, factor in found.items()}
    ranks = dict.fromkeys(factors, 1)
    left = max_bytes - sum(column_bytes.values())
    rated = [
        (float(share) / column_bytes[name], name) for name, own in shares.items() for share in own[1:] if share > 0
    ]
    full: set[str] = set()
    for _, name in sorted(rated, reverse=True):
        if name not in full and column_bytes[name] <= left:
            ranks[name] += 1
            left -= column_bytes[name]
        else:
            full.add(name)  # its later columns explain less
    lost = [name for name, factor in factors.items() if ranks[name] < factor.shape[2]]
    cuts = {name: ordered[name][:, :, : ranks[name]].to(found[name].dtype).contiguous() for name in lost}
    return found | cuts, {name: float(shares[name][: ranks[name]].sum()) for name in lost}


def principal(factor: Float64[Tensor, "classes d r"]) -> Float64[Tensor, "classes d r"]:
    """The same covariances F F^T, with orthogonal columns by decreasing length."""
    return torch.stack([own @ torch.linalg.eigh(own.T @ own)[1].flip(1) for own in factor])


def explained(factor: Float64[Tensor, "classes d r"]) -> Float64[Tensor, " r"]:
    """The share of the variance that each column explains, as a mean over the classes that have variance."""
    energy = factor.square().sum(dim=1)
    varied = energy[energy.sum(dim=1) > 0]
    if not len(varied):
        return torch.zeros(factor.shape[2], dtype=factor.dtype)
    return (varied / varied.sum(dim=1, keepdim=True)).mean(dim=0)


def num_coefficients(column_bytes: Int64[Tensor, " k"], num_classes: int, max_bytes: int) -> int:
    """How many coefficients fit, in the given order, each with the bytes of its column of a basis.

    At least `LEAST_RANK` of the factor's columns must fit beside them.
    """
    count = torch.arange(1, len(column_bytes) + 1)
    rank = (LEAST_RANK * count).ceil().long()
    fits = column_bytes.cumsum(0) + num_classes * count * (4 + 2 * rank) <= max_bytes
    return max(1, int(fits.sum()))
