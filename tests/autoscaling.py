"""A cluster whose machines are launched on demand, all on this one: Ray's own autoscaler over its fake node provider.

`ray.cluster_utils.AutoscalingCluster` does the same, but begins with `ray stop --force`, which ends every Ray process
of this machine, and reads an example that Ray's wheels do not hold. The provider is private to Ray: used here alone.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dfkd_ray.cli.live import descendants

HEAD = "ray.head.default"
EMPTY_LISTS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


def config_of(address: str, worker: dict[str, float], most: int, idle_s: float) -> dict:
    """A cluster file: a head that computes nothing, and up to so many workers of one type."""
    types = {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {**worker, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        },
    }
    return {
        "cluster_name": "fake",
        "max_workers": most,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,  # all nodes share this machine's
            "disable_node_updaters": True,  # nothing is installed over ssh
            "disable_launch_config_check": True,
        },
        "available_node_types": types,
        "head_node_type": HEAD,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in EMPTY_LISTS},
    }


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def autoscaled(folder: Path, worker: dict[str, float], most: int, idle_s: float) -> Iterator[str]:
    """While open, such a cluster runs; yields its address. Its processes are ended by their ids."""
    port, client_port, agent_port = free_ports(3)
    address = f"127.0.0.1:{port}"
    (folder / "cluster.yaml").write_text(json.dumps(config_of(address, worker, most, idle_s)))
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    words += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client_port}"]
    words += [f"--dashboard-agent-listen-port={agent_port}", "--include-dashboard=false", "--num-cpus=0"]
    words += ["--object-store-memory=100000000", f"--autoscaling-config={folder / 'cluster.yaml'}"]
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_enable_autoscaler_v2": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    try:
        while "--block" not in (folder / "head.log").read_text():  # said when all is up
            assert process.poll() is None, (folder / "head.log").read_text()
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        yield address
    finally:
        own = descendants(process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        for pid in [process.pid, *own]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
