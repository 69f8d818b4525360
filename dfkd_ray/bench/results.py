"""Benchmark of result tables and report with many rows from many writers, before and after compaction.

The rows are generated with a seeded generator. The code that writes, compacts, reads and draws is that of real sweeps.
It is compared with plain pandas on the same files.
"""

import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dfkd_ray import report, results
from dfkd_ray.batches import Batch
from dfkd_ray.config import TrialConfig, columns_of
from dfkd_ray.images import PixelSpace, class_grid
from dfkd_ray.ladder import BN_REESTIMATED, RECONSTRUCTED
from dfkd_ray.trial import identity

NETWORKS = ("resnet8", "resnet20", "resnet32", "resnet56", "wrn_16_1", "wrn_40_2", "vgg11", "mobilenet_v2")
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
BN_WEIGHTS = (0.1, 0.2, 0.5, 1.0, 2.0)
NUM_IMAGES = 1024


def made_up_rows(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of finished trials over a grid of networks, sparsities, BN weights, temperatures and three seeds."""
    rng = np.random.default_rng(seed)
    made_up = TrialConfig(teacher="made-up")
    plain = columns_of(made_up.model_copy(update={"distillation": identity.settled(made_up, None)}))
    temperatures = (1.0 + 0.25 * n for n in itertools.count())
    rows = []
    for temperature in temperatures:
        for network, sparsity, weight, trial_seed in itertools.product(NETWORKS, SPARSITIES, BN_WEIGHTS, range(3)):
            if len(rows) == num_rows:
                return rows
            wobble = float(rng.uniform(0, 0.02))
            config = {"teacher": network, "pruning.sparsity": sparsity, "distillation.temperature": temperature}
            config |= {"synthesis.bn_weight": weight, "reference.synthesis.bn_weight": weight}
            config |= {"synthesis.seed": trial_seed, "distillation.seed": trial_seed}
            rungs = {"teacher": 0.94, "pruned": 0.4 - 0.3 * sparsity, BN_REESTIMATED.name: 0.8 - 5 * wobble}
            rungs |= {RECONSTRUCTED.name: 0.9 - 3 * wobble, "recovered": 0.93 - 0.03 * sparsity - wobble}
            rows.append(
                plain
                | config
                | {f"{rung}_accuracy": accuracy for rung, accuracy in rungs.items()}
                | {
                    "trial_id": f"t-{len(rows):012x}",
                    "status": "finished",
                    "teacher_architecture": network,
                    "teacher_hash": sha(network),
                    "synthesis_key": sha(f"{network} {weight} {trial_seed}"),
                    "real_data": False,
                    "agreement": rungs["recovered"],
                    "pruned_agreement": rungs["pruned"],
                    **{str(rung.agreement): rungs[rung.name] for rung in (BN_REESTIMATED, RECONSTRUCTED)},
                    "reference_kl": wobble,
                    "achieved_sparsity": sparsity,
                    "num_parameters": 270_000,
                    "num_nonzero": round(270_000 * (1 - sparsity)),
                    "dense_bytes": 1_083_392,
                    "stored_bytes": round(1_200_000 * (1 - sparsity)) + 40_000,
                    "num_images": NUM_IMAGES,
                    "class_histogram": json.dumps([NUM_IMAGES // 10] * 10),
                    "synthesis_wall_s": 40.0,
                    "wall_s": 60.0 + wobble,
                }
            )
    raise AssertionError


def sha(text: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def made_up_batches(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `synthesis` rows of those trials: four batches a key."""
    teachers = {row["synthesis_key"]: row["teacher_hash"] for row in rows}
    common = {"method": "deepinversion", "num_images": NUM_IMAGES // 4, "wall_s": 10.0}
    return [
        common | {"synthesis_key": key, "teacher_hash": teacher, "batch_index": index}
        for key, teacher in teachers.items()
        for index in range(4)
    ]


def read_filter_group(read: Callable[[], pd.DataFrame]) -> int:
    """A typical use of a table: read, filter, group; returns its number of rows."""
    frame = read()
    kept = frame[frame["pruning.sparsity"] >= 0.75]
    kept.groupby(["teacher_architecture", "synthesis.bn_weight"])["recovered_accuracy"].mean()
    return len(frame)


def seconds(action: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds of a call."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def run(num_rows: int, num_writers: int) -> dict[str, float]:
    """Measure and print; returns the figures."""
    rows = made_up_rows(num_rows)
    with tempfile.TemporaryDirectory(prefix="dfkd_ray-bench-") as scratch:
        place = Path(scratch)
        start = time.perf_counter()
        for writer in range(num_writers):
            results.write(place, "trials", rows[writer::num_writers], f"writer-{writer}")
        figures = {"write_s": time.perf_counter() - start}
        results.write_batches(place, made_up_batches(rows))

        def ours() -> int:
            return read_filter_group(lambda: results.read(place, "trials"))

        def plain() -> int:
            return read_filter_group(lambda: pd.read_parquet(place / "trials"))

        assert ours() == num_rows
        figures |= {"before_s": seconds(ours), "plain_before_s": seconds(plain)}
        start = time.perf_counter()
        results.compact(place)
        figures["compact_s"] = time.perf_counter() - start
        assert ours() == num_rows
        figures |= {"after_s": seconds(ours), "plain_after_s": seconds(plain)}
        pictures(place, rows)
        start = time.perf_counter()
        written = report.write(place)
        figures |= {"report_s": time.perf_counter() - start, "report_mb": written.size_bytes / 1e6}
    print(
        f"{num_rows:,} rows of `trials` by {num_writers} writers, one part each ({figures['write_s']:.1f} s to write)\n"
        "read, filter, group (median of 3; plain: pandas.read_parquet of the same files):\n"
        f"  as left      {figures['before_s']:.2f} s, plain {figures['plain_before_s']:.2f} s\n"
        f"  compacted    {figures['after_s']:.2f} s, plain {figures['plain_after_s']:.2f} s "
        f"(compaction {figures['compact_s']:.2f} s)\n"
        f"report over them: {figures['report_s']:.1f} s, {figures['report_mb']:.2f} MB"
    )
    return figures


def pictures(place: Path, rows: list[dict[str, Any]]) -> None:
    """Write a picture of noise for every synthesis key, for the report."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, 3, 32, 32), dtype=np.uint8)
    batch = Batch(0, images, np.arange(100) % 10, "made up")
    data = class_grid([batch], 10, PixelSpace((0.5,) * 3, (0.25,) * 3))
    (place / "images").mkdir()
    for key in {row["synthesis_key"][:12] for row in rows}:
        (place / "images" / f"{key}.png").write_bytes(data)
