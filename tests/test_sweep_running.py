"""Running a sweep: what goes wrong and what then happens, resuming, places, clusters."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import torch

from dfkd_ray import (
    bundles,
    checkpoints,
    config,
    distillation,
    distillation_state,
    fleet,
    models,
    results,
    storage,
    sweep,
    trial,
)
from dfkd_ray.cli.live import descendants
from dfkd_ray.fleet import node_check
from dfkd_ray.sweep import ledger as ledgers
from dfkd_ray.sweep import places, tune_reports, worker
from helpers import ABOUT, TINY_TRIAL, jobs_of, tiny_sweep, write_yaml

LOOKS = {"distillation.num_steps": 12, "distillation.eval_every": 2, "distillation.checkpoint_every": 2}


def jobs_with(teacher: Path, **grid) -> list[sweep.Job]:
    return jobs_of(tiny_sweep(teacher, grid or {"pruning.sparsity": [0.5]}, **LOOKS))


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(places, "PAUSES_S", (0.0, 0.0, 0.0))


def run(job: sweep.Job, folder: Path, cache: Path | None = None, **options):
    return sweep.run_job(job, trial.Inputs(images=trial.Local(cache)), folder, **options)


# ---- reasons -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FloatingPointError("the loss is inf at step 10"), "FloatingPointError: the loss is inf at step 10"),
        (MemoryError(), "MemoryError: no message"),
        (
            RuntimeError("worker pid=1234 at 0x7f3a12 of 10.1.2.3:6379 died"),
            "RuntimeError: worker pid=… at 0x… of … died",
        ),
        (ValueError("/tmp/run-7/t/weights.safetensors: not whole\nmore"), "ValueError: weights.safetensors: not whole"),
        (OSError(errno.ENOENT, "No such file", "/a/b-1/c.bin"), "OSError: [Errno 2] No such file: 'c.bin'"),
        (ValueError("s3://bucket/a/b is gone"), "ValueError: s3://bucket/a/b is gone"),
        (RuntimeError("a ratio of 3/4, and/or 2.15.0"), "RuntimeError: a ratio of 3/4, and/or 2.15.0"),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1 GiB free. Process 77 …"
            ),
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB",
        ),
    ],
)
def test_reasons_hold_nothing_that_differs_between_runs(error, reason):
    if isinstance(error, OSError):
        reason = reason.replace("OSError", type(error).__name__)
    assert trial.reason_of(error) == reason


# ---- one trial -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("can't allocate"),
        RuntimeError("can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_out_of_memory_error_leaves_a_row_with_its_reason_and_a_checkpoint_to_go_on_from(
    tiny_teacher, tmp_path, monkeypatch, error
):
    job = jobs_with(tiny_teacher)[0]
    calm = distillation.update

    def update(*arguments):
        if arguments[-1] == 7:
            raise error
        calm(*arguments)

    monkeypatch.setattr(distillation, "update", update)
    row = run(job, tmp_path)
    assert (row["status"], row["reason"]) == ("failed", trial.reason_of(error))
    assert results.read(tmp_path, "trials")["status"].tolist() == ["failed"]
    assert not results.finished_ids(tmp_path), "a failed trial is run again"
    assert (tmp_path / "checkpoints" / job.id / checkpoints.FILE).is_file()
    monkeypatch.setattr(distillation, "update", calm)
    assert run(job, tmp_path)["status"] == "finished"
    assert results.read(tmp_path, "trials")["status"].tolist() == ["finished"]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_resumed_trial_starts_at_its_checkpoint_takes_cached_images_and_ends_with_the_same_row(
    tiny_teacher, tmp_path
):
    job = jobs_with(tiny_teacher)[0]
    wanted = run(job, tmp_path / "undisturbed", tmp_path / "other cache")
    seen: list[int] = []

    def dying(stage: str, done: int, _total: int, _numbers) -> None:
        if stage == "distilling":
            seen.append(done)
            if done == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "resumed", tmp_path / "cache", observer=trial.Observer(progress=dying))
    assert not (tmp_path / "resumed" / "trials").exists()
    watching = trial.Observer(progress=lambda stage, done, *_: seen.append(done) if stage == "distilling" else None)
    row = run(job, tmp_path / "resumed", tmp_path / "cache", observer=watching)
    assert seen == [1, 2, 3, 4, 5, 6, 7, *range(7, 13)], "checkpoints are every second step"
    assert row["num_cached_batches"] == 1
    names = [name for name in results.deterministic_columns() if name in wanted]
    assert {name: row[name] for name in names} == {name: wanted[name] for name in names}


def failing(real, num_failures: int, number: int = errno.ENOSPC, table: str | None = None):
    """A function that meets a full disk so many times; of `results.write` for one table only."""
    left = [num_failures]

    def act(*arguments, **options):
        if left[0] and (table is None or table == arguments[1]):
            left[0] -= 1
            raise OSError(number, os.strerror(number), "/somewhere/full")
        return real(*arguments, **options)

    return act


def test_a_disk_that_is_full_for_a_moment_costs_no_trial(tiny_teacher, tmp_path, monkeypatch, no_pauses):
    monkeypatch.setattr(distillation_state, "write", failing(distillation_state.write, 2))
    monkeypatch.setattr(results, "write", failing(results.write, 3, table="trials"))
    assert run(jobs_with(tiny_teacher)[0], tmp_path)["status"] == "finished"
    assert len(results.read(tmp_path, "trials")) == 1


@pytest.mark.parametrize("where", [(distillation_state, "write"), (results, "write"), (results, "write_batches")])
def test_a_disk_that_stays_full_stops_the_trial_and_spares_the_finished_rows(
    tiny_teacher, tmp_path, monkeypatch, no_pauses, where
):
    first, second = jobs_with(tiny_teacher, **{"pruning.sparsity": [0.5, 0.9]})
    run(first, tmp_path)
    before = (tmp_path / "trials" / f"{first.id}.parquet").read_bytes()
    monkeypatch.setattr(*where, failing(getattr(*where), 10**6))
    with pytest.raises(OSError, match="No space left"):
        run(second, tmp_path)
    assert (tmp_path / "trials" / f"{first.id}.parquet").read_bytes() == before
    assert results.read(tmp_path, "trials")["trial_id"].tolist() == [first.id]


def shared_with(folder: Path, teacher: bundles.Teacher, **more) -> worker.Shared:
    teachers = {teacher.hash: [more.pop("arrays", bundles.to_arrays(teacher))]}
    return worker.Shared(str(folder), None, (), None, more.pop("board", None), teachers, {teacher.hash: [None]}, {})


def test_in_its_process_a_trial_tells_its_row_and_stages_or_why_not(tiny_teacher, tmp_path, monkeypatch, no_pauses):
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(worker, "OPENED", {})
    job = jobs_with(tiny_teacher)[0]
    broken = bundles.to_arrays(job.teacher)
    broken["state"] = dict(list(broken["state"].items())[1:])
    told = worker.in_worker(job.id, job.config, job.teacher.hash, shared_with(tmp_path, job.teacher, arrays=broken))
    judged = {"step": 0, "reference_kl": tune_reports.WORST, "failed": 1}  # as bad as can be
    assert set(told) == {"reason", *judged} and told["reason"].startswith("ValueError: ") and "/" not in told["reason"]

    class Remote:
        def __init__(self) -> None:
            self.tell = self
            self.heard: list[tuple] = []

        def remote(self, *told) -> None:
            self.heard.append(told)

    board = Remote()
    told = worker.in_worker(job.id, job.config, job.teacher.hash, shared_with(tmp_path, job.teacher, board=board))
    assert json.loads(told["row"])["status"] == "finished" and set(told["seconds"]) == {
        "results",
        "TensorBoard",
        "live view",
    }
    assert {stage for _, stage, _, _ in board.heard} >= {"reference set", "synthesising", "distilling"}
    monkeypatch.setattr(results, "write", failing(results.write, 10**6, table="trials"))
    told = worker.in_worker(job.id, job.config, job.teacher.hash, shared_with(tmp_path / "other", job.teacher))
    assert told == {"stopped": "/somewhere/full: No space left on device", **judged}


# ---- the driver ----------------------------------------------------------------------------------------------------


def test_the_ledger_counts_every_trial_once_and_writes_rows_for_those_that_cannot(tiny_teacher, tmp_path):
    jobs = jobs_with(tiny_teacher, **{"pruning.sparsity": [0.5, 0.6, 0.7, 0.8]})
    heard: list[tuple] = []
    ledger = ledgers.Ledger(
        jobs,
        storage.folder(tmp_path),
        lambda row, *n: heard.append((row["trial_id"], row["status"], *n)),
        sweep.Seconds(),
    )
    for job in jobs:
        ledger.started(job)
    ledger.ended(
        jobs[0], {"row": json.dumps({"trial_id": jobs[0].id, "status": "finished"}), "seconds": {"results": 1.5}}
    )
    ledger.again(jobs[1])
    assert ledger.running == {jobs[1].id: "starting again", jobs[2].id: "starting", jobs[3].id: "starting"}
    ledger.died(jobs[1])
    ledger.ended(jobs[2], {"reason": "ValueError: broken"})
    ledger.ended(jobs[3], {})  # it was stopped
    statuses = [(jobs[0].id, "finished", 1, 4), (jobs[1].id, "failed", 2, 4), (jobs[2].id, "failed", 3, 4)]
    assert heard == statuses and ledger.num_done == 3 and not ledger.running and ledger.trouble is None
    rows = results.read(tmp_path, "trials").set_index("trial_id")
    assert rows.loc[jobs[1].id, "reason"] == "the trial's process died 3 times (killed, or out of memory)"
    assert rows.loc[jobs[2].id, "reason"] == "ValueError: broken" and ledger.seconds["results"] > 1.5


def test_the_ledger_keeps_the_first_trouble_of_the_disk(tiny_teacher, tmp_path, monkeypatch, no_pauses):
    jobs = jobs_with(tiny_teacher, **{"pruning.sparsity": [0.5, 0.6]})
    ledger = ledgers.Ledger(jobs, storage.folder(tmp_path), None, sweep.Seconds())
    monkeypatch.setattr(results, "write", failing(results.write, 10**6, table="trials"))
    ledger.died(jobs[0])
    ledger.ended(jobs[1], {"stopped": "other"})
    assert ledger.trouble == f"{tmp_path}: No space left on device" and ledger.num_done == 0


def test_rows_measured_on_other_test_data_are_not_mixed(tiny_teacher, tmp_path):
    first, second = jobs_with(tiny_teacher, **{"pruning.sparsity": [0.5, 0.9]})
    run(first, tmp_path)
    with pytest.raises(ValueError, match="measured on no test images, the others would be on 3"):
        batch = trial.Batch(0, torch.zeros(3, 1, 16, 16, dtype=torch.uint8).numpy(), torch.zeros(3).long().numpy(), "k")
        sweep.run([first, second], tmp_path, None, data=sweep.Data(test_of=lambda _teacher: [batch]))


def test_what_killed_processes_left_is_tidied_and_the_rest_is_not(tmp_path):
    first, second, third = (f"t-{digit * 12}" for digit in "123")
    written = [f"checkpoints/{first}/state.safetensors", f"checkpoints/{second}/state.safetensors"]
    written += [f"students/.{third}-ab_12xyz/weights.safetensors", f"students/{first}/teacher.json"]
    written += ["checkpoints/.mine/notes.txt", f"checkpoints/{first}0/state.safetensors", "students/.git/config"]
    for name in written:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    places.tidy(storage.folder(tmp_path), {first, str(tmp_path / "students" / first), "..", f"../students/{first}"})
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(written) - {written[0], written[2]}
    assert not (tmp_path / "checkpoints" / first).exists()
    assert not (tmp_path / "students" / f".{third}-ab_12xyz").exists()


# ---- places --------------------------------------------------------------------------------------------------------


def test_a_probe_leaves_nothing_behind(tmp_path):
    places.probe(storage.folder(tmp_path / "new"), "results folder")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the cache .*/file/x cannot be written: Not a directory; mend"):
        places.probe(storage.folder(tmp_path / "file" / "x"), "cache")
    monkeypatch.setattr(storage.Folder, "read", lambda *_: b"other")
    with pytest.raises(OSError, match="does not read back"):
        places.probe(storage.folder(tmp_path), "cache")
    monkeypatch.setattr(storage.Folder, "write", lambda *_: time.sleep(3))
    monkeypatch.setattr(node_check, "ANSWER_S", 0.1)
    with pytest.raises(OSError, match="no answer within"):
        places.probe(storage.folder(tmp_path), "cache")


def test_what_a_node_cannot_do_is_said_with_what_to_do(tmp_path, monkeypatch):
    place, cache = storage.folder(tmp_path / "r"), storage.folder(tmp_path / "c")
    place.write("seen", b"seen")
    assert (
        node_check.trouble_here(place, "seen", cache) is None and node_check.trouble_here(place, "seen", None) is None
    )
    assert (list(place.sizes()), list(cache.sizes())) == (["seen"], []), "a probe leaves nothing behind"
    assert "does not see" in (node_check.trouble_here(place, "other", cache) or "")
    real = storage.Folder.write
    for denied, what, option in ((place, "results folder", "`results`"), (cache, "cache", "`cache`")):

        def write(folder, name, *data, denied=denied):
            if folder == denied:
                raise PermissionError(13, "AWS Error ACCESS_DENIED s3://me:hush@b")
            real(folder, name, *data)

        monkeypatch.setattr(storage.Folder, "write", write)
        told = node_check.trouble_here(place, "seen", cache) or ""
        assert told.startswith(f"the {what} {denied} cannot be written: AWS Error ACCESS_DENIED") and "hush" not in told
        assert told.endswith(f"choose another {option}") and "credentials" in told
    monkeypatch.setattr(storage.Folder, "read", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert "cannot be read: denied; give this node" in (node_check.trouble_here(place, "seen", cache) or "")


TWO_NODES = """
import os, sys
from ray.cluster_utils import Cluster
from dfkd_ray import fleet, storage
from dfkd_ray.fleet import node_check

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000})
try:
    with fleet.connected(cluster.address):
        place, cache = storage.folder(sys.argv[1]), storage.folder(sys.argv[2])
        node_check.try_on_every_node(place, cache)
        os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"  # the store is out of this node's reach
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        cluster.wait_for_nodes()
        node_check.try_on_every_node(storage.folder(sys.argv[3]), None)
        try:
            node_check.try_on_every_node(storage.folder(sys.argv[3]), cache)
        except OSError as error:
            print(error)
        print("left", place.sizes(), cache.sizes())
finally:
    cluster.shutdown()
"""


def test_a_node_that_cannot_write_is_found_before_the_first_trial(bucket, tmp_path):
    endpoint = bucket("").rpartition("=")[2]
    uri = "s3://test:test@bucket/{}?scheme=http&region=us-east-1"
    (tmp_path / "nodes.py").write_text(TWO_NODES)
    words = [sys.executable, str(tmp_path / "nodes.py"), uri.format("r"), uri.format("c"), str(tmp_path / "shared")]
    env = {**os.environ, **fleet.QUIET, "AWS_ENDPOINT_URL": f"http://{endpoint}"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told, left = done.stdout.splitlines()[-2:]
    assert told.startswith("node ") and ": the cache s3://***@bucket/c?" in told and "choose another `cache`" in told
    assert left == "left {} {}", "what was tried is removed"


def test_a_bucket_that_is_not_there_is_one_line_before_anything_starts(bucket, run_cli, sweep_file, tmp_path):
    nobody = "s3://test:test@bucket/x?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:1"
    for place in (nobody, bucket("x").replace("@bucket", "@other")):
        done = run_cli("sweep", str(sweep_file), "--results", place, "--cache", str(tmp_path / "c"))
        assert done.code == 3 and len(done.err.splitlines()) == 1 and "test:test" not in done.err
        assert "the results folder s3://" in done.err and "mend that or choose another place" in done.err


def test_two_sweeps_do_not_run_in_one_folder(tmp_path):
    place = storage.folder(tmp_path)
    with places.reserved(place), pytest.raises(OSError, match="another sweep is running"), places.reserved(place):
        pass
    with places.reserved(place):
        pass


def test_disk_errors_are_told_from_a_trials_own(monkeypatch):
    told = OSError(f"batch 3 of synthesis abc: [Errno {errno.ENOSPC}] No space left on device: '/cache'")
    assert places.is_disk_error(told) and places.is_disk_error(OSError(errno.EROFS, "read-only"))
    assert not any(
        map(places.is_disk_error, [FileNotFoundError(errno.ENOENT, "gone"), TimeoutError("late"), ValueError("x")])
    )
    pauses: list[float] = []
    monkeypatch.setattr(places.time, "sleep", pauses.append)
    with pytest.raises(OSError, match="No space"):
        places.persistently(failing(lambda: None, 10**6))
    assert pauses == list(places.PAUSES_S)
    with pytest.raises(FileNotFoundError):
        places.persistently(failing(lambda: None, 10**6, errno.ENOENT), places.is_disk_error)
    assert pauses == list(places.PAUSES_S), "what will not pass is not tried again"


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep_file(tiny_teacher, tmp_path) -> Path:
    return write_yaml(tmp_path / "s.yaml", tiny_sweep(tiny_teacher, {"pruning.sparsity": [0.5, 0.9]}, **LOOKS))


@pytest.mark.parametrize(
    ("address", "code", "parts"),
    [
        ("127.0.0.1:1", 3, ("no Ray cluster to be reached at 127.0.0.1:1", "refused")),
        ("ray://127.0.0.1:10001", 2, ("expected HOST:PORT",)),
        ("somewhere", 2, ("expected HOST:PORT",)),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(run_cli, sweep_file, tmp_path, address, code, parts):
    words = ["--results", str(tmp_path / "r"), "--cache", str(tmp_path / "c"), "--address", address]
    done = run_cli("sweep", str(sweep_file), *words)
    assert done.code == code and len(done.err.splitlines()) == 1 and all(part in done.err for part in parts), done.err


def test_a_cache_that_cannot_be_written_is_found_before_ray_starts(run_cli, sweep_file, tmp_path):
    (tmp_path / "file").write_text("")
    for cache, code, says in ((tmp_path / "file" / "c", 2, "expected a folder"), ("/proc/dfkd_ray/c", 3, "the cache")):
        done = run_cli("sweep", str(sweep_file), "--results", str(tmp_path / "r"), "--cache", str(cache))
        assert done.code == code and says in done.err and len(done.err.splitlines()) == 1, done.err
    assert not ray.is_initialized()


# ---- all of it, on a running cluster -------------------------------------------------------------------------------

FAULTY = """
import os, signal, torch
from torch import nn

class Faulty(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)

    def forward(self, images):
        if torch.is_grad_enabled() and self.training and len(images) > 2:  # a student in distillation, no check
            if self.fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"can't allocate memory: pid {os.getpid()} at {hex(id(self))}")
        return self.layers(images)

def make(fault):
    if fault == "gone" and "RAY_RAYLET_PID" in os.environ:  # in a process of the cluster
        raise ModuleNotFoundError(f"no module in {os.getcwd()}/{os.getpid()}/modules")
    return Faulty(fault)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray cluster of one node in processes of its own; its address."""
    code = tmp_path_factory.mktemp("code")
    (code / "faulty.py").write_text(FAULTY)
    script = (
        "import sys, ray; ray.init('local', num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, "
        "logging_level='ERROR'); print('at', ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(code), prepend=os.pathsep)
    patch.setenv("RAY_AUTH_MODE", "disabled")  # to an address that is named, Ray shows no token of its own accord
    patch.syspath_prepend(str(code))
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    try:
        address = next(line.split()[1] for line in process.stdout if line.startswith("at "))
        yield address
    finally:
        patch.undo()
        own = descendants(process.pid)
        process.stdin.close()
        process.wait(timeout=900)
        for pid in own:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)


def test_faults_interrupt_and_resume_on_a_running_cluster(cluster, tiny_teacher, tmp_path):
    teachers = [str(tiny_teacher)]
    for fault in ("die", "memory", "gone"):
        info = bundles.BundleInfo(
            architecture="faulty:make",
            arguments={"fault": fault},
            num_classes=10,
            input_shape=(1, 16, 16),
            mean=(0.5,),
            std=(0.5,),
            trained=False,
        )
        network = models.build("faulty:make", {"fault": fault}, num_classes=10, image_shape=(1, 16, 16))
        bundles.save(tmp_path / fault, info, network.state_dict())
        teachers.append(str(tmp_path / fault))
    grid = [{"teacher": teachers}, {"teacher": teachers[:1], "synthesis.bn_weight": [1e38]}]
    base = config.with_overrides(TINY_TRIAL, LOOKS)
    write_yaml(tmp_path / "faults.yaml", {"about": ABOUT, "base": base, "grid": grid})
    words = [sys.executable, "-m", "dfkd_ray", "sweep", str(tmp_path / "faults.yaml"), "--test-data", "none"]
    words += ["--results", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--trust-code", "faulty"]
    words += ["--address", cluster, "--synthesizers", "1"]

    # Interrupted when the first row is there.
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not list((tmp_path / "out" / "trials").glob("*.parquet")):
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=900)
    assert first.returncode == 130, out + err
    assert "go on with: " + words[0] in err and "of 5 trials finished" in err and "Traceback" not in err

    # The same command again.
    second = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert second.returncode == 1, second.stdout + second.stderr
    assert second.stderr == "" and "(raylet)" not in second.stdout, "no storm of logs"
    rows = results.read(tmp_path / "out", "trials")
    reasons = {Path(row["teacher"]).name: row["reason"] for row in rows.to_dict("records") if row["status"] == "failed"}
    assert len(rows) == 5 and rows["status"].tolist().count("finished") == 1
    assert reasons["die"] == "the trial's process died 3 times (killed, or out of memory)"
    assert reasons["memory"] == "RuntimeError: can't allocate memory: pid … at 0x…"
    assert reasons["gone"].startswith("ValueError: architecture ")
    assert reasons["gone"].endswith("cannot be built: ModuleNotFoundError: no module in modules")
    assert reasons["tiny"].startswith("FloatingPointError")
    assert "5 trials, 4 failed" in second.stdout and second.stdout.count(" failed: ") == 4
