"""What several test files share: the environment, and a tiny untrained teacher."""

import gc
import os

# torch reads it at import, here and in each process that a test starts. A trial has two threads by default; on a busy
# machine they would wait for each other in loops, which cost up to ten times the work itself.
os.environ["OMP_WAIT_POLICY"] = "passive"

import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import type_checks  # noqa: F401  before the package, whose types it checks
from dfkd_ray import bundles, cli
from dfkd_ray.__main__ import COLLECT_AFTER
from helpers import TINY_INFO, Done, tiny_network

# Before any test module is imported: Ray reads its variable once, and no test may touch the user's cache.
SCRATCH = tempfile.TemporaryDirectory(prefix="dfkd_ray-tests-")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["DFKD_RAY_CACHE"] = os.path.join(SCRATCH.name, "cache")
os.environ["XDG_STATE_HOME"] = os.path.join(SCRATCH.name, "state")
# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that; tests here send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` has it ignored
# Tensors here are tiny; on a busy machine threads that wait for each other cost a hundred times more than they give.
torch.set_num_threads(1)

# The modules' million objects are not garbage: see `dfkd_ray.__main__`.
gc.set_threshold(COLLECT_AFTER)

# Tests that take long: run where `-m` asks for them by name, and with no other choice of tests.
LONG = ("fuzz", "soak", "venvs")
# The files that take longest, so that none of them runs alone at the end; each file runs in one process, which makes
# its fixtures once. Those that wait (for Ray, for a host that is lost) come with those that compute, so that both cores
# have work. (`--no-loadscope-reorder` keeps this order.)
FIRST = [
    *("test_cluster.py", "test_shipped_sweeps.py", "test_fuzz.py", "test_fleet_sweep.py", "test_session.py"),
    *("test_rounds.py", "test_killed_sweep.py", "test_unasked_code.py", "test_bench_scaling.py", "test_search.py"),
    *("test_sweep_running.py", "test_channels.py", "test_elastic.py", "test_doors.py", "test_streams.py"),
    *("test_token.py", "test_cli_paper.py", "test_quantisation.py", "test_sweep.py", "test_shrinking.py"),
    *("test_cli_synthesize.py", "test_records.py", "test_trial.py", "test_fleet.py", "test_targets.py"),
    *("test_without_batchnorm.py", "test_exporting_families.py", "test_report.py"),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which inputs tests/fuzz makes, and how long tests/soak disturbs a sweep."""
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of the inputs that tests/fuzz makes")
    parser.addoption("--fuzz-only", type=int, default=None, help="run the input of that number alone")
    parser.addoption("--soak-minutes", type=float, default=30.0, help="how long tests/soak disturbs sweeps")
    parser.addoption("--soak-seed", type=int, default=0, help="seed of what tests/soak does, and when")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long tests unless `-m` names their marker; begin with the files that take longest."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    left_out = [name for name in LONG if name not in config.option.markexpr]
    long = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_collection_finish() -> None:
    """Nothing that collection has made is looked at for garbage again."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained teacher's bundle; read it, do not write into it."""
    folder = tmp_path_factory.mktemp("teachers") / "tiny"
    bundles.save(folder, TINY_INFO, tiny_network().state_dict())
    return folder


@pytest.fixture(scope="session")
def bucket() -> Iterator[Callable[[str], str]]:
    """A bucket of an S3 server on loopback; yields a function from a folder in it to its URI."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"access_key": "test", "secret_key": "test", "region": "us-east-1", "scheme": "http"}
    system = fs.S3FileSystem(endpoint_override=f"{host}:{port}", allow_bucket_creation=True, **options)
    system.create_dir("bucket")
    query = f"?scheme=http&region=us-east-1&endpoint_override={host}:{port}"
    yield lambda name: f"s3://test:test@bucket/{name}{query}"
    server.stop()


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run `dfkd-ray` with some words in this process."""

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["dfkd-ray", *words])
        monkeypatch.setenv("COLUMNS", "160")
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        captured = capsys.readouterr()
        return Done(code if isinstance(code, int) else int(bool(code)), captured.out, captured.err)

    return run
