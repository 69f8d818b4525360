"""A cluster that begins as a head without CPUs: machines are launched for a sweep and taken back after it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoscaling import autoscaled
from dfkd_ray import devices, fleet, results
from dfkd_ray.cli.options import range_of
from dfkd_ray.fleet.placement import Node
from dfkd_ray.sweep import machines
from helpers import jobs_of, sweep_of_four


@pytest.mark.timeout(2400)
def test_machines_come_with_waiting_images_and_go_when_they_are_idle(tiny_teacher, tmp_path):
    script = Path(__file__).with_name("run_elastic.py")
    with autoscaled(tmp_path, {"CPU": 1}, most=2, idle_s=8.0) as address:
        done = subprocess.run(
            [sys.executable, str(script), address, str(tiny_teacher), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=2000,
            check=False,
            env={**os.environ, **fleet.QUIET, "RAY_AUTH_MODE": "disabled"},
        )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["at first"] == 0 and "no CPU is free" in told["refused"] and "`synthesizers=1-8`" in told["refused"]
    assert "no machine has CPUs yet: waiting up to 900 s" in done.stderr
    assert told["failed"] == 0 and set(results.read(tmp_path / "results", "trials")["status"]) == {"finished"}
    assert told["grown"] == [2, 2], "one more synthesizer, on one more machine"
    assert told["shrunk"] and told["first stays up"] == 1 and told["all gone"]


# ---- without Ray ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch):
    """Machines as a test says, one list after the other; what was asked of the autoscaler."""
    asked: list = []

    def be(*looks: list[Node]):
        left = list(looks)
        monkeypatch.setattr(fleet, "nodes", lambda: left.pop(0) if len(left) > 1 else left[0])
        monkeypatch.setattr(fleet, "budget_bytes", lambda: 1000)
        monkeypatch.setattr(machines, "LOOK_S", 0.0)
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
        return asked

    return be


HEAD, CPUS, GPUS = Node(0.0), Node(8.0), Node(8.0, 2.0)


def preflight(jobs, synthesizers, shares=(None, None), limit_s=60.0):
    of_synthesizer, of_trial = shares
    with machines.first_machine(jobs, synthesizers, of_synthesizer, of_trial, limit_s):
        return machines.preflight(jobs, None, synthesizers, of_synthesizer, of_trial)


def on_device(jobs, device):
    return [type(job)(job.config.model_copy(update={"device": device}), job.teacher, job.id) for job in jobs]


def test_a_first_machine_is_asked_for_waited_for_and_the_request_withdrawn(cluster, tiny_teacher):
    asked = cluster([HEAD], [HEAD], [HEAD, CPUS])
    settings, placement = preflight(jobs_of(sweep_of_four(tiny_teacher)), (1, 64))
    assert asked == [[{"CPU": 1.0}], []]
    assert (settings.num_synthesizers, settings.most, settings.added_cpus) == (1, 64, 1.0)
    assert placement.num_trials == 8


@pytest.mark.parametrize(
    ("shares", "bundles"),
    [
        ((None, 1.0), [{"GPU": 1.0}] * 3),
        ((0.25, 0.0), [{"GPU": 1.0}]),
        ((0.0, 0.25), [{"GPU": 1.0}]),
        ((2.0, 1.0), [{"GPU": 2.0}] * 3),
        ((0.0, 0.0), [{"CPU": 1.0}]),
    ],
)
def test_where_shares_of_gpus_are_given_machines_with_room_for_fleet_and_trial_are_asked_for(
    cluster, tiny_teacher, shares, bundles
):
    asked = cluster([HEAD], [HEAD, GPUS], [HEAD, GPUS, GPUS, GPUS])
    settings, placement = preflight(on_device(jobs_of(sweep_of_four(tiny_teacher)), "auto"), (2, 4), shares)
    assert asked == [bundles, []]
    assert (settings.gpus, placement.trial_gpus) == tuple(0.5 if share is None else share for share in shares)
    assert settings.device == ("auto" if settings.gpus else "cpu"), "what reserves no GPU takes nobody's"


def test_where_no_machine_comes_the_request_is_withdrawn_and_the_words_say_what_was_asked_for(cluster, tiny_teacher):
    asked = cluster([HEAD])
    with pytest.raises(OSError, match=r"no machine .* within 0 s: 1 CPUs were asked for, 0 with CPUs .*`ray status`"):
        preflight(jobs_of(sweep_of_four(tiny_teacher)), (1, 2), limit_s=0.0)
    assert asked == [[{"CPU": 1.0}], []]


def test_no_machine_is_asked_for_with_a_range_that_is_none(cluster, tiny_teacher):
    asked = cluster([HEAD])
    for synthesizers in ((4, 2), (0, 2)):
        with pytest.raises(ValueError, match="the fewest not above the most"):
            preflight(jobs_of(sweep_of_four(tiny_teacher)), synthesizers, limit_s=0.0)
    assert asked == []


def test_nothing_is_asked_for_without_a_range_or_where_there_are_machines(cluster, tiny_teacher):
    jobs = jobs_of(sweep_of_four(tiny_teacher))
    asked = cluster([HEAD])
    for synthesizers in (None, 1):
        with pytest.raises(ValueError, match=r"no CPU is free; .* give a range of synthesizers, as in `synthesizers="):
            preflight(jobs, synthesizers)
    assert cluster([HEAD, CPUS]) is asked
    settings, _ = preflight(jobs, (2, 4))
    assert settings.num_synthesizers == 2 and asked == []
    automatic, _ = preflight(jobs, None)
    assert (automatic.most, automatic.added_cpus) == ("auto", 0.0), "what is added takes nothing that a trial needs"
    assert preflight(jobs, 3)[0].most is None


def test_trials_without_a_share_of_a_gpu_may_not_insist_on_one(cluster, tiny_teacher):
    cluster([GPUS])
    jobs = jobs_of(sweep_of_four(tiny_teacher))
    with pytest.raises(ValueError, match=r"`gpus_per_trial=0`: trials with device=cuda need a share"):
        preflight(on_device(jobs, "cuda"), 1, (None, 0.0))
    settings, placement = preflight(on_device(jobs, "auto"), 1, (None, 0.0))
    assert placement.trial_gpus == 0 and settings.gpus == 0.5 and settings.device == "auto"


def test_a_process_that_hides_its_gpus_computes_on_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    devices.hide_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and devices.resolve("auto").type == "cpu"


@pytest.mark.parametrize(("text", "asked"), [("auto", None), ("0", 0), ("7", 7), ("1-64", (1, 64)), ("3-3", (3, 3))])
def test_synthesizers_are_auto_a_number_or_a_range(text, asked):
    assert range_of(text) == asked


@pytest.mark.parametrize("text", ["", "-", "1-", "-1", "0-4", "4-2", "1-2-3", "1.5", "many"])
def test_other_words_for_synthesizers_are_refused(text):
    with pytest.raises(ValueError, match="--synthesizers"):
        range_of(text)
