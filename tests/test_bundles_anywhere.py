"""Bundles under URIs: read as from a disk, file by file, and without a trace of what opens the URI."""

import json
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dfkd_ray import bundles, storage, sweep, trial
from dfkd_ray.bundles import folders
from dfkd_ray.config import TrialConfig, validate, with_overrides
from dfkd_ray.records import finishing, fitting
from dfkd_ray.sweep import runner
from folders import content, remove_everything
from helpers import TINY_TRIAL, make_teacher

BASE = with_overrides(TINY_TRIAL, {"distillation.num_steps": 1, "distillation.eval_every": 1})
SECRET = "test:test"  # of the bucket's URI


def copied(folder: Path, where: str) -> str:
    """A bundle's files under a URI."""
    for path in folder.rglob("*"):
        if path.is_file():
            place = storage.folder(where)
            for part in path.relative_to(folder).parts[:-1]:
                place = place / part
            place.write(path.name, path.read_bytes())
    return where


@pytest.fixture
def memory() -> str:
    return f"fsspec+memory://{uuid.uuid4().hex}/teachers"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that are read through `storage`, in order."""
    names: list[str] = []
    real = storage.Folder.read

    def read(folder, name):
        names.append(name)
        return real(folder, name)

    monkeypatch.setattr(storage.Folder, "read", read)
    return names


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A LeNet-5 with two records."""
    folder = tmp_path_factory.mktemp("recorded") / "lenet"
    made = make_teacher(folder)
    labels, rows = torch.arange(24) % 3, np.arange(24)
    images = torch.randint(0, 256, (24, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plan = fitting.plan(made, labels.numpy(), rows, ["top", "all"])
    (shard,) = fitting.shards(lambda chosen: images[chosen], labels, rows, 1)
    for record in finishing.finish(plan, fitting.fit(plan, made.network, shard, num_threads=1), made):
        bundles.save_record(str(folder), record)
    return folder


def test_bundles_are_written_into_a_bucket_and_no_password_is_printed(run_cli, bucket):
    done = run_cli("teacher", "init", "resnet8", "--seed", "3", "--out", bucket("made/untrained"))
    assert done.code == 0 and "s3://" in done.out and "test:test" not in done.out, done.out + done.err
    made = bundles.load(bucket("made/untrained"))
    assert made.info.architecture == "resnet8" and not made.info.trained


def test_a_bundle_in_a_bucket_is_the_one_on_the_disk(tiny_teacher, bucket):
    here, there = bundles.load(str(tiny_teacher)), bundles.load(copied(tiny_teacher, bucket("teachers/tiny")))
    assert (there.hash, there.name, there.info) == (here.hash, "tiny", here.info)
    for name, tensor in here.network.state_dict().items():
        assert torch.equal(there.network.state_dict()[name], tensor), name
    assert there.record_kinds() == [] and SECRET not in repr(there.folder)
    with pytest.raises(ValueError, match=r"tiny: no top record in its bundle \(expected records/top") as caught:
        there.record("top")
    assert SECRET not in str(caught.value)


def test_a_student_in_a_results_place_is_a_teacher(memory, tiny_teacher):
    made = bundles.load(str(tiny_teacher))
    student = storage.folder(memory) / "students" / "t-0123"
    bundles.save(student, made.info, made.network.state_dict())
    assert bundles.load(student.uri).name == "t-0123" and bundles.load(student).hash == made.hash


def test_a_record_is_read_only_when_it_is_asked_for(memory, recorded, reads):
    there, here = bundles.load(copied(recorded, memory)), bundles.load(str(recorded))
    reads.clear()
    there = bundles.load(memory)
    assert set(reads) == {"teacher.json", "weights.safetensors"}
    assert there.record_kinds() == ["all", "top"] and "all.safetensors" not in reads
    assert there.record("top").sha256 == here.record("top").sha256
    for name, tensor in here.record("top").tensors.items():
        assert torch.equal(there.record("top").tensors[name], tensor)
    assert reads.count("top.safetensors") == 2 and "all.safetensors" not in reads, "once here, once there"


def test_a_record_is_written_into_a_bundle_under_a_uri(memory, recorded):
    copied(recorded, memory)
    remove_everything(storage.folder(memory) / "records")
    assert bundles.load(memory).record_kinds() == []
    record = bundles.load(str(recorded)).record("all")
    size = bundles.save_record(memory, record)
    assert len((storage.folder(memory) / "records").read("all.safetensors") or b"") == size
    assert bundles.load(memory).record("all").sha256 == record.sha256
    with pytest.raises(ValueError, match=r"no bundle there; expected teacher\.json"):
        bundles.save_record(f"{memory}/nowhere", record)


def test_a_damaged_record_under_a_uri_is_refused(memory, recorded):
    copied(recorded, memory)
    records = storage.folder(memory) / "records"
    data = content(records, "top.safetensors")
    for broken in (data[:-1], data[:6], b"", b"\xff" * 64):
        records.write("top.safetensors", broken)
        with pytest.raises(ValueError, match=r"records/top\.safetensors: not a whole record"):
            bundles.load(memory).record("top")


def test_weights_under_a_uri_are_checked_before_they_are_looked_at(bucket, tiny_teacher, monkeypatch):
    place = storage.folder(copied(tiny_teacher, bucket("teachers/bad")))
    monkeypatch.setattr(folders, "read_safetensors", lambda *_: pytest.fail("it was parsed"))
    for data in (content(place, "weights.safetensors")[:-1], b"\x80\x04."):
        place.write("weights.safetensors", data)
        with pytest.raises(ValueError, match="truncated or not the one of this bundle") as caught:
            bundles.load(place)
        assert SECRET not in str(caught.value) and "bad/weights.safetensors?" in str(caught.value)
    place.remove("weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is missing"):
        bundles.load(place)


def test_the_weights_of_a_local_bundle_are_mapped_not_copied(tiny_teacher, reads):
    bundles.load(str(tiny_teacher))
    bundles.load(f"file://{tiny_teacher}")
    assert "weights.safetensors" not in reads


def test_what_is_not_there_and_what_does_not_answer_are_one_line_each_without_secrets(bucket, run_cli):
    done = run_cli("teacher", "info", bucket("teachers/none"))
    assert done.code == 2 and len(done.err.splitlines()) == 1 and SECRET not in done.err
    for word in ("s3://***@bucket/teachers/none", "teacher.json", "weights.safetensors", "records/<kind>.safetensors"):
        assert word in done.err
    nobody = "s3://test:test@bucket/x?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:1"
    done = run_cli("teacher", "info", nobody)
    assert done.code == 3 and len(done.err.splitlines()) == 1 and SECRET not in done.err
    assert "teacher s3://***@bucket/x?" in done.err and "cannot be read" in done.err
    done = run_cli("recover", "s3://test:te/st@bucket/x?nope=1", "--out", "never")
    assert done.code == 2 and "te/st" not in done.err


def test_a_denied_read_is_an_environment_error_that_names_the_bundle(memory, tiny_teacher, monkeypatch):
    copied(tiny_teacher, memory)

    def denied(*_):
        raise PermissionError(13, "When reading key 'x':\n AWS Error ACCESS_DENIED s3://me:hush@b")

    monkeypatch.setattr(storage.Folder, "read", denied)
    with pytest.raises(OSError, match=r"teacher fsspec\+memory://.*ACCESS_DENIED.*may use it") as caught:
        bundles.load(memory)
    assert "\n" not in str(caught.value) and "hush" not in str(caught.value)


def test_a_trial_whose_teacher_is_a_uri_is_the_same_trial_and_tells_no_secret(bucket, tiny_teacher):
    uri = copied(tiny_teacher, bucket("teachers/secretive"))
    outcomes = [
        trial.run(validate(TrialConfig, {**BASE, "teacher": name}), bundles.load(name))
        for name in (uri, str(tiny_teacher))
    ]
    there, here = outcomes
    assert there.row["teacher"] == "s3://bucket/teachers/secretive"
    assert there.row["trial_id"] == here.row["trial_id"] and there.row["agreement"] == here.row["agreement"]
    assert here.row["teacher"] == str(tiny_teacher)
    assert there.student_info is not None
    assert SECRET not in json.dumps(there.row) + there.student_info.model_dump_json()


def test_what_a_place_is_called_in_tables():
    assert storage.public_name("s3://key:hush@b/t@1/x?secret_key=hush&region=r") == "s3://b/t@1/x"
    assert storage.public_name("fsspec+sftp://me:hush@host:22/x") == "fsspec+sftp://host:22/x"
    for name in ("lenet5", "runs/a?b", "/x:y@z"):
        assert storage.public_name(name) == name


def test_secrets_of_all_kinds_are_hidden_and_nothing_else():
    shown = storage.without_secrets
    assert shown("s3://AK:a/b+c@bucket/x, see http://h:80/y") == "s3://***@bucket/x, see http://h:80/y"
    assert shown("abfs://c?sas_token=x&sig=y%3D&sp=r") == "abfs://c?sas_token=***&sig=***&sp=***"
    assert shown("gs://b?X-Amz-Credential=x y") == "gs://b?X-Amz-Credential=***"
    plain = "fsspec+memory://a/b and s3://bucket/a?region=us-east-1 and me@host: /x:y"
    assert shown(plain) == plain
    data = {"a": ["s3://k:s@b", 1, None], "b": {"c": "what? key=1"}}
    assert storage.secretless(data) == {"a": ["s3://***@b", 1, None], "b": {"c": "what? key=1"}}


@pytest.fixture
def planned(monkeypatch):
    """The plans that the command line would run."""
    plans: list[sweep.Plan] = []

    def run(plan, *_words, **_options):
        plans.append(plan)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", run)
    return plans


def test_a_sweep_finds_its_teachers_below_a_uri(bucket, tiny_teacher, tmp_path, run_cli, planned):
    copied(tiny_teacher, bucket("all/mine/tiny"))
    grid = {"teacher": ["mine/tiny", "fashion_mnist_resnet8"]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": BASE, "grid": grid}))
    words = ["sweep", str(tmp_path / "s.yaml"), "--results", str(tmp_path / "r"), "--test-data", "none"]
    done = run_cli(*words, "--teachers", bucket("all"))
    assert done.code == 130 and SECRET not in done.out + done.err, done.err
    assert [job.config.teacher for job in planned[0].jobs] == grid["teacher"]
    assert planned[0].jobs[0].teacher.hash == bundles.load(str(tiny_teacher)).hash
    grid["teacher"] = ["mine/other", "../all/mine/tiny"]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": BASE, "grid": grid}))
    done = run_cli(*words, "--teachers", bucket("all"))
    assert done.code == 2 and len(done.err.splitlines()) == 2 and SECRET not in done.err
    assert done.err.count("nor is there one in --teachers s3://***@bucket/all") == 2


def test_a_sweep_with_a_secret_in_its_teachers_uri_writes_none_of_it(bucket, tiny_teacher, tmp_path, run_cli, planned):
    uri = copied(tiny_teacher, bucket("teachers/tiny"))
    for parts in ({"grid": {"teacher": [uri]}}, {"search": {"space": {"pruning.sparsity": [0.5]}, "num_trials": 1}}):
        base = BASE if "grid" in parts else {**BASE, "teacher": uri}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": base, **parts}))
        done = run_cli("sweep", str(tmp_path / "s.yaml"), "--results", str(tmp_path / "r"), "--test-data", "none")
        assert done.code == 130 and SECRET not in done.out + done.err, done.err
        plan = planned.pop()
        (job,) = plan.known_jobs
        assert job.config.teacher == "s3://bucket/teachers/tiny" and SECRET not in repr(job.config)
        written = runner.as_yaml(plan.settings).decode()
        assert SECRET not in written and "s3://***@bucket/teachers/tiny?" in written
    wrong = {"base": {**BASE, "teacher": uri, "synthesis": {"precision": "tf32"}}, "grid": {"teacher": uri}}
    for data in (wrong, wrong | {"grid": {"pruning.sparsity": [0.5]}}, wrong | {"exclude": [{"teacher": uri}]}):
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(data))
        done = run_cli("sweep", str(tmp_path / "s.yaml"))
        assert done.code == 2 and done.err and SECRET not in done.err
