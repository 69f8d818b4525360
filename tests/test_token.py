"""Who may talk to a sweep's Ray session: nobody without its token."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dfkd_ray import fleet

# In a process of its own: what a session is started with stays with its process.
SESSION = """
import json, os, sys
import grpc, psutil
import ray
from dfkd_ray import fleet

# A call that each of Ray's services knows; others answer UNIMPLEMENTED, whoever asks.
KNOWN = ["NodeInfoGcsService/GetAllNodeInfo", "NodeManagerService/GetNodeStats", "ObjectManagerService/Pull",
         "CoreWorkerService/GetCoreWorkerStats", "ReporterService/GetTraceback"]

def answers(port, token):
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    said = []
    for name in KNOWN:
        call = channel.unary_unary(f"/ray.rpc.{name}", request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=60, metadata=[("authorization", f"Bearer {token}")] if token else None)
            said.append("OK")
        except grpc.RpcError as error:
            said.append(error.code().name)
    channel.close()
    return said

NAMES = {"/monitor.py": "monitor", "/dashboard.py": "dashboard", "/agent.py": "agent", "ray::DashboardAgent": "agent"}

def name_of(process):  # the agent gives itself its name some time after it listens
    for word in process.cmdline():
        for end, name in NAMES.items():
            if word.strip().endswith(end):
                return name
    return process.name()

with fleet.connected(num_cpus=1, object_store_memory=80_000_000):
    class Actor:
        def there(self):
            return True

    actor = ray.remote(Actor).remote()
    assert ray.get(actor.there.remote())
    this = psutil.Process()
    found = []
    for process in [this, *this.children(recursive=True)]:
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found.append((name_of(process), connection.laddr.ip, connection.laddr.port))
    token = os.environ["RAY_AUTH_TOKEN"]
    told = [{"name": name, "ip": ip, "port": port, "without": answers(port, ""), "wrong": answers(port, "0" * 64),
             "with": answers(port, token)} for name, ip, port in found]
    print(json.dumps({"token": token, "address": ray.get_runtime_context().gcs_address, "listeners": told}), flush=True)
    sys.stdin.readline()
"""
CLIENT = "import ray; ray.init({address!r}, logging_level='ERROR', log_to_driver=False); print('in')"


def environment(home: Path) -> dict[str, str]:
    """Of somebody else on this machine: neither our variables nor our home."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(home)}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A default local session, and what listens in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", SESSION],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(tmp_path_factory.mktemp("owner")),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(timeout=900)


def test_every_listener_of_a_local_session_refuses_who_has_no_token(session):
    names, exporters = [listener["name"] for listener in session["listeners"]], []
    for listener in session["listeners"]:
        if "OK" in listener["with"]:  # speaks gRPC, and to its owner
            assert set(listener["without"]) | set(listener["wrong"]) <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, listener
            continue
        host = "127.0.0.1" if listener["ip"] in ("::", "0.0.0.0") else listener["ip"]
        try:
            answer = urllib.request.urlopen(f"http://{host}:{listener['port']}/logs", timeout=300).read()
        except urllib.error.HTTPError as error:
            assert error.code == 401, listener
        else:
            # As the README states: with ray[default] installed, counters for Prometheus, and nothing else.
            assert answer.startswith(b"# HELP "), listener
            exporters.append(listener["name"])
    assert {"gcs_server", "raylet"} <= set(names), names
    assert set(exporters) <= {"monitor", "dashboard", "agent"} and len(set(exporters)) == len(exporters), exporters
    assert names.count("dashboard") == exporters.count("dashboard"), (
        "of the dashboard there is nothing but its counters"
    )


def test_a_session_on_one_machine_listens_on_loopback_only(session):
    elsewhere = [one for one in session["listeners"] if one["ip"] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    assert session["listeners"] and not elsewhere


# What starts a session with a variable set, and waits.
STARTS = """
import sys
import ray
from dfkd_ray import fleet

with fleet.connected(num_cpus=1, object_store_memory=80_000_000):
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("mode", ["", " Token "])
def test_an_empty_mode_is_as_none_and_case_does_not_matter(mode, tmp_path):
    (tmp_path / "owner").mkdir()
    (tmp_path / "client").mkdir()
    variables = environment(tmp_path / "owner")
    variables |= {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": " "}
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, "no session"
        assert_gets_no_session(address, tmp_path / "client")
    finally:
        process.stdin.close()
        process.wait(timeout=900)


@pytest.mark.parametrize("mode", ["tokn", "off", "0", "k8s", "none", "x" * 5000])
def test_an_unknown_mode_is_refused_before_anything_listens(mode, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr("ray.init", lambda *_a, **_k: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match=r"RAY_AUTH_MODE .*: expected token or disabled") as caught, fleet.connected():
        pass
    assert len(str(caught.value)) < 300


def test_a_client_without_the_token_gets_no_session(session, tmp_path):
    assert_gets_no_session(session["address"], tmp_path)
    assert client(session["address"], tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=session["token"]).returncode == 0


def client(address: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Somebody on this machine who connects."""
    return subprocess.run(
        [sys.executable, "-c", CLIENT.format(address=address)],
        capture_output=True,
        text=True,
        # Else Ray takes the machine's own address for loopback, where nothing listens.
        env=environment(home) | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} | more,
        timeout=900,
    )


def assert_gets_no_session(address: str, home: Path) -> None:
    done = client(address, home)
    assert done.returncode != 0 and "in" not in done.stdout.split()
