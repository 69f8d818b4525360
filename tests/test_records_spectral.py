import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

from dfkd_ray.records import operators, spectral
from dfkd_ray.records.operators import layer_operator

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(3, 4, 3),
    "padding": lambda: nn.Conv2d(3, 4, 5, padding=2),
    "stride_with_rest": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "long_stride": lambda: nn.Conv2d(3, 4, 2, stride=3),
    "rectangular": lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "dilation": lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2),
    "groups": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "same": lambda: nn.Conv2d(3, 4, 3, padding="same"),
    "same_of_even_kernel": lambda: nn.Conv2d(3, 4, (4, 2), padding="same", dilation=(1, 3)),
    "valid": lambda: nn.Conv2d(3, 4, 3, padding="valid"),
    "without_bias": lambda: nn.Conv2d(3, 4, 3, bias=False),
}
IN_SHAPE = (3, 10, 9)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def convolution(name, dtype=torch.float64):
    return layer_operator(seeded(CONVOLUTIONS[name]), IN_SHAPE, dtype)


def linear(num_in, num_out, seed=0, dtype=torch.float64):
    return layer_operator(seeded(lambda: nn.Linear(num_in, num_out), seed), (num_in,), dtype)


def small_chain(dtype=torch.float64):
    """Operators of layers 2, 3, 4 and output shapes of layers 1 to 4: 2x6x6 (pooled), 3x4x4 (pooled, flat), 7, 5."""
    second = layer_operator(seeded(lambda: nn.Conv2d(2, 3, 3, padding=1)), (2, 4, 4), dtype)
    rest = [linear(12, 7, 1, dtype), linear(7, 5, 2, dtype)]
    return [second, *rest], [(2, 6, 6), (3, 4, 4), (7,), (5,)]


def adjacency(chain, shapes):
    """The symmetric adjacency of a chain of layers, built block by block from autograd's Jacobians."""
    sizes = [math.prod(shape) for shape in shapes]
    starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    matrix = torch.zeros(starts[-1], starts[-1], dtype=torch.float64)
    for index, operator in enumerate(chain):

        def block(x, operator=operator, shape=shapes[index], index=index):
            x = x.reshape(1, *shape)
            if len(shape) == 3:
                x = F.adaptive_avg_pool2d(x, (4, 4) if index == 0 else (2, 2))
            return operator.forward(x.reshape(1, *operator.in_shape)).flatten()

        jacobian = torch.autograd.functional.jacobian(block, torch.zeros(sizes[index], dtype=torch.float64))
        rows, columns = slice(starts[index + 1], starts[index + 2]), slice(starts[index], starts[index + 1])
        matrix[rows, columns], matrix[columns, rows] = jacobian, jacobian.T
    return matrix


def reconstruction(u, s, v):
    return (u * s) @ v.T


def identity_error(columns):
    columns = columns.double()
    return float((columns.T @ columns - torch.eye(columns.shape[1], dtype=torch.float64)).abs().max())


# Operators


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolutions_operator_is_the_layer_without_its_bias(name):
    layer, operator = seeded(CONVOLUTIONS[name]).double(), convolution(name)
    x = normal(2, *IN_SHAPE)
    assert operator.forward(x).shape == (2, *operator.out_shape)
    torch.testing.assert_close(operator.forward(x), layer(x) - layer(torch.zeros_like(x)))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_adjoint_moves_an_operator_across_an_inner_product(name, dtype, tolerance):
    operator = convolution(name, dtype)
    x, y = normal(4, *operator.in_shape, dtype=dtype), normal(4, *operator.out_shape, seed=1, dtype=dtype)
    ahead, back = operator.forward(x), operator.adjoint(y)
    assert ahead.dtype == back.dtype == dtype and back.shape == x.shape
    torch.testing.assert_close((ahead * y).sum(), (x * back).sum(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shapes", [((4, 7, 5), (4, 3, 2)), ((4, 7, 5), (24,)), ((24,), (4, 3, 2)), ((4, 2, 2), (16,))])
def test_the_adjoint_of_resampling_moves_it_across_an_inner_product(shapes):
    before, after = shapes
    resample = operators.resampler(before, after, torch.float64)
    x, y = normal(4, *before), normal(4, *after, seed=1)
    torch.testing.assert_close((resample.forward(x) * y).sum(), (x * resample.adjoint(y)).sum())


@pytest.mark.parametrize("name", ["padding", "rectangular", "same_of_even_kernel"])
def test_the_matrix_is_the_jacobian_of_the_layer(name, monkeypatch):
    monkeypatch.setattr(operators, "MATRIX_CHUNK", 100)
    layer, operator = seeded(CONVOLUTIONS[name]).double(), convolution(name)
    jacobian = torch.autograd.functional.jacobian(layer, torch.zeros(1, *IN_SHAPE, dtype=torch.float64))
    torch.testing.assert_close(operator.matrix(), jacobian.reshape(operator.num_outputs, operator.num_inputs))


def test_the_matrix_of_a_linear_layer_is_its_weight():
    layer = nn.Linear(7, 5)
    assert torch.equal(layer_operator(layer, (7,)).matrix(), layer.weight)


def test_layers_without_a_spectral_basis_are_refused():
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        layer_operator(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), IN_SHAPE)
    with pytest.raises(ValueError, match="BatchNorm2d has no spectral basis"):
        layer_operator(nn.BatchNorm2d(3), IN_SHAPE)
    with pytest.raises(ValueError, match="3 channels cannot take"):
        layer_operator(nn.Conv2d(3, 4, 3), (4, 10, 10))
    with pytest.raises(ValueError, match="7 features cannot take"):
        layer_operator(nn.Linear(7, 5), (8,))


# Pairs


@pytest.mark.parametrize("rank", [1, 4, 30, 500])
@pytest.mark.parametrize("name", ["linear", "padding", "stride_with_rest", "groups"])
def test_a_pair_basis_equals_the_svd_of_the_matrix(name, rank):
    operator = linear(30, 40) if name == "linear" else convolution(name)
    matrix = operator.matrix()
    expected_u, expected_s, expected_vt = torch.linalg.svd(matrix, full_matrices=False)
    u, s, v = spectral.pair_basis(operator, rank, seed=0)
    kept = min(rank, *matrix.shape)
    assert u.shape == (len(matrix), kept) and v.shape == (matrix.shape[1], kept)
    torch.testing.assert_close(s, expected_s[:kept])
    assert max(identity_error(u), identity_error(v)) < 1e-12
    # Up to the basis of a degenerate subspace, which rank `kept` may cut through: every triplet is one of the matrix.
    torch.testing.assert_close(matrix @ v, u * s)
    torch.testing.assert_close(matrix.T @ u, v * s)
    if name == "linear":
        torch.testing.assert_close(u.abs(), expected_u[:, :kept].abs(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(v.abs(), expected_vt[:kept].T.abs(), rtol=1e-6, atol=1e-6)


def krylov(monkeypatch):
    monkeypatch.setattr(spectral, "DENSE_SIDE", 0)
    monkeypatch.setattr(spectral, "DENSE_UNITS", 0)


@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 2e-4)])
def test_the_krylov_method_equals_the_svd(monkeypatch, transposed, dtype, tolerance):
    krylov(monkeypatch)
    shape = (700, 500) if not transposed else (500, 700)
    operator = linear(*reversed(shape), dtype=dtype)
    u, s, v = spectral.pair_basis(operator, 40, seed=0)
    expected = torch.linalg.svd(operator.matrix().double())
    torch.testing.assert_close(s.double(), expected.S[:40], rtol=1e-4, atol=0)
    assert max(identity_error(u), identity_error(v)) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert spectral.residual(operator, u, s, v) < tolerance
    for found, whole in ((u, expected.U), (v, expected.Vh.T)):
        inside = (whole[:, :44].T @ found.double()).square().sum(dim=0)  # 4 more: the cut may split a cluster
        torch.testing.assert_close(inside, torch.ones_like(inside), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rank", [5, 100, 1000])
def test_the_krylov_method_survives_a_space_that_closes_early(monkeypatch, rank):
    krylov(monkeypatch)
    layer = nn.Linear(150, 120, bias=False).requires_grad_(False)
    layer.weight.copy_(normal(120, 20) @ normal(20, 150, seed=1))
    operator = layer_operator(layer, (150,), torch.float64)
    u, s, v = spectral.pair_basis(operator, rank, seed=0)
    kept = min(rank, 120)
    assert s.shape == (kept,)
    assert max(identity_error(u), identity_error(v)) < 1e-10
    torch.testing.assert_close(s, torch.linalg.svdvals(operator.matrix())[:kept], rtol=1e-6, atol=1e-6 * float(s[0]))


def test_a_cluster_of_equal_singular_values_is_found_whole(monkeypatch):
    krylov(monkeypatch)
    layer = nn.Conv2d(2, 3, 1, bias=False)  # one singular triplet of the 3x2 weight for each of 256 pixels
    operator = layer_operator(layer, (2, 16, 16), torch.float64)
    u, s, v = spectral.pair_basis(operator, 512, seed=0)
    expected = torch.linalg.svdvals(layer.weight.detach().double().flatten(1)).repeat_interleave(256)
    torch.testing.assert_close(s, expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(reconstruction(u, s, v), operator.matrix(), rtol=0, atol=1e-8)


def test_the_krylov_method_captures_a_convolutions_energy(monkeypatch):
    krylov(monkeypatch)
    operator = layer_operator(seeded(lambda: nn.Conv2d(3, 8, 5, padding=2)), (3, 16, 16))
    u, s, v = spectral.pair_basis(operator, 32, seed=0)
    best = torch.linalg.svdvals(operator.matrix().double())[:32].square().sum()
    assert float(s.double().square().sum()) == pytest.approx(float(best), rel=2e-3)
    assert float(operator.rows_forward(v.T).square().sum()) == pytest.approx(float(best), rel=2e-3)
    assert max(identity_error(u), identity_error(v)) < 1e-5


def test_a_krylov_space_that_is_too_small_still_gives_an_orthonormal_basis_of_most_energy(monkeypatch):
    krylov(monkeypatch)
    monkeypatch.setattr(spectral, "DIMENSIONS", 0)
    operator = layer_operator(seeded(lambda: nn.Conv2d(3, 8, 5, padding=2)), (3, 16, 16))
    u, s, v = spectral.pair_basis(operator, 32, seed=0)
    best = torch.linalg.svdvals(operator.matrix().double())[:32].square().sum()
    assert spectral.residual(operator, u, s, v) > 1e-2  # not converged, and `residual` says so
    assert max(identity_error(u), identity_error(v)) < 1e-5
    assert 0.95 < float(s.double().square().sum()) / float(best) < 1


@pytest.mark.parametrize("large", [False, True])
def test_a_basis_is_the_same_every_time_and_its_signs_are_fixed(monkeypatch, large):
    operator = convolution("padding")
    if large:
        krylov(monkeypatch)
    one, other = (spectral.pair_basis(operator, 10, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    u = one[0]
    assert (u.gather(0, u.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_an_operator_of_zeros_has_zero_singular_values(monkeypatch):
    for prepare in (lambda: None, lambda: krylov(monkeypatch)):
        prepare()
        layer = nn.Linear(60, 50)
        nn.init.zeros_(layer.weight)
        u, s, v = spectral.pair_basis(layer_operator(layer, (60,)), 7, seed=0)
        assert not s.any() and max(identity_error(u), identity_error(v)) < 1e-5


# The whole network


@pytest.mark.parametrize("rank", [5, 20, 10_000])
@pytest.mark.parametrize("large", [False, True])
def test_a_graph_basis_holds_the_strongest_eigenpairs_of_the_adjacency(monkeypatch, rank, large):
    chain, shapes = small_chain()
    if large:
        krylov(monkeypatch)
    matrix = adjacency(chain, shapes)
    basis, values = spectral.graph_basis(chain, shapes, rank, seed=0)
    expected = torch.linalg.eigvalsh(matrix).abs().sort(descending=True).values
    assert basis.shape == (len(matrix), min(rank, len(matrix)))
    torch.testing.assert_close(values.abs(), expected[: len(values)], rtol=1e-4, atol=1e-6)
    assert identity_error(basis) < 1e-10
    torch.testing.assert_close(matrix @ basis, basis * values, rtol=0, atol=2e-4 * float(values[0]))


def test_a_large_graph_basis_equals_scipys_lanczos(monkeypatch):
    krylov(monkeypatch)
    chain, shapes = [linear(200, 150), linear(150, 100, 1), linear(100, 60, 2)], [(200,), (150,), (100,), (60,)]
    matrix = adjacency(chain, shapes).numpy()
    # The class makes an instance of one of its own in `__new__`, with other arguments than its `__init__`'s.
    product = cast(Any, LinearOperator)(matrix.shape, matvec=lambda x: matrix @ x, dtype=matrix.dtype)
    expected_values, expected = eigsh(product, k=24, which="LM", v0=normal(510).numpy())
    basis, values = spectral.graph_basis(chain, shapes, 20, seed=0)
    strongest = torch.from_numpy(expected_values).abs().sort(descending=True).values[:20]
    torch.testing.assert_close(values.abs(), strongest, rtol=1e-4, atol=0)
    inside = (torch.from_numpy(expected).T @ basis).square().sum(dim=0)
    torch.testing.assert_close(inside, torch.ones_like(inside), rtol=0, atol=1e-4)


def test_a_two_layer_network_has_the_eigenvectors_of_its_pair():
    operator = linear(12, 9)
    u, s, v = spectral.pair_basis(operator, 9, seed=0)
    basis, values = spectral.graph_basis([operator], [(12,), (9,)], 18, seed=0)
    torch.testing.assert_close(values, torch.stack([s, -s], dim=1).flatten())
    expected = torch.stack([torch.cat([v, u]), torch.cat([v, -u])], dim=2).flatten(1) / 2**0.5
    torch.testing.assert_close((basis * expected).sum(dim=0).abs(), torch.ones(18, dtype=torch.float64))


def test_eigenvalues_come_in_pairs_and_an_odd_rank_cuts_the_last():
    chain, shapes = small_chain()
    _, values = spectral.graph_basis(chain, shapes, 7, seed=0)
    torch.testing.assert_close(values[1::2], -values[0:6:2])
    assert (values[::2] > 0).all() and (values[::2].diff() <= 0).all()


def test_a_rank_beyond_the_nonzero_eigenvalues_of_a_large_graph_gives_those(monkeypatch):
    krylov(monkeypatch)
    operator = linear(40, 9)
    assert spectral.graph_basis([operator], [(40,), (9,)], 30, seed=0)[0].shape == (49, 18)


def test_networks_that_are_no_chain_are_refused():
    chain, shapes = small_chain()
    with pytest.raises(ValueError, match="an operator for each but the first"):
        spectral.graph_basis(chain[1:], shapes, 5, seed=0)
    with pytest.raises(ValueError, match=r"outputs of shape \(3, 4, 4\)"):
        spectral.graph_basis(chain, [shapes[0], (3, 5, 5), *shapes[2:]], 5, seed=0)
    for wrong in ((3, 6, 6), (72,)):
        with pytest.raises(ValueError, match="do not lead to inputs"):
            spectral.graph_basis(chain, [wrong, *shapes[1:]], 5, seed=0)
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"rank of a basis is {rank}"):
            spectral.graph_basis(chain, shapes, rank, seed=0)


# Coefficients


def test_a_signal_comes_back_from_all_coefficients_of_a_complete_basis():
    chain, shapes = small_chain()
    num_units = sum(math.prod(shape) for shape in shapes)
    basis, _ = spectral.graph_basis(chain, shapes, num_units, seed=0)
    signal = normal(6, num_units)
    found = spectral.coefficients(signal, basis)
    torch.testing.assert_close(spectral.signal_of(spectral.truncated(found, num_units), basis), signal)
    kept = spectral.strongest(found.square().mean(dim=0), num_units)
    torch.testing.assert_close(spectral.signal_of(found[:, kept], basis[:, kept]), signal)


def test_more_coefficients_are_closer_to_the_signal_and_fewer_have_the_energy_they_keep():
    chain, shapes = small_chain()
    basis, _ = spectral.graph_basis(chain, shapes, 1000, seed=0)
    signal = normal(6, len(basis))
    found = spectral.coefficients(signal, basis)
    errors = []
    for num in (1, 12, 60, 120):
        part = spectral.truncated(found, num)
        errors.append((spectral.signal_of(part, basis) - signal).square().sum(dim=1))
        torch.testing.assert_close(errors[-1], signal.square().sum(dim=1) - part.square().sum(dim=1))
    assert (torch.stack(errors).diff(dim=0) < 0).all()


def test_an_incomplete_basis_gives_the_projection():
    basis = torch.linalg.qr(normal(10, 4)).Q
    signal = normal(3, 10, seed=1)
    once = spectral.signal_of(spectral.coefficients(signal, basis), basis)
    torch.testing.assert_close(spectral.signal_of(spectral.coefficients(once, basis), basis), once)
    torch.testing.assert_close((signal - once) @ basis, torch.zeros(3, 4, dtype=torch.float64))


def test_truncation_keeps_each_rows_largest_magnitudes():
    rows = torch.tensor([[1.0, -5.0, 2.0, 0.5], [-4.0, 0.0, 3.0, 3.5]])
    expected = torch.tensor([[0.0, -5.0, 2.0, 0.0], [-4.0, 0.0, 0.0, 3.5]])
    assert torch.equal(spectral.truncated(rows, 2), expected)


def test_the_strongest_coefficients_come_in_ascending_order_and_ties_go_to_the_first():
    assert spectral.strongest(torch.tensor([1.0, 9.0, 4.0, 4.0, 0.0]), 2).tolist() == [1, 2]
    assert spectral.strongest(torch.tensor([3.0, 1.0, 2.0]), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("num", [0, 5])
def test_a_share_of_the_coefficients_that_does_not_exist_is_refused(num):
    with pytest.raises(ValueError, match=f"cannot keep {num} of 4"):
        spectral.truncated(torch.ones(2, 4), num)
    with pytest.raises(ValueError, match=f"cannot keep {num} of 4"):
        spectral.strongest(torch.ones(4), num)
