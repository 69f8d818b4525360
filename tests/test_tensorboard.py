"""Event files: what TensorBoard reads in them, that nothing doubles, and that it serves them."""

import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pyarrow import fs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from dfkd_ray import bundles, storage, sweep, tensorboard, trial
from dfkd_ray.config import TrialConfig, columns_of, validate
from helpers import tiny_trial

# What protobuf makes at import has no types.
API: Any = api_pb2
PLUGIN_DATA: Any = plugin_data_pb2
LOOKS = {"distillation.num_steps": 5, "distillation.eval_every": 1}


def config_of(teacher: str | Path = "t", /, **overrides) -> TrialConfig:
    return validate(TrialConfig, tiny_trial(teacher, **LOOKS | overrides))


def looks(num: int) -> list[dict]:
    """Looks at steps 0, 10, 20, … with numbers that float32 holds exactly; the first has no losses yet."""
    first = {"step": 0, "agreement": 0.25, "reference_kl": 2.0}
    return [first] + [
        {**first, "step": 10 * i, "agreement": 0.25 + i / 64, "kl": 1 / i, "learning_rate": 0.5} for i in range(1, num)
    ]


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def scalars(run: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in run.Scalars(tag)]


def hparams_of(run: EventAccumulator, tag: str):
    content = run.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
    return PLUGIN_DATA.HParamsPluginData.FromString(content)


def a_row(**changes) -> dict:
    row = {"trial_id": "t-1", "status": "finished", "best_step": 10, "wall_s": 3.0, "agreement": 0.5} | columns_of(
        config_of()
    )
    return row | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher):
    """A results place with one trial that `run_job` has run, its row and its looks."""
    place = tmp_path_factory.mktemp("place")
    teacher = bundles.load(str(tiny_teacher))
    [job] = sweep.plan([config_of(tiny_teacher, **{"pruning.sparsity": 0.5})], lambda _name: teacher)
    seen = {}
    run = trial.run

    def watched(*args, **kwargs):
        seen["outcome"] = run(*args, **kwargs)
        return seen["outcome"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "run", watched)
        row = sweep.run_job(job, trial.Inputs(images=trial.Local()), place)
    other = trial.pinned(config_of(**{"pruning.sparsity": 0.9}), teacher)
    tensorboard.write_sweep(place, [job.config, other])
    return place, row, seen["outcome"].epochs


def test_a_finished_trials_losses_and_agreement_are_those_of_its_looks(finished):
    place, row, epochs = finished
    run = read(place / "tensorboard" / row["trial_id"])
    assert len(epochs) == 6
    for name, tag in [("kl", "losses/kl"), ("agreement", "reference/agreement")]:
        expected = [(look["step"], pytest.approx(look[name], rel=1e-6)) for look in epochs if name in look]
        assert scalars(run, tag) == expected


def test_ladder_results_and_picture_are_those_of_the_row_and_the_place(finished):
    place, row, _ = finished
    run = read(place / "tensorboard" / row["trial_id"])
    rungs = [row[f"{rung}_agreement"] for rung in ("pruned", "bn_reestimated", "reconstructed")] + [row["agreement"]]
    assert scalars(run, "ladder/agreement") == [(i + 1, pytest.approx(value)) for i, value in enumerate(rungs)]
    assert "ladder/accuracy" not in run.Tags()["scalars"], "there was no test data"
    for name in ("agreement", "achieved_sparsity", "stored_bytes"):
        assert scalars(run, f"trial/{name}") == [(row["best_step"], pytest.approx(row[name]))]
    [picture] = run.Images("synthetic_images")
    assert picture.encoded_image_string == (place / "images" / f"{row['synthesis_key'][:12]}.png").read_bytes()


@pytest.mark.parametrize("reconstructed", [0.5625, None])
def test_the_accuracy_ladder_has_a_step_for_each_rung_and_says_which(tmp_path, reconstructed):
    accuracies = {"teacher_accuracy": 0.75, "pruned_accuracy": 0.125, "bn_reestimated_accuracy": 0.5}
    accuracies |= {"reconstructed_accuracy": reconstructed, "recovered_accuracy": 0.625}
    tensorboard.write_trial(tmp_path, a_row(**accuracies), ())
    run = read(tmp_path / "tensorboard" / "t-1")
    before = [(0, 0.75), (1, 0.125), (2, 0.5), *([(3, reconstructed)] if reconstructed else [])]
    assert scalars(run, "ladder/accuracy") == [*before, (4, 0.625)], "a rung left out leaves its step out"
    said = run.SummaryMetadata("ladder/accuracy").summary_description
    assert said.endswith("0 teacher, 1 pruned, 2 BN re-estimated, 3 reconstructed, 4 recovered, 5 quantised to int8")
    assert scalars(run, "trial/recovered_accuracy") == [(10, 0.625)]


def test_what_a_resumed_trial_hands_in_again_is_not_doubled_and_nothing_is_missing(tmp_path):
    all_looks = looks(8)
    tensorboard.write_epochs(tmp_path, "t-1", all_looks[:3])
    tensorboard.write_epochs(tmp_path, "t-1", all_looks[:6])  # killed after this; the checkpoint is of the third look
    tensorboard.write_epochs(tmp_path, "t-1", all_looks[:3])
    tensorboard.write_epochs(tmp_path, "t-1", all_looks[:5])
    for _ in range(2):  # the second: killed between events and row, so that the trial ends twice
        tensorboard.write_trial(tmp_path, a_row(), all_looks)
    run = read(tmp_path / "tensorboard" / "t-1")
    assert scalars(run, "reference/agreement") == [(look["step"], look["agreement"]) for look in all_looks]
    assert scalars(run, "losses/kl") == [(look["step"], pytest.approx(look["kl"])) for look in all_looks[1:]]
    assert [step for step, _ in scalars(run, "training/learning_rate")] == [10 * i for i in range(1, 8)]
    assert len(scalars(run, "trial/agreement")) == 1


def test_a_reader_that_is_open_sees_the_looks_as_they_come(tmp_path):
    tensorboard.write_epochs(tmp_path, "t-1", looks(2))
    run = read(tmp_path / "tensorboard" / "t-1")
    assert len(run.Scalars("reference/agreement")) == 2
    tensorboard.write_epochs(tmp_path, "t-1", looks(4))
    tensorboard.write_trial(tmp_path, a_row(), looks(5))
    run.Reload()
    assert [step for step, _ in scalars(run, "reference/agreement")] == [0, 10, 20, 30, 40]
    assert len(run.Scalars("trial/agreement")) == 1


def test_a_failed_trial_says_why_and_that_it_failed(tmp_path):
    row = a_row(status="failed", reason="FloatingPointError: no number", agreement=None)
    tensorboard.write_trial(tmp_path, row, ())
    run = read(tmp_path / "tensorboard" / "t-1")
    [reason] = run.Tensors("reason")
    assert reason.tensor_proto.string_val[0].decode() == "FloatingPointError: no number"
    assert hparams_of(run, "session_end_info").session_end_info.status == API.STATUS_FAILURE
    assert not run.Tags()["scalars"]


def test_hparams_of_a_trial_are_its_config_fields(finished):
    place, row, _ = finished
    start = hparams_of(read(place / "tensorboard" / row["trial_id"]), "session_start_info").session_start_info
    assert start.group_name == row["trial_id"]
    assert start.hparams["pruning.sparsity"].number_value == 0.5
    assert start.hparams["pruning.criterion"].string_value == "lamp"
    assert start.hparams["distillation.flip"].bool_value is True
    assert "student.architecture" not in start.hparams, "null has no value"


def test_the_hparams_view_has_the_fields_that_vary_and_two_metrics(tmp_path):
    student = {"architecture": "resnet18", "arguments": {"stem": "cifar"}}
    configs = [
        config_of("a"),
        config_of("a", **{"pruning.sparsity": 0.9, "distillation.flip": False}),
        config_of("b", student=student, **{"synthesis.seed": 3}),
        config_of("a", synthesis={"method": "noise", "batch_size": 8}),
    ]
    tensorboard.write_sweep(tmp_path, configs)
    experiment = hparams_of(read(tmp_path / "tensorboard"), "experiment").experiment
    shown = {info.name: info for info in experiment.hparam_infos}
    assert set(shown) == {
        "teacher",
        "pruning.sparsity",
        "distillation.flip",
        "student.architecture",
        "student.arguments",
        "synthesis.seed",
        "synthesis.method",
    }
    assert shown["pruning.sparsity"].type == API.DATA_TYPE_FLOAT64
    assert [value.number_value for value in shown["pruning.sparsity"].domain_discrete.values] == [0.75, 0.9]
    tags = [info.name.tag for info in experiment.metric_infos]
    assert tags == ["trial/reference_kl", "trial/agreement", "trial/recovered_accuracy"]


def test_a_place_on_a_uri_holds_the_same_points(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    uri = "mock://bucket/place"
    remote = fs.SubTreeFileSystem(str(tmp_path / "disk"), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "opened", lambda _uri: (remote, "bucket/place"))
    tensorboard.write_epochs(uri, "t-1", looks(3))
    tensorboard.write_epochs(uri, "t-1", looks(5))
    tensorboard.write_trial(uri, a_row(), looks(5))
    run = read(tmp_path / "disk" / "bucket" / "place" / "tensorboard" / "t-1")
    assert [step for step, _ in scalars(run, "reference/agreement")] == [0, 10, 20, 30, 40]


def test_a_large_picture_is_made_smaller_and_a_small_one_kept_as_it_is():
    def png(width: int, height: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (width, height), (200, 10, 10)).save(file, format="PNG")
        return file.getvalue()

    small, large = png(40, 20), png(3000, 1500)
    kept, shrunk = tensorboard.image("x", small, "").image, tensorboard.image("x", large, "").image
    assert kept.encoded_image_string == small and (kept.width, kept.height, kept.colorspace) == (40, 20, 3)
    assert (shrunk.width, shrunk.height) == (1024, 512)
    assert Image.open(io.BytesIO(shrunk.encoded_image_string)).size == (1024, 512)


def test_writing_imports_neither_tensorflow_nor_torch(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('tensorflow was imported')\n")
    script = (
        "import sys\n"
        "from dfkd_ray import config, tensorboard\n"
        f"tensorboard.write_trial({str(tmp_path)!r}, dict(trial_id='t-1', status='failed', reason='x'), [])\n"
        f"tensorboard.write_sweep({str(tmp_path)!r}, [config.TrialConfig(teacher=name) for name in 'ab'])\n"
        "assert not {'tensorflow', 'torch'} & set(sys.modules)\n"
    )
    first = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=900, env={**os.environ, "PYTHONPATH": first})


def test_a_trial_is_one_file_however_often_it_looked_failed_and_was_resumed(tmp_path):
    all_looks = looks(9)
    for num in (1, 2, 3):
        tensorboard.write_epochs(tmp_path, "t-1", all_looks[:num])
    tensorboard.write_trial(tmp_path, a_row(status="failed", reason="x", agreement=None), all_looks[:5])
    tensorboard.write_trial(tmp_path, a_row(status="failed", reason="it died", agreement=None), ())
    tensorboard.write_epochs(tmp_path, "t-1", all_looks[:4])
    tensorboard.write_epochs(tmp_path, "t-1", all_looks[:7])
    tensorboard.write_trial(tmp_path, a_row(), all_looks)
    assert [path.name for path in (tmp_path / "tensorboard" / "t-1").iterdir()] == ["events.out.tfevents.trial"]
    run = read(tmp_path / "tensorboard" / "t-1")
    assert scalars(run, "reference/agreement") == [(look["step"], look["agreement"]) for look in all_looks]
    assert hparams_of(run, "session_end_info").session_end_info.status == API.STATUS_SUCCESS
    assert len(scalars(run, "trial/agreement")) == 1 and "reason" not in run.Tags()["tensors"]


def test_a_trial_whose_process_died_keeps_the_looks_that_it_had(tmp_path):
    tensorboard.write_epochs(tmp_path, "t-1", looks(4))
    tensorboard.write_trial(tmp_path, a_row(status="failed", reason="it died", agreement=None), ())
    run = read(tmp_path / "tensorboard" / "t-1")
    assert [step for step, _ in scalars(run, "reference/agreement")] == [0, 10, 20, 30]


def test_half_a_record_of_a_killed_process_is_cut_and_nothing_else_is_lost(tmp_path):
    tensorboard.write_epochs(tmp_path, "t-1", looks(3))
    file = tmp_path / "tensorboard" / "t-1" / "events.out.tfevents.trial"
    before = file.read_bytes()
    tensorboard.write_epochs(tmp_path, "t-1", looks(6))
    whole = file.read_bytes()
    for size in range(len(before) + 1, len(whole), 7):
        file.write_bytes(whole[:size])
        tensorboard.write_epochs(tmp_path, "t-1", looks(6))
        steps = [step for step, _ in scalars(read(file.parent), "reference/agreement")]
        assert steps == [0, 10, 20, 30, 40, 50], size


def test_a_full_disk_leaves_a_runs_file_as_it_was(tmp_path, monkeypatch):
    tensorboard.write_epochs(tmp_path, "t-1", looks(3))
    file = tmp_path / "tensorboard" / "t-1" / "events.out.tfevents.trial"
    before = file.read_bytes()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            tensorboard.write_epochs(tmp_path, "t-1", looks(5))
    assert file.read_bytes() == before


def test_a_link_in_the_place_of_a_runs_file_leads_to_nothing_that_is_changed(tmp_path):
    tensorboard.write_epochs(tmp_path, "t-1", looks(3))
    file = tmp_path / "tensorboard" / "t-1" / "events.out.tfevents.trial"
    mine = tmp_path / "mine"
    file.rename(mine)
    file.symlink_to(mine)
    before = mine.read_bytes()
    with pytest.raises(OSError):
        tensorboard.write_epochs(tmp_path, "t-1", looks(5))
    assert mine.read_bytes() == before


def test_the_hparams_view_has_the_fields_of_every_sweep_that_was_in_the_place(tmp_path):
    def shown() -> dict[str, list]:
        experiment = hparams_of(read(tmp_path / "tensorboard"), "experiment").experiment
        values = {info.name: info.domain_discrete.values for info in experiment.hparam_infos}
        return {name: sorted(one.number_value or one.string_value for one in some) for name, some in values.items()}

    tensorboard.write_sweep(tmp_path, [config_of("a"), config_of("a", **{"pruning.sparsity": 0.9})])
    assert shown() == {"pruning.sparsity": [0.75, 0.9]}
    second = [config_of("b"), config_of("b", **{"distillation.temperature": 2.0})]
    for _ in range(2):  # again: it was resumed
        tensorboard.write_sweep(tmp_path, second)
    both = {"pruning.sparsity": [0.75, 0.9], "distillation.temperature": [2.0, 4.0], "teacher": ["a", "b"]}
    assert shown() == both
    fields = tmp_path / "tensorboard" / "fields.json"
    kept = fields.read_text()
    for damaged in (
        "{",
        "[]",
        '{"teacher": [[1]], "nope": [1]}',
        '{"pruning.sparsity": ["x", 1' + "0" * 400 + "]}",
        "[" * 9999,
    ):
        fields.write_text(damaged)
        tensorboard.write_sweep(tmp_path, second)
        assert set(shown()) == {"distillation.temperature"}
    fields.write_text(kept)
    tensorboard.write_sweep(tmp_path, [config_of("a")])
    assert shown() == both


@pytest.mark.parametrize("fast", ["true", "false"])
def test_a_tensorboard_that_follows_a_run_sees_every_point_once_and_its_end(tmp_path, fast):
    tensorboard.write_epochs(tmp_path, "t-1", looks(2))
    tensorboard.write_sweep(tmp_path, [config_of("a"), config_of("b")])
    with served(tmp_path, f"--load_fast={fast}") as ask:

        def steps(tag: str) -> list[int]:
            try:
                return [point[1] for point in ask(f"/data/plugin/scalars/scalars?run=tensorboard/t-1&tag={tag}")]
            except urllib.error.HTTPError:  # none yet
                return []

        def eventually(wanted: list[int], tag: str) -> None:
            deadline = time.monotonic() + 300
            while steps(tag) != wanted and time.monotonic() < deadline:
                time.sleep(0.2)
            assert steps(tag) == wanted

        eventually([0, 10], "reference/agreement")
        tensorboard.write_epochs(tmp_path, "t-1", looks(4))
        eventually([0, 10, 20, 30], "reference/agreement")
        tensorboard.write_epochs(tmp_path, "t-1", looks(5))
        tensorboard.write_trial(tmp_path, a_row(), looks(6))
        eventually([0, 10, 20, 30, 40, 50], "reference/agreement")
        eventually([10], "trial/agreement")


@contextlib.contextmanager
def served(place: Path, *options: str):
    """A TensorBoard over a place; gives what asks it."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(place), "--host", "127.0.0.1", "--port", "0"]
    command += ["--reload_interval", "1", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = None
        for line in process.stderr:
            if match := re.search(r"http://[^/ ]+:(\d+)", line):
                address = f"http://127.0.0.1:{match[1]}"
                break
        assert address, "TensorBoard ended before it was up"

        def ask(path: str, body: dict | None = None):
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)

        yield ask
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_tensorboard_serves_runs_points_and_hparams_of_a_results_place(finished):
    place, row, epochs = finished
    run = f"tensorboard/{row['trial_id']}"
    with served(place) as ask:
        deadline = time.monotonic() + 600
        while run not in ask("/data/runs") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert set(ask("/data/runs")) == {run, "tensorboard"}
        points = ask(f"/data/plugin/scalars/scalars?run={run}&tag=reference/agreement")
        assert [point[1:] for point in points] == [[k["step"], pytest.approx(k["agreement"])] for k in epochs]
        experiment = ask("/data/plugin/hparams/experiment", {"experimentName": ""})
        assert {info["name"] for info in experiment["hparamInfos"]} == {"teacher", "pruning.sparsity"}
        wanted = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "colParams": [], "sliceSize": 9}
        [group] = ask("/data/plugin/hparams/session_groups", wanted)["sessionGroups"]
        assert group["hparams"]["pruning.sparsity"] == 0.5
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        assert values == {f"trial/{name}": pytest.approx(row[name]) for name in ("reference_kl", "agreement")}
