"""Efforts: named sets of fields beneath those that are set."""

import pytest

from dfkd_ray import config, sweep
from dfkd_ray.config import EFFORTS, TrialConfig, validate, with_effort
from dfkd_ray.sweep import estimate
from helpers import assert_one_error


def trial(effort: str, **data) -> TrialConfig:
    return validate(TrialConfig, with_effort({"teacher": "t", **data}, effort), "x")


def test_standard_is_the_defaults_and_each_effort_is_a_valid_trial_that_costs_more_than_the_one_before():
    fast, standard, thorough = (trial(name) for name in EFFORTS)
    assert standard == TrialConfig(teacher="t")
    for less, more in ((fast, standard), (standard, thorough)):
        assert less.synthesis.num_steps < more.synthesis.num_steps
        assert less.distillation.num_images * less.distillation.num_steps < (
            more.distillation.num_images * more.distillation.num_steps
        )
        assert less.reconstruction.num_images < more.reconstruction.num_images
        assert config.config_hash(less) != config.config_hash(more), "an effort is expanded before hashing"


def test_what_is_set_stays_and_the_other_fields_of_its_section_are_the_efforts():
    made = trial("fast", distillation={"num_steps": 7}, synthesis={"bn_weight": 3.0})
    assert made.distillation.num_steps == 7 and made.synthesis.bn_weight == 3.0
    assert made.distillation.num_images == EFFORTS["fast"]["distillation"]["num_images"]
    assert made.synthesis.num_steps == EFFORTS["fast"]["synthesis"]["num_steps"]


@pytest.mark.parametrize("method", ["noise", "records", "real"])
def test_other_methods_keep_their_own_steps(method):
    made = trial("fast", synthesis={"method": method})
    assert made.synthesis == trial("standard", synthesis={"method": method}).synthesis
    assert made.distillation.num_steps == EFFORTS["fast"]["distillation"]["num_steps"]


def test_the_input_is_not_changed():
    data = {"teacher": "t", "distillation": {"num_steps": 7}}
    with_effort(data, "thorough")
    assert data == {"teacher": "t", "distillation": {"num_steps": 7}}
    assert EFFORTS["standard"] == {}


def test_an_unknown_effort_is_one_line(run_cli):
    done = run_cli("recover", "fashion_mnist_resnet8", "--effort", "quick", "--out", "x")
    assert_one_error(done, 2, "--effort", "quick", "thorough")
    with pytest.raises(ValueError, match="effort 'quick': expected fast, standard, thorough"):
        with_effort({}, "quick")


@pytest.mark.parametrize("base", ["base: {teacher: fashion_mnist_resnet8, distillation: {num_steps: 9}}", ""])
def test_a_sweep_has_the_effort_beneath_its_file(base, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "calibrate", lambda units, *_: dict.fromkeys(units, estimate.Cost(1.0)))
    file = tmp_path / "s.yaml"
    file.write_text(f"{base}\ngrid: {{teacher: [fashion_mnist_resnet8], pruning.sparsity: [0.5]}}\n")
    # 1,024 images in batches of 256 and a reference set of one batch; fast: one batch each.
    for effort, num_batches in ((), 5), (("--effort", "fast"), 2):
        done = run_cli("sweep", str(file), "--dry-run", *effort)
        assert done.code == 0 and f"{num_batches} batches" in done.out, done.out
        assert ("enough_kl is not counted" in done.out) == bool(effort)


@pytest.mark.parametrize(
    "axes",
    [
        {"synthesis.method": ["deepinversion", "noise"]},
        {"synthesis": [{"method": "deepinversion"}, {"method": "noise"}]},
        {"synthesis": [{}, {"method": "noise"}]},
    ],
)
def test_each_trial_of_a_grid_over_methods_has_what_of_an_effort_is_for_its_method(axes):
    data = {"effort": "fast", "base": {"teacher": "t", "distillation": {"num_steps": 7}}, "grid": axes}
    made, other = sweep.expand(sweep.parse(data), {})
    assert made == trial("fast", distillation={"num_steps": 7})
    assert other == trial("fast", distillation={"num_steps": 7}, synthesis={"method": "noise"})
    passes = {"base": {"teacher": "t"}, "grid": {"distillation.num_passes": [9999]}}
    (told,) = sweep.expand(sweep.parse(data | passes), {})
    assert told.distillation.num_passes == 9999 and told.synthesis == made.synthesis


def test_ranges_hold_for_the_effort_of_their_file(run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "calibrate", lambda units, *_: dict.fromkeys(units, estimate.Cost(1.0)))
    dropped = []
    monkeypatch.setattr(sweep, "without_ranges", lambda settings, why: dropped.append(why) or settings)
    for own, asked, num in (("fast", "fast", 0), ("fast", "standard", 1), ("standard", "fast", 1)):
        file = tmp_path / "s.yaml"
        file.write_text(f"effort: {own}\ngrid: {{teacher: [fashion_mnist_resnet8]}}\n")
        dropped.clear()
        assert run_cli("sweep", str(file), "--dry-run", "--effort", asked).code == 0 and len(dropped) == num
