import pytest
import torch

from dfkd_ray.records import sizes


def factor(classes=3, units=40, columns=12, scale=1.0):
    """A factor whose columns explain less and less, in no order."""
    drawn = torch.randn(classes, units, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    return scale * drawn * (0.7 ** torch.arange(columns))[order]


def covariance(own):
    return own.double() @ own.double().transpose(1, 2)


def test_principal_columns_have_the_same_covariance_and_are_ordered_and_orthogonal():
    own = sizes.principal(factor())
    torch.testing.assert_close(covariance(own), covariance(factor()))
    gram = own.transpose(1, 2) @ own
    lengths = gram.diagonal(dim1=1, dim2=2)
    assert bool((lengths[:, 1:] <= lengths[:, :-1]).all())
    torch.testing.assert_close(gram, torch.diag_embed(lengths))


def test_factors_that_fit_are_only_rounded():
    factors = {"a": factor(), "b": factor(units=9, columns=9)}
    kept, explained = sizes.cut(factors, sum(2 * own.numel() for own in factors.values()))
    assert not explained
    for name, own in factors.items():
        assert torch.equal(kept[name], own.half())


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_cut_factors_fit_and_keep_the_variance_that_is_said(share):
    factors = {"a": factor(), "b": factor(units=400, columns=30), "c": factor(units=9, columns=9)}
    limit = round(share * sum(2 * own.numel() for own in factors.values()))
    kept, explained = sizes.cut(factors, limit)
    assert sum(own.nbytes for own in kept.values()) <= limit
    assert explained
    for name, own in explained.items():
        variances = [covariance(some).diagonal(dim1=1, dim2=2).sum(dim=1) for some in (kept[name], factors[name])]
        assert float((variances[0] / variances[1]).mean()) == pytest.approx(own, abs=1e-3)
        assert 0 < own < 1
    for name in set(factors) - set(explained):
        torch.testing.assert_close(kept[name], factors[name].half())


def test_a_larger_limit_keeps_more_variance():
    factors = {"a": factor(), "b": factor(units=400, columns=30)}
    found = [
        sum(sizes.cut(factors, limit)[1].get(name, 1.0) for name in factors) for limit in range(3000, 70_000, 7000)
    ]
    assert found == sorted(found) and found[0] < found[-1]


def test_columns_without_variance_take_no_bytes():
    own = factor(units=400, columns=30)
    own[:, :, 10:] = 0
    kept, explained = sizes.cut({"a": own, "b": factor()}, 400 * 3 * 2 * 10 + 3 * 40 * 12 * 2)
    assert kept["a"].shape[2] == 10 and explained["a"] == pytest.approx(1)
    assert torch.equal(kept["b"], factor().half())


@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_values_that_float16_cannot_hold_stay_float32(scale):
    assert sizes.stored(factor(scale=scale)).dtype == torch.float32
    assert sizes.stored(factor(scale=1e-3)).dtype == torch.float16
    kept, _ = sizes.cut({"a": factor(scale=scale)}, 3 * 40 * 4 * 5)
    assert kept["a"].dtype == torch.float32 and kept["a"].shape[2] == 5


def test_a_factor_of_zeros_keeps_one_column():
    assert sizes.cut({"a": torch.zeros(2, 50, 4, dtype=torch.float64)}, 250)[0]["a"].shape == (2, 50, 1)


def test_as_many_coefficients_are_taken_as_fit():
    columns = torch.tensor([100, 20, 20, 300, 20, 20])
    for limit in range(80, 800, 10):
        found = sizes.num_coefficients(columns, 2, limit)
        taken = [int(columns[:k].sum()) + 2 * k * (4 + 2 * -(-k // 4)) for k in range(1, 7)]
        assert found == max(1, sum(own <= limit for own in taken))
