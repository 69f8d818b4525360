"""The sweep files of the project: valid, runnable at their tiny size, and telling how to make their teachers."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main

from dfkd_ray import bundles, cli, config, results, storage, sweep, trial
from dfkd_ray.batches import Batch
from dfkd_ray.cli.inputs import load_teacher
from dfkd_ray.records import finishing, fitting, format
from dfkd_ray.storage import Folder

SWEEPS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "sweeps").glob("*.yaml"))}
by_name = pytest.mark.parametrize("name", SWEEPS)


def settings_of(name: str) -> sweep.SweepConfig:
    return config.validate(sweep.SweepConfig, config.read_yaml(SWEEPS[name]), name)


def teacher_commands(name: str, command: str) -> list[list[str]]:
    """The words of each `dfkd-ray teacher <command>` in the head of a sweep file, as bash makes them of its loops."""
    head = [line[4:] for line in SWEEPS[name].read_text().splitlines() if line.startswith("#   ")]
    script = "dfkd-ray() { printf '%q ' \"$@\"; echo; }\n" + "\n".join(head)
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    found = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(words[0] == "teacher" and words[1] in ("train", "record") for words in found)
    return [words for words in found if words[1] == command]


def option(words: list[str], name: str, default: str) -> str:
    return words[words.index(name) + 1] if name in words else default


def command_of(name: str) -> str:
    """The command that a sweep file gives."""
    about = settings_of(name).about
    assert about is not None
    return about.command


def teachers_folder(name: str) -> str:
    """Where the command of a sweep file looks for teachers first; relative to the working folder."""
    return option(shlex.split(command_of(name)), "--teachers", "")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A folder with untrained, narrow bundles in place of all that the sweep files have trained and recorded."""
    root = tmp_path_factory.mktemp("untrained")
    init = typer.main.get_command(cli.app)
    trained = {option(words, "--out", ""): words for name in SWEEPS for words in teacher_commands(name, "train")}
    for out, (_, _, architecture, *words) in trained.items():
        arguments = json.loads(option(words, "--arguments", "{}"))
        if not architecture.startswith(("wrn_", "lenet", "hinton")):  # which have the width that they are named for
            arguments["width_multiplier"] = 0.125
        architecture = architecture.replace("hinton_1200", "hinton_800")  # its records take less time
        shape = "3x32x32" if option(words, "--dataset", "") == "cifar10" else "1x32x32"
        shape = "1x28x28" if "image_size=28" in words else shape
        words = ["teacher", "init", architecture, "--arguments", json.dumps(arguments), "--image-shape", shape]
        init.main([*words, "--out", str(root / out)], standalone_mode=False)
    for bundle in sorted({words[2] for name in SWEEPS for words in teacher_commands(name, "record")}):
        recorded_on_noise(str(root / bundle))
    return root


def recorded_on_noise(bundle: str) -> None:
    """All records of a bundle, small ones."""
    teacher = bundles.load(bundle)
    labels, rows = torch.arange(20) % teacher.info.num_classes, np.arange(20)
    plan = fitting.plan(teacher, labels.numpy(), rows, format.KINDS, fitting.Options(rank=4))
    images = torch.randint(0, 256, (20, *teacher.info.image_shape), dtype=torch.uint8)
    (shard,) = fitting.shards(lambda chosen: images[chosen], labels, rows, 1)
    for record in finishing.finish(plan, fitting.fit(plan, teacher.network, shard), teacher):
        bundles.save_record(bundle, record)


@by_name
def test_a_file_is_valid_and_its_command_names_it(name):
    assert f"sweeps/{name}.yaml" in command_of(name)
    assert sweep.expand(settings_of(name), {})


@by_name
def test_the_head_of_a_file_trains_every_teacher_that_is_not_bundled(name):
    named = {trial.teacher for trial in sweep.expand(settings_of(name), {})}
    missing = {teacher for teacher in named if not (bundles.BUNDLED / teacher / "teacher.json").is_file()}
    commands = teacher_commands(name, "train")
    made = {str(Path(option(words, "--out", "")).relative_to(teachers_folder(name))) for words in commands}
    assert made == missing
    app: Any = typer.main.get_command(cli.app)  # a group of commands
    group = app.commands["teacher"].commands
    for words in [*commands, *teacher_commands(name, "record")]:
        group[words[1]].make_context(words[1], words[2:])  # an unknown option, or a value of the wrong type, raises


def narrow(settings: sweep.SweepConfig) -> sweep.SweepConfig:
    """A sweep whose students of another architecture are as narrow as its teachers here, where they can be."""
    grids = [settings.grid] if isinstance(settings.grid, dict) else settings.grid or []
    for student in (student for grid in grids for student in grid.get("student", [])):
        if "stem" in student.get("arguments", {}):
            student["arguments"]["width_multiplier"] = 0.125
    return settings


@pytest.mark.parametrize("name", sorted(set(SWEEPS) - {"recovery_bound", "quickstart"}))  # real images; below
def test_every_trial_of_a_files_tiny_size_finishes(name, untrained, tmp_path):
    def open_teacher(teacher: str) -> bundles.Teacher:
        return load_teacher(teacher, None, str(untrained / teachers_folder(name)))

    settings = narrow(settings_of(name))
    jobs = sweep.plan(sweep.expand(settings, {}, tiny=True), open_teacher)
    for job in jobs:  # as Ray's workers would, without the start of Ray for every file
        info = job.teacher.info
        pixels = np.random.default_rng(0).integers(0, 256, (8, *info.image_shape), dtype=np.uint8)
        real = Batch(0, pixels, np.arange(8) % info.num_classes, "handed in")
        injected = (lambda index: replace(real, index=index)) if job.config.synthesis.method == "real" else None  # noqa: B023
        sweep.run_job(job, trial.Inputs(real=injected, images=trial.Local(tmp_path / "cache")), tmp_path / "out")
    check_results(storage.folder(tmp_path / "out"), jobs)


def test_the_command_runs_quickstarts_tiny_size_with_all_that_it_keeps_in_a_bucket(bucket, run_cli):
    place, cache = bucket("quickstart"), bucket("cache")
    words = ["sweep", str(SWEEPS["quickstart"]), "--tiny", "--test-data", "none", "--results", place, "--cache", cache]
    command = [sys.executable, "-m", "dfkd_ray", *words, "--synthesizers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    jobs = sweep.plan(sweep.expand(settings_of("quickstart"), {}, tiny=True), bundles.load)
    num_trials = len(jobs)
    assert f"{num_trials} trials, 0 failed" in done.stdout and "test:test" not in done.stdout
    check_results(storage.folder(place), jobs)
    again = run_cli(*words)
    assert again.code == 0 and f"{num_trials} trials, {num_trials} already finished" in again.out
    told = run_cli("report", place)
    assert told.code == 0 and "/quickstart/report.html?scheme=http" in told.out
    assert (storage.folder(place).read("report.html") or b"").startswith(b"<!DOCTYPE html>")


def check_results(place: Folder, jobs: list[sweep.Job]) -> None:
    """Every trial has its finished row, a student of the size and sparsity that the row says, and its events."""
    rows = results.read(place, "trials")
    assert sorted(rows["trial_id"]) == sorted(job.id for job in jobs)
    assert set(rows["status"]) == {"finished"}, rows["reason"].dropna().tolist()
    for row in rows.to_dict("records"):
        student = place / "students" / row["trial_id"]
        assert len(student.read("weights.safetensors") or b"") == row["stored_bytes"]
        assert (row["achieved_sparsity"] < 1e-3) == (row["pruning.sparsity"] == 0)
        assert "events.out.tfevents.trial" in (place / "tensorboard" / row["trial_id"]).names()


def test_a_teacher_that_is_nowhere_is_named_with_the_folder_that_was_asked_for(tmp_path, run_cli):
    done = run_cli("sweep", str(SWEEPS["paper_pruning"]), "--teachers", str(tmp_path))
    assert done.code == 2 and len(done.err.splitlines()) == 8
    assert all(f"nor is there one in --teachers {tmp_path}" in line for line in done.err.splitlines())


def test_paper_pruning_is_eight_families_by_four_sparsities_by_three_seeds_on_one_synthesis_per_family_and_seed():
    trials = sweep.expand(settings_of("paper_pruning"), {})
    assert len(trials) == 8 * 4 * 3
    assert len({(t.teacher, t.synthesis.seed) for t in trials}) == 24
    assert len({(t.teacher, t.synthesis.model_dump_json()) for t in trials}) == 24
    assert {t.pruning.sparsity for t in trials} == {0.5, 0.75, 0.9, 0.95}
    assert all(t.pruning.criterion == "global_magnitude" and t.pruning.schedule == "one_shot" for t in trials)
    assert all(t.reconstruction.num_images == 0 for t in trials)


def test_families_are_those_of_the_paper_by_two_sparsities_by_three_seeds_with_the_defaults():
    trials = sweep.expand(settings_of("families"), {})
    assert len(trials) == 8 * 2 * 3 and {t.pruning.sparsity for t in trials} == {0.75, 0.9}
    assert {t.teacher for t in trials} == {t.teacher for t in sweep.expand(settings_of("paper_pruning"), {})}
    plain = config.TrialConfig(teacher="t")
    assert all(t.pruning.criterion == plain.pruning.criterion for t in trials)
    assert all(t.reconstruction == plain.reconstruction for t in trials)
    widths = {words[2]: json.loads(option(words, "--arguments", "")) for words in teacher_commands("families", "train")}
    assert {name: given["width_multiplier"] for name, given in widths.items()} == {
        **{"resnet18": 0.5, "resnet34": 0.25, "resnet50": 0.25, "wide_resnet50_2": 0.25},
        **{"mobilenet_v2": 0.5, "vgg19_bn": 0.25, "densenet121": 0.25, "shufflenet_v2_x1_0": 0.5},
    }


PAIRS = {
    "compress_full": {
        ("resnet34", "resnet18"),
        ("vgg11_bn", "resnet18"),
        ("wrn_40_2", "wrn_16_1"),
        ("wrn_40_2", "wrn_40_1"),
        ("wrn_40_2", "wrn_16_2"),
    },
    "compress": {
        ("fashion_mnist_resnet20", "resnet8"),
        ("wrn_16_2", "wrn_16_1"),
        ("lenet5", "lenet5_half"),
        ("hinton_1200", "hinton_800"),
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_compress_trains_new_students_and_prunes_nothing(name):
    trials = sweep.expand(settings_of(name), {})
    assert {(t.teacher, t.student.architecture) for t in trials} == PAIRS[name]
    assert all(t.pruning.sparsity == 0 for t in trials)


@pytest.mark.parametrize("name", ["grid", "quickstart"])
def test_the_grids_cross_architecture_sparsity_bn_weight_and_temperature(name):
    trials = [(t, t.synthesis) for t in sweep.expand(settings_of(name), {})]
    points = [
        (t.teacher, t.pruning.sparsity, synthesis.bn_weight, t.distillation.temperature)
        for t, synthesis in trials
        if isinstance(synthesis, config.DeepInversionConfig)
    ]
    axes = [set(axis) for axis in zip(*points, strict=True)]
    size = 1
    for axis in axes:
        assert len(axis) > 1
        size *= len(axis)
    assert len(points) == len(set(points)) == size


def test_quickstart_has_twelve_trials_and_a_noise_baseline():
    trials = sweep.expand(settings_of("quickstart"), {})
    assert len(trials) >= 12 and any(t.synthesis.method == "noise" for t in trials)
