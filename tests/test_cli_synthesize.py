"""`dfkd-ray synthesize`: what the fleet makes is what local synthesis makes, in files."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_ray import bundles, fleet, image_sets, synthesis
from dfkd_ray.cli import synthesize
from dfkd_ray.config import DeepInversionConfig
from dfkd_ray.fleet import Node
from helpers import TINY_INFO, TINY_TRIAL, assert_one_error, tiny_network

TINY = ["--set", "num_steps=1", "--set", "synthesis.batch_size=8", "--set", "num_threads=1"]
TINY_CONFIG = DeepInversionConfig.model_validate(TINY_TRIAL["synthesis"])
CPU = ["--device", "cpu", "--synthesizers", "1"]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One Ray for the commands of this file: a command takes the session there is."""
    with fleet.connected(num_cpus=1):
        yield


def images_made_here(teacher: Path, num_images: int, num_steps: int = 1) -> tuple[np.ndarray, np.ndarray]:
    settings = TINY_CONFIG.model_copy(update={"num_steps": num_steps})
    loaded = bundles.load(str(teacher))
    _, batch = synthesis.source(loaded, synthesis.pinned(loaded, settings), torch.device("cpu"))
    batches = [batch(index) for index in range(-(-num_images // 8))]
    images = np.concatenate([batch.images for batch in batches])
    return images[:num_images], np.concatenate([batch.labels for batch in batches])[:num_images]


def record_of(out: Path) -> dict:
    return json.loads((out / "synthesis.json").read_text())


@pytest.mark.usefixtures("ray_session")
def test_a_folder_holds_what_local_synthesis_makes_and_a_second_run_makes_nothing(run_cli, tiny_teacher, tmp_path):
    out = tmp_path / "out"
    words = ["synthesize", str(tiny_teacher), "--out", str(out), "--num-images", "12", *TINY, *CPU]
    words += ["--cache", str(tmp_path / "cache")]
    done = run_cli(*words)
    assert done.code == 0, done.err
    assert "2 batches made" in done.out and "fleet: 1/1 synthesizers up" in done.out
    images, labels = images_made_here(tiny_teacher, 12)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = out / "train" / str(label) / f"{number // 8:06d}-{number % 8:04d}.png"
        assert np.array_equal(np.asarray(Image.open(file)), image[0])
    files = {path: path.read_bytes() for path in out.rglob("*.png")}
    assert len(files) == 12 and (record_of(out)["num_made"], record_of(out)["num_found"]) == (2, 0)
    again = run_cli(*words)
    assert again.code == 0, again.err
    assert (record_of(out)["num_made"], record_of(out)["num_found"]) == (0, 2)
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == files


@pytest.mark.usefixtures("ray_session")
def test_images_of_independent_labels_are_written_without_labels_and_it_is_said(run_cli, tmp_path):
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    bundles.save(teacher, TINY_INFO.model_copy(update={"head": "sigmoid"}), tiny_network().state_dict())
    words = ["synthesize", str(teacher), "--out", str(out), "--num-images", "8", *TINY, *CPU]
    done = run_cli(*words, "--cache", str(tmp_path / "cache"))
    assert done.code == 0 and "without labels" in done.err, done.err
    assert {path.parent.name for path in out.rglob("*.png")} == {"unlabelled"}


@pytest.mark.usefixtures("ray_session")
def test_an_interrupted_command_goes_on_to_exactly_the_images_of_local_synthesis(run_cli, tiny_teacher, tmp_path):
    out = tmp_path / "out"
    words = ["synthesize", str(tiny_teacher), "--out", str(out), "--format", "parquet", *TINY[2:], *CPU]
    words += ["--set", "num_steps=40"]  # slow enough to be interrupted on a busy machine
    words += ["--cache", str(tmp_path / "cache"), "--num-images"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dfkd_ray", *words, "80"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 900
        while not (out / "part-000001.parquet").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C goes to every process of the terminal
        _, err = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    num_there = len(list(out.glob("part-*.parquet")))
    assert num_there >= 2 and not (out / "synthesis.json").exists()
    assert_one_error(run_cli(*words, "9"), 2, "holds 80 images", "choose another folder")
    done = run_cli(*words, "81")
    assert done.code == 0, done.err
    record = record_of(out)
    assert record["num_kept"] == num_there and record["num_made"] + record["num_found"] == 11 - num_there
    batches = [image_sets.read_part(path) for path in sorted(out.glob("part-*.parquet"))]
    images, labels = images_made_here(tiny_teacher, 81, num_steps=40)
    assert np.array_equal(np.concatenate([batch.images for batch in batches]), images)
    assert np.array_equal(np.concatenate([batch.labels for batch in batches]), labels)
    assert run_cli(*words, "81").code == 0 and record_of(out)["num_kept"] == 11
    assert_one_error(run_cli(*words, "81", "--seed", "1"), 2, "key", "choose another folder")


@pytest.mark.usefixtures("ray_session")
def test_a_loss_that_is_not_finite_is_exit_1_and_one_line(run_cli, tiny_teacher, tmp_path):
    words = ["synthesize", str(tiny_teacher), "--out", str(tmp_path / "o"), "--num-images", "8", *TINY, *CPU]
    assert_one_error(run_cli(*words, "--set", "bn_weight=1e38"), 1, "batch 0", "loss is")
    assert not (tmp_path / "o" / "synthesis.json").exists()


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--set", "num_stepz=3"], ["num_stepz", "did you mean num_steps?"]),
        (["--set", "synthesis.num_steps=0"], ["num_steps", "greater than or equal to 1"]),
        (["--set", "distillation.num_steps=3"], ["distillation", "unknown field"]),
        (["--method", "real"], ["'real'", "expected one of deepinversion, records, noise"]),
        (["--method", "dafl"], ["method dafl makes its images in rounds", "one of deepinversion, records, noise"]),
        (["--method", "noise", "--set", "num_steps=3"], ["num_steps", "unknown field"]),
        (["--config", "no.yaml"], ["no.yaml"]),
        (["--num-images", "0"], ["--num-images"]),
        (["--format", "jpeg"], ["jpeg", "folder or parquet"]),
        (["--device", "tpu"], ["tpu", "auto, cpu, cuda"]),
        (["--device", "cpu", "--set", "fast=true"], ["fast"]),
        (["--device", "cpu", "--gpus-per-synthesizer", "1"], ["--gpus-per-synthesizer", "no GPU is used"]),
        (["--synthesizers", "many"], ["many", "expected auto"]),
        (["--cache", "s4://bucket/x"], ["s4://bucket/x"]),
    ],
)
def test_a_wrong_word_is_one_line_and_starts_nothing(run_cli, tiny_teacher, tmp_path, monkeypatch, words, parts):
    def never(*_args, **_options):
        raise AssertionError("a fleet was started")

    monkeypatch.setattr(fleet, "connected", never)
    out = tmp_path / "o"
    assert_one_error(run_cli("synthesize", str(tiny_teacher), "--out", str(out), *words), 2, *parts)
    assert not out.exists()


def test_fields_have_one_meaning_by_either_name_and_win_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("num_steps: 7\nbatch_size: 16\n")
    config = synthesize.settings_of(tmp_path / "c.yaml", None, 3, ["synthesis.num_steps=9", "jitter=1"])
    assert config == DeepInversionConfig(num_steps=9, batch_size=16, jitter=1, seed=3)
    assert synthesize.settings_of(None, "noise", None, None).method == "noise"


@pytest.mark.parametrize(
    "num_gpus, asked, share, count, gpus",
    [
        (0, None, None, 4, 0.0),
        (1, None, None, 1, 1.0),
        (2, None, None, 2, 1.0),
        (2, 1, None, 1, 1.0),
        (2, 3, None, 3, 0.5),
        (1, 3, None, 3, 0.3333),
        (2, None, 0.25, 8, 0.25),
    ],
)
def test_the_synthesizers_have_the_machine_to_themselves(monkeypatch, num_gpus, asked, share, count, gpus):
    monkeypatch.setattr(fleet, "nodes", lambda: [Node(8.0, float(num_gpus))])
    monkeypatch.setattr(fleet, "budget_bytes", lambda: 1000)
    settings = synthesize.fleet_settings(DeepInversionConfig(), "auto", asked, share, "/cache")
    assert (settings.num_synthesizers, settings.gpus) == (count, gpus)
    assert 0 < settings.cpus * count <= 8
    assert settings.device == ("auto" if num_gpus else "cpu") and settings.most == ("auto" if asked is None else None)
