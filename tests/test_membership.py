"""Membership inference on simulated scores: the attacks find a memoriser, find nothing where nothing is, and refuse."""

import numpy as np
import pytest
from scipy import stats

from dfkd_ray.bench import membership, rates
from helpers import refusal

CALIBRATED = ("online", "online_own_variance", "offline")


def simulated(shift: float, num_models: int = 16, num_examples: int = 3000, num_queries: int = 2):
    """Scores whose examples differ far more than members do from non-members of the same example."""
    rng = np.random.default_rng(7)
    keep = membership.halves(num_models, num_examples, seed=3)
    level = rng.normal(2.0, 4.0, (1, num_examples, 1))
    noise = rng.normal(0.0, 1.0, (num_models, num_examples, num_queries))
    return level + noise + shift * keep[:, :, None], keep


def rate(attack: str, phi, keep, fpr: float) -> rates.Rate:
    scores = membership.ATTACKS[attack](phi, keep)
    return rates.tpr_at(scores[keep], scores[~keep], fpr)


def test_each_example_is_in_half_of_the_models_and_the_draw_is_seeded():
    keep = membership.halves(6, 500, seed=1)
    assert (keep.sum(axis=0) == 3).all() and 200 < keep[0].sum() < 300
    assert np.array_equal(keep, membership.halves(6, 500, seed=1))
    assert not np.array_equal(keep, membership.halves(6, 500, seed=2))
    for wrong in (5, 7, 4):
        refusal(lambda num=wrong: membership.halves(num, 10, 0), f"{wrong} shadow models", "even")


@pytest.mark.parametrize("attack", CALIBRATED)
def test_a_memoriser_is_found_by_calibrated_attacks(attack):
    assert rate(attack, *simulated(shift=3.0), 0.01).value >= 0.3


def test_a_global_threshold_misses_what_calibrated_attacks_find():
    phi, keep = simulated(shift=3.0)
    assert rate("threshold", phi, keep, 0.01).value < 0.1 < rate("online", phi, keep, 0.01).value / 3


@pytest.mark.parametrize("attack", list(membership.ATTACKS))
def test_without_a_signal_no_attack_is_better_than_chance(attack):
    phi, keep = simulated(shift=0.0)
    assert rate(attack, phi, keep, 0.01).value <= 0.02
    scores = membership.ATTACKS[attack](phi, keep)
    area = rates.auc(scores[keep], scores[~keep])
    assert abs(area.value - 0.5) < 0.012 and area.high - area.low < 0.03


def test_the_attacked_model_is_left_out_of_its_own_gaussians():
    phi, keep = simulated(shift=3.0, num_models=8, num_examples=40)
    scores = membership.ATTACKS["online_own_variance"](phi, keep)
    model, example = 5, 11
    order = [6, 7, 0, 1, 2, 3, 4]
    left_out = next(m for m in order if keep[m, example] != keep[model, example])
    logs = []
    for chosen in (keep, ~keep):
        own = phi[[m for m in order if chosen[m, example] and m != left_out], example]
        assert len(own) == 3
        logs.append(stats.norm.logpdf(phi[model, example], np.median(own, axis=0), own.std(axis=0, ddof=1)))
    assert scores[model, example] == pytest.approx((logs[0] - logs[1]).mean())


def test_the_pooled_deviation_does_not_depend_on_how_far_examples_are_apart():
    phi, keep = simulated(shift=3.0)
    one = membership.stds(phi, keep, pooled=True)
    assert one.shape == phi.shape[1:] and np.ptp(one, axis=0).max() == 0
    assert one[0] == pytest.approx(1.0, abs=0.03)


def test_log_odds_equal_those_of_the_probabilities_and_do_not_saturate():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (50, 10)).astype(np.float32), rng.integers(0, 10, 50)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    own = p[np.arange(50), labels]
    assert membership.log_odds(logits, labels) == pytest.approx(np.log(own / (1 - own)))
    sure = np.array([[900.0, 0.0, 0.0], [901.0, 0.0, 0.0], [0.0, 900.0, 0.0]], np.float32)
    assert membership.log_odds(sure, np.zeros(3, np.int64)) == pytest.approx([900 - np.log(2), 901 - np.log(2), -900])
    sure[1, 2] = np.inf
    refusal(lambda: membership.log_odds(sure, np.zeros(3, np.int64)), "not finite")


def test_clopper_pearson_gives_known_intervals():
    # Published values for 95 %: 0 of 10, 5 of 10; and the rule of three for 0 of 1,000.
    none, half = rates.clopper_pearson(0, 10), rates.clopper_pearson(5, 10)
    assert none.low == 0 and none.high == pytest.approx(0.3085, abs=5e-5)
    assert (half.low, half.high) == pytest.approx((0.1871, 0.8129), abs=5e-5)
    assert rates.clopper_pearson(0, 1000).high == pytest.approx(3.69e-3, abs=1e-5)
    assert rates.clopper_pearson(10, 10).high == 1.0
    for hits, total in ((3, 40), (400, 4000)):
        exact = stats.binomtest(hits, total).proportion_ci(0.95, method="exact")
        found = rates.clopper_pearson(hits, total)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_no_more_false_positives_than_allowed_also_where_scores_are_equal():
    rng = np.random.default_rng(0)
    for non_members in (rng.normal(size=1000), rng.integers(0, 5, 1000).astype(float), np.zeros(1000)):
        for fpr in (0.003, 0.01, 0.1):
            itself = rates.tpr_at(non_members, non_members, fpr)
            assert itself.value <= fpr
    assert rates.tpr_at(np.arange(1000.0), np.arange(1000.0), 0.01).value == 0.01


def test_a_rate_that_so_few_non_members_cannot_resolve_is_refused():
    members, non_members = np.ones(500), np.zeros(299)
    refusal(lambda: rates.tpr_at(members, non_members, 0.01), "1 %", "300 non-members", "299")
    assert rates.tpr_at(members, np.zeros(300), 0.01).value == 1.0
    assert rates.fewest_non_members(0.001) == 3000
    refusal(lambda: rates.auc(members, np.array([])), "0 non-members")
    refusal(lambda: rates.auc(members, np.array([np.nan])), "not a number")


def test_the_area_is_the_share_of_pairs_in_order_and_its_interval_covers_it():
    rng = np.random.default_rng(1)
    members, non_members = rng.integers(1, 8, 60).astype(float), rng.integers(0, 7, 80).astype(float)
    pairs = (members[:, None] > non_members).mean() + (members[:, None] == non_members).mean() / 2
    found = rates.auc(members, non_members)
    assert found.value == pytest.approx(pairs) and found.low < pairs < found.high
    truth = stats.norm.cdf(1 / np.sqrt(2))
    covered = [
        low <= truth <= high
        for own in (rates.auc(rng.normal(1, 1, 100), rng.normal(0, 1, 100)) for _ in range(200))
        for low, high in [(own.low, own.high)]
    ]
    assert 0.9 <= np.mean(covered) <= 0.99


def test_the_curve_agrees_with_the_rates_read_from_it():
    rng = np.random.default_rng(2)
    members, non_members = rng.normal(1, 1, 2000), rng.normal(0, 1, 2000)
    false, true = rates.roc(members, non_members)
    assert (np.diff(false) > 0).all() and (np.diff(true) >= 0).all() and false[-1] == 1.0
    at = np.searchsorted(false, 0.01)
    assert true[at - 1] <= rates.tpr_at(members, non_members, 0.01).value <= true[at + 1]
