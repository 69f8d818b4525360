"""The guide's way to a cluster, on three hosts: `ray up`, a job, a host that is lost, one that joins, `ray down`.

Commands and the cluster file are the guide's own; only names are filled in. The hosts are network namespaces (`bed`).
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest
import yaml

from autoscaling import free_ports
from cluster import bed
from cluster.guide import HOSTS, REPOSITORY, block
from dfkd_ray import results, sweep, trial
from helpers import ABOUT, jobs_of
from table_rows import deterministic

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bed.missing() is not None, reason=f"no hosts to be made here: {bed.missing()}"),
]
ADDRESSES = {"head": "10.77.0.10", "one": "10.77.0.11", "two": "10.77.0.12", "three": "10.77.0.13"}
WORKER = {"PIP_NO_DEPS": "1"}  # that all dependencies are there is found out on the head: it takes pip ten seconds
SWEEP = {
    "about": ABOUT,
    "base": {
        "teacher": "fashion_mnist_resnet8",
        "bn_num_images": 16,
        "synthesis": {"num_steps": 10, "batch_size": 16, "num_threads": 1},
        "distillation": {
            "num_images": 48,
            "num_steps": 30,
            "batch_size": 16,
            "eval_every": 10,
            "checkpoint_every": 10,
            "num_threads": 1,
        },
        "reference": {"num_images": 16, "synthesis": {"batch_size": 16, "num_steps": 10, "num_threads": 1}},
    },
    "grid": {"pruning.sparsity": [0.5, 0.6, 0.7, 0.8], "distillation.temperature": [2]},
}

WAIT_FOR_NODES = """
import ray, time
ray.init("auto", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < {}:
    time.sleep(0.5)
"""


@dataclass
class Laptop:
    """The project's folder on the laptop, and what is run there."""

    bed: bed.Bed
    folder: Path
    log: list[str] = field(default_factory=list)

    def run(self, command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Run a command; returns all that it prints."""
        self.log.append(f"$ {command}")
        start = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.bed.environment() if env is None else env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        said = f"{done.stdout}\n[{done.returncode}, {time.monotonic() - start:.0f} s]"
        self.log.append(said)
        assert not check or done.returncode == 0, "\n".join(self.log[-8:])
        return done.stdout

    def wait_for(self, what: str, happened: Callable[[], bool], seconds: float = 900.0) -> None:
        """Look until something has happened."""
        start = time.monotonic()
        while not happened():
            assert time.monotonic() < start + seconds, f"not within {seconds:.0f} s: {what}"
            time.sleep(0.5)
        self.log.append(f"waited for {what} [{time.monotonic() - start:.0f} s]")

    def start(self, command: str) -> subprocess.Popen:
        """Run a command in the background."""
        with (self.folder / "background.log").open("ab") as log:
            return subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.bed.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def rows_of(place: str) -> pd.DataFrame:
    """The trials in a place; none where there is no table yet."""
    try:
        return results.read(place, "trials")
    except ValueError:
        return pd.DataFrame({"trial_id": [], "status": []})


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    """An S3 server that all hosts reach, once the bed's bridge is there; yields what a client has to know of it."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="0.0.0.0", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    options = {"access_key": "test", "secret_key": "test", "region": "us-east-1", "scheme": "http"}
    fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", allow_bucket_creation=True, **options).create_dir("bucket")
    known = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    # Ray's workers wait a minute for a head that is gone before they go too: here less.
    known |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "15"}
    # And the head believes a host that says nothing to be lost after a minute: here after about 35 s.
    known |= {"RAY_health_check_timeout_ms": "10000", "RAY_health_check_failure_threshold": "3"}
    yield known | {"AWS_ENDPOINT_URL": f"http://{bed.LAPTOP}:{port}"}
    server.stop()


@pytest.fixture(scope="module")
def laptop(tmp_path_factory, store) -> Iterator[Laptop]:
    """Three hosts, and a laptop on which the guide's preparation has been done."""
    root = tmp_path_factory.mktemp("bed")
    with bed.made(root, store) as made:
        made.add("head", ADDRESSES["head"])
        for name in ("one", "two"):
            made.add(name, ADDRESSES[name], WORKER)
        laptop = Laptop(made, root / "project")
        (laptop.folder / "sweeps").mkdir(parents=True)
        for line in block("cluster preparation").splitlines():
            if "[cluster]" in line or line.startswith("export "):
                continue  # this environment has it; the bed exports the mode
            laptop.run(line.replace(".venv/bin/", f"{sys.prefix}/bin/").replace("dist .", f"dist {REPOSITORY}"))
        write_files(laptop, ["one", "two"])
        yield laptop


def write_files(laptop: Laptop, workers: list[str]) -> None:
    """The guide's cluster file with names filled in, and a sweep."""
    config = yaml.safe_load(HOSTS)
    config["provider"] |= {"head_ip": ADDRESSES["head"], "worker_ips": [ADDRESSES[name] for name in workers]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(laptop.bed.key)}
    # As many trials at a time as two cores can run, wherever the test runs.
    start = config["worker_start_ray_commands"]
    start[1] = start[1].replace("ray start ", "ray start --num-cpus=1 ")
    (laptop.folder / "cluster.yaml").write_text(yaml.safe_dump(config, sort_keys=False, width=1000))
    (laptop.folder / "sweeps/quickstart.yaml").write_text(yaml.safe_dump(SWEEP))


def test_the_guides_commands_run_a_sweep_through_the_loss_of_a_host_and_go_on_on_a_new_cluster(
    laptop, store, monkeypatch, tmp_path
):
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    hosts, place, port = laptop.bed.hosts, "s3://bucket/quickstart", free_ports(1)[0]  # 8265 may be another cluster's
    up, dashboard, submit, logs, read, down = (
        line.partition(" #")[0].strip(" &").replace("BUCKET", "bucket").replace("localhost:8265", f"localhost:{port}")
        for line in block("cluster commands").splitlines()
    )
    submit, dashboard = (
        submit.replace("quickstart.yaml", "quickstart.yaml --test-data none"),
        f"{dashboard} --port {port}",
    )
    url = f"http://localhost:{port}"
    try:
        with watched(laptop, up, dashboard, url, num_workers=2):
            refused = laptop.run(f"ray job list --address {url}", check=False, env=stranger(tmp_path))
            assert "authentication token" in refused and "JobDetails" not in refused, refused
            laptop.run(submit)
            laptop.wait_for("the first row", lambda: len(rows_of(place)) >= 1)
            hosts["two"].cut_off()
            fresh = laptop.bed.add("three", ADDRESSES["three"], WORKER)
            hosts["two"].kill()
            join(laptop, fresh)
            assert "4 trials, 0 failed" in laptop.run(logs)
        assert laptop.run(read).count("fashion_mnist_resnet8") == 4
        laptop.run(down)
        laptop.wait_for("Ray to be gone from every host", lambda: not any(map(ray_processes, hosts.values())))

        # The same trials in this process, without Ray.
        for job in jobs_of(SWEEP):
            sweep.run_job(job, trial.Inputs(images=trial.Local(tmp_path / "c")), tmp_path / "r")
        cluster, here = (rows_of(where).set_index("trial_id").sort_index() for where in (place, f"{tmp_path}/r"))
        pd.testing.assert_frame_equal(deterministic(cluster.reset_index()), deterministic(here.reset_index()))

        # Another cluster, of two hosts that are left, goes on with the same storage; the sweep has grown by one trial.
        SWEEP["grid"]["pruning.sparsity"].append(0.9)
        write_files(laptop, ["three"])
        with watched(laptop, up, dashboard, url, num_workers=1):
            again = laptop.run(
                submit.replace("--no-wait ", "").replace("--submission-id quickstart", "--submission-id again")
            )
        assert "5 trials, 4 already finished" in again and "5 trials, 0 failed" in again
        told = [line for line in again.splitlines() if line.startswith("fleet:")]
        assert told and all(", 0 batches made, " in line for line in told), "every batch is in the cache"
        assert len(rows_of(place)) == 5
        laptop.run(down)
        laptop.wait_for("Ray to be gone from every host", lambda: not any(map(ray_processes, hosts.values())))
    finally:
        (laptop.folder / "story.log").write_text("\n".join(laptop.log))


@contextmanager
def watched(laptop: Laptop, up: str, dashboard: str, url: str, num_workers: int) -> Iterator[None]:
    """A cluster that is up, with all its workers, while the guide's `ray dashboard` runs in the background."""
    laptop.run(up)
    process = laptop.start(dashboard)
    try:
        laptop.wait_for("the dashboard", lambda: answers(f"{url}/api/version") in (200, 401))
        head, count = laptop.bed.hosts["head"], f"python -c {shlex.quote(WAIT_FOR_NODES.format(num_workers + 1))}"
        laptop.wait_for(f"{num_workers} workers", lambda: laptop.bed.ssh(head, count, check=False).returncode == 0)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def ray_processes(host: bed.Host) -> list[str]:
    """What still runs of Ray on a host."""
    return [words for words in host.processes() if "ray" in words] if host.process else []


def join(laptop: Laptop, host: bed.Host) -> None:
    """What the guide says of a host that joins later: the set-up, and the start command with the head's address."""
    config = yaml.safe_load((laptop.folder / "cluster.yaml").read_text())
    ssh = f"ssh -i {laptop.bed.key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    for there, here in config["file_mounts"].items():
        laptop.bed.ssh(host, f"mkdir -p {os.path.dirname(there)}")
        here = os.path.expanduser(here.replace("~", laptop.bed.environment()["HOME"]))
        slash = "/" if (laptop.folder / here).is_dir() else ""
        laptop.run(f"rsync -a -e '{ssh}' {here}{slash} root@{host.address}:{there}{slash}")
    for command in config["setup_commands"]:
        laptop.bed.ssh(host, command)
    start = config["worker_start_ray_commands"][1].replace("$RAY_HEAD_IP", ADDRESSES["head"])
    laptop.log.append(laptop.bed.ssh(host, start).stdout)


def stranger(home: Path) -> dict[str, str]:
    """Environment of somebody without the token."""
    return {"HOME": str(home), "PATH": f"{sys.prefix}/bin:{bed.path_of()}"}


def answers(url: str) -> int | None:
    """The HTTP status of an answer, if there is one."""
    try:
        return urllib.request.urlopen(url, timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
