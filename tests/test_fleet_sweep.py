"""Whole sweeps through the fleet: the same tables whoever made the images, on one CPU, and on three machines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dfkd_ray import bundles, cache, config, devices, fleet, results, synthesis
from helpers import sweep_of_four, tiny_sweep, write_yaml
from table_rows import comparable, deterministic

NUM_BATCHES = 2 * 8 + 2  # of two syntheses, and of the reference set


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The deterministic columns of both tables, in an order of their own."""
    batches = deterministic(results.read(folder, "synthesis"), "synthesis")
    return comparable(folder, "trials", ["trial_id"]), batches


@pytest.fixture(scope="module")
def swept(tiny_teacher, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder in which run_fleet_sweeps.py has run its sweeps, and what it told of them."""
    folder, script = tmp_path_factory.mktemp("sweeps"), Path(__file__).with_name("run_fleet_sweeps.py")
    words = [sys.executable, str(script), str(tiny_teacher), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder, json.loads((folder / "told.json").read_text())


def test_one_or_two_synthesizers_kills_or_none_warm_or_cold_the_tables_are_the_same(swept, tiny_teacher):
    folder, told = swept
    assert told["kills"] == ["synthesizer", "coordinator", "synthesizer"]
    one, batches = tables(folder / "cold")
    assert len(one) == 4 and len(batches) == NUM_BATCHES and set(one["status"]) == {"finished"}
    disturbed = [path.name for path in folder.glob("killed-*") if (path / "trials").is_dir()]
    for other in ["warm", *disturbed]:
        pd.testing.assert_frame_equal(tables(folder / other)[0], one)
        pd.testing.assert_frame_equal(tables(folder / other)[1], batches)
    cold, warm = told["cold"], told["warm"]
    assert cold["synthesizers"] == 1 and cold["made"] == NUM_BATCHES, "four trials, two syntheses: none is made twice"
    assert warm["made"] == 0 and warm["read"] == NUM_BATCHES
    assert results.read(folder / "warm", "trials")["num_cached_batches"].tolist() == [8] * 4
    # And they are what one process makes by itself.
    teacher, device = bundles.load(str(tiny_teacher)), devices.resolve("cpu")
    plain = sweep_of_four(tiny_teacher)["base"]["synthesis"] | {"bn_weight": 2.0}
    settings = config.DeepInversionConfig.model_validate(plain)
    key, make = synthesis.source(teacher, settings, device)
    kept = cache.folder_of(folder / "cache", key, devices.numerics_class(device))
    batch, manifest = cache.read(kept, 3, key), cache.read_manifest(kept)
    assert batch is not None and manifest is not None
    assert batch.images.tobytes() == make(3).images.tobytes() and manifest["teacher_hash"] == teacher.hash


def test_a_grid_on_one_cpu_ends_with_or_without_sharing(swept):
    rows = results.read(swept[0] / "cold", "trials")
    assert set(rows["status"]) == {"finished"} and all(wait_s >= 0 for wait_s in rows["fleet_wait_s"])
    rows = results.read(swept[0] / "unshared", "trials")
    assert len(set(rows["synthesis_key"])) == 2, "two of the three trials have the same synthesis"
    assert set(rows["num_cached_batches"]) == {0}
    assert set(rows["fleet_call_s"].isna()) == {True}, "every trial made its own images"


def test_a_trial_whose_process_died_before_it_began_is_run_by_another(swept):
    folder, told = swept
    rows = results.read(folder / "unshared", "trials")
    assert told["died"] >= 1, "a process that was to run another trial"
    assert rows["status"].tolist() == ["finished"] * 3, rows["reason"].tolist()


CLUSTER = """
import sys, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from dfkd_ray import fleet
from dfkd_ray.fleet.simulated import Simulated, simulated_batch, simulated_spec

quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 10_000,
         "health_check_failure_threshold": 6}
head = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": quick})
nodes = [cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100_000_000) for _ in range(2)]
try:
    with fleet.connected(cluster.address):
        machines = fleet.nodes()
        placement = fleet.plan(machines, synthesizers=None, synthesizer_threads=1, trial_threads=1, use_gpu=True)
        assert placement.num_synthesizers == 3 and placement.num_trials >= 2, placement
        settings = fleet.Settings(num_synthesizers=3, cpus=placement.synthesizer_cpus, gpus=placement.synthesizer_gpus,
                                  cache_root=sys.argv[1], make=Simulated, most="auto", trial_gpus=0.5)
        with fleet.started(settings) as running:
            while (running.status() or {}).get("synthesizers_up", 0) < 3:
                time.sleep(0.2)
            actors = ray.get(running.coordinator.actors.remote())
            assert len({hello["node"] for hello in ray.get([actor.hello.remote() for actor in actors])}) == 3
            spec = simulated_spec("cluster", (4, 1, 8, 8), (0.1, 0.2))
            seen = []
            for batch, _ in running.stream(timeout_s=900.0).batches(spec, range(60)):
                wanted = simulated_batch(spec.key, batch.index, spec.config)
                assert (batch.images == wanted.images).all()
                seen.append(batch.index)
                if batch.index == 15:
                    where = lambda self: ray.get_runtime_context().get_node_id()
                    held = {where(None), ray.get(running.coordinator.__ray_call__.remote(where))}
                    victim = next(node for node in nodes if node.node_id not in held)  # nor driver nor coordinator
                    cluster.remove_node(victim, allow_graceful=False)
            assert seen == list(range(60))
            status = running.status()
            lost = status["made"] + status["found"] - 60
            print("made", status["made"], "lost", lost, "up", status["synthesizers_up"], "deaths", status["deaths"])
            assert 0 <= lost <= 4 and status["synthesizers_up"] >= 2, status
            for _ in range(2):  # four machines now: one more than the fleet began with
                cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100_000_000)
            more = simulated_spec("more", (4, 1, 8, 8), (0.5, 0.5))
            end = time.monotonic() + 600
            for _ in running.stream(timeout_s=900.0).batches(more, range(10_000)):  # grows while images are waited for
                if running.status()["synthesizers_up"] == 4 or time.monotonic() > end:
                    break
            assert running.status()["synthesizers_up"] == 4, running.status()
            list(running.stream(timeout_s=900.0).batches(spec, range(60, 72)))
    print("well")
finally:
    cluster.shutdown()
"""


def test_on_three_nodes_the_fleet_spreads_and_a_lost_node_costs_only_its_batches(tmp_path):
    (tmp_path / "cluster.py").write_text(CLUSTER)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "cluster.py"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
        env={**os.environ, **fleet.QUIET},
    )
    assert done.returncode == 0 and "well" in done.stdout, done.stdout + done.stderr[-3000:]


def test_a_refusal_of_placement_is_wrong_input(swept, tiny_teacher, tmp_path, run_cli):
    write_yaml(tmp_path / "s.yaml", tiny_sweep(tiny_teacher, {"pruning.sparsity": [0.5]}))
    words = ["sweep", str(tmp_path / "s.yaml"), "--results", str(tmp_path / "r"), "--cache", str(tmp_path / "c")]
    done = run_cli(*words, "--synthesizers", "many")
    assert (
        done.code == 2 and done.err == "error: --synthesizers 'many': expected auto, a number, or a range like 1-64\n"
    )
    done = run_cli(*words, "--synthesizers", "4-2")
    assert done.code == 2 and "--synthesizers 4-2: expected MIN-MAX" in done.err
    code, said = swept[1]["refused"]
    assert code == 2 and "--synthesizers 100000: that many do not fit" in said
