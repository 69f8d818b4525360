"""Batch sizes that fit into memory (`batch_size: auto`), and what is said of memory and hours before a run starts."""

import json

import pytest
import torch
from torch import nn

from dfkd_ray import bundles, sweep, trial, untrusted
from dfkd_ray.cli import before
from dfkd_ray.config import DeepInversionConfig, RecordsConfig, TrialConfig, validate
from dfkd_ray.sweep import json_schema
from dfkd_ray.synthesis import memory
from helpers import TINY_SETS, assert_one_error, refusal, set_words, tiny_sweep, tiny_trial

CPU = torch.device("cpu")
AUTO = {"synthesis.batch_size": "auto", "reference.synthesis.batch_size": "auto"}


def give_memory(monkeypatch, num_bytes):
    """From here on, one batch may need so many bytes on this machine."""
    monkeypatch.setattr(memory, "share_bytes", lambda _device, _num_threads: int(num_bytes))


@pytest.fixture
def teacher(tiny_teacher):
    return bundles.load(tiny_teacher)


def sizes(teacher, config):
    return memory.fitting_batch_size(teacher, config, CPU, "synthesis")


@pytest.mark.parametrize("config", [DeepInversionConfig(), RecordsConfig()], ids=lambda config: config.method)
def test_the_default_is_halved_until_it_fits(teacher, monkeypatch, config):
    default, image = config.batch_size, memory.step_bytes(teacher)
    for halvings in range(4):
        give_memory(monkeypatch, image * (default // 2**halvings))
        assert sizes(teacher, config) == default // 2**halvings
        give_memory(monkeypatch, image * (default // 2**halvings) - 1)
        assert sizes(teacher, config) == default // 2 ** (halvings + 1)
    give_memory(monkeypatch, image * memory.SMALLEST)
    assert sizes(teacher, config) == memory.SMALLEST
    give_memory(monkeypatch, image * memory.SMALLEST - 1)
    refusal(lambda: sizes(teacher, config), "synthesis.batch_size=auto", "of this machine's memory", "give a number")


def test_the_share_goes_by_the_total_memory_and_the_work_at_once(monkeypatch):
    monkeypatch.setattr(untrusted, "total_bytes", lambda: 64 << 30)
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _pid: range(8))
    assert memory.share_bytes(CPU, 2) == 8 << 30
    assert memory.share_bytes(CPU, 8) == memory.share_bytes(CPU, 16) == 32 << 30


def test_a_limit_of_the_cgroup_counts_as_the_machine_s_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(untrusted, "CGROUP", tmp_path)
    whole = untrusted.total_bytes()
    (tmp_path / "memory.max").write_text("1000000\n")
    assert untrusted.total_bytes() == 1_000_000
    (tmp_path / "memory.current").write_text("900000\n")
    assert untrusted.free_bytes() == 100_000
    (tmp_path / "memory.max").write_text("max\n")
    assert untrusted.total_bytes() == whole


def test_what_a_pass_keeps_is_what_its_layers_hand_on():
    """ReLU keeps its output (8 channels of 6x6), and the convolution its input."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    network[0].bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in network.parameters()]
    for num_images in (1, 4):
        for trained in (False, True):
            kept = memory.kept_bytes(network, (3, 8, 8), num_images, trained)
            assert kept == 4 * num_images * (8 * 36 + 3 * 64)
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert all(parameter.grad is None for parameter in network.parameters())


def test_auto_is_the_same_trial_as_the_number_that_it_stands_for(teacher, tiny_teacher, monkeypatch):
    give_memory(monkeypatch, memory.step_bytes(teacher) * 16)
    auto = validate(TrialConfig, tiny_trial(tiny_teacher, **AUTO))
    number = validate(TrialConfig, tiny_trial(tiny_teacher, **dict.fromkeys(AUTO, 16)))
    pinned = trial.pinned(auto, teacher)
    assert pinned == trial.pinned(number, teacher)
    row = trial.run(auto, teacher).row
    assert row["synthesis.batch_size"] == row["reference.synthesis.batch_size"] == row["num_images"] == 16
    assert row["trial_id"] == trial.trial_id(pinned, teacher)
    give_memory(monkeypatch, memory.step_bytes(teacher) * 8)  # another machine: another trial, other images
    assert trial.trial_id(trial.pinned(auto, teacher), teacher) != row["trial_id"]


@pytest.mark.parametrize("varied", [{"grid": [{"pruning.sparsity": [0.5]}]}, "search"])
def test_a_sweep_takes_auto_here_and_refuses_it_for_other_machines(tiny_teacher, varied):
    data = tiny_sweep(tiny_teacher, {"pruning.sparsity": [0.5]}, **AUTO)
    if varied == "search":
        del data["grid"]
        data["search"] = {
            "algorithm": "optuna",
            "num_trials": 2,
            "space": {"pruning.sparsity": {"uniform": [0.5, 0.6]}},
        }
    settings = sweep.parse(data)
    plan = sweep.prepare(settings, bundles.load)
    assert {job.config.synthesis.batch_size for job in plan.known_jobs} == {256}
    refusal(lambda: sweep.prepare(settings, bundles.load, on_gpu=True), "batch_size=auto", "give a number")


@pytest.mark.parametrize("value", ["Auto", 1, None, True, 2.5])
def test_another_value_is_refused_with_the_field_s_name(value):
    wrong = {"teacher": "t", "synthesis": {"batch_size": value}}
    text = refusal(lambda: validate(TrialConfig, wrong), "synthesis.batch_size: ", "or auto")
    assert "number." not in text
    refusal(
        lambda: validate(TrialConfig, {"teacher": "t", "distillation": {"batch_size": "auto"}}),
        "distillation.batch_size",
    )


def test_the_schema_of_sweep_files_knows_auto():
    assert '"const": "auto"' in json.dumps(json_schema())


def test_recover_says_the_size_the_memory_and_the_hours_before_it_starts(
    run_cli, tiny_teacher, teacher, monkeypatch, tmp_path
):
    give_memory(monkeypatch, memory.step_bytes(teacher) * 8)
    monkeypatch.setattr(before, "LONG_S", 0.0)
    monkeypatch.setattr(before, "CAP_S", 1.0)
    sets = TINY_SETS | {"synthesis.batch_size": "auto", "distillation.batch_size": 16, "distillation.num_steps": 80}
    done = run_cli("recover", str(tiny_teacher), "--out", str(tmp_path / "o"), *set_words(sets))
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("synthesis.batch_size=auto: 8 images")
    assert any(line.startswith("estimated: ") for line in lines)
    assert any(line.endswith("with --set distillation.num_steps=75") for line in lines)
    assert "warning: distillation.batch_size=16 needs about" in done.err and "lower it" in done.err
    assert "reference.synthesis" not in done.err  # 8 images fit
    assert json.loads((tmp_path / "o" / "row.json").read_text())["synthesis.batch_size"] == 8


def test_a_short_run_is_not_timed(run_cli, tiny_teacher, tmp_path):
    done = run_cli("recover", str(tiny_teacher), "--out", str(tmp_path / "o"), *set_words(TINY_SETS))
    assert done.code == 0 and "estimated: " not in done.out and "warning: distillation" not in done.err


def test_synthesize_warns_of_a_batch_that_may_not_fit_and_refuses_auto_where_none_fits(
    run_cli, tiny_teacher, monkeypatch, tmp_path
):
    monkeypatch.setattr("dfkd_ray.cli.synthesize.through_fleet", lambda *_: None)
    monkeypatch.setattr("dfkd_ray.image_sets.finish", lambda *_, **__: "nothing")
    give_memory(monkeypatch, 1000)
    words = ["synthesize", str(tiny_teacher), "--out", str(tmp_path / "o"), "--device", "cpu", "--num-images", "8"]
    assert_one_error(run_cli(*words, "--set", "batch_size=auto"), 2, "synthesis.batch_size=auto", "give a number")
    done = run_cli(*words, "--set", "batch_size=8")
    assert "warning: batch_size=8 needs about" in done.err and "set auto" in done.err
