"""Grids over Ray Tune: what is run, and what is written."""

import os
import subprocess
import sys

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from dfkd_ray import bundles, config, results, sweep
from helpers import ABOUT, tiny_sweep, tiny_trial, write_yaml


def load(**parts) -> sweep.SweepConfig:
    data = {"about": ABOUT, "base": tiny_trial(), **parts}
    return config.validate(sweep.SweepConfig, data, "sweep file")


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory, tiny_teacher):
    """A sweep of three trials, one of which fails, run by the real command in a process of its own, twice."""
    folder = tmp_path_factory.mktemp("sweep")
    grid = [{"pruning.sparsity": [0.5, 0.9]}, {"synthesis.bn_weight": [1e38], "pruning.sparsity": [0.9]}]
    write_yaml(folder / "small.yaml", tiny_sweep(tiny_teacher, grid))
    command = [sys.executable, "-m", "dfkd_ray", "sweep", str(folder / "small.yaml"), "--results", str(folder / "out")]
    command += ["--cache", str(folder / "cache"), "--test-data", "none", "--synthesizers"]
    environment = {**os.environ, "COLUMNS": "160"}
    runs = [
        subprocess.run([*command, num], capture_output=True, text=True, timeout=900, env=environment, check=False)
        for num in ("1", "0")  # with what is left there is no fleet to be tested
    ]
    return folder, runs


def test_a_sweep_writes_every_trial_and_fails_only_the_failing(finished_sweep):
    folder, (first, _) = finished_sweep
    assert first.returncode == 1, first.stderr
    rows = results.read(folder / "out", "trials")
    assert sorted(rows["status"]) == ["failed", "finished", "finished"]
    assert all("FloatingPointError" in row["reason"] for row in rows.to_dict("records") if row["status"] == "failed")
    assert rows["agreement"].iloc[:2].notna().all(), "finished trials come first"


def test_trials_with_one_key_synthesise_once(finished_sweep):
    folder, _ = finished_sweep
    rows = results.read(folder / "out", "trials")
    done = [row for row in rows.to_dict("records") if row["status"] == "finished"]
    assert len({row["synthesis_key"] for row in done}) == 1 and len({row["images_sha256"] for row in done}) == 1
    assert sum(row["num_cached_batches"] for row in done) == 1, "of the two trials that want one batch, one makes it"


def test_students_and_pictures_lie_beside_the_table(finished_sweep):
    folder, _ = finished_sweep
    rows = results.read(folder / "out", "trials")
    for name in rows[rows["status"] == "finished"]["trial_id"]:
        assert bundles.load(str(folder / "out" / "students" / name)).info.num_classes == 10
    assert len(list((folder / "out" / "images").glob("*.png"))) == 1
    assert not any((folder / "out" / "checkpoints").glob("*")), "a finished trial needs no checkpoint"


def test_every_look_of_a_finished_trial_is_a_row_of_epochs_and_ends_as_the_trial_says(finished_sweep):
    folder, _ = finished_sweep
    rows, epochs = results.read(folder / "out", "trials"), results.read(folder / "out", "epochs")
    rows = rows[rows["status"] == "finished"].set_index("trial_id")
    assert set(epochs["trial_id"]) == set(rows.index)
    for name, own in epochs.groupby("trial_id"):
        assert own["step"].tolist() == [0, 2] and own["loss"].notna().tolist() == [False, True]
        best = own[own["step"] == rows.loc[name, "best_step"]].iloc[0]
        selected, row = rows.loc[name, "selected"], rows.loc[name]
        ends = best["agreement"] if selected == "recovered" else row[f"{selected}_agreement"]
        assert row["agreement"] == ends
        if selected == "pruned":  # a rung that is no look
            assert row["reference_kl"] < own["reference_kl"].min()
        else:
            assert row["reference_kl"] == own["reference_kl"].min() == best["reference_kl"]
        assert best["sparsity"] == rows.loc[name, "achieved_sparsity"]


def test_a_sweep_leaves_its_finished_rows_in_one_file_of_each_table(finished_sweep):
    folder, _ = finished_sweep
    for table in results.TABLES:
        merged = [path for path in (folder / "out" / table).iterdir() if path.name.startswith("merged-")]
        assert len(merged) == 1, table
    assert len(list((folder / "out" / "trials").iterdir())) == 2, "and the failed trial may be run again"


def test_the_final_table_is_printed_and_output_is_quiet(finished_sweep):
    _, (first, _) = finished_sweep
    assert "closest to the teacher first" in first.stdout and "agreement" in first.stdout
    noise = [line for line in first.stderr.splitlines() if "error:" not in line]
    assert len(noise) <= 3, first.stderr


def test_finished_trials_are_not_run_again(finished_sweep):
    _, (first, second) = finished_sweep
    assert "2 already finished" in second.stdout and "[1/1" in second.stdout
    assert ": reference KL" in first.stdout and ": reference KL" not in second.stdout


def test_plain_pandas_reads_the_table(finished_sweep):
    folder, _ = finished_sweep
    frame = pd.read_parquet(folder / "out" / "trials")
    assert set(frame["pruning.sparsity"]) == {0.5, 0.9}
    part = next((folder / "out" / "trials").glob("*.parquet"))
    assert pq.read_schema(part).metadata[b"dfkd_ray.schema"] == f"dfkd_ray.trials/{results.version('trials')}".encode()


def test_real_images_in_a_sweep_are_refused_unless_injected(tiny_teacher, tmp_path, run_cli):
    settings = load(base={"teacher": str(tiny_teacher)}, grid={"synthesis": [{"method": "real"}]})
    jobs = sweep.plan(sweep.expand(settings, {}), bundles.load)
    with pytest.raises(ValueError, match="`real_data`"):
        sweep.run(jobs, tmp_path, str(tmp_path))
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    done = run_cli("sweep", str(tmp_path / "s.yaml"), "--results", str(tmp_path / "r"))
    assert done.code == 2 and "--real-data" in done.err


def test_a_teacher_without_batchnorm_is_refused_before_anything_starts(tmp_path, monkeypatch):
    (tmp_path / "bn_free.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from dfkd_ray import models

    info = bundles.BundleInfo(
        architecture="bn_free:make", num_classes=10, input_shape=(1, 16, 16), mean=(0.5,), std=(0.5,)
    )
    network = models.build("bn_free:make", {}, num_classes=10, image_shape=(1, 16, 16))
    bundles.save(tmp_path / "t", info, network.state_dict())
    trials = sweep.expand(load(base={"teacher": str(tmp_path / "t")}, grid={"pruning.sparsity": [0.5, 0.6]}), {})
    with pytest.raises(ValueError, match="no BatchNorm layer") as caught:
        sweep.plan(trials, lambda name: bundles.load(name, ("bn_free",)))
    assert len(str(caught.value).splitlines()) == 1
