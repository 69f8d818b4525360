"""Rows of the tables: made up, as trials would leave them; and what of them is the same in every run."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from dfkd_ray import results
from dfkd_ray.config import TrialConfig, flat, validate
from dfkd_ray.config.fields import AUTO

ACCURACIES = [0.9, 0.8, 0.7, 0.88, 0.79, 0.66]
HASH = {"resnet20": "a" * 64, "resnet8": "b" * 64}


def trial_row(index: int, sparsity: float, seed: int, **changes: Any) -> dict[str, Any]:
    """A finished trial's row with few metrics; `index` is into `ACCURACIES`."""
    settings: dict[str, Any] = {"teacher": "some/where/net_20", "pruning": {"sparsity": sparsity}}
    settings |= {"synthesis": {"seed": seed, "bn_weight": 0.2}, "distillation": {"seed": seed}}
    values = columns(settings)
    own = {"trial_id": f"t-{index}", "status": "finished", "agreement": ACCURACIES[index], "wall_s": 10.0 + index}
    own |= {"teacher_hash": "ab" * 32, "teacher_architecture": "resnet20", "real_data": False, "stored_bytes": 1000}
    return values | own | changes


def columns(settings: dict[str, Any]) -> dict[str, Any]:
    """The columns of a trial config, with what `auto` stands for where nothing is special."""
    values = flat(validate(TrialConfig, settings).model_dump(mode="json"))
    known = {"bn_weight": 0.2, "learning_rate": 0.05, "bn_mode": "trained"}
    left = {name: name.rpartition(".")[2] for name, value in values.items() if value == AUTO}
    return values | {name: known[field] for name, field in left.items() if field in known}


@functools.cache
def plain_config(method: str) -> dict[str, Any]:
    """The columns of a trial config with all its defaults."""
    return columns({"teacher": "t", "synthesis": {"method": method}})


def full_row(
    number: int,
    *,
    network: Any = "resnet20",
    sparsity: Any = 0.9,
    seed: Any = 0,
    method: Any = "deepinversion",
    bn_weight: Any = 0.2,
    temperature: Any = 4.0,
    **more: Any,
) -> dict[str, Any]:
    """A finished trial's row; its numbers follow from its number, and differ between trials."""
    settings: dict[str, Any] = {"teacher": f"runs/{network}", "pruning.sparsity": sparsity}
    settings |= {"synthesis.seed": seed, "distillation.seed": seed, "distillation.temperature": temperature}
    settings |= {"synthesis.bn_weight": bn_weight} if method == "deepinversion" else {}
    wobble = (number * 7919 % 100) / 5000
    key = hashlib.sha256(f"{network}-{method}-{bn_weight}-{seed}".encode()).hexdigest()
    metrics = {
        "trial_id": f"t-{number:012x}",
        "status": "finished",
        "teacher_architecture": network,
        "teacher_hash": HASH.get(network, "c" * 64),
        "real_data": method == "real",
        "teacher_accuracy": 0.94,
        "pruned_accuracy": 0.3 - sparsity / 5,
        "bn_reestimated_accuracy": 0.8 - wobble,
        "reconstructed_accuracy": 0.9 - wobble,
        "recovered_accuracy": 0.93 - sparsity / 20 - wobble,
        "pruned_agreement": 0.31 - sparsity / 5,
        "bn_reestimated_agreement": 0.81 - wobble,
        "reconstructed_agreement": 0.91 - wobble,
        "agreement": 0.97 - sparsity / 20 - wobble,
        "reference_kl": 0.05 + wobble,
        "num_test_images": 10_000,
        "achieved_sparsity": sparsity,
        "num_parameters": 270_000,
        "num_nonzero": int(270_000 * (1 - sparsity)),
        "dense_bytes": 1_083_392,
        "stored_bytes": int(1_200_000 * (1 - sparsity)) + 40_000,
        "num_images": 1024,
        "synthesis_key": key,
        "image_confidence": 0.97,
        "class_histogram": json.dumps([100] * 10),
        "synthesis_wall_s": 0.0 if method == "real" else 40.0,
        "reference_wall_s": 10.0,
        "wall_s": 60.0 + number % 7,
        "package_version": "0.1.0",
        "commit": "0123abc",
        "torch_version": "2.15.0",
        "numerics": "x86_64 AVX512, torch 2.15.0",
        "host": "laptop",
    }
    return plain_config(method) | settings | metrics | more


def batch_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The synthesis table of some trials: four batches of 256 images a key, one reference batch a teacher."""
    made = {}
    for row in rows:
        common = {"num_images": 256, "teacher_hash": row["teacher_hash"], "method": "deepinversion", "wall_s": 10.0}
        if row["synthesis.method"] == "deepinversion":
            for index in range(4):
                made[row["synthesis_key"], index] = common | {"domain": "train"}
        made["r" + row["teacher_hash"][1:], 0] = common | {"domain": "reference"}
    return [row | {"synthesis_key": key, "batch_index": index} for (key, index), row in made.items()]


def deterministic(rows: pd.DataFrame, table: str = "trials") -> pd.DataFrame:
    """The columns of a table that are the same in every run."""
    columns = rows[results.deterministic_columns(table)]
    assert isinstance(columns, pd.DataFrame)
    return columns


def comparable(place: str | Path, table: str, order: list[str]) -> pd.DataFrame:
    """The deterministic columns of a table in a place, in an order of their own."""
    return deterministic(results.read(place, table), table).sort_values(order).reset_index(drop=True)
