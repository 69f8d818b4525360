"""Search: domains, points, what Ray Tune and Optuna are told, early stopping, resuming from rows; estimates."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
import yaml

from dfkd_ray import bundles, results, storage, sweep, trial
from dfkd_ray.distillation_state import State
from dfkd_ray.sweep import asha, estimate, optuna, search, tune_reports
from helpers import TINY_NOISE, TINY_TRIAL, calibrated, costs_of, estimated, refusal, tiny_trial

LOOKS = {"distillation.num_steps": 6, "distillation.eval_every": 1}
SPACE = {
    "pruning.sparsity": {"uniform": [0.5, 0.9]},
    "distillation.temperature": {"quniform": [1, 8, 0.5]},
    "synthesis": [TINY_NOISE, TINY_TRIAL["synthesis"]],
}
SHARES = [i / 997 for i in range(997)]


def settings_of(teacher, *, algorithm="random", space=SPACE, num_trials=4, **parts) -> sweep.SweepConfig:
    searched = {"space": space, "algorithm": algorithm, "num_trials": num_trials}
    searched |= {name: parts.pop(name) for name in ("objective", "bounds") if name in parts}
    return sweep.parse({"base": tiny_trial(teacher, **LOOKS), "search": searched, **parts})


# ---- domains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ({"uniform": [0.5, 2]}, (0.5, 2.0)),
        ({"loguniform": [1e-4, 1]}, (1e-4, 1.0)),
        ({"quniform": [0.25, 1, 0.1]}, (0.3, 1.0)),
        ({"qloguniform": [0.05, 0.9, 0.1]}, (0.1, 0.9)),
        ({"randint": [2, 6]}, (2, 5)),
        ({"lograndint": [1, 100]}, (1, 99)),
        ({"qrandint": [10, 50, 20]}, (20, 40)),
        ({"qlograndint": [8, 64, 8]}, (8, 64)),
        ({"choice": ["a", 1, None]}, ("a", 1, None)),
        ([1, 2], (1, 2)),
    ],
    ids=str,
)
def test_draws_stay_within_the_ends_reach_them_and_lie_on_the_steps(given, ends):
    values = search.domain(given)
    draws = [values.at(share) for share in SHARES]
    assert values.ends() == ends and all(values.holds(draw) for draw in draws)
    if values.kind == "choice":
        assert set(draws) == set(ends)
        return
    assert draws == sorted(draws) and type(draws[0]) is type(ends[0]) and draws[0] == ends[0]
    if values.step:
        assert draws[-1] == ends[1] and all(abs(d / values.step - round(d / values.step)) < 1e-9 for d in draws)
    else:
        assert draws[-1] == pytest.approx(ends[1], rel=0.02)
    share = sum(d < (math.sqrt(ends[0] * ends[1]) if values.is_log else sum(ends) / 2) for d in draws) / len(draws)
    assert 0.25 < share < 0.75


def test_the_names_and_ends_are_those_of_ray_tune():
    from ray import tune

    for name, count in search.BOUNDED.items():
        arguments = [3, 21, 3][:count]
        theirs, ours = getattr(tune, name)(*arguments), search.domain({name: arguments})
        drawn = {theirs.sample() for _ in range(300)}
        assert all(ours.holds(value) for value in drawn), name
        if ours.step:
            assert drawn <= {ours.at(share) for share in SHARES}, name


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (0.5, "expected a list of values or one of choice, uniform"),
        ({"normal": [0, 1]}, "expected a list"),
        ({"uniform": [0, 1], "randint": [0, 1]}, "expected a list"),
        ({"choice": []}, "takes a list of values"),
        ({"uniform": [1]}, r"takes \[low, high\]"),
        ({"quniform": [0, 1]}, r"takes \[low, high, q\]"),
        ({"randint": [0, 1.5]}, "whole numbers"),
        ({"uniform": [1, 1]}, "less than high"),
        ({"loguniform": [0, 1]}, "above 0"),
        ({"quniform": [0, 1, 0]}, "q has to be above 0"),
        ({"quniform": [0.1, 0.2, 0.5]}, "no multiple"),
    ],
    ids=str,
)
def test_domains_that_are_none_are_refused(given, why):
    with pytest.raises(ValueError, match=why):
        search.domain(given)


def test_what_has_to_be_the_same_in_all_trials_cannot_be_searched():
    for name in ("teacher", "reference.num_images", "distillation.seed"):
        with pytest.raises(ValueError, match=f"{name}: is the same in all trials"):
            settings_of("t", space={name: [1, 2]})
    with pytest.raises(ValueError, match=r"synthesis\.bn_weight: lies within synthesis"):
        settings_of("t", space={"synthesis": [{}], "synthesis.bn_weight": [1.0]})
    with pytest.raises(ValueError, match="seeds=3 goes with grid"):
        settings_of("t", seeds=3)


# ---- points --------------------------------------------------------------------------------------------------------


def test_every_end_and_choice_is_validated_before_anything_starts():
    space = {"pruning.sparsity": {"uniform": [0.5, 1.5]}, "distillation.num_steps": {"uniform": [100, 200]}}
    space |= {"distillation.bn_mode": ["trained", "thawed"], "distillation.temprature": [1.0]}
    for algorithm in ("random", "optuna"):
        with pytest.raises(ValueError) as caught:
            sweep.expand(settings_of("t", algorithm=algorithm, space=space), {})
        text = str(caught.value)
        assert "pruning.sparsity" in text and "1.5" in text and "thawed" in text and "temprature" in text
        assert "num_steps" in text, "a number between the ends, where the field wants whole ones"


def test_random_points_are_the_same_every_time_and_more_trials_only_add():
    few, more = (sweep.expand(settings_of("t", num_trials=n), {}) for n in (5, 9))
    assert more[:5] == few == sweep.expand(settings_of("t", num_trials=5), {})
    assert len({config.model_dump_json() for config in more}) == 9
    other = settings_of("t", num_trials=5)
    assert other.search is not None
    other = other.model_copy(update={"search": other.search.model_copy(update={"seed": 1})})
    assert sweep.expand(other, {}) != few


def test_random_points_are_distinct_until_the_space_is_used_up():
    space = {"pruning.sparsity": [0.5, 0.7, 0.9]}
    assert len(sweep.expand(settings_of("t", space=space, num_trials=3), {})) == 3
    with pytest.raises(ValueError, match="no more than 3 distinct points"):
        sweep.expand(settings_of("t", space=space, num_trials=4), {})


def test_exclusions_hold_in_a_search_and_have_to_be_possible():
    space = {"pruning.sparsity": [0.5, 0.7, 0.9]}
    left = sweep.expand(settings_of("t", space=space, num_trials=2, exclude=[{"pruning.sparsity": 0.7}]), {})
    assert {config.pruning.sparsity for config in left} == {0.5, 0.9}
    with pytest.raises(ValueError, match="matches no combination"):
        sweep.expand(settings_of("t", space=space, num_trials=2, exclude=[{"pruning.sparsity": 0.8}]), {})


# ---- what is judged by ---------------------------------------------------------------------------------------------


class Sealed(dict):
    """A row whose figures of test data cannot be read."""

    def __getitem__(self, name):
        assert "accuracy" not in name and "test" not in name, f"{name} was read"
        return super().__getitem__(name)

    def get(self, name, default=None):
        return self[name] if name in self else default  # noqa: SIM401 - through the seal

    def items(self):
        raise AssertionError("the whole row was read")

    values = items


class Report(dict):
    """What a trial reports, which tells what of it is read."""

    def __init__(self, **values):
        super().__init__(values)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)


def test_nothing_measured_on_test_data_reaches_tune_or_optuna():
    columns = {name: 0.5 for name in results.schema("trials").names}
    row = Sealed(columns | {"status": "finished", "reference_kl": 0.1, "recovered_accuracy": 0.99})
    state = State(step=2, best_agreement=0.75, best_kl=0.1, best_step=1)
    told = [
        tune_reports.final(row, 6),
        tune_reports.final(Sealed(row | {"status": "failed"}), 6),
        tune_reports.evaluation(row, state),
    ]
    sought = {"reference_kl", "latency_ratio", "num_macs", "num_parameters"}
    assert {key for report in told for key in report} == {"step", "failed", "so_far", "looks"} | sought
    assert not any("accuracy" in name or "test" in name for name in json.loads(told[2]["so_far"]))
    assert told[0]["reference_kl"] == told[2]["reference_kl"] == 0.1 and told[1]["reference_kl"] == tune_reports.WORST
    assert tune_reports.final(None, 6) == told[1] and (tune_reports.METRIC, tune_reports.MODE) == (
        "reference_kl",
        "min",
    )
    no_number = tune_reports.evaluation(row, State(step=2, best_agreement=0.0, best_kl=math.inf))
    assert no_number["reference_kl"] == tune_reports.WORST, "Tune takes finite numbers"


def test_searcher_and_scheduler_are_given_the_kl_to_be_minimised(tiny_teacher):
    plan = sweep.prepare(settings_of(tiny_teacher, algorithm="optuna", stop={"asha": {}}), bundles.load)
    assert plan.search is not None and plan.stop is not None
    jobs = []
    searcher = optuna.searcher(plan.search, lambda job: jobs.append(job) or len(jobs) - 1)
    stopper = asha.scheduler(plan.stop, [job.config for job in plan.search.probes])
    assert (searcher.metric, searcher.mode, stopper.metric) == ("reference_kl", "min", "reference_kl")
    plan.search.begin([])
    point = searcher.suggest("one")
    report = Report(step=6, reference_kl=0.25, failed=0, row="a row with its accuracies")
    searcher.on_trial_complete("one", report)
    assert report.read == {"reference_kl", "failed"}, "no objective, no bound: the other columns are not looked at"
    assert [t.value for t in plan.search.study.get_trials()] == [0.25]
    assert plan.search.study.direction.name == "MINIMIZE"
    assert json.loads(point["config"])["teacher"] == str(tiny_teacher) and point["id"] == jobs[point["job"]].id


def test_a_trial_reports_each_look_and_its_numbers_do_not_depend_on_being_asked(tiny_teacher):
    config = sweep.expand(settings_of(tiny_teacher, num_trials=1), {})[0]
    teacher = bundles.load(str(tiny_teacher))
    seen = []

    def look(row, state):
        seen.append((state.step, tune_reports.evaluation(row, state)))

    told = trial.run(config, teacher, observer=trial.Observer(look=look))
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4, 5, 6]
    looks = [look["reference_kl"] for look in told.epochs]
    assert [report["reference_kl"] for _, report in seen] == list(itertools.accumulate(cast(list[float], looks), min))
    assert told.row["reference_kl"] <= seen[-1][1]["reference_kl"]
    assert json.loads(seen[1][1]["so_far"])["synthesis_key"] == told.row["synthesis_key"]
    assert json.loads(seen[-1][1]["looks"]) == list(told.epochs)
    silent = trial.run(config, teacher)
    same = [name for name in results.deterministic_columns() if name in told.row]
    assert [told.row[name] for name in same] == [silent.row[name] for name in same]
    assert not tune_reports.may_stop(State(step=3), 6), "while it is being pruned a student is no candidate"
    assert not tune_reports.may_stop(State(step=6, best_agreement=0.5), 6), "a trial at its end is not stopped"


# ---- early stopping ------------------------------------------------------------------------------------------------


def asha_of(num_steps=6, **options):
    stop = search.StopConfig(asha=search.AshaConfig(**options))
    data = tiny_trial(**LOOKS | {"distillation.num_steps": num_steps})
    return asha.scheduler(stop, sweep.expand(sweep.parse({"base": data, "grid": {"pruning.sparsity": [0.5]}}), {}))


def ask(stopper, name, step, kl, **more) -> str:
    if name not in stopper._trial_info:
        stopper.on_trial_add(None, SimpleNamespace(trial_id=name))
    report = Report(step=step, reference_kl=kl, row="a row with its accuracies", **more)
    decision = stopper.on_trial_result(None, SimpleNamespace(trial_id=name), report)
    assert report.read <= {"step", "reference_kl"}
    return decision


def test_a_trial_that_lags_behind_at_a_rung_is_stopped_and_one_at_its_end_is_not():
    stopper = asha_of(grace_looks=2, reduction_factor=2)
    assert ask(stopper, "best", 2, 0.1) == "CONTINUE"
    assert ask(stopper, "early", 1, 0.9) == "CONTINUE", "before the first rung"
    assert ask(stopper, "worse", 2, 0.7) == "STOP" and stopper.cut == {"worse"}
    assert ask(stopper, "better", 2, 0.05) == "CONTINUE"
    assert ask(stopper, "at its end", 6, 0.9, failed=0) == "CONTINUE" and stopper.cut == {"worse"}


def test_the_rungs_are_rebuilt_from_earlier_looks():
    stopper, again = asha_of(), asha_of()
    ask(stopper, "best", 1, 0.1)
    asha.prime(again, [("best", 1, 0.1), ("lost", 1, 0.8)])
    assert again.cut == set()
    assert ask(stopper, "new", 1, 0.7) == ask(again, "new", 1, 0.7) == "STOP"
    assert ask(asha_of(), "new", 1, 0.7) == "CONTINUE", "with no earlier trials it is the best"


# ---- Optuna --------------------------------------------------------------------------------------------------------


def objective(config) -> float:
    """To be minimised."""
    return abs(config.pruning.sparsity - 0.6) + 0.02 * config.distillation.temperature


def optimised(plan, rows, num) -> list:
    jobs = []
    assert plan.search.begin(rows) >= num
    for _ in range(num):
        job = plan.search.next()
        plan.search.tell(job.id, {"reference_kl": objective(job.config)})
        jobs.append(job)
    return jobs


def row_of(job, **values):
    measured = {"status": "finished", "reference_kl": objective(job.config)}
    return trial.provenance(job.config, job.teacher) | measured | values


def test_optuna_finds_better_points_than_it_starts_with(tiny_teacher):
    plan = sweep.prepare(settings_of(tiny_teacher, algorithm="optuna", num_trials=40), bundles.load)
    values = [objective(job.config) for job in optimised(plan, [], 40)]
    assert sum(values[-10:]) / 10 < sum(values[:10]) / 10 - 0.05


def test_optuna_looks_for_the_fastest_student_within_a_bound_and_for_the_best_that_is_fast_enough(tiny_teacher):
    """The network is the faster and the farther from its teacher, the sparser it is."""

    def told(job):
        sparsity = job.config.pruning.sparsity
        return {"reference_kl": sparsity, "latency_ratio": 1 / (1 - 0.9 * sparsity), "failed": 0}

    space = {"pruning.sparsity": {"uniform": [0.1, 0.6]}}
    for objective_, bounds, best in (
        ("latency_ratio", {"reference_kl": 0.3}, 0.3),
        ("reference_kl", {"latency_ratio": 1 / (1 - 0.9 * 0.4)}, 0.4),
    ):
        options = {"algorithm": "optuna", "num_trials": 40, "objective": objective_, "bounds": bounds}
        plan = sweep.prepare(settings_of(tiny_teacher, space=space, **options), bundles.load)
        assert plan.search is not None
        plan.search.begin([])
        jobs = []
        for _ in range(40):
            job = plan.search.next()
            assert job is not None
            plan.search.tell(job.id, told(job))
            jobs.append(job)
        late = [job.config.pruning.sparsity for job in jobs[-10:]]
        assert sum(abs(each - best) for each in late) / 10 < 0.08, (objective_, late)
        rows = [trial.provenance(jobs[0].config, jobs[0].teacher) | told(jobs[0]) | {"status": "finished"}]
        assert plan.search.begin(rows) == 39 and plan.search.study.get_trials()[0].constraints


def test_a_student_in_the_teachers_shape_is_as_fast_as_it_and_one_without_a_number_is_outside():
    bounds = search.SearchConfig(
        space={"pruning.sparsity": [0.5]}, num_trials=1, algorithm="optuna", bounds={"latency_ratio": 2.0}
    )
    assert search.excess(bounds, {"latency_ratio": None}) == {"latency_ratio": 1.0}
    assert search.excess(bounds, {"latency_ratio": 3.0}) == {"latency_ratio": -1.0}
    bounds = bounds.model_copy(update={"bounds": {"num_macs": 10.0}})
    assert search.excess(bounds, {}) == {"num_macs": math.inf}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "latency_ratio"}, "algorithm=optuna only"),
        ({"algorithm": "optuna", "bounds": {"reference_kl": 1.0}}, "it is the objective"),
        ({"algorithm": "optuna", "objective": "num_macs", "stop": {"asha": {}}}, "leave stop out"),
        ({"algorithm": "optuna", "bounds": {"recovered_accuracy": 0.9}}, "bounds"),
    ],
)
def test_an_objective_that_cannot_act_is_refused(tiny_teacher, options, said):
    refusal(lambda: settings_of(tiny_teacher, **options), said)


def test_a_resumed_search_knows_the_rows_and_tries_no_point_again(tiny_teacher, tmp_path):
    plan = sweep.prepare(settings_of(tiny_teacher, algorithm="optuna", num_trials=8), bundles.load)
    jobs = optimised(plan, [], 5)
    written = [row_of(job) for job in jobs[:3]]
    written += [row_of(jobs[3], status="stopped"), row_of(jobs[4], status="failed", reference_kl=None)]
    foreign = trial.provenance(jobs[0].config, jobs[0].teacher) | {"trial_id": "t-0", "status": "finished"}
    for row in [*written, {**foreign, "reference_kl": 0.5}]:
        results.write(tmp_path, "trials", [row], row["trial_id"])
    rows = sweep.rows_in(storage.folder(tmp_path))
    again = sweep.prepare(settings_of(tiny_teacher, algorithm="optuna", num_trials=8), bundles.load)
    assert again.search is not None
    assert again.search.begin(rows) == 4, "finished and stopped ones count, failed and foreign ones do not"
    states = Counter(t.state.name for t in again.search.study.get_trials())
    assert states == {"COMPLETE": 4, "FAIL": 1}
    assert {job.id for job in again.jobs_in(rows)} == {job.id for job in jobs}
    assert {t.value for t in again.search.study.get_trials()} == {row["reference_kl"] for row in written}
    assert not {job.id for job in optimised(again, rows, 4)} & {job.id for job in jobs[:4]}
    changed = settings_of(
        tiny_teacher,
        algorithm="optuna",
        num_trials=8,
        base=tiny_trial(tiny_teacher, **LOOKS, bn_num_images=16),
    )
    other = sweep.prepare(changed, bundles.load)
    assert other.search is not None and other.search.begin(rows) == 8, "rows of another base are of no use"


def test_a_resumed_search_knows_a_row_of_auto_by_what_it_stood_for(tiny_teacher):
    space = {"distillation.learning_rate": ["auto", 0.02], "distillation.bn_mode": ["auto", "frozen"]}
    settings = settings_of(tiny_teacher, algorithm="optuna", space=space, num_trials=4)
    plan = sweep.prepare(settings, bundles.load)
    jobs = optimised(plan, [], 4)
    rows = [row_of(job) for job in jobs]
    assert plan.search is not None and plan.search.begin(rows) == 0
    assert {job.id for job in plan.jobs_in(rows)} == {job.id for job in jobs}


def test_a_resumed_search_over_structures_knows_the_rows_in_which_fields_that_do_not_act_are_null(
    tiny_teacher, tmp_path
):
    space = {
        "pruning.structure": ["unstructured", "channels"],
        "pruning.criterion": ["lamp", "erk"],
        "pruning.sparsity": {"uniform": [0.1, 0.6]},
    }
    no_trial = [{"pruning.structure": "channels", "pruning.criterion": "erk"}]
    settings = settings_of(tiny_teacher, space=space, exclude=no_trial, algorithm="optuna", num_trials=30)
    plan = sweep.prepare(settings, bundles.load)
    jobs = optimised(plan, [], 12)
    assert {job.config.pruning.structure for job in jobs} == {"unstructured", "channels"}
    for row in map(row_of, jobs):
        results.write(tmp_path, "trials", [row], row["trial_id"])
    assert plan.search is not None
    assert plan.search.begin(sweep.rows_in(storage.folder(tmp_path))) == 30 - 12


def test_a_space_that_is_used_up_ends_the_search(tiny_teacher):
    space = {"pruning.sparsity": [0.5, 0.7, 0.9]}
    exclude = [{"pruning.sparsity": 0.7}]
    settings = settings_of(tiny_teacher, algorithm="optuna", space=space, num_trials=5, exclude=exclude)
    plan = sweep.prepare(settings, bundles.load)
    assert plan.search is not None
    plan.search.begin([])
    found = [plan.search.next() for _ in range(3)]
    assert {job.config.pruning.sparsity for job in found if job} == {0.5, 0.9} and found[2] is None


def test_optuna_that_is_missing_is_said_in_one_line(tiny_teacher, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'dfkd_ray\[search\]'") as caught:
        sweep.prepare(settings_of(tiny_teacher, algorithm="optuna"), bundles.load)
    assert len(str(caught.value).splitlines()) == 1


# ---- the whole, over Ray -------------------------------------------------------------------------------------------


SCRIPT = """
import doctest, sys, threading
from pathlib import Path
import yaml
from dfkd_ray import bundles, fleet, sweep

folder = Path(sys.argv[1])
lock = threading.Lock()  # as a live view has one: it cannot be pickled
with fleet.connected(num_cpus=1):  # one trial at a time, in one process
    assert doctest.testmod(sweep, extraglobs={"folder": folder}).failed == 0
    settings = sweep.parse(yaml.safe_load((folder / "optuna.yaml").read_text()))
    for _ in range(2):
        told = []
        plan = sweep.prepare(settings, bundles.load)
        alone = sweep.Cluster(synthesizers=0)
        heard = sweep.Callbacks(on_row=lambda row, _, total: lock and told.append(total))
        sweep.run(plan, folder / "optuna", None, cluster=alone, callbacks=heard)
        print(told)
"""


@pytest.fixture(scope="module")
def ran(tiny_teacher, tmp_path_factory):
    """The example of the package's docstring, and an Optuna search with early stopping, run twice, in one process."""
    folder = tmp_path_factory.mktemp("search")
    stop = {"asha": {"grace_looks": 1, "reduction_factor": 1.5}}
    settings = settings_of(tiny_teacher, algorithm="optuna", num_trials=6, stop=stop)
    (folder / "optuna.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, settings, done.stdout


def test_the_example_of_the_package_runs(ran):
    folder, _, _ = ran
    assert (folder / "grid" / "trials").is_dir() and len(results.read(folder / "search", "trials")) == 3


def test_an_optuna_search_leaves_a_row_a_trial_and_is_not_run_again(ran):
    folder, settings, said = ran
    assert said.splitlines() == [str([6] * 6), "[]"]
    rows = sweep.rows_in(storage.folder(folder / "optuna"))
    assert len(rows) == 6 and {row["status"] for row in rows} <= {"finished", "stopped"}
    jobs = sweep.prepare(settings, bundles.load).jobs_in(rows)
    assert {job.id for job in jobs} == {row["trial_id"] for row in rows}
    shown = (folder / "optuna" / "tensorboard" / "events.out.tfevents.sweep").read_bytes()
    assert all(str(json.loads(job.config.model_dump_json())["synthesis"]["method"]).encode() in shown for job in jobs)


def test_a_stopped_trial_leaves_its_numbers_so_far_and_no_student(ran):
    folder, _, _ = ran
    rows = [row for name in ("search", "optuna") for row in sweep.rows_in(storage.folder(folder / name))]
    looks = pd.concat(results.read(folder / name, "epochs") for name in ("search", "optuna"))
    by_trial: Any = looks.groupby("trial_id")["reference_kl"].min()
    lowest = by_trial.to_dict()
    assert any(row["status"] == "finished" for row in rows)
    for row in rows:
        students = [folder / name / "students" / row["trial_id"] for name in ("search", "optuna")]
        assert any(student.exists() for student in students) == (row["status"] == "finished")
        assert 0 <= row["agreement"] <= 1 and len(row["images_sha256"]) == 64
        assert row["status"] == "finished" or "stopped early at step" in row["reason"]
        assert row["reconstructed_agreement"] is not None and row["reconstruction_wall_s"] > 0
        if row["selected"] == "pruned":  # a rung that is no look
            assert row["reference_kl"] < lowest[row["trial_id"]]
        else:
            assert row["reference_kl"] == lowest[row["trial_id"]]
        assert not (folder / "optuna" / "checkpoints" / row["trial_id"]).exists()


# ---- estimates -----------------------------------------------------------------------------------------------------


def grid_jobs(tiny_teacher, **parts):
    settings = sweep.parse({"base": tiny_trial(tiny_teacher, **LOOKS), **parts})
    return sweep.prepare(settings, bundles.load).jobs


def test_the_keys_and_batches_of_an_estimate_are_those_of_a_real_run(tiny_teacher):
    jobs = grid_jobs(
        tiny_teacher,
        grid={
            "bn_num_images": [8, 24],
            "synthesis": [TINY_NOISE, TINY_TRIAL["synthesis"]],
            "pruning.sparsity": [0.5],
        },
    )
    real: dict[str, int] = {}
    for job in jobs:
        outcome = trial.run(job.config, job.teacher)
        assert outcome.row["status"] == "finished"
        own = Counter(row["synthesis_key"] for row in outcome.synthesis)
        real |= {key: max(num, real.get(key, 0)) for key, num in own.items()}
    planned = {made.key: made.num_batches for made in estimate.syntheses(jobs)}
    assert planned == real and len(planned) == 3


@pytest.mark.parametrize("num_fitted", [0, 16])
def test_an_estimate_adds_up(tiny_teacher, num_fitted):
    fields = {"pruning.sparsity": [0.5, 0.7, 0.9], "reconstruction.num_images": [num_fitted]}
    jobs = grid_jobs(tiny_teacher, grid=fields)
    costs = costs_of(jobs)
    one = estimated(jobs, costs, 1)
    before = 3 if num_fitted else 2  # rungs before training
    images = 8 * (1 + before + 7) + 8 + 8  # reference: teacher, these rungs and seven looks; pool; BatchNorm
    # The fit, its distance on the reference set, and on its own images with the teacher's answers.
    images += estimate.RECONSTRUCTION * 2 * num_fitted + 3 * 8 if num_fitted else 0
    synthesis_s, trials_s = 2 * 4.0, 3 * (6 * 2.0 + 0.1 * images)
    assert one.synthesis_h * 3600 == pytest.approx(synthesis_s) and one.trials_h * 3600 == pytest.approx(trials_s)
    assert one.unshared_h * 3600 == pytest.approx(3 * synthesis_s)
    assert one.wall_s == pytest.approx(estimate.START_S + synthesis_s + trials_s)
    many = estimated(jobs, costs, 1000, "GPU")
    assert (many.synthesis_h, many.trials_h) == (one.synthesis_h, one.trials_h)
    assert many.wall_s == pytest.approx(estimate.START_S + synthesis_s + trials_s / 3), "no sooner than a trial"
    tested = estimated(jobs, costs, 1, num_test_images=100)
    assert tested.trials_h * 3600 == pytest.approx(trials_s + 3 * (before + 1) * 100 * 0.1)
    cached = estimated(jobs, costs, 1, num_cached=9)
    assert cached.synthesis_h == 0 and cached.trials_h == one.trials_h and cached.unshared_h == one.unshared_h


def test_calibration_times_every_unit_once_and_keeps_its_cap(tiny_teacher):
    jobs = grid_jobs(tiny_teacher, grid={"pruning.sparsity": [0.5, 0.9], "distillation.batch_size": [4, 8]})
    costs = calibrated(jobs, cap_s=1.0)
    assert set(costs) == set(costs_of(jobs)) and len(costs) == 3
    assert all(cost.step_s > 0 for cost in costs.values())
    assert estimated(jobs, costs, 2).trials_h > 0


@pytest.mark.parametrize("overhead", [0.0, 0.004])
def test_work_that_cannot_be_afforded_is_timed_on_fewer_images_and_scaled(overhead, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock.now)

    def work(steps, batch_size):
        def run():
            clock.now += 0.01 + steps * (overhead + 0.001 * batch_size)

        return run

    for batch_size, share_s in ((1, 1.0), (8, 1.0), (256, 10.0), (1024, 2.0), (4096, 0.1)):
        clock.now = 0.0
        cost = estimate.per_step(work, batch_size, share_s)
        assert cost.scaled == (batch_size > 256) and clock.now < share_s + 0.3
        rel = 0.01 if not cost.scaled else 1.3
        assert cost.step_s == pytest.approx(overhead + 0.001 * batch_size, rel=rel)


def test_a_batch_that_waits_for_the_device_and_not_for_images_is_not_taken_to_grow_with_them(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock.now)

    def work(steps, _batch_size):
        def run():
            clock.now += 0.1 * steps

        return run

    cost = estimate.per_step(work, 256, 0.5)
    assert cost.step_s == pytest.approx(0.1) and clock.now < 1.2


def test_a_dry_run_says_what_will_be_run_and_starts_nothing(tiny_teacher, tmp_path, run_cli, monkeypatch):
    monkeypatch.setattr(estimate, "CAP_S", 0.2)
    monkeypatch.setattr("ray.init", lambda *_a, **_k: pytest.fail("Ray was started"))
    grid = {
        "pruning.sparsity": [0.5, 0.9],
        "synthesis": [{"method": "noise", "batch_size": 8}, {"num_steps": 1, "batch_size": 8}],
    }
    space = {"space": SPACE, "algorithm": "optuna", "num_trials": 4}
    for parts in ({"grid": grid}, {"search": space}):
        file = tmp_path / "s.yaml"
        file.write_text(yaml.safe_dump({"base": tiny_trial(tiny_teacher, **LOOKS), **parts}))
        done = run_cli("sweep", str(file), "--dry-run", "--results", str(tmp_path / "out"), "--test-data", "none")
        assert done.code == 0, done.err
        assert "4 trials, 0 already finished" in done.out and "3 distinct syntheses, 3 batches" in done.out
        assert "CPU core-hours" in done.out and "timings in" in done.out and not (tmp_path / "out").exists()
    assert run_cli("sweep", str(file), "--dry-run", "--gpus", "4").code == 2
    assert run_cli("sweep", str(file), "--gpus", "4").code == 2
