"""Spectral bases of a layer pair and of a whole network, and coefficients of activations in them.

The directed graph of a feed-forward network is nilpotent and has no useful eigenvectors, so the graph is made
symmetric: for one pair of layers that is [[0, W^T], [W, 0]], whose eigenpairs are +-s with [v; +-u] / sqrt 2 from the
singular triplets u, s, v of W. A chain of layers is bipartite too (layers 1, 3, ... against layers 2, 4, ...), so both
bases are one truncated SVD.

Large operators are never built: a randomised block Krylov method with full reorthogonalisation multiplies blocks of
vectors. The singular values of convolutions form dense clusters. At rank 256, AlexNet's first two convolutions keep a
residual of 3e-2 s_1 in 1,024 dimensions (random weights). The span of the vectors matters, not the single vectors.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dfkd_ray.records.operators import Operator, chain_graph

Product = Callable[[Tensor], Tensor]

DENSE_SIDE = 512  # an operator with a side of at most this, and at most DENSE_ENTRIES entries, is built and decomposed
DENSE_ENTRIES = 2**22
DENSE_UNITS = 1024  # graphs of at most this many units likewise
CHECKED = 128  # dimensions between two checks of the convergence
BLOCK = 16  # vectors multiplied at a time: more run faster, fewer converge further in as many dimensions
DIMENSIONS = 1024  # it takes up to this many, or DEPTH x rank where that is more
DEPTH = 4
TOLERANCE = 1e-4  # it stops at ||A^T u - s v|| <= TOLERANCE s_1 for every triplet kept
ROWS = 8192  # of float64 copied at a time
SMALL = 1e-2  # triplets below this share of s_1 are judged less strictly


def pair_basis(
    operator: Operator, rank: int, seed: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "n r"]]:
    """U, s, V of the `rank` largest singular triplets, A ~ U diag(s) V^T, or all min(m, n) where there are fewer.

    Orthonormal columns, s from the largest, the largest-magnitude entry of each u positive, in the operator's
    precision. Small operators are decomposed in float64; for large ones `seed` draws the start (`residual` says how
    far they converged).
    """
    _require_rank(rank)
    sides = operator.num_outputs, operator.num_inputs
    if min(sides) <= DENSE_SIDE and sides[0] * sides[1] <= DENSE_ENTRIES:
        u, s, vt = torch.linalg.svd(operator.matrix().double(), full_matrices=False)
        u, s, v = (part[..., :rank].to(operator.dtype) for part in (u, s, vt.T))
    else:
        u, s, v = _truncated_svd(operator, min(rank, *sides), seed)
    signs = _signs(u)
    return u * signs, s, v * signs


def graph_basis(
    operators: list[Operator], shapes: list[tuple[int, ...]], rank: int, seed: int
) -> tuple[Float[Tensor, "units r"], Float[Tensor, " r"]]:
    """Eigenvectors (columns) and eigenvalues of largest magnitude of a whole network's symmetric adjacency.

    The nodes are the units of all layers' outputs (`shapes`), in order; `operators` are those of layers 2, 3, ...
    (the first layer's leads from pixels, which are no activations). Eigenvalues come in pairs s, -s, by decreasing s,
    then zeros. A `rank` of the number of units or more gives the complete basis; a smaller one gives no more than the
    2 min(side) eigenvalues that can differ from zero, where side is the units of every other layer.
    """
    _require_rank(rank)
    graph = chain_graph(operators, shapes)
    halves, num_units = graph.halves, graph.num_units
    if num_units <= DENSE_UNITS or rank >= num_units:
        u, s, vt = torch.linalg.svd(halves.matrix().double(), full_matrices=True)
        v = vt.T
    else:
        u, s, v = _truncated_svd(halves, min((rank + 1) // 2, halves.num_inputs, halves.num_outputs), seed)
    pairs = len(s)
    basis = torch.zeros(num_units, u.shape[1] + v.shape[1], dtype=u.dtype)
    basis[~graph.odd, : 2 * pairs] = u[:, :pairs].repeat_interleave(2, dim=1) / 2**0.5
    basis[graph.odd, : 2 * pairs] = v[:, :pairs].repeat_interleave(2, dim=1) / 2**0.5
    basis[graph.odd, 1 : 2 * pairs : 2] *= -1
    # Beyond the pairs: the null space of either side (in a complete basis one of them has vectors left).
    rest = u.shape[1] - pairs
    basis[~graph.odd, 2 * pairs : 2 * pairs + rest] = u[:, pairs:]
    basis[graph.odd, 2 * pairs + rest :] = v[:, pairs:]
    values = torch.cat([torch.stack([s, -s], dim=1).flatten(), s.new_zeros(basis.shape[1] - 2 * pairs)])
    return oriented(basis[:, :rank]).to(halves.dtype), values[:rank].to(halves.dtype)


def residual(operator: Operator, u: Float[Tensor, "m r"], s: Float[Tensor, " r"], v: Float[Tensor, "n r"]) -> float:
    """The larger of max_i ||A v_i - s_i u_i|| and max_i ||A^T u_i - s_i v_i||, over s_1: 0 for exact triplets."""
    largest = 0.0
    for columns in torch.arange(len(s)).split(BLOCK):
        forward = operator.rows_forward(v[:, columns].T) - s[columns, None] * u[:, columns].T
        adjoint = operator.rows_adjoint(u[:, columns].T) - s[columns, None] * v[:, columns].T
        largest = max(largest, float(forward.norm(dim=1).max()), float(adjoint.norm(dim=1).max()))
    return largest / float(s[0]) if largest else 0.0


def coefficients(signal: Float[Tensor, "n units"], basis: Float[Tensor, "units r"]) -> Float[Tensor, "n r"]:
    """The graph Fourier transform: each row's inner products with the basis vectors, in the signal's units."""
    return signal @ basis


def signal_of(coefficients: Float[Tensor, "n r"], basis: Float[Tensor, "units r"]) -> Float[Tensor, "n units"]:
    """The inverse transform: the signal itself for a complete basis, else its projection on the basis."""
    return coefficients @ basis.T


def strongest(energy: Float[Tensor, " r"], num: int) -> Int64[Tensor, " {num}"]:
    """Ascending indices of the `num` coefficients with the largest energy (mean square); ties go to the first."""
    _require_share(num, len(energy))
    return energy.argsort(descending=True, stable=True)[:num].sort().values


def truncated(coefficients: Float[Tensor, "n r"], num: int) -> Float[Tensor, "n r"]:
    """Each row with its `num` coefficients of largest magnitude kept and the others zero."""
    _require_share(num, coefficients.shape[1])
    kept = coefficients.abs().topk(num, dim=1).indices
    return torch.zeros_like(coefficients).scatter(1, kept, coefficients.gather(1, kept))


def oriented(vectors: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    """Columns with signs such that the entry of largest magnitude is positive: a basis is the same every time."""
    return vectors * _signs(vectors)


def _signs(vectors: Tensor) -> Tensor:
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def _require_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"the rank of a basis is {rank}: give 1 or more")


def _require_share(num: int, total: int) -> None:
    if not 1 <= num <= total:
        raise ValueError(f"cannot keep {num} of {total} coefficients: give 1 to {total}")


def _truncated_svd(operator: Operator, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets (m x r, r, n x r), by a Krylov space of the smaller side."""
    narrow = operator.num_inputs <= operator.num_outputs
    there, back = operator.rows_forward, operator.rows_adjoint
    if not narrow:
        there, back = back, there
    space = _krylov_vectors(there, back, min(operator.num_inputs, operator.num_outputs), rank, seed, operator.dtype)
    image = torch.cat([there(rows) for rows in space.split(BLOCK)])
    orthonormal, triangle = torch.linalg.qr(image.T)
    left, s, right = torch.linalg.svd(triangle.double())
    far = _polished(orthonormal @ left.to(operator.dtype))
    near = _polished(space.T @ right.T.to(operator.dtype))
    return (far, s.to(operator.dtype), near) if narrow else (near, s.to(operator.dtype), far)


def _krylov_vectors(
    there: Product, back: Product, size: int, rank: int, seed: int, dtype: torch.dtype
) -> Float[Tensor, "{rank} {size}"]:
    """Orthonormal Ritz vectors (rows) of the `rank` largest eigenvalues of G = A^T A, from a block Krylov space.

    The space grows by BLOCK vectors at a time, G times the last block made orthogonal to all before it, until the
    Ritz pairs have converged or it has its largest size. Source: Musco, Musco 2015, "Randomized block Krylov methods
    for stronger and faster approximate singular value decomposition", algorithm 2, with orthogonalisation block by
    block (block Lanczos) in place of one QR at the end, which loses the space to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = min(size, max(DIMENSIONS, DEPTH * rank))
    space = torch.empty(limit, size, dtype=dtype)
    gram = torch.zeros(limit, limit, dtype=torch.float64)
    block = torch.randn(min(BLOCK, limit), size, dtype=dtype, generator=generator)
    block = torch.linalg.qr(block.T)[0].T
    used = 0
    while True:
        start, used = used, used + len(block)
        space[start:used] = block
        image = back(there(block))
        products = space[:used] @ image.T
        image -= products.T @ space[:used]
        gram[:used, start:used] = products.double()
        gram[start:used, :used] = products.T.double()
        following, remainder = torch.linalg.qr(image.T)
        if used == limit or (used >= rank and used // CHECKED > start // CHECKED):
            vectors, errors = _ritz(gram[:used, :used], rank, remainder)
            if used == limit or errors <= TOLERANCE:
                return vectors.T.to(dtype) @ space[:used]
        block = _new_directions(following.T[: limit - used], space[:used])


def _new_directions(block: Tensor, space: Tensor) -> Tensor:
    """Orthonormal rows from `block`, orthogonal to the rows of `space`.

    Projections are subtracted until nothing is left to subtract. If the operator maps the last block into the space
    itself, the block is mostly rounding error, and a fixed number of repetitions is not enough.
    """
    for _ in range(10):
        rows, triangle = torch.linalg.qr((block - (block @ space.T) @ space).T)
        block = rows.T
        if bool((triangle.diagonal().abs() > 0.5).all()):
            break
    return block


def _ritz(gram: Tensor, rank: int, remainder: Tensor) -> tuple[Tensor, float]:
    """Coordinates of the `rank` largest Ritz vectors, and their largest ||G v - s^2 v|| / (s s_1)."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    scales = values.clamp(min=0).sqrt()
    errors = (remainder.double() @ vectors[-len(remainder) :]).norm(dim=0)
    # A triplet with a tiny s is judged as if s were SMALL s_1: its u comes from a QR, not from a division by s.
    errors = errors / (scales.clamp(min=SMALL * float(scales[0])) * scales[0])
    return vectors, float(errors.nan_to_num().max())


def _polished(vectors: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    """Nearly orthonormal columns made orthonormal: one Newton-Schulz step, V (3 - V^T V) / 2.

    A float32 QR of 10^5 rows leaves errors of 1e-5; inner products in float64, some rows at a time, undo them.
    """
    gram = sum(chunk.double().T @ chunk.double() for chunk in vectors.split(ROWS))
    assert isinstance(gram, Tensor)
    correction = (3 * torch.eye(len(gram), dtype=torch.float64) - gram) / 2
    return torch.cat([(chunk.double() @ correction).to(vectors.dtype) for chunk in vectors.split(ROWS)])
