"""How synthesizers and trials share machines: what is planned is packed again, slowly, as Ray would."""

import functools
import itertools
import random
from dataclasses import dataclass, field

import pytest

from dfkd_ray.fleet import placement
from dfkd_ray.fleet.placement import Node, Placement

UNIT = 10_000  # Ray's fixed point: resources are whole multiples of 0.0001
THREADS = (1, 4, 64)
COUNTS = (None, 1, 3, 64)
SHARES = ((None, None), (0.25, 0.5), (0.5, 0.25), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0), (2.0, 1.0), (1.0, 2.0))


@dataclass
class Free:
    """What is left of a machine, in units of 0.0001."""

    cpus: int
    gpus: list[int] = field(default_factory=list)


def fixed(share: float) -> int:
    units = round(share * UNIT)
    assert abs(share * UNIT - units) < 1e-6, f"{share} is finer than Ray's 0.0001"
    return units


def take(free: Free, cpus: int, gpus: int) -> bool:
    """One reservation on one machine: whole GPUs that are free, or a part of the GPU where it fits best.

    Source: ray, NodeResourceInstanceSet::TryAllocate.
    """
    if free.cpus < cpus:
        return False
    if gpus >= UNIT:
        whole = [number for number, part in enumerate(free.gpus) if part == UNIT][: gpus // UNIT]
        if len(whole) * UNIT < gpus:
            return False
        for number in whole:
            free.gpus[number] = 0
    elif gpus:
        fitting = [(part, number) for number, part in enumerate(free.gpus) if part >= gpus]
        if not fitting:
            return False
        free.gpus[min(fitting)[1]] -= gpus
    free.cpus -= cpus
    return True


def spread(machines: list[Free], count: int, cpus: int, gpus: int) -> bool:
    """A placement group of equal bundles: first one on each machine, then each where the largest part stays free.

    Source: ray, BundleSpreadSchedulingPolicy with LeastResourceScorer, which sees the sum of a machine's GPUs.
    """

    def score(free: Free) -> float:
        total = sum(free.gpus)
        if free.cpus < cpus or total < gpus:
            return -1.0
        return (1 - cpus / free.cpus if cpus else 0.0) + (1 - gpus / total if gpus else 0.0)

    new, chosen = list(machines), []
    for _ in range(count):
        best = max(new, key=score, default=None)
        if best is None or score(best) < 0:
            best = max(chosen, key=score, default=None)
            if best is None or score(best) < 0:
                return False
        else:
            new = [free for free in new if free is not best]
            chosen.append(best)
        if not take(best, cpus, gpus):
            return False
    return True


def packed(machines: list[Free], count: int, cpus: int, gpus: int) -> bool:
    """The same bundles, each on the first machine that has room."""
    return all(any(take(free, cpus, gpus) for free in machines) for _ in range(count))


def packed_from_the_end(machines: list[Free], count: int, cpus: int, gpus: int) -> bool:
    return packed(machines[::-1], count, cpus, gpus)


WAYS = [spread, packed, packed_from_the_end]  # Ray spreads, as far as machines have room at the time


def trials_of(nodes: list[Node], plan: Placement, place=spread) -> list[int] | None:
    """How many trials run on each machine beside the synthesizers; None where these do not fit themselves."""
    machines = [Free(fixed(one.cpus), [UNIT] * int(one.gpus)) for one in nodes]
    if not place(machines, plan.num_synthesizers, fixed(plan.synthesizer_cpus), fixed(plan.synthesizer_gpus)):
        return None
    trials = [0] * len(nodes)
    for number, free in enumerate(machines):
        while take(free, fixed(plan.trial_cpus), fixed(plan.trial_gpus)):
            trials[number] += 1
    return trials


def room(nodes: list[Node], plan: Placement, place=spread) -> int:
    """How many trials run beside the synthesizers; -1 where these do not fit themselves."""
    trials = trials_of(nodes, plan, place)
    return -1 if trials is None else sum(trials)


def planned(nodes, *, synthesizers=None, threads=1, trial_threads=1, gpu=False, shares=(None, None)):
    return placement.plan(
        nodes,
        synthesizers=synthesizers,
        synthesizer_threads=threads,
        trial_threads=trial_threads,
        use_gpu=gpu,
        gpus_per_synthesizer=shares[0],
        gpus_per_trial=shares[1],
    )


def node(cpus: float, gpus: float = 0) -> Node:
    return Node(float(cpus), float(gpus))


def equal(cpus, gpus=(0,), nums=(1, 2, 3, 4)) -> list[list[Node]]:
    return [[node(*sizes)] * num for sizes in itertools.product(cpus, gpus) for num in nums]


MACHINES = {
    "one machine": equal((0.5, 1, 2, 3, 8, 64), nums=(1,)),
    "equal machines": equal((0.5, 1, 2, 8, 64), nums=(2, 3, 4)),
    "a head without CPUs": [[node(0), node(8)], [node(0), node(2), node(2)]],
    "mixed machines": [[node(a), node(b), node(c)] for a in (1, 2, 64) for b in (2, 8, 16) for c in (0.5, 1, 8)]
    + [[node(64), node(16)], [node(1), node(2)], [node(64), node(2), node(2), node(2)]],
    "one machine with GPUs": equal((1, 2, 8, 64), (1, 2, 3, 8), nums=(1,)),
    "equal machines with GPUs": equal((1, 8, 64), (1, 2, 4), nums=(2, 3)),
    "mixed machines with GPUs": [
        [node(8, 2), node(8)],
        [node(8), node(8, 1)],
        [node(64), node(8, 8)],
        [node(8, 1), node(64, 8)],
        [node(2, 1), node(16, 2), node(64, 0)],
        [node(8, 4), node(8, 1), node(8, 1)],
    ],
}


@functools.cache
def plans(name: str) -> list[tuple[list[Node], dict, Placement]]:
    """Plans for every choice of options on some machines, without those that are refused."""
    found = []
    gpu = "GPUs" in name
    # The threads of a synthesizer matter where it has no GPU.
    both = zip(THREADS, THREADS[::-1], strict=True) if gpu else itertools.product(THREADS, THREADS)
    choices = itertools.product(MACHINES[name], COUNTS, both, SHARES if gpu else SHARES[:1])
    for nodes, count, (threads, trial_threads), shares in choices:
        options = {"synthesizers": count, "threads": threads, "trial_threads": trial_threads, "shares": shares}
        try:
            found.append((nodes, options, planned(nodes, gpu=gpu, **options)))
        except ValueError:
            assert gpu, (nodes, options)
    return found


WITHOUT_GPUS = [name for name in MACHINES if "GPUs" not in name]
WITH_GPUS = [name for name in MACHINES if "GPUs" in name]


@pytest.mark.parametrize("place", WAYS)
@pytest.mark.parametrize("name", MACHINES)
def test_the_synthesizers_of_a_plan_fit(name, place):
    bad = [case for case in plans(name) if room(case[0], case[2], place) < 0]
    assert not bad, f"{len(bad)} of {len(plans(name))}, the first: {bad[0]}"


@pytest.mark.parametrize("name", MACHINES)
def test_one_trial_always_runs_beside_synthesizers_that_ray_spreads(name):
    bad = [case for case in plans(name) if room(case[0], case[2]) == 0]
    assert not bad, f"{len(bad)} of {len(plans(name))}, the first: {bad[0]}"


@pytest.mark.parametrize("place", [packed, packed_from_the_end])
@pytest.mark.parametrize("name", [name for name in MACHINES if name != "mixed machines with GPUs"])
def test_one_trial_always_runs_beside_synthesizers_that_ray_packs(name, place):
    bad = [case for case in plans(name) if room(case[0], case[2], place) == 0]
    assert not bad, f"{len(bad)} of {len(plans(name))}, the first: {bad[0]}"


def test_room_that_is_there_only_where_ray_happens_to_spread_is_refused():
    """Two synthesizers of a GPU on machines of three and one: both on the large one, and two GPUs are free nowhere."""
    with pytest.raises(ValueError, match=r"2 synthesizer.* leave no room for one trial of 2 GPU"):
        planned([node(8, 3), node(8, 1)], gpu=True, synthesizers=2, shares=(1.0, 2.0))
    assert planned([node(8, 4), node(8, 1)], gpu=True, synthesizers=2, shares=(1.0, 2.0)).num_trials == 1


def test_a_synthesizer_that_may_land_on_the_only_gpu_with_cores_for_a_trial_is_refused():
    nodes = [node(8, 1), node(64, 1)]
    for machines in (nodes, nodes[::-1]):
        for synthesizers in (1, None):
            with pytest.raises(ValueError, match="leave no room for one trial of 1 GPU"):
                planned(machines, gpu=True, synthesizers=synthesizers, shares=(1.0, 1.0), trial_threads=16)


@pytest.mark.parametrize("place", WAYS)
@pytest.mark.parametrize("name", WITHOUT_GPUS)
def test_as_many_trials_run_as_planned_and_hardly_more_where_cpus_are_the_limit(name, place):
    """More, because 95 % of a machine leaves a gap: one in 19, and one where another machine's trials are smaller."""
    for nodes, options, plan in plans(name):
        trials = trials_of(nodes, plan, place)
        assert trials is not None and sum(trials) >= plan.num_trials, (nodes, options, plan)
        for one, num in zip(nodes, trials, strict=True):
            cores_for = max(1, int(one.cpus // options["trial_threads"]))
            most = cores_for + 1 + (cores_for + 1) // 19 if "mixed" in name else cores_for + cores_for // 19
            assert num <= most, (nodes, options, plan)


@pytest.mark.parametrize("name", ["one machine with GPUs", "equal machines with GPUs"])
def test_as_many_trials_run_as_planned_where_gpus_are_the_limit(name):
    bad = [case for case in plans(name) if room(case[0], case[2]) < case[2].num_trials]
    assert not bad, f"{len(bad)} of {len(plans(name))}, the first: {bad[0]}"


def test_as_many_trials_run_as_planned_on_mixed_machines_with_gpus():
    cases = plans("mixed machines with GPUs")
    bad = [case for case in cases if room(case[0], case[2]) < case[2].num_trials]
    assert not bad, f"{len(bad)} of {len(cases)}, the first: {bad[0]}"


def test_as_many_trials_run_as_planned_beside_shares_that_do_not_divide_a_gpu():
    nodes = [node(8, 2)]
    plan = planned(nodes, gpu=True, shares=(0.3, 0.4))
    assert room(nodes, plan) >= plan.num_trials


def test_a_trial_of_all_threads_runs_beside_synthesizers_on_a_large_and_a_small_machine():
    nodes = [node(64), node(16)]
    plan = planned(nodes, threads=8, trial_threads=64)
    assert plan == Placement(10, 0.08, 0.0, 1, 60.8, 0.0)
    assert all(room(nodes, plan, place) == 1 for place in WAYS)


def test_a_trial_runs_beside_synthesizers_on_one_machine_with_gpus_and_one_without():
    nodes = [node(8), node(8, 2)]
    plan = planned(nodes, gpu=True)
    assert plan == Placement(2, 0.2, 0.5, 2, 0.95, 0.5)
    assert all(room(nodes, plan, place) == 2 for place in WAYS)


@pytest.mark.parametrize("name", MACHINES)
def test_synthesizers_reserve_a_twentieth_of_the_smallest_machine_and_trials_the_rest_of_theirs(name):
    gpu = "GPUs" in name
    for nodes, options, plan in plans(name):
        homes = [one.cpus for one in nodes if one.cpus and (one.gpus or not gpu)]  # shares here are never 0
        assert 0 <= 0.05 * min(homes) - plan.num_synthesizers * plan.synthesizer_cpus < plan.num_synthesizers / UNIT
        cores_for = [cpus // options["trial_threads"] for cpus in homes]
        if not any(cores_for):
            cores_for = [float(cpus == max(homes)) for cpus in homes]
        tightest = min(0.95 * cpus / num for cpus, num in zip(homes, cores_for, strict=True) if num)
        assert plan.trial_cpus == pytest.approx(tightest, abs=1 / UNIT) and plan.trial_cpus <= tightest + 1e-9


@pytest.mark.parametrize("name", MACHINES)
def test_a_plan_has_at_least_one_of_each_and_never_more_than_there_is(name):
    for nodes, options, plan in plans(name):
        cpus, gpus = sum(one.cpus for one in nodes), sum(one.gpus for one in nodes)
        assert plan.num_synthesizers >= 1 and plan.num_trials >= 1, (nodes, options)
        assert plan.num_synthesizers == (options["synthesizers"] or plan.num_synthesizers)
        assert plan.synthesizer_cpus > 0 and plan.trial_cpus > 0
        for used, there in (
            (plan.num_synthesizers * plan.synthesizer_cpus, 0.05 * cpus),
            (plan.num_trials * plan.trial_cpus, 0.95 * cpus),
            (plan.num_synthesizers * plan.synthesizer_gpus + plan.num_trials * plan.trial_gpus, gpus),
        ):
            assert used <= there + 1e-9, (nodes, options, plan)


@pytest.mark.parametrize("name", MACHINES)
def test_reservations_are_whole_multiples_of_rays_resolution(name):
    for _, _, plan in plans(name):
        for share in (plan.synthesizer_cpus, plan.synthesizer_gpus, plan.trial_cpus, plan.trial_gpus):
            assert fixed(share) >= 0


@pytest.mark.parametrize("share", [1 / 3, 1 / 6, 1 / 7])
def test_gpu_shares_are_whole_multiples_of_rays_resolution(share):
    plan = planned([node(64, 4)], gpu=True, shares=(share, share))
    assert fixed(plan.synthesizer_gpus) and fixed(plan.trial_gpus)


def test_rounding_goes_down_and_loses_less_than_the_resolution():
    rng = random.Random(0)
    for share in (rng.uniform(0, 64) for _ in range(1000)):
        rounded = placement.rounded(share)
        assert 0 <= share - rounded < 1 / UNIT and fixed(rounded) >= 0


def test_a_plan_depends_on_no_order_of_the_machines():
    rng = random.Random(0)
    for _ in range(200):
        nodes = [node(rng.choice((1, 2, 8, 64)), rng.choice((0, 1, 2))) for _ in range(4)]
        options = {"synthesizers": rng.choice(COUNTS), "threads": rng.choice(THREADS)}
        options["trial_threads"] = rng.choice(THREADS)
        assert planned(nodes, **options) == planned(rng.sample(nodes, 4), **options)


def test_a_plan_on_gpus_depends_on_no_order_of_the_machines():
    nodes, options = [node(8, 1), node(64, 1)], {"gpu": True, "shares": (1.0, 1.0), "trial_threads": 16}
    said = []
    for machines in (nodes, nodes[::-1]):
        try:
            said.append(planned(machines, synthesizers=1, **options))
        except ValueError as error:
            said.append(str(error))
    assert said[0] == said[1]


def test_machines_without_cpus_do_not_count():
    for gpu in (False, True):
        assert planned([node(0, 4), node(8, 2)], gpu=gpu) == planned([node(8, 2)], gpu=gpu)


def test_without_gpus_none_are_reserved_even_where_there_are_some():
    plan = planned([node(8, 4)], shares=(0.25, 1.0))
    assert plan.synthesizer_gpus == plan.trial_gpus == 0
    assert plan == planned([node(8)])


def test_a_share_of_no_gpu_leaves_the_gpus_to_the_others():
    nodes = [node(8, 2)]
    plan = planned(nodes, gpu=True, shares=(0.0, 1.0))
    assert (plan.synthesizer_gpus, plan.num_trials) == (0, 2) and room(nodes, plan) == 2


# ---- profiles -------------------------------------------------------------------------------------------------------

MIXED = [node(0), node(64, 8), node(64, 8), node(32)]  # a head that computes nothing, two with GPUs, one without
# Shares of (synthesizer, trial), and the trials of 4 threads that surely run beside 4 synthesizers.
PROFILES = {
    "one GPU per trial": ((None, 1.0), 12),
    "several trials per GPU": ((0.25, 0.25), 32),
    "trials on CPUs beside synthesis on GPUs": ((1.0, 0.0), 40),
}


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("place", WAYS)
def test_each_profile_runs_as_many_trials_as_planned_on_a_mixed_cluster(name, place):
    shares, num_trials = PROFILES[name]
    plan = planned(MIXED, gpu=True, synthesizers=4, shares=shares, trial_threads=4)
    assert plan.num_trials == num_trials
    head, *with_gpus, without = trials_of(MIXED, plan, place) or []
    assert head == 0 and sum(with_gpus) + without >= num_trials
    assert (without > 0) == (plan.trial_gpus == 0), "what needs no GPU uses the cores of machines without, too"


def test_synthesizers_on_gpus_leave_machines_without_alone_and_spread_over_the_others():
    machines = [Free(fixed(one.cpus), [UNIT] * int(one.gpus)) for one in MIXED]
    plan = planned(MIXED, gpu=True, synthesizers=4)
    assert spread(machines, 4, fixed(plan.synthesizer_cpus), fixed(plan.synthesizer_gpus))
    assert [sum(UNIT - part for part in free.gpus) for free in machines] == [0, UNIT, UNIT, 0]


# ---- what is added to a plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(0.25, 0.25), (0.5, 0.5), (0.5, 0.0), (1.0, 0.0)])
def test_on_a_machine_that_joins_and_is_full_of_trials_added_synthesizers_still_fit(shares):
    nodes = [node(64, 8)]
    plan = planned(nodes, gpu=True, synthesizers=1, shares=shares)
    cpus = placement.added_cpus(nodes, 1, plan.synthesizer_gpus)
    new = Free(fixed(64), [UNIT] * 8)
    num_added = int(8 * (1 - shares[1]) / shares[0])
    while take(new, fixed(plan.trial_cpus), fixed(plan.trial_gpus)) and sum(new.gpus) > 8 * UNIT * (1 - shares[1]):
        pass
    assert packed([new], num_added, fixed(cpus), fixed(plan.synthesizer_gpus))


@pytest.mark.parametrize("fewest", [1, 2, 7])
@pytest.mark.parametrize("shares", SHARES[1:])
def test_on_the_machines_asked_for_first_a_fleet_and_a_trial_fit_and_on_one_fewer_not_surely(fewest, shares):
    asked = placement.first_machines(fewest, 4, *shares)
    nodes = [node(4, bundle["GPU"]) for bundle in asked]
    assert planned(nodes, gpu=True, synthesizers=fewest, shares=shares, trial_threads=4).num_trials >= 1
    if len(nodes) > 1:
        with pytest.raises(ValueError, match="leave no room"):
            planned(nodes[1:], gpu=True, synthesizers=fewest, shares=shares, trial_threads=4)


def test_without_gpus_an_added_synthesizer_reserves_its_threads_so_that_full_machines_have_no_room_for_it():
    nodes = [node(1), node(8)]
    assert placement.added_cpus(nodes, 4, 0.0) == 4.0
    assert placement.added_cpus(nodes, 64, 0.0) == pytest.approx(7.6), "it fits on the largest beside the fleet's share"
    plan = planned(nodes, synthesizers=1, trial_threads=1)
    machines = [Free(fixed(one.cpus)) for one in nodes]
    assert spread(machines, 1, fixed(plan.synthesizer_cpus), 0)
    assert packed(machines, plan.num_trials, fixed(plan.trial_cpus), 0)
    assert not packed(machines, 1, fixed(placement.added_cpus(nodes, 1, 0.0)), 0)


# ---- how many synthesizers there are when nobody says ---------------------------------------------------------------


@pytest.mark.parametrize(
    "shares", [(0.0, 0.0), (0.25, 0.5), (0.5, 0.5), (0.5, 1.0), (0.75, 0.75), (1.0, 1.0), (2.0, 1.0)]
)
def test_the_automatic_number_never_shrinks_when_a_machine_joins(shares):
    rng = random.Random(0)
    for _ in range(100):
        nodes = [node(rng.choice((1, 2, 8, 64)), rng.choice((0, 1, 2, 8))) for _ in range(rng.randrange(1, 6))]
        threads = rng.choice(THREADS)
        counts = [placement.automatic(nodes[:num], threads, *shares) for num in range(1, len(nodes) + 1)]
        assert counts == sorted(counts)


def test_the_automatic_number_grows_with_equal_machines():
    for shares, one in (((0.0, 0.0), node(8)), ((0.5, 0.5), node(8, 2)), ((1.0, 1.0), node(8, 2))):
        counts = [placement.automatic([one] * num, 2, *shares) for num in range(1, 6)]
        assert counts == [num * counts[0] for num in range(1, 6)] and counts[0] >= 1


def test_the_automatic_number_is_one_where_cores_are_fewer_than_threads():
    assert placement.automatic([node(0.5), node(2)], 64, 0.0, 0.0) == 1


@pytest.mark.parametrize("name", WITHOUT_GPUS)
def test_without_gpus_no_plan_with_an_automatic_number_is_refused(name):
    num = len(MACHINES[name]) * len(THREADS) ** 2
    assert sum(options["synthesizers"] is None for _, options, _ in plans(name)) == num


@pytest.mark.parametrize("name", WITH_GPUS)
def test_the_automatic_number_is_refused_only_where_one_synthesizer_is_too(name):
    def fitting(count):
        fits = [(nodes, options) for nodes, options, _ in plans(name) if options["synthesizers"] == count]
        return {
            (*nodes, *(options[what] for what in ("threads", "trial_threads", "shares"))) for nodes, options in fits
        }

    refused = fitting(1) - fitting(None)
    assert not refused, f"{len(refused)}, one of them: {next(iter(refused))}"


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.1, 0.3])
def test_the_automatic_number_leaves_one_trial_on_each_gpu(num_gpus, share):
    nodes = [node(64, num_gpus)]
    plan = planned(nodes, gpu=True, shares=(share, 0.5))
    assert plan.num_trials >= num_gpus and plan.num_synthesizers >= num_gpus


@pytest.mark.parametrize("num_gpus", [2, 4, 8])
def test_the_automatic_number_is_never_refused_where_a_smaller_one_fits(num_gpus):
    nodes, shares = [node(8, num_gpus)], (None, 1.0)
    assert room(nodes, planned(nodes, gpu=True, synthesizers=1, shares=shares)) >= 1
    assert planned(nodes, gpu=True, shares=shares).num_trials >= 1


def test_the_automatic_number_is_not_zero_where_one_fits():
    nodes, shares = [node(8, 3)], (2.0, 1.0)
    assert room(nodes, planned(nodes, gpu=True, synthesizers=1, shares=shares)) == 1
    assert placement.automatic(nodes, 1, *shares) >= 1


def test_the_automatic_number_leaves_room_where_a_trial_of_many_threads_can_go():
    nodes, options = [node(8, 2), node(64, 2)], {"gpu": True, "shares": (None, 1.0), "trial_threads": 16}
    plan = planned(nodes, **options)
    assert plan.num_synthesizers >= 1 and plan.num_trials >= 1
    assert all(room(nodes, plan, place) >= 1 for place in WAYS)


def test_the_automatic_number_fits_a_small_head_and_large_machines():
    nodes = [node(1), *[node(64)] * 8]
    assert room(nodes, planned(nodes, synthesizers=500)) >= 1
    assert planned(nodes).num_synthesizers >= 1


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "options", "said"),
    [
        ([], {}, "no CPU is free; there are 0 node(s) with 0 CPUs and 0 GPUs"),
        ([node(0), node(0, 2)], {}, "no CPU is free; there are 0 node(s) with 0 CPUs and 0 GPUs"),
        ([node(2)], {"synthesizers": 0}, "`synthesizers=0`: expected at least 1; there are 1 node(s) with 2 CPUs"),
        ([node(2)], {"synthesizers": -3}, "`synthesizers=-3`: expected at least 1"),
        (
            [node(2)],
            {"synthesizers": 5000, "gpu": False},
            "`synthesizers=5000`: that many do not fit; there are 1 node(s) with 2 CPUs",
        ),
        ([node(8, 2)], {"shares": (1.5, None)}, "`gpus_per_synthesizer=1.5`: expected a fraction up to 1, or a whole"),
        ([node(8, 2)], {"shares": (None, -0.5)}, "`gpus_per_trial=-0.5`: expected a fraction up to 1"),
        (
            [node(8)],
            {"synthesizers": 1},
            "leave no room for one trial of 0.5 GPU; there are 1 node(s) with 8 CPUs and 0 GPUs",
        ),
        ([node(8, 1)], {"synthesizers": 2}, "2 synthesizer(s) of 0.5 GPU leave no room for one trial of 0.5 GPU"),
        ([node(8, 2)], {"synthesizers": 5}, "5 synthesizer(s) of 0.5 GPU leave no room"),
        ([node(8, 1)] * 2, {"shares": (0.25, 2.0), "synthesizers": 1}, "trial of 2 GPU; there are 2 node(s)"),
        ([node(8, 1)] * 2, {"shares": (2.0, 0.25), "synthesizers": 1}, "1 synthesizer(s) of 2 GPU leave no room"),
        ([node(8, 1)], {"shares": (1.0, 1.0), "synthesizers": 1}, "1 synthesizer(s) of 1 GPU leave no room"),
    ],
)
def test_a_refusal_names_the_numbers(nodes, options, said):
    with pytest.raises(ValueError) as caught:
        planned(nodes, **({"gpu": True} | options))
    assert said in str(caught.value)


@pytest.mark.parametrize("shares", [(1.0, 0.5), (0.5, 0.75), (1.0, 1.0), (0.5, 2.0)])
def test_a_refusal_of_the_automatic_number_names_the_shares_and_not_an_option_that_was_not_given(shares):
    with pytest.raises(ValueError) as caught:
        planned([node(8, 1)], gpu=True, shares=shares)
    assert "`synthesizers=0`:" not in str(caught.value)
    assert "`synthesizers=-2`:" not in str(caught.value)
    assert "`gpus_per_trial" in str(caught.value)
