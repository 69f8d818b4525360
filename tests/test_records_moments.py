import itertools

import numpy as np
import pytest
import torch

from dfkd_ray.records import moments
from dfkd_ray.records.moments import Moments, Sketch

CLASSES, UNITS, RANK = 3, 40, 6
KINDS = {"dense": lambda: Moments.empty(CLASSES, UNITS), "sketch": lambda: Sketch.empty(CLASSES, UNITS, RANK, seed=1)}


def examples(num, seed=0, units=UNITS, rank=None):
    """Correlated float32 values with a large mean, and labels; `rank` bounds the rank of the covariance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or units, units, generator=torch.Generator().manual_seed(99))
    values = torch.randn(num, rank or units, generator=generator) @ mixing + 20
    return values, torch.randint(CLASSES, (num,), generator=generator)


def slow_moments(values, labels):
    """Count, mean and covariance of each class by numpy, in float64."""
    rows = [values.double().numpy()[labels.numpy() == label] for label in range(CLASSES)]
    return [(len(x), x.mean(axis=0), np.cov(x, rowvar=False)) for x in rows]


def recorded(kind, *shards):
    record = KINDS[kind]()
    for values, labels in shards:
        record.update(values, labels)
    return record


def covariance(record):
    if isinstance(record, Moments):
        return record.covariance()
    factor = record.factor()
    return factor @ factor.mT


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_dense_moments_equal_a_slow_reference():
    values, labels = examples(200)
    record = recorded("dense", (values, labels))
    for label, (count, mean, expected) in enumerate(slow_moments(values, labels)):
        assert record.counts[label] == count
        assert relative(record.means[label], torch.from_numpy(mean)) < 1e-12
        assert relative(record.covariance()[label], torch.from_numpy(expected)) < 1e-12


def test_a_sketch_is_the_co_moment_times_omega():
    values, labels = examples(200)
    dense, sketch = recorded("dense", (values, labels)), recorded("sketch", (values, labels))
    assert relative(sketch.products, dense.comoments @ sketch.omega) < 1e-12
    assert torch.equal(sketch.means, dense.means)


def test_a_factor_gives_a_covariance_of_low_rank_exactly():
    values, labels = examples(200, rank=RANK)
    sketch = recorded("sketch", (values.double(), labels))
    expected = recorded("dense", (values.double(), labels)).covariance()
    assert sketch.factor().shape == (CLASSES, UNITS, RANK)
    assert relative(covariance(sketch), expected) < 1e-6  # `values` is rounded to float32: its rank is RANK up to that


def test_a_factor_gives_the_covariance_of_few_examples_exactly():
    values, labels = examples(3 * (RANK + 1))
    labels = torch.arange(3 * (RANK + 1)) % 3
    shards = (values, labels)
    assert relative(covariance(recorded("sketch", shards)), covariance(recorded("dense", shards))) < 1e-9


def test_a_factor_of_a_decaying_spectrum_is_nearly_the_best_of_its_rank():
    values, labels = examples(900)
    basis = torch.linalg.qr(torch.randn(UNITS, UNITS, generator=torch.Generator().manual_seed(5))).Q
    values = (values - 20) @ torch.linalg.inv(torch.linalg.cholesky(values.T.cov())).T
    values = values * 0.7 ** torch.arange(UNITS) @ basis
    expected = recorded("dense", (values, labels)).covariance()
    best = torch.linalg.eigvalsh(expected)[:, :-RANK].norm()
    assert (covariance(recorded("sketch", (values, labels))) - expected).norm() < 1.5 * best


def test_a_factors_columns_are_orthogonal_and_sorted():
    factor = recorded("sketch", examples(200)).factor()
    gram = factor.mT @ factor
    lengths = gram.diagonal(dim1=1, dim2=2)
    assert (lengths.diff(dim=1) <= 0).all() and (lengths > 0).all()
    torch.testing.assert_close(gram, torch.diag_embed(lengths), rtol=0, atol=1e-10 * float(lengths.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_records_of_shards_equals_recording_the_whole_in_any_order(kind):
    values, labels = examples(200)
    labels[:60] = torch.arange(60) % 2  # class 2 is missing in the first shard
    sizes = [60, 0, 1, 139]
    shards = list(zip(values.split(sizes), labels.split(sizes), strict=True))
    whole = recorded(kind, (values, labels))
    for order in itertools.permutations(shards):
        merged = KINDS[kind]()
        for shard in order:
            merged.merge(recorded(kind, shard))
        assert torch.equal(merged.counts, whole.counts)
        assert relative(merged.means, whole.means) < 1e-12
        assert relative(covariance(merged), covariance(whole)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_batches_give_the_record_of_the_whole(kind):
    values, labels = examples(200)
    batched = recorded(kind, *zip(values.split(7), labels.split(7), strict=True))
    assert relative(covariance(batched), covariance(recorded(kind, (values, labels)))) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_a_class_give_its_record(kind, monkeypatch):
    shard = examples(200)
    whole = recorded(kind, shard)
    monkeypatch.setattr(moments, "CHUNK_NUMBERS", 5 * UNITS)
    assert relative(covariance(recorded(kind, shard)), covariance(whole)) < 1e-9


def test_the_covariance_survives_a_large_mean():
    values, labels = examples(200)
    values = values.double()
    plain, far = recorded("dense", (values, labels)), recorded("dense", (values + 1e6, labels))
    assert relative(far.covariance(), plain.covariance()) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_one_example_none_and_constant_values_have_zero_covariance(kind):
    values, labels = examples(51)
    values[1:] = values[1]
    labels[:] = 1
    labels[0] = 0
    record = recorded(kind, *zip(values.split(9), labels.split(9), strict=True))
    assert record.counts.tolist() == [1, 50, 0]
    assert torch.equal(record.means[:2], values[:2].double())
    assert not covariance(record).any()


def test_constant_units_have_a_variance_of_exactly_zero():
    values, labels = examples(200)
    values[:, 3] = 0.1
    variances = recorded("dense", (values, labels)).covariance().diagonal(dim1=1, dim2=2)
    assert not variances[:, 3].any()
    assert (variances[:, :3] > 0).all()


def test_a_covariance_is_exactly_symmetric():
    found = recorded("dense", examples(200)).covariance()
    assert torch.equal(found, found.mT)


def test_omega_is_a_function_of_the_seed():
    one, same, other = (Sketch.empty(2, 5, 3, seed).omega for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_and_change_nothing(kind, value):
    values, labels = examples(10)
    record = recorded(kind, (values, labels))
    before = covariance(record)
    values[4, 17] = value
    with pytest.raises(ValueError, match=rf"1 of 400 .* row 4 \(class {labels[4]}\), unit 17"):
        record.update(values, labels)
    assert record.counts.sum() == 10
    assert torch.equal(covariance(record), before)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes_and_labels_are_refused(kind):
    record = KINDS[kind]()
    values, labels = examples(10)
    with pytest.raises(ValueError, match=r"shape \(10, 39\), expected \(10, 40\)"):
        record.update(values[:, 1:], labels)
    for wrong in (-1, CLASSES):
        labels[3] = wrong
        with pytest.raises(ValueError, match="expected 0 to 2"):
            record.update(values, labels)


def test_records_that_differ_are_not_merged():
    with pytest.raises(ValueError, match="cannot merge"):
        Moments.empty(2, 5).merge(Moments.empty(2, 6))
    for other in (Sketch.empty(2, 5, 3, seed=2), Sketch.empty(2, 5, 4, seed=1), Sketch.empty(3, 5, 3, seed=1)):
        with pytest.raises(ValueError, match="cannot merge"):
            Sketch.empty(2, 5, 3, seed=1).merge(other)
    with pytest.raises(ValueError, match="rank of a sketch is 0"):
        Sketch.empty(2, 5, 0, seed=1)
