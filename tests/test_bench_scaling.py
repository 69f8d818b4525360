"""The bench of large fleets: its arithmetic, and a tiny run of it."""

import pytest

from dfkd_ray.bench.scaling import Assumed, Cost, Load, carried, cost_of, first_limit, quantile

ASSUMED = Assumed(batch_s=30.0, num_readers=10, network_bytes_per_s=1e9, store_bytes=1e10)


def load(made: int, handed: int, cost: Cost) -> Load:
    return Load(0.0, 8.0, made, handed, made * cost.make_s + handed * cost.hand_s, 10**8)


def test_two_loads_tell_the_cost_of_making_from_that_of_handing_out():
    cost = Cost(0.0007, 0.0003)
    found = cost_of(load(1000, 1010, cost), load(900, 3100, cost))
    assert (found.make_s, found.hand_s) == pytest.approx((cost.make_s, cost.hand_s))
    assert found.of(4) == pytest.approx(0.0019)


def test_a_cost_is_never_negative_and_all_of_it_is_accounted_for():
    light, heavy = Load(0.0, 8.0, 100, 100, 0.2, 0), Load(0.0, 8.0, 100, 300, 0.1, 0)
    assert cost_of(light, heavy) == Cost(0.002, 0.0)
    light, heavy = Load(0.0, 8.0, 100, 100, 0.1, 0), Load(0.0, 8.0, 100, 300, 0.9, 0)
    found = cost_of(light, heavy)
    assert found.make_s == 0.0 and found.hand_s > 0


def test_loads_that_cannot_tell_are_refused():
    cost = Cost(0.001, 0.001)
    with pytest.raises(ValueError, match="100 batches handed out of 50 made is no more than 200 of 100"):
        cost_of(load(100, 200, cost), load(50, 100, cost))


def test_twice_the_seconds_of_a_batch_carry_twice_the_synthesizers_but_need_the_same_memory():
    cost = Cost(0.0005, 0.0005)
    once, twice = (carried(Assumed(s, 10, 1e9, 1e10), cost, 1e6) for s in (30.0, 60.0))
    assert twice["coordinator"] == pytest.approx(2 * once["coordinator"])
    assert twice["network"] == pytest.approx(2 * once["network"])
    assert twice["object store"] == once["object store"]


def test_what_is_full_first_depends_on_the_size_of_a_batch():
    cost = Cost(0.0005, 0.0005)
    small, large = carried(ASSUMED, cost, 1e5), carried(ASSUMED, cost, 1e8)
    assert first_limit(small) == "coordinator" and small["coordinator"] == pytest.approx(30 / 0.0055)
    assert first_limit(large) == "object store" and large["object store"] == pytest.approx(0.3 * 1e10 / 2e8)
    assert large["network"] == pytest.approx(300)


def test_a_quantile_is_one_of_the_values():
    assert quantile(range(1, 101), 0.99) == 100 and quantile(range(1000), 0.5) == 500 and quantile([3.0], 0.99) == 3.0


def test_what_came_to_readers_while_a_load_was_watched_is_counted_with_its_probes():
    watched = Load(10.0, 20.0, 5, 3, 0.1, 0)
    assert watched.with_readers([[9.0, 10.0, 10.5, 20.0], [], [15.0, 20.5]]).handed == 3 + 3


def test_a_tiny_run_measures_every_size_and_marks_the_first_limit_of_every_batch(run_cli):
    small = ("--size", "1", "--size", "2", "--simulated-s", "0.1", "--seconds", "1", "--readers", "5")
    done = run_cli("bench", "scaling", *small)
    assert done.code == 0, done.err
    rows = [line.strip("| ").split(" | ") for line in done.out.splitlines() if line.startswith("| ")]
    measured, modelled = rows[1:3], rows[4:]
    assert [row[0] for row in measured] == ["1", "2"]
    for row in measured:
        assert min(float(cell) for cell in row[2].split(" / ")) > 0 and float(row[-1]) > 0
    assert [row[0] for row in modelled] == ["256x1x32x32", "256x3x32x32", "256x3x224x224"]
    assert all(sum(cell.startswith("**") for cell in row) == 1 for row in modelled)
