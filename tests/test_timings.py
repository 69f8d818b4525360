"""Plans from stored timings: what bounds a sweep on many GPUs, and the file that carries costs between machines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dfkd_ray import __version__, bundles, devices, sweep
from dfkd_ray.sweep import estimate, timings
from helpers import costs_of, estimated, tiny_trial

H200 = "NVIDIA H200, torch 2.15.0"
SPARSITIES = {"pruning.sparsity": [0.5, 0.7, 0.9]}
FIELDS = {"device": "auto", "distillation.num_steps": 6, "distillation.eval_every": 1}


def grid_jobs(teacher, grid=SPARSITIES, on_gpu=False, **base) -> list[sweep.Job]:
    settings = sweep.parse({"base": tiny_trial(teacher, **FIELDS | base), "grid": grid})
    return sweep.prepare(settings, bundles.load, on_gpu=on_gpu).jobs


def units_of(jobs) -> dict[estimate.Unit, estimate.Work]:
    return {estimate.unit_of(one): one for one in (*estimate.syntheses(jobs), *jobs)}


def stored_for(jobs, kind: Any = "GPU", numerics=H200, version=__version__) -> timings.Timings:
    """Timings of made-up seconds for all units of these jobs."""
    device = numerics.partition(", torch")[0]
    return timings.Timings(package_version=version, kind=kind, device=device, numerics=numerics, costs=costs_of(jobs))


def timings_in(path: Path) -> timings.Timings:
    found = timings.read(path)
    assert found is not None
    return found


@pytest.fixture
def dry(tiny_teacher, tmp_path, run_cli, monkeypatch):
    """A dry run of a grid on a machine without GPU, on which nothing is to be started."""
    monkeypatch.setattr("ray.init", lambda *_a, **_k: pytest.fail("Ray was started"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(estimate, "CAP_S", 0.5)

    def run(*words, grid=SPARSITIES, **base):
        data = {"base": tiny_trial(tiny_teacher, **FIELDS | base), "grid": grid}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(data))
        places = ("--results", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--test-data", "none")
        return run_cli("sweep", str(tmp_path / "s.yaml"), "--dry-run", *places, *words)

    return run


# ---- what bounds a sweep -------------------------------------------------------------------------------------------


def costs_with(jobs, batch_s: float, step_s: float) -> dict[estimate.Unit, estimate.Cost]:
    return {
        unit: estimate.Cost(step_s if isinstance(one, sweep.Job) else batch_s) for unit, one in units_of(jobs).items()
    }


def test_a_wall_time_is_that_of_all_the_work_of_a_trials_images_or_of_a_trial(tiny_teacher):
    jobs = grid_jobs(tiny_teacher, grid=SPARSITIES | {"bn_num_images": [80]})  # 10 batches, and one of the reference
    steps = jobs[0].config.distillation.num_steps

    def planned(num, batch_s, step_s):
        return estimated(jobs, costs_with(jobs, batch_s, step_s), num, "GPU")

    one = planned(1, 100.0, 1.0)
    assert one.bound == "work" and one.wall_s == estimate.START_S + 11 * 100 + 3 * steps
    four = planned(4, 100.0, 1.0)
    assert four.bound == "images" and four.waits_s == 100 + 3 * 100, "one round of the reference set, three of ten"
    assert four.wall_s == estimate.START_S + 400 + steps and four.synthesis_h == one.synthesis_h == 1100 / 3600
    many = planned(64, 100.0, 1.0)
    assert many.waits_s == 200 and many.wall_s == estimate.START_S + 200 + steps
    slow = planned(64, 1.0, 1000.0)
    assert slow.bound == "trial" and slow.wall_s == estimate.START_S + 2 + 1000 * steps


def test_more_gpus_never_take_longer_and_never_less_than_a_trial_with_its_images(tiny_teacher):
    jobs = grid_jobs(tiny_teacher, grid=SPARSITIES | {"bn_num_images": [24, 80]})
    costs = costs_with(jobs, 7.0, 1.0)
    walls = [estimated(jobs, costs, num, "GPU").wall_s for num in range(1, 40)]
    assert walls == sorted(walls, reverse=True)
    assert walls[-1] == estimate.START_S + 2 * 7.0 + jobs[0].config.distillation.num_steps


def test_nobody_waits_for_batches_that_are_in_the_cache(tiny_teacher):
    jobs = grid_jobs(tiny_teacher)
    cached = estimated(jobs, costs_of(jobs), 64, "GPU", num_cached=99)
    assert cached.waits_s == 0 and cached.synthesis_h == 0 and cached.bound == "trial"


def test_units_tell_apart_what_takes_other_seconds_and_nothing_else(tiny_teacher):
    same = {"pruning.sparsity": [0.5, 0.9], "distillation.temperature": [2, 4], "synthesis.num_steps": [1, 3]}
    assert len(units_of(grid_jobs(tiny_teacher, grid=same))) == 2, "of batches, and of trials"
    other = {
        "distillation.batch_size": [4, 8],
        "student.architecture": [None, "resnet8"],
        "synthesis.precision": ["float32"],
    }
    jobs = grid_jobs(tiny_teacher, grid=other)
    assert len(units_of(jobs)) == 4 + 2
    assert set(units_of(jobs)) == set(costs_of(jobs)) and {one.teacher.name for one in units_of(jobs).values()} == {
        "tiny"
    }


# ---- the file ------------------------------------------------------------------------------------------------------


def test_timings_read_back_as_written_and_give_the_same_costs(tiny_teacher, tmp_path):
    jobs = grid_jobs(tiny_teacher)
    written = stored_for(jobs)
    path = tmp_path / "new" / "h200.json"
    assert timings.read(path) is None
    timings.write(path, written)
    assert timings.read(path) == written and written.costs == costs_of(jobs)
    data = json.loads(path.read_text())
    assert (data["device"], data["numerics"], data["package_version"]) == ("NVIDIA H200", H200, __version__)
    assert {unit.split()[0] for unit in data["costs"]} == {"synthesis", "trial"}
    assert all(f" {jobs[0].teacher.hash} " in unit and " batch_size=" in unit for unit in data["costs"])
    assert [set(cost) for cost in data["costs"].values()] == [{"step_s", "image_s", "scaled"}] * 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: "{", "not valid JSON"),
        (lambda data: [], "schema_version is 'list', this version reads"),
        (lambda data: data | {"schema_version": "dfkd_ray.figures/1"}, "schema_version is 'dfkd_ray.figures/1'"),
        (lambda data: data | {"kind": "TPU"}, "kind: input should be 'GPU' or 'CPU core'"),
        (lambda data: data | {"extra": 1}, "extra: unknown field"),
        (lambda data: data | {"costs": {"a": {"step_s": -1}}}, "costs.a.step_s: "),
        (lambda data: data | {"costs": {"a": {"step_s": 1, "extra": 1}}}, "costs.a.extra: "),
        (lambda data: json.dumps(data)[:-1] + ', "costs": {}}', "'costs' is given twice"),
    ],
)
def test_what_is_no_file_of_timings_is_refused(tiny_teacher, tmp_path, change, says):
    path = tmp_path / "f.json"
    changed = change(stored_for(grid_jobs(tiny_teacher)).model_dump(mode="json"))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError) as caught:
        timings.read(path)
    assert f"`timings` {path}" in str(caught.value) and says in str(caught.value)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_a_sweep_for_gpus_is_planned_on_a_machine_without_one(dry, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "calibrate", lambda *_a, **_k: pytest.fail("something was timed"))
    path = tmp_path / "h200.json"
    timings.write(path, stored_for(grid_jobs(tiny_teacher), version="0.0.9"))
    done = dry("--gpus", "64", "--timings", str(path))
    assert done.code == 0, done.err
    assert "3 trials, 0 already finished" in done.out and "2 distinct syntheses" in done.out
    assert "on 64 GPUs" in done.out and "GPU-hours" in done.out
    assert "bound by: the longest trial" in done.out
    assert f"timings of {path}, timed on {H200} by dfkd_ray 0.0.9 (this is {__version__})" in done.out
    assert not (tmp_path / "out").exists()


def test_what_only_a_gpu_can_do_is_planned_on_a_machine_without_one(dry, tiny_teacher, tmp_path):
    base = {"device": "cuda", "distillation.precision": "tf32", "distillation.fast": True}
    path = tmp_path / "h200.json"
    timings.write(path, stored_for(grid_jobs(tiny_teacher, on_gpu=True, **base)))
    done = dry("--gpus", "8", "--timings", str(path), **base)
    assert done.code == 0 and "on 8 GPUs" in done.out, done.err
    assert dry("--gpus", "8", **base).code == 2


def test_timings_are_written_where_there_are_none_and_are_used_the_next_time(dry, tmp_path, monkeypatch):
    path = tmp_path / "cpu.json"
    done = dry("--timings", str(path))
    assert done.code == 0 and f"timings written to {path}" in done.out, done.err
    written = timings_in(path)
    assert written.kind == "CPU core" and written.numerics == devices.numerics_class(torch.device("cpu"))
    assert len(written.costs) == 2 and all(cost.step_s > 0 for cost in written.costs.values())
    timed = []
    real = estimate.calibrate
    monkeypatch.setattr(estimate, "calibrate", lambda *a, **k: timed.append(real(*a, **k)) or timed[-1])
    done = dry("--timings", str(path))
    assert done.code == 0 and not timed and "bound by: " in done.out and "2 timings of " in done.out
    done = dry("--timings", str(path), grid={"distillation.batch_size": [4, 8]})
    assert done.code == 0 and [len(costs) for costs in timed] == [1], "what was lacking, and no more"
    assert len(timings_in(path).costs) == 3 and timings_in(path).costs == written.costs | timed[0]


def test_what_timings_cannot_say_is_one_line_with_what_to_do(dry, tiny_teacher, tmp_path):
    path, cpu = tmp_path / "h200.json", tmp_path / "cpu.json"
    jobs = grid_jobs(tiny_teacher)
    timings.write(path, stored_for(jobs))
    timings.write(cpu, stored_for(jobs, "CPU core", "x86_64 AVX2, torch 2.0"))
    lacking = {"distillation.batch_size": [2, 3, 4, 5, 6]}
    for words, says, grid in (
        (("--gpus", "4"), "this machine has no GPU that the sweep would use", SPARSITIES),
        (("--timings", str(path)), "--timings are of a GPU (NVIDIA H200): say how many to plan for", SPARSITIES),
        (("--timings", str(path), "--gpus", "0"), "say how many to plan for, as in --gpus 8", SPARSITIES),
        (("--timings", str(cpu), "--gpus", "4"), "these --timings are of CPU cores (x86_64 AVX2)", SPARSITIES),
        (("--timings", str(path), "--gpus", "4"), "lacks 5 of 6 units of work: trial with tiny (batch_size=2", lacking),
        (("--timings", str(cpu)), "run this dry run with it on a machine of its kind (x86_64 AVX2", lacking),
    ):
        done = dry(*words, grid=grid)
        assert done.code == 2 and len(done.err.splitlines()) == 1 and says in done.err, done.err
    assert ", and 4 more" in done.err and timings_in(cpu).costs == costs_of(jobs), "nothing was added"
    done = dry("--timings", str(path), "--gpus", "4", device="cpu")
    assert done.code == 2 and "all trials have device=cpu" in done.err


def test_images_that_answer_to_a_student_are_counted_for_each_trial_and_in_whole_rounds(tiny_teacher):
    def made(method: str) -> dict[str, int]:
        synthesis = {"method": method, "batch_size": 8, "num_rounds": 3, "num_threads": 1}
        distillation = {"num_images": 8, "num_steps": 6, "num_threads": 1}
        jobs = grid_jobs(tiny_teacher, synthesis=synthesis, distillation=distillation, bn_num_images=8)
        found = [one for one in estimate.syntheses(jobs) if one.domain == "train"]
        assert {one.num_users for one in found} == {len(jobs) // len(found)}
        return {one.key: one.num_batches for one in found}

    assert list(made("dafl").values()) == [3], "shared by all three trials"
    assert list(made("dfad").values()) == [3, 3, 3]
