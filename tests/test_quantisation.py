"""The rung after distillation: the student as an int8 file, measured as it runs; the float student stays as it is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from dfkd_ray import bundles, exporting, ladder, results, trial
from dfkd_ray.bundles import Teacher
from dfkd_ray.cli import show
from dfkd_ray.compression import pruning
from dfkd_ray.config import QuantisationConfig, TrialConfig, flat, validate, with_overrides
from dfkd_ray.exporting import int8, metadata, of_trial, onnx_files, simulated, torch_files
from dfkd_ray.sweep import estimate
from dfkd_ray.trial import quantisation
from helpers import (
    TINY_NOISE,
    TINY_SETS,
    assert_one_error,
    costs_of,
    jobs_of,
    refusal,
    same_weights,
    set_words,
    tiny_sweep,
    tiny_trial,
)
from test_trial import a_test_set

INT8 = {"quantisation.int8": True, "quantisation.num_images": 8}
COLUMNS = ("quantised_accuracy", "quantised_agreement", "quantised_kl", "int8_file_bytes", "float_file_bytes")


def config_of(teacher: str | Path = "t", **fields: Any) -> TrialConfig:
    return validate(TrialConfig, tiny_trial(teacher, **{"synthesis": TINY_NOISE, **fields}))


@pytest.fixture(scope="module")
def teacher(tiny_teacher) -> Teacher:
    return bundles.load(str(tiny_teacher))


@pytest.fixture(scope="module")
def pair(teacher) -> tuple[trial.Outcome, trial.Outcome]:
    """The same trial with int8 and without."""
    inputs = trial.Inputs(test=a_test_set())
    return (
        trial.run(config_of("t", **INT8), teacher, inputs),
        trial.run(config_of("t"), teacher, inputs),
    )


@pytest.fixture
def tried(teacher, monkeypatch) -> None:
    """Whether the network can be written is not tried: that takes seconds."""
    monkeypatch.setattr(exporting, "not_installed", lambda _names: [])
    monkeypatch.setattr(quantisation.onnx_files, "converted", lambda *_: b"")


# ---- the config ------------------------------------------------------------------------------------------------------

# Ids of trials from before there was int8, when trials had version 3, kept the criterion's weights, had one weight of
# BatchNorm statistics for all teachers, and trained all students on batch statistics, at one learning rate.
THEN = {"reference.synthesis.bn_weight": 0.2, "distillation.bn_mode": "trained"}
THEN |= {"distillation.learning_rate": 0.05}
IDS = {
    "t-6dc249a63431": {"reconstruction.reselect": False, "synthesis.bn_weight": 0.2, **THEN},
    "t-98116617c6b4": {"pruning.structure": "channels", "pruning.sparsity": 0.5, "synthesis.bn_weight": 0.2, **THEN},
    "t-8bdcb59bbb53": {"student.architecture": "resnet8", "synthesis.method": "noise", **THEN},
}


def id_of(teacher: Teacher, **fields: Any) -> str:
    return trial.trial_id(validate(TrialConfig, with_overrides({"teacher": "t"}, fields)), replace(teacher, hash="ab"))


@pytest.mark.parametrize("own", IDS)
def test_trials_without_int8_keep_their_ids(own, teacher, monkeypatch):
    monkeypatch.setattr("dfkd_ray.config.hashes.TRIAL_VERSION", 3)
    assert id_of(teacher, **IDS[own]) == id_of(teacher, **IDS[own], **{"quantisation.int8": False}) == own


def test_with_int8_every_field_of_the_section_changes_the_id(teacher):
    on, distils = {"quantisation.int8": True}, {"quantisation.int8": True, "quantisation.distil_above": 0.1}
    others = [{}, on, {**on, "quantisation.num_images": 64}, distils]
    others += [{**distils, f"quantisation.{name}": 3} for name in ("num_steps", "learning_rate")]
    ids = [id_of(teacher, **fields) for fields in others]
    assert len(set(ids)) == len(ids) == len(QuantisationConfig.model_fields) + 1


@pytest.mark.parametrize("name", ["num_images", "distil_above"])
def test_a_field_that_acts_with_int8_only_is_refused_without(name):
    refusal(lambda: config_of("t", **{f"quantisation.{name}": 7}), f"{name} acts with int8=true only")


@pytest.mark.parametrize("name", ["num_steps", "learning_rate"])
def test_a_field_of_the_distillation_is_refused_without_it(name):
    fields = {"quantisation.int8": True, f"quantisation.{name}": 7}
    refusal(lambda: config_of("t", **fields), f"{name} acts with distil_above only")


def test_rows_from_before_there_was_int8_are_read_as_rows_without(tmp_path):
    import pyarrow.parquet as pq

    name = tmp_path / "trials" / "a.parquet"
    row = {"trial_id": "t-1", "status": "finished", **flat(config_of("t").model_dump(exclude={"student"}))}
    results.write(tmp_path, "trials", [results.writable("trials", row)], "a")
    table = pq.read_table(name)
    older = table.drop_columns([name for name in table.column_names if "int8" in name or "quantis" in name])
    older = older.replace_schema_metadata({**(table.schema.metadata or {}), b"dfkd_ray.schema": b"dfkd_ray.trials/6"})
    pq.write_table(older, name)
    results.write(tmp_path, "trials", [results.writable("trials", row | {"trial_id": "t-2"})], "b")
    frame = results.read(tmp_path, "trials")
    assert frame["quantisation.int8"].tolist() == [False, False]
    assert frame["quantised_accuracy"].tolist() == pytest.approx([np.nan] * 2, nan_ok=True)
    assert not [name for name in results.varied_fields(frame) if name.startswith("quantisation")]


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_row_is_measured_on_the_file_and_the_float_student_is_the_same_as_without(pair, teacher):
    on, off = pair
    assert on.student is not None and off.student is not None and same_weights(on.student, off.student)
    assert {on.row[name] - off.row[name] for name in ("reference_kl", "agreement", "best_step")} == {0}
    assert on.row["selected"] == off.row["selected"] and on.row["trial_id"] != off.row["trial_id"]
    assert off.int8 is None and all(off.row.get(name) is None for name in COLUMNS)
    assert on.int8 is not None and on.row["int8_file_bytes"] == len(on.int8) < on.row["float_file_bytes"]
    run, batch = onnx_files.runs(onnx_files.session(on.int8)), a_test_set()[0]
    logits = run(exporting.images.normalised(teacher, batch.images))
    assert on.row["quantised_accuracy"] == pytest.approx((logits.argmax(1) == batch.labels).mean())
    assert on.row["quantised_kl"] > 0 and 0 <= on.row["quantised_agreement"] <= 1 and on.row["int8_steps"] == 0


def test_the_card_of_a_trial_s_int8_file_has_the_numbers_of_the_trial(pair, tmp_path, monkeypatch):
    def noise(teacher, *_):
        drawn = torch.randn(24, *teacher.info.input_shape, generator=torch.Generator().manual_seed(1)).numpy()
        return exporting.images.Images(drawn, None, "noise")

    monkeypatch.setattr(exporting.images, "made", noise)
    done, row = pair[0], {**pair[0].row, "quantised_accuracy": 0.3141, "quantised_agreement": 0.2718}
    done.save_student(tmp_path / "student")
    student = bundles.load(str(tmp_path / "student"))
    refusal(lambda: of_trial.copied(student, done.int8, tmp_path / "net.onnx"), "row of its trial is not beside it")
    (tmp_path / "row.json").write_text(json.dumps(row))
    other = student.info.model_copy(update={"weights_sha256": "0" * 64})
    of_others = replace(student, info=other)
    refusal(lambda: of_trial.copied(of_others, done.int8, tmp_path / "net.onnx"), "int8 file is of weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["row.json", "student"]
    found = of_trial.copied(student, done.int8, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == done.int8
    text = found.card.read_text()
    for part in (
        "| accuracy of this file | 31.41 % |",
        f"| accuracy of the network before it was written | {100 * row['recovered_accuracy']:.2f} % |",
        "| same answer as the teacher (this int8 file) | 27.18 % |",
        f"| KL divergence from the teacher, nats (this int8 file) | {row['quantised_kl']:.3g} |",
        f"{len(done.int8):,} bytes | the same format in float32: {row['float_file_bytes']:,} bytes |",
        "activations are from 8 of the images that the student was distilled on",
        f"trial `{row['trial_id']}`",
        "- int8",
    ):
        assert part in text, part
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.3141
    row |= dict.fromkeys(("quantised_accuracy", "recovered_accuracy", "test_set", "test_sha256", "num_test_images"))
    (tmp_path / "row.json").write_text(json.dumps(row))
    text = of_trial.copied(student, done.int8, tmp_path / "other.onnx").card.read_text()
    assert "| accuracy of this int8 file | not known |" in text and "model-index" not in text


def test_the_same_seed_gives_the_same_bytes_also_after_a_full_disk(pair, teacher, tmp_path, monkeypatch):
    written, config = quantisation.written, config_of("t", **INT8)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantisation, "written", full)
    with pytest.raises(OSError, match="No space"):
        trial.run(config, teacher, checkpoint=tmp_path)
    monkeypatch.setattr(quantisation, "written", written)
    again = trial.run(config, teacher, trial.Inputs(test=a_test_set()), checkpoint=tmp_path)
    assert again.int8 == pair[0].int8
    for name in set(results.deterministic_columns()) & set(pair[0].row):
        assert again.row[name] == pair[0].row[name], name


def test_the_file_is_beside_the_student_names_its_weights_and_goes_with_them(pair, tmp_path):
    on, off = pair
    folder = tmp_path / "student"
    info = on.save_student(folder)
    about = metadata.read(onnx_files.read(folder / trial.INT8_FILE))
    assert about["weights_sha256"] == info.weights_sha256 and about["precision"] == "int8"
    assert (about["mean"], about["input_shape"]) == (list(info.mean), list(info.input_shape))
    loaded = bundles.load(str(folder))
    assert on.student is not None and same_weights(on.student, loaded.network)
    off.save_student(folder)
    assert not (folder / trial.INT8_FILE).exists(), "a file of other weights"


KINDS = {
    "channels": {"pruning.structure": "channels", "pruning.sparsity": 0.5},
    "another architecture": {"student.architecture": "lenet5"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_students_of_every_kind_are_quantised(kind, teacher, monkeypatch):
    monkeypatch.setattr(quantisation, "check", lambda *_: None)
    monkeypatch.setattr(int8, "NUM_CORRECTION", 2)
    outcome = trial.run(config_of("t", **INT8, **KINDS[kind]), teacher)
    assert outcome.row["status"] == "finished" and outcome.int8 is not None, outcome.row["warnings"]
    assert outcome.row["quantised_kl"] == pytest.approx(outcome.row["reference_kl"], rel=0.5, abs=0.05)
    assert outcome.row["quantised_accuracy"] is None and outcome.row["quantised_agreement"] is not None


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_missing_package_is_said_before_anything_is_computed(teacher, tiny_teacher, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "not_installed", lambda names: [names[-1]])
    said = refusal(lambda: trial.check(config_of("t", **INT8), teacher, ()), "quantisation.int8 needs onnxruntime")
    assert "pip install 'dfkd_ray[onnx]'" in said
    words = ["recover", str(tiny_teacher), "--out", str(tmp_path / "out"), *set_words(TINY_SETS | INT8)]
    assert_one_error(run_cli(*words), 2, "quantisation.int8 needs onnxruntime")
    assert not (tmp_path / "out").exists()
    trial.check(config_of("t"), teacher, ())


class Branching(nn.Module):
    """It looks at its images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(1), nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.fc(x.flatten(1)) * (2 if float(x.detach().sum()) > 0 else 1)


def test_a_network_that_cannot_be_written_is_refused_before_anything_is_computed(teacher):
    own = Teacher.from_network(Branching(), num_classes=10, input_shape=(1, 16, 16), mean=0.5, std=0.25)
    refusal(lambda: trial.check(config_of("t", **INT8), own, ()), "quantisation.int8: the network cannot be exported")


@pytest.mark.parametrize("error", [ValueError("the network cannot be quantised"), RuntimeError("no kernel")])
def test_what_fails_at_the_end_is_said_and_the_float_student_is_there(error, pair, teacher, tried, monkeypatch):
    def failing(*_args):
        raise error

    monkeypatch.setattr(quantisation, "written", failing)
    outcome = trial.run(config_of("t", **INT8), teacher)
    assert (
        outcome.row["status"] == "finished"
        and f"no int8 file: {type(error).__name__}: {error}" in outcome.row["warnings"]
    )
    assert outcome.int8 is None and outcome.student is not None and same_weights(outcome.student, pair[1].student)
    assert all(outcome.row.get(name) is None for name in COLUMNS)


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"recovered_accuracy": 0.9}, {"quantised_accuracy": 0.891, "quantised_agreement": 0.0}, None),
        ({"recovered_accuracy": 0.9}, {"quantised_accuracy": 0.88, "quantised_agreement": 1.0}, "2.0 points of test"),
        ({"recovered_accuracy": None}, {"quantised_agreement": 0.96}, None),
        ({}, {"quantised_agreement": 0.9}, "10.0 points of agreement"),
    ],
)
def test_a_file_that_loses_more_than_the_bound_has_a_warning(row, columns, said):
    found = quantisation.lost_by_int8(row, columns, 1.0)
    assert found is None if said is None else said in str(found)


# ---- in sweeps -------------------------------------------------------------------------------------------------------


def test_trials_with_and_without_int8_share_their_images_and_int8_is_in_the_estimate(tiny_teacher, tried):
    jobs = jobs_of(tiny_sweep(tiny_teacher, {"quantisation.int8": [False, True]}))
    assert len({job.id for job in jobs}) == 2
    made = estimate.syntheses(jobs)
    assert sorted(one.domain for one in made) == ["reference", "train"] and {one.num_users for one in made} == {2}
    without, with_int8 = (estimate.trial_s(job, costs_of(jobs), 0) for job in jobs)
    assert without + estimate.INT8_S <= with_int8 < without + 2 * estimate.INT8_S


# ---- distillation through fake quantisation --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(teacher) -> tuple[quantisation.Written, np.ndarray]:
    """The teacher's files, biases as they are rounded, and images."""
    given = np.random.default_rng(0).normal(size=(48, 1, 16, 16)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "corrected", lambda model, *_: model)
        return quantisation.written(teacher, given, given), given


def test_the_simulation_computes_what_the_file_computes_and_has_gradients(files, teacher):
    written, given = files
    network = trial.on_device(teacher.network, torch.device("cpu")).requires_grad_(True)
    run = simulated.simulation(network, (1, 16, 16), written.float32, written.int8, given[:4])
    logits = run(torch.from_numpy(given))
    of_int8, of_float = onnx_files.run_of(written.int8)(given), torch_files.runs(teacher.network)(given)
    assert np.abs(logits.detach().numpy() - of_int8).mean() < 0.6 * np.abs(of_float - of_int8).mean()
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_a_file_of_another_network_is_not_simulated(files, teacher):
    written, given = files
    other = trial.on_device(teacher.network, torch.device("cpu")).requires_grad_(True)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    call = lambda: simulated.simulation(other, (1, 16, 16), written.float32, written.int8, given[:4])  # noqa: E731
    refusal(call, "no part of the network computes")


def test_weights_are_rounded_to_255_steps_of_each_output_and_zeros_stay():
    weight = torch.tensor([[0.5, -1.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.01, -3.0]], requires_grad=True)
    found = simulated.rounded(weight)
    steps = found.detach()[[0, 2]] / torch.tensor([[1.0], [3.0]]) * 127
    torch.testing.assert_close(steps, steps.round())
    assert (found[weight == 0] == 0).all() and found.detach()[2, 0] == 3
    found.sum().backward()
    assert (weight.grad == 1).all(), "straight through"


def test_the_file_nearer_to_the_teacher_is_kept_and_zeros_stay_zero(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(quantisation, "check", lambda *_: None)
    seen = []
    distilled = quantisation.distilled
    monkeypatch.setattr(
        quantisation, "distilled", lambda *args: seen.append((args[0], distilled(*args))) or seen[-1][1]
    )
    fields = {"quantisation.distil_above": 0.0, "quantisation.num_steps": 2}
    fields |= {"pruning.structure": "n_of_m", "pruning.sparsity": 0.5}
    outcome = trial.run(config_of("t", **INT8, **fields), teacher)
    ((before, after),) = seen
    steps = outcome.row["int8_steps"]
    (tmp_path / "int8.onnx").write_bytes(outcome.int8 or b"")
    assert metadata.read(onnx_files.read(tmp_path / "int8.onnx"))["int8_steps"] == steps and steps in (0, 2)
    assert not same_weights(before.network, after.network)
    assert outcome.student is not None and same_weights(outcome.student, before.network), "the student is not changed"
    own = pruning.prunable(after.network)
    for name, weight in pruning.prunable(before.network).items():
        assert (own[name][weight == 0] == 0).all()


def test_where_the_simulation_fails_the_file_from_before_it_is_kept(files, teacher, monkeypatch):
    def failing(*_args):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(quantisation, "check", lambda *_: None)
    monkeypatch.setattr(quantisation, "written", lambda *_: files[0])
    monkeypatch.setattr(quantisation, "distilled", failing)
    outcome = trial.run(config_of("t", **INT8, **{"quantisation.distil_above": 0.0}), teacher)
    assert outcome.int8 is not None and outcome.row["int8_steps"] == 0 < outcome.row["quantised_kl"]
    assert "no distillation through fake quantisation: RuntimeError: no such operator" in outcome.row["warnings"]


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_the_rung_is_shown_where_it_is_and_only_there(pair, capsys, tmp_path):
    for outcome, there in zip(pair, (True, False), strict=True):
        row = results.kept(outcome.row)
        show.print_ladder(row, tmp_path)
        printed = capsys.readouterr().out
        assert ("quantised to int8" in printed) == there == ("int8.onnx: " in printed)
        columns = {column.heading for column in show.trial_columns(pd.DataFrame([row]), [])}
        assert (ladder.QUANTISED.heading in columns) == there
