"""Benchmark of the fleet: its cost and its savings, each compared with a plain counterpart in the same run.

control    256 simulated slots and one coordinator: utilisation of the slots, and batches handed out per second
streaming  large batches through the fleet, against the bare object store
memory     more batches than fit in memory, through a small object store
trial      one trial with the fleet, against the same trial without it
grid       24 trials with 2 distinct syntheses, against the same work measured alone, and a grid without sharing
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch

from dfkd_ray import devices, fleet, results, sweep, trial
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import DeepInversionConfig, TrialConfig, with_overrides
from dfkd_ray.fleet.simulated import Simulated, simulated_batch, simulated_spec
from dfkd_ray.sweep import SweepConfig

MB = 1e6
# The defaults with fewer steps, and one thread each, so that two processes use two cores.
SCALED: dict[str, Any] = {
    "synthesis": {"num_threads": 1},
    "distillation": {"num_threads": 1},
    "reference": {"synthesis": {"num_threads": 1}},
}
GRID: dict[str, list[Any]] = {
    "synthesis.bn_weight": [0.2, 2.0],
    "pruning.sparsity": [0.5, 0.75, 0.9, 0.95],
    "distillation.temperature": [2.0, 4.0, 8.0],
}


def scaled(teacher: str, scale: float) -> dict[str, Any]:
    """A trial config with the default step counts scaled down together."""
    default = TrialConfig(teacher=teacher)
    assert isinstance(default.reference.synthesis, DeepInversionConfig)
    steps = {
        "teacher": teacher,
        "device": "cpu",
        "synthesis.num_steps": max(1, round(scale * 60)),
        "reference.synthesis.num_steps": max(1, round(scale * default.reference.synthesis.num_steps)),
        "distillation.num_steps": max(1, round(scale * default.distillation.num_steps)),
    }
    return with_overrides(SCALED, steps)


def control(seconds: float = 20.0) -> dict[str, float]:
    """256 simulated slots of 0.5 to 1 s a batch, in 4 processes, and one coordinator."""
    with fleet.connected(num_cpus=8):
        settings = fleet.Settings(num_synthesizers=4, cpus=0.1, slots=64, make=Simulated, device="cpu")
        with fleet.started(settings) as running:
            spec = simulated_spec("busy", (1, 1, 1, 1), (0.5, 1.0))
            source = running.stream(in_flight=64).batches(spec, range(10**6))
            begun, marks = time.monotonic(), []
            for _ in source:
                now = time.monotonic() - begun
                if (not marks and now > 3) or now > 3 + seconds:  # the ramp is left out
                    status = running.status()
                    assert status is not None
                    marks.append((time.monotonic(), status["made"]))
                    if len(marks) == 2:
                        break
            (t0, n0), (t1, n1) = marks
            busy = (n1 - n0) * 0.75 / (256 * (t1 - t0))  # each batch sleeps 0.75 s on average
        settings = fleet.Settings(num_synthesizers=4, cpus=0.1, slots=8, make=Simulated, device="cpu")
        with fleet.started(settings) as running:
            stream = running.stream(in_flight=64)
            list(stream.batches(simulated_spec("warm-up", (1, 1, 1, 1)), range(200)))
            begun = time.perf_counter()
            list(stream.batches(simulated_spec("zero", (1, 1, 1, 1)), range(5000)))
            rate = 5000 / (time.perf_counter() - begun)
    made = (n1 - n0) / (t1 - t0)
    print(f"  256 slots, one coordinator: {100 * busy:.1f} % busy over {t1 - t0:.0f} s, {made:.0f} batches/s")
    print(f"  zero-wait batches: {rate:.0f} batches/s handed out")
    return {"busy_share": busy, "batches_per_s": rate}


class Producer:
    """The bare object store: an actor that returns the same arrays."""

    def batch(self, key: str, index: int, config: Mapping[str, Any]) -> Any:
        """One array, as the simulated synthesizer makes it."""
        return simulated_batch(key, index, config).images


def bare_store(config: Mapping[str, Any], num_batches: int, in_flight: int = 4) -> float:
    """Seconds for `num_batches` arrays from one actor to this process, a few in flight, in order."""
    make: Any = ray.remote(Producer)
    actor = make.options(num_cpus=0.1).remote()
    ray.get(actor.batch.remote("0000", 0, config))
    begun = time.perf_counter()
    coming = [actor.batch.remote("0000", index, config) for index in range(in_flight)]
    for index in range(num_batches):
        array = ray.get(coming.pop(0))
        torch.from_dlpack(array)
        coming.append(actor.batch.remote("0000", in_flight + index, config))
    took = time.perf_counter() - begun
    ray.kill(actor)
    return took


def streaming(num_batches: int = 200, repeats: int = 3) -> dict[str, float]:
    """Batches of 64x3x224x224 uint8 to one reader: bare object store, fleet, and fleet with a cache on disk."""
    shape = (64, 3, 224, 224)
    size = 64 * 3 * 224 * 224 / MB
    rates: dict[str, list[float]] = {"bare": [], "fleet": [], "fleet with cache": []}
    with fleet.connected(num_cpus=4, object_store_memory=1 << 30), tempfile.TemporaryDirectory() as root:
        for repeat in range(repeats):
            spec = simulated_spec(f"stream {repeat}", shape)
            rates["bare"].append(num_batches * size / bare_store(spec.config, num_batches))
            for name, cache_root in (("fleet", None), ("fleet with cache", root)):
                settings = fleet.Settings(
                    num_synthesizers=1, cpus=0.1, slots=2, make=Simulated, device="cpu", cache_root=cache_root
                )
                with fleet.started(settings) as running:
                    stream = running.stream(in_flight=4)
                    list(stream.batches(simulated_spec("warm-up", (1, 1, 1, 1)), range(20)))
                    begun = time.perf_counter()
                    for batch, _ in stream.batches(spec, range(num_batches)):
                        torch.from_dlpack(batch.images)
                    rates[name].append(num_batches * size / (time.perf_counter() - begun))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        spread = max(rates[name]) - min(rates[name])
        print(f"  {name}: {rate:.0f} MB/s (spread {spread:.0f}), {rate / medians['bare']:.2f} of the bare store")
    return medians


def resident() -> float:
    """Private resident bytes of this process and all its descendants, without shared memory."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(folder.name))
    total, todo = 0, [os.getpid()]
    while todo:
        process = todo.pop()
        todo += parents.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024
    return float(total)


def memory(num_batches: int = 5000, store_bytes: int = 300_000_000) -> dict[str, float]:
    """Batches of 256x3x32x32 through a small object store, read in order and occasionally a second time."""
    spec = simulated_spec("memory", (256, 3, 32, 32))
    with fleet.connected(num_cpus=4, object_store_memory=store_bytes), tempfile.TemporaryDirectory() as root:
        settings = fleet.Settings(
            num_synthesizers=2,
            cpus=0.1,
            slots=2,
            make=Simulated,
            device="cpu",
            cache_root=root,
            budget_bytes=fleet.budget_bytes(),
        )
        with fleet.started(settings) as running:
            first, second = running.stream(), running.stream()
            seen, most = [], 0.0
            late = second.batches(spec, range(0, num_batches, 10))
            for batch, _ in first.batches(spec, range(num_batches)):
                assert batch.images.flat[0] == batch.index % 256
                if batch.index % 10 == 9 and batch.index > num_batches // 20:
                    next(late)  # a reader far behind: its batches are not in memory any more
                if batch.index % (num_batches // 10) == num_batches // 10 - 1:
                    seen.append(resident())
                    status = running.status() or {}
                    most = max(most, status.get("held_bytes", 0))
            spilled = spilled_bytes()
            read = (running.status() or {}).get("read", 0)
        growth = max(seen) - seen[0]
        print(
            f"  {num_batches} batches of 256x3x32x32 through a store of {store_bytes / MB:.0f} MB: private memory "
            f"{' '.join(f'{size / MB:.0f}' for size in seen)} MB, a value every {num_batches // 10}: at most "
            f"{growth / MB:+.0f} MB over the first; "
            f"held {most / MB:.0f} MB, {read} read again from the cache, {spilled / MB:.0f} MB spilled"
        )
    return {"growth_bytes": growth, "spilled_bytes": spilled}


def spilled_bytes() -> float:
    """Bytes in Ray's spill folders of this session."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore[union-attr]
    folders = [path for path in session.glob("ray_spilled_objects*") if path.is_dir()]
    return float(sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()))


def one_trial(teacher: Teacher, teacher_name: str, scale: float, pairs: int) -> dict[str, float]:
    """The same trial through the fleet and without it, one thread each, alternating; fresh cache every time."""
    config = TrialConfig.model_validate(with_overrides(scaled(teacher_name, scale), {"pruning.sparsity": 0.75}))
    ratios, shares, walls = [], [], {"local": [], "fleet": []}
    share = started_s = 0.0
    with fleet.connected(num_cpus=2), tempfile.TemporaryDirectory() as root:
        for pair in range(pairs + 1):  # the first pair is warm-up
            rows = {}
            for name in ("local", "fleet") if pair % 2 else ("fleet", "local"):
                folder = f"{root}/{pair}-{name}"
                if name == "local":
                    rows[name] = trial.run(config, teacher, trial.Inputs(images=trial.Local(folder))).row
                    continue
                settings = fleet.Settings(num_synthesizers=1, cpus=0.5, cache_root=folder, device="cpu")
                begun = time.perf_counter()
                with fleet.started(settings, [teacher]) as running:
                    started_s = time.perf_counter() - begun
                    stream = running.stream()
                    warm = config.synthesis.model_copy(update={"seed": 10**6, "num_steps": 1})
                    stream.source(trial.Round(teacher, warm, torch.device("cpu")))(
                        0
                    )  # loads torch and the teacher: start-up, reported separately
                    rows[name] = trial.run(config, teacher, trial.Inputs(images=stream)).row
                    share = stream.call_s / rows[name]["wall_s"]
            if pair:
                ratios.append(rows["fleet"]["wall_s"] / rows["local"]["wall_s"])
                shares.append(share)
                for name, row in rows.items():
                    walls[name].append(row["wall_s"])
            assert rows["fleet"]["images_sha256"] == rows["local"]["images_sha256"]
            assert rows["fleet"]["agreement"] == rows["local"]["agreement"]
    ratio, share = statistics.median(ratios), statistics.median(shares)
    local, remote = statistics.median(walls["local"]), statistics.median(walls["fleet"])
    print(
        f"  one trial, median of {pairs} pairs: local {local:.1f} s, fleet {remote:.1f} s, ratio {ratio:.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}); inside Ray calls {100 * share:.2f} % of its wall; fleet up in "
        f"{started_s:.1f} s"
    )
    return {"ratio": ratio, "call_share": share}


def grid(teacher: Teacher, teacher_name: str, scale: float, without: bool = True) -> dict[str, float]:
    """24 trials with 2 distinct syntheses: their cost as single pieces of work, with the fleet, and without sharing."""
    about = {"source": "bench", "command": "dfkd-ray bench fleet", "cost": "minutes", "expected": "ratios"}
    file = SweepConfig.model_validate({"about": about, "base": scaled(teacher_name, scale), "grid": GRID})
    jobs = sweep.plan(sweep.expand(file, {}), lambda _name: teacher)
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        syntheses_s, distillations_s, keys = alone(jobs, teacher, root / "alone")
        limit = (syntheses_s + distillations_s) / cores
        with fleet.connected():
            first = timed_sweep(jobs, root / "shared", str(root / "cache"), None)
            off = timed_sweep(jobs, root / "unshared", None, 0) if without else None
        batches, rows = results.read(root / "shared", "synthesis"), results.read(root / "shared", "trials")
    print(
        f"  {len(jobs)} trials, {keys} keys (2 of training images, 1 of the reference set), "
        f"{len(batches)} batches made\n"
        f"  alone: syntheses {syntheses_s:.1f} s, the rest {distillations_s:.1f} s; over {cores} cores {limit:.1f} s"
    )
    call_share = sum(rows["fleet_call_s"]) / sum(rows["wall_s"])
    print(
        f"  shared: {first['trials_s']:.1f} s from the fleet being up to the last row, {first['trials_s'] / limit:.2f} "
        f"x that; {first['wall_s']:.1f} s with start-up; inside Ray calls {100 * call_share:.2f} % of the trials' wall"
    )
    in_place = (sum(batches["wall_s"]) + sum(rows["wall_s"] - rows["fleet_wait_s"])) / cores
    print(
        f"  the same work as measured inside that sweep, all cores busy: {in_place:.1f} s over {cores} cores; the "
        f"sweep took {first['trials_s'] / in_place:.2f} x that"
    )
    figures = {"ratio": first["trials_s"] / limit, "made": float(len(batches))}
    if off is not None:
        figures["speedup"] = off["wall_s"] / first["wall_s"]
        print(f"  sharing off: {off['wall_s']:.1f} s with start-up, {figures['speedup']:.2f} x")
    return figures


def alone(jobs: list[sweep.Job], teacher: Teacher, root: Path) -> tuple[float, float, int]:
    """Seconds of the distinct syntheses, of all trials without them, number of keys; one thread, idle machine."""
    torch.set_num_threads(1)
    inputs, rows = trial.Inputs(images=trial.Local(root)), []
    for job in jobs:
        begun = time.perf_counter()
        outcome = trial.run(job.config, teacher, inputs)
        assert outcome.student is not None, outcome.row
        rows.append((time.perf_counter() - begun, outcome))
    made = {
        (one["synthesis_key"], one["batch_index"]): one["wall_s"] for _, outcome in rows for one in outcome.synthesis
    }
    syntheses_s = sum(made.values())
    return syntheses_s, sum(wall for wall, _ in rows) - syntheses_s, len({key for key, _ in made})


def timed_sweep(
    jobs: list[sweep.Job], folder: Path, cache_root: str | None, synthesizers: int | None
) -> dict[str, float]:
    """Wall time of a sweep, in total and from the moment when the fleet is up."""
    begun, up = time.perf_counter(), []
    failed = sweep.run(
        jobs,
        folder,
        cache_root,
        cluster=sweep.Cluster(synthesizers=synthesizers),
        callbacks=sweep.Callbacks(on_up=lambda: up.append(time.perf_counter())),
    )
    assert failed == 0
    end = time.perf_counter()
    return {"wall_s": end - begun, "trials_s": end - up[0]}


def run(parts: list[str], teacher: Teacher, teacher_name: str, scale: float, pairs: int) -> None:
    """Run the given parts of the benchmark."""
    print(f"bench fleet: {teacher.name}, {devices.numerics_class(torch.device('cpu'))}, {os.cpu_count()} cores")
    actions: dict[str, Callable[[], Any]] = {
        "control": control,
        "streaming": streaming,
        "memory": memory,
        "trial": lambda: one_trial(teacher, teacher_name, scale, pairs),
        "grid": lambda: grid(teacher, teacher_name, scale),
    }
    unknown = set(parts) - set(actions)
    if unknown:
        raise ValueError(f"`part={sorted(unknown)[0]}`: expected one of {', '.join(actions)}")
    for name in parts or actions:
        print(f"{name}:", flush=True)
        actions[name]()
