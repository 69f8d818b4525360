"""No row lies: what a table cannot hold is told in a failed row, and what was made by other algorithms is not found."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import yaml

from dfkd_ray import bundles, cache, config, results, storage, sweep, synthesis, trial
from dfkd_ray.batches import Batch
from dfkd_ray.config import DeepInversionConfig, NoiseConfig, TrialConfig, hashes, synthesis_key, validate
from dfkd_ray.results import rows, selecting
from dfkd_ray.sweep import worker
from dfkd_ray.trial import identity
from helpers import TINY_NOISE, TINY_TRIAL, tiny_trial
from table_rows import trial_row

FIELDS = {"synthesis": TINY_NOISE, "reference.synthesis": TINY_NOISE, "distillation.eval_every": 1}
HUGE, HALF = 10**5000, "r\ud800seau"
UNFIT = [
    ("no_such_column", 1.0, "no such column"),
    ("best_step", 2**63, "beyond 64 bits"),
    ("best_step", HUGE, "beyond 64 bits"),
    ("best_step", 1.5, "whole number"),
    ("best_step", True, "expected a number"),
    ("agreement", HUGE, "beyond what a float holds"),
    ("agreement", math.nan, "no finite number"),
    ("recovered_accuracy", np.float64("inf"), "no finite number"),
    ("agreement", "high", "expected a number"),
    ("real_data", 1, "true or false"),
    ("class_histogram", [1, 2], "expected text"),
    ("host", HALF, "surrogate"),
]


def job_of(teacher, **more):
    """A trial of a few seconds."""
    loaded = bundles.load(str(teacher))
    settings = validate(TrialConfig, tiny_trial(teacher, **FIELDS | more))
    (job,) = sweep.plan([settings], lambda _name: loaded)
    return job


def run(job, place, **more):
    return sweep.run_job(job, trial.Inputs(images=trial.Local(more.pop("cache", None))), place, **more)


# ---- versions ------------------------------------------------------------------------------------------------------


def test_another_version_of_an_algorithm_has_other_ids_and_keys(tiny_teacher, monkeypatch):
    job = job_of(tiny_teacher)
    ids, keys = {job.id}, {synthesis_key("ab", DeepInversionConfig())}
    for name in ("TRIAL_VERSION", "SYNTHESIS_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(hashes, name, getattr(hashes, name) + 1)
            ids.add(trial.trial_id(job.config, job.teacher))
            keys.add(synthesis_key("ab", DeepInversionConfig()))
    assert len(ids) == 3 and len(keys) == 2


def test_another_version_of_the_synthesis_draws_no_other_seeds_by_itself(tiny_teacher, monkeypatch):
    teacher = bundles.load(str(tiny_teacher))
    settings = NoiseConfig(batch_size=4)
    device = trial.devices.resolve("cpu")
    key, make = synthesis.source(teacher, settings, device)
    before = make(3)
    monkeypatch.setattr(hashes, "SYNTHESIS_VERSION", hashes.SYNTHESIS_VERSION + 1)
    other, make = synthesis.source(teacher, settings, device)
    after = make(3)
    assert (before.key, after.key) == (key, other) and key != other
    np.testing.assert_array_equal(before.images, after.images)


def test_a_trial_of_another_version_is_not_finished_and_its_batches_are_not_found(tiny_teacher, tmp_path, monkeypatch):
    place, kept = tmp_path / "place", tmp_path / "cache"
    job = job_of(tiny_teacher)
    first = run(job, place, cache=kept)
    assert first["status"] == "finished" and first["num_cached_batches"] == 0
    assert run(job, place, cache=kept)["num_cached_batches"] == 1, "its own version's are found"
    monkeypatch.setattr(hashes, "SYNTHESIS_VERSION", hashes.SYNTHESIS_VERSION + 1)
    again = job_of(tiny_teacher)
    assert again.id not in results.finished_ids(place) and job.id in results.finished_ids(place)
    second = run(again, place, cache=kept)
    assert second["num_cached_batches"] == 0 and second["synthesis_key"] != first["synthesis_key"]
    table = results.read(place, "trials")
    assert sorted(table["synthesis_version"]) == [hashes.SYNTHESIS_VERSION - 1, hashes.SYNTHESIS_VERSION]
    assert set(results.read(place, "synthesis")["synthesis_version"]) == set(table["synthesis_version"])
    assert "2 versions of the synthesis algorithms" in str(results.mixed(table))


def test_rows_of_before_the_versions_were_counted_are_read_with_nulls(tmp_path):
    import pyarrow.parquet as pq

    for table, old in (("trials", 2), ("synthesis", 3)):
        row = (
            {"trial_id": "t-1", "status": "finished"} if table == "trials" else {"synthesis_key": "k", "batch_index": 0}
        )
        results.write(tmp_path, table, [row], "a")
        path = tmp_path / table / "a.parquet"
        found = pq.read_table(path)
        found = found.drop_columns([name for name in found.column_names if name in selecting.ALGORITHMS])
        pq.write_table(found.replace_schema_metadata({b"dfkd_ray.schema": f"dfkd_ray.{table}/{old}"}), path)
        assert set(results.read(tmp_path, table)["synthesis_version"].isna()) == {True}


def test_results_say_which_versions_are_mixed_and_nothing_where_none_are(tmp_path, run_cli):
    base = {"status": "finished", "agreement": 0.5, "reference_kl": 0.1, "trial_version": 1, "synthesis_version": 1}
    base |= {"package_version": "1.0", "torch_version": "2.7", "numerics": "cpu A, torch 2.7", "real_data": False}
    base |= {"teacher_architecture": "r", "teacher_hash": "h", "synthesis.method": "noise"}
    results.write(tmp_path, "trials", [base | {"trial_id": f"t-{n}"} for n in range(3)], "a")
    frame = results.read(tmp_path, "trials")
    assert selecting.mixtures(frame) == [] and results.mixed(frame) is None
    done = run_cli("results", str(tmp_path))
    assert done.code == 0 and "made differently" not in done.out
    more = {"trial_id": "t-9", "package_version": "2.0", "torch_version": "2.8", "numerics": "cpu A, torch 2.8"}
    results.write(tmp_path, "trials", [base | more | {"trial_version": 2}], "b")
    phrases = selecting.mixtures(results.read(tmp_path, "trials"))
    assert phrases[0] == "2 versions of the trial's algorithms (1: 3 rows, 2: 1 row)" and len(phrases) == 4
    done = run_cli("results", str(tmp_path))
    assert done.code == 0 and done.out.splitlines()[-1].startswith("rows that were made differently: 2 versions of the")
    assert run_cli("results", str(tmp_path), "--where", "package_version=1.0").out.count("made differently") == 0
    csv = run_cli("results", str(tmp_path), "--format", "csv").out
    assert "made differently" not in csv and len(csv.splitlines()) == 5
    folded = results.fold_seeds(results.read(tmp_path, "trials"))
    assert sorted(folded["num_seeds"]) == [1, 3], "rows of two algorithms are no repetitions of each other"


def test_trials_of_several_test_sets_are_no_repetitions_of_each_other(tmp_path, run_cli):
    rows = [trial_row(number, 0.5, number, trial_id=f"t-{number}") for number in range(4)]
    for number, row in enumerate(rows):
        row |= {"test_sha256": "ab"[number % 2] * 64, "test_set": "mine", "num_test_images": 10 + number % 2}
    results.write(tmp_path, "trials", rows, "a")
    folded = results.fold_seeds(results.read(tmp_path, "trials"))
    assert folded["num_seeds"].tolist() == [2, 2]
    assert sorted(folded["num_test_images"]) == [10, 11]
    out = run_cli("results", str(tmp_path), "--mean-std").out
    assert "aaaaaaaaaaaa" in out and "bbbbbbbbbbbb" in out
    assert out.splitlines()[-1].endswith("measured on several test sets: their accuracies cannot be compared")
    out = run_cli("results", str(tmp_path), "--where", "num_test_images=10").out
    assert "several test sets" not in out and "aaaaaaaaaaaa" not in out


@pytest.mark.parametrize("mean_std", [[], ["--mean-std"]], ids=["rows", "folded"])
def test_results_show_older_versions_last_and_say_that_their_kl_is_on_other_images(tmp_path, run_cli, mean_std):
    made = [("t-1", 3, True, 0.3), ("t-2", 2, None, 0.01), ("t-3", 2, None, 0.02), ("t-4", 3, True, 0.2)]
    rows = [
        trial_row(0, sparsity, 0, trial_id=name, trial_version=version, reference_kl=kl, **{"reference.mixed": mixed})
        for sparsity, (name, version, mixed, kl) in zip((0.5, 0.75, 0.9, 0.95), made, strict=True)
    ]
    results.write(tmp_path, "trials", rows, "a")
    words = ["results", str(tmp_path), *mean_std]
    lines = run_cli(*words).out.splitlines()
    heading = lines[0].split()
    assert {"trial_version", "reference_kl"} <= set(heading)
    version, kl = (heading.index(name) for name in ("trial_version", "reference_kl"))
    shown = [(line.split()[version], line.split()[kl]) for line in lines[2:6]]
    assert shown == [("3", "0.2"), ("3", "0.3"), ("2", "0.01"), ("2", "0.02")]
    says = "KL and agreement on two kinds of reference images cannot be compared (mixed: 2 rows, plain: 2 rows)"
    assert lines[-1].endswith(says) and "(3: 2 rows, 2: 2 rows)" in lines[-1]
    for version in (2, 3):
        out = run_cli(*words, "--where", f"trial_version={version}").out
        assert "compared" not in out and "trial_version" not in out


def test_reference_sets_are_told_apart_within_one_version_too_and_failed_trials_have_none():
    rows = [trial_row(0, 0.5, seed, trial_version=3) for seed in (0, 1)]
    assert rows[0]["reference.mixed"] is True
    plain = trial_row(0, 0.5, 2, trial_version=3, **{"reference.mixed": False})
    shapes = trial_row(0, 0.5, 2, trial_version=3, **{"reference.mixed_with": "shapes"})
    failed = trial_row(0, 0.5, 2, status="failed", trial_version=2)
    assert results.mixed(pd.DataFrame(rows)) is None and results.mixed(pd.DataFrame([shapes])) is None
    assert selecting.reference_sets(pd.DataFrame([plain, *rows, shapes])) == {
        "mixed": 2,
        "mixed with shapes": 1,
        "plain": 1,
    }
    assert selecting.reference_sets(pd.DataFrame([*rows, plain])) == {"mixed": 2, "plain": 1}
    says = "KL and agreement on two kinds of reference images cannot be compared (mixed: 2 rows, plain: 1 row)"
    assert results.mixed(pd.DataFrame([*rows, plain])) == says
    assert selecting.reference_sets(pd.DataFrame([*rows, failed])) == {"mixed": 2}
    assert "compared" not in str(results.mixed(pd.DataFrame([*rows, failed])))


# ---- rows that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "why"), UNFIT, ids=range(len(UNFIT)))
def test_a_finished_row_that_its_table_cannot_hold_is_a_failed_row_that_says_which_column(tmp_path, name, value, why):
    row = {"trial_id": "t-1", "status": "finished", "agreement": 0.5, "best_step": 3, name: value}
    kept = results.kept(row)
    assert kept["status"] == "failed" and kept["reason"].startswith(f"the row cannot be written: column {name}: ")
    assert why in kept["reason"] and len(kept["reason"]) <= 300
    results.write(tmp_path, "trials", [kept], "t-1")
    results.write_json(tmp_path / "row.json", kept)
    assert results.read(tmp_path, "trials")["reason"].tolist() == [kept["reason"]]
    assert json.loads(json.dumps(kept)) == kept


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_numbers_that_are_not_finite_are_null_in_a_row_that_is_no_result(status):
    row = {"trial_id": "t-1", "status": status, "reason": "x", "agreement": math.nan, "wall_s": np.float32("inf")}
    assert results.kept(row) == row | {"agreement": None, "wall_s": None}


def test_a_failed_row_keeps_its_reason_and_what_of_it_can_be_written(tmp_path):
    row = {
        "trial_id": "t-1",
        "status": "failed",
        "reason": f"no file {HALF}",
        "best_step": HUGE,
        "nope": 1,
        "host": "h",
    }
    kept = results.kept(row)
    assert kept == {"trial_id": "t-1", "status": "failed", "reason": "no file r\\ud800seau", "host": "h"}
    results.write(tmp_path, "trials", [kept], "t-1")


def test_a_row_that_fits_is_kept_as_it_is_in_plain_values():
    row = {
        "trial_id": "t-1",
        "status": "finished",
        "agreement": np.float64(0.5),
        "best_step": np.int64(3),
        "commit": None,
    }
    kept = results.kept(row)
    assert kept == {"trial_id": "t-1", "status": "finished", "agreement": 0.5, "best_step": 3, "commit": None}
    assert type(kept["best_step"]) is int and json.dumps(kept)


def test_no_number_that_is_not_finite_is_in_any_table(tmp_path):
    looks = [{"trial_id": "t-1", "step": 0, "reference_kl": math.inf}, {"trial_id": "t-1", "step": 1, "loss": math.nan}]
    results.write(tmp_path, "epochs", looks, "t-1")
    table = pd.read_parquet(tmp_path / "epochs")
    assert set(table["reference_kl"].isna()) == set(table["loss"].isna()) == {True}


@pytest.mark.parametrize(("name", "value", "why"), [UNFIT[0], UNFIT[1], UNFIT[6], UNFIT[11]], ids=range(4))
def test_a_trial_whose_row_cannot_be_written_fails_once_and_leaves_no_student(
    tiny_teacher, tmp_path, monkeypatch, name, value, why
):
    job, times, real = job_of(tiny_teacher), [], trial.run

    def measured(*arguments, **options):
        times.append(1)
        outcome = real(*arguments, **options)
        outcome.row[name] = value
        return outcome

    monkeypatch.setattr(trial, "run", measured)
    row = run(job, tmp_path)
    assert row["status"] == "failed" and why in row["reason"] and len(times) == 1
    assert results.read(tmp_path, "trials")["status"].tolist() == ["failed"]
    assert len(results.read(tmp_path, "epochs")) == 3 and not (tmp_path / "students").exists()


def test_a_config_that_the_table_cannot_hold_fails_before_anything_is_computed(tiny_teacher, tmp_path, monkeypatch):
    job = job_of(tiny_teacher)
    monkeypatch.setattr(identity.socket, "gethostname", lambda: HALF)
    monkeypatch.setattr(trial, "run", lambda *_arguments, **_options: pytest.fail("it was computed"))
    row = run(job, tmp_path)
    assert row["status"] == "failed" and "column host" in row["reason"]


def test_a_term_that_the_table_does_not_know_costs_no_trial(tiny_teacher, tmp_path, monkeypatch, caplog):
    real = trial.Gathered.add

    def with_more_terms(gathered: trial.Gathered, batch: Batch, found: bool) -> None:
        batch.terms["sharpness"] = 0.5
        real(gathered, batch, found)

    monkeypatch.setattr(trial.Gathered, "add", with_more_terms)
    row = run(job_of(tiny_teacher), tmp_path)
    assert row["status"] == "finished" and "column sharpness" in caplog.text
    assert len(results.read(tmp_path, "synthesis")) == 2


def test_what_shows_a_trial_does_not_decide_on_its_row(tiny_teacher, tmp_path, monkeypatch):
    for name in ("write_trial", "write_epochs"):
        monkeypatch.setattr(worker.tensorboard, name, lambda *_words: [][0])
    assert run(job_of(tiny_teacher), tmp_path)["status"] == "finished"


def test_what_a_trial_leaves_and_cannot_be_written_is_the_reason_of_a_failed_row(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "class_grid", lambda *_words: [][0])
    row = run(job_of(tiny_teacher), tmp_path)
    assert row["status"] == "failed" and row["reason"].startswith("what it leaves cannot be written: IndexError")
    assert results.read(tmp_path, "trials")["status"].tolist() == ["failed"]


def test_recover_leaves_a_row_whatever_it_measured(tiny_teacher, tmp_path, run_cli, monkeypatch):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.with_overrides(TINY_TRIAL, FIELDS)))
    words = ["recover", str(tiny_teacher), "--config", str(tmp_path / "c.yaml"), "--test-data", "none"]
    real = trial.run

    def measured(*arguments, **options):
        outcome = real(*arguments, **options)
        outcome.row["image_confidence"] = math.nan
        return outcome

    monkeypatch.setattr(trial, "run", measured)
    done = run_cli(*words, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"))
    row = json.loads((tmp_path / "out" / "row.json").read_text())
    assert done.code == 1 and row["status"] == "failed" and "column image_confidence" in row["reason"]


def test_a_number_for_a_message_has_any_size():
    assert rows.shown(HUGE) == f"a number of {HUGE.bit_length()} bits" and len(rows.shown("x" * 10**6)) <= 60


# ---- which folder is full ------------------------------------------------------------------------------------------


def full_below(root, real):
    """`Folder.write` on a disk of which the part below `root` is full."""

    def write(folder, name, *data):
        if str(folder).startswith(str(root)):
            raise OSError(28, "No space left on device")
        return real(folder, name, *data)

    return write


@pytest.mark.parametrize("full", ["cache", "place"])
def test_a_full_disk_is_named_by_the_folder_that_lies_on_it(tiny_teacher, tmp_path, monkeypatch, full):
    monkeypatch.setattr(worker.places, "PAUSES_S", ())
    monkeypatch.setattr(storage.Folder, "write", full_below(tmp_path / full, storage.Folder.write))
    with pytest.raises(OSError) as caught:
        run(job_of(tiny_teacher), tmp_path / "place", cache=tmp_path / "cache")
    assert worker.places.is_disk_error(caught.value)
    told = worker.why_stopped(caught.value, storage.folder(tmp_path / "place"))
    what = "the cache" if full == "cache" else "the results folder"
    assert told.startswith(f"{what} {tmp_path / full}") and told.endswith("No space left on device")
    assert (str(tmp_path / "place") in told) == (full == "place")


def test_a_full_cache_of_a_synthesizer_is_named_where_the_trial_stops(tmp_path):
    from dfkd_ray.fleet.stream import error_of

    folder = cache.folder_of(tmp_path / "cache", "ab" * 32, "cpu")
    with pytest.raises(OSError) as caught, cache.explained(folder):
        raise OSError(28, "No space left on device", "/x/.part")
    error = error_of(f"{type(caught.value).__name__}: {caught.value}", "ab" * 32, 3)
    assert isinstance(error, OSError) and worker.places.is_disk_error(error)
    told = worker.why_stopped(error, storage.folder(tmp_path / "place"))
    assert f"the cache {folder}: No space left on device" in told and "results folder" not in told
