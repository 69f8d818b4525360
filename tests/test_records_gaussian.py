import math

import pytest
import torch

from dfkd_ray.records import gaussian

NUM = 40_000


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance_of(units, examples=1000, seed=0):
    """The covariance of some correlated examples, with variances from 0.01 to 100."""
    x = normal(examples, units, seed=seed) @ normal(units, units, seed=seed + 1) * torch.logspace(-1, 1, units)
    return x.T.cov()


def worst_errors(samples, mean, covariance):
    """Largest errors of a sample's mean and covariance, in standard errors of n Gaussian samples.

    Variance of the mean: C_ii / n; of the covariance: (C_ij^2 + C_ii C_jj) / n.
    """
    samples, variances = samples.double(), covariance.diagonal()
    mean_error = (samples.mean(dim=0) - mean).abs() / (variances / len(samples)).sqrt()
    spread = ((covariance.square() + torch.outer(variances, variances)) / len(samples)).sqrt()
    return float(mean_error.max()), float(((samples.T.cov() - covariance).abs() / spread).max())


def drawn(mean, factor, seed=0):
    return gaussian.sample(mean, factor, NUM, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_samples_have_the_records_moments(seed):
    mean, covariance = normal(8, seed=7), covariance_of(8, seed=seed)
    factor, shrinkage = gaussian.cholesky(covariance)
    assert shrinkage == 0
    assert max(worst_errors(drawn(mean, factor, seed), mean, covariance)) < 5


def test_sampling_with_the_covariance_in_place_of_its_factor_would_be_noticed():
    mean, covariance = normal(8, seed=7), covariance_of(8)
    assert worst_errors(drawn(mean, covariance), mean, covariance)[1] > 100
    deviations = drawn(torch.zeros(2), gaussian.cholesky(torch.diag(torch.tensor([100.0, 0.01])))[0].float()).std(dim=0)
    torch.testing.assert_close(deviations, torch.tensor([10.0, 0.1]), rtol=5 / math.sqrt(2 * NUM), atol=0)


def test_a_factor_of_low_rank_gives_its_covariance():
    mean, factor = normal(8, seed=7), normal(8, 3)
    assert max(worst_errors(drawn(mean, factor), mean, factor @ factor.T)) < 5


def test_samples_are_float32_and_follow_the_generator():
    mean, factor = normal(5), normal(5, 2)
    assert drawn(mean, factor).dtype == torch.float32
    assert torch.equal(drawn(mean, factor), drawn(mean, factor))
    assert not torch.equal(drawn(mean, factor), drawn(mean, factor, seed=1))


def test_a_regular_covariance_has_its_cholesky_factor_unshrunk():
    covariance = covariance_of(30)
    factor, shrinkage = gaussian.cholesky(covariance)
    assert shrinkage == 0
    torch.testing.assert_close(factor @ factor.T, covariance)
    assert torch.equal(factor, factor.tril())


def test_variances_of_very_different_size_are_no_reason_to_shrink():
    assert gaussian.cholesky(torch.diag(torch.logspace(-20, 20, 9, dtype=torch.float64)))[1] == 0


SINGULAR = {
    "fewer_examples_than_units": lambda: covariance_of(30, examples=12),
    "as_many_examples_as_units": lambda: covariance_of(30, examples=30),
    "constant_unit": lambda: covariance_of(30) * (torch.arange(30) != 4).outer(torch.arange(30) != 4),
    "equal_units": lambda: torch.ones(6, 6, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", SINGULAR)
def test_a_singular_covariance_is_shrunk_and_says_how_much(kind):
    covariance = SINGULAR[kind]()
    factor, shrinkage = gaussian.cholesky(covariance)
    rounding_decides = kind == "as_many_examples_as_units"  # on some processors it is regular by a rounding error
    assert 0 <= shrinkage <= 1e-5 and (shrinkage > 0 or rounding_decides)
    identity = torch.eye(len(covariance), dtype=torch.float64)
    expected = (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * identity
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-8, atol=1e-10 * float(covariance.max()))


def test_shrinking_keeps_the_mean_variance():
    covariance = covariance_of(30, examples=12)
    factor, _ = gaussian.cholesky(covariance)
    torch.testing.assert_close((factor @ factor.T).trace(), covariance.trace())


def test_a_covariance_stored_in_float32_is_shrunk_by_what_its_rounding_asks_for():
    covariance = covariance_of(30, examples=12)
    assert gaussian.cholesky(covariance.float())[1] > gaussian.cholesky(covariance)[1]


def test_the_ladder_starts_at_nothing_and_ends_at_the_identity():
    assert gaussian.SHRINKAGES[0] == 0 and gaussian.SHRINKAGES[-1] == 1
    assert list(gaussian.SHRINKAGES) == sorted(gaussian.SHRINKAGES)
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]])  # no covariance of data, but the last step serves any
    factor, shrinkage = gaussian.cholesky(indefinite)
    assert shrinkage == 1
    torch.testing.assert_close(factor, torch.eye(2, dtype=torch.float64))


def test_an_all_zero_covariance_gives_the_mean():
    mean, (factor, shrinkage) = normal(4), gaussian.cholesky(torch.zeros(4, 4))
    assert shrinkage == 0 and not factor.any()
    assert torch.equal(drawn(mean, factor), mean.float().expand(NUM, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_covariance_that_is_not_finite_is_refused(value):
    covariance = torch.eye(3)
    covariance[1, 1] = value
    with pytest.raises(ValueError, match="1 of 9 entries"):
        gaussian.cholesky(covariance)


def test_a_matrix_that_is_no_covariance_is_refused():
    for matrix in (torch.diag(torch.tensor([1.0, -1.0])), torch.tensor([[1.0, 0.5], [0.0, 1.0]])):
        with pytest.raises(ValueError, match="not a covariance"):
            gaussian.cholesky(matrix)
