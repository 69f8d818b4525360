"""Good inputs, made by the commands themselves: what the generators copy and damage."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dfkd_ray import results
from dfkd_ray.config import with_overrides
from helpers import ABOUT, set_words

if TYPE_CHECKING:
    from fuzz.fuzzing import Server

CLASSES = ("ant", "bee", "cat")
SETTINGS = {
    "synthesis.num_steps": 1,
    "synthesis.batch_size": 4,
    "synthesis.num_threads": 1,
    "bn_num_images": 4,
    "distillation.num_images": 4,
    "distillation.num_steps": 2,
    "distillation.batch_size": 2,
    "distillation.eval_every": 1,
    "distillation.num_threads": 1,
    "reference.num_images": 4,
    "reference.synthesis.num_steps": 1,
    "reference.synthesis.batch_size": 4,
    "reference.synthesis.num_threads": 1,
}
TINY = set_words(SETTINGS)
TINY += ["--test-data", "none", "--device", "cpu"]
NUM_ROWS = 4

# In range, or nearly so: what is left to the computation to refuse, and to the row to tell.
EDGES = {
    "synthesis.bn_weight": ["1e30", "1e38", "0", "1e-30"],
    "synthesis.learning_rate": ["1e30", "1e-30", "1000"],
    "synthesis.tv_weight": ["1e38", "0"],
    "synthesis.l2_weight": ["1e38", "1e-38"],
    "synthesis.label_weight": ["0", "1e38"],
    "synthesis.num_steps": ["1", "3"],
    "synthesis.batch_size": ["2", "3", "5"],
    "synthesis.storage": ["uint8", "float16", "float32"],
    "synthesis.precision": ["bfloat16", "float32"],
    "synthesis.parametrisation": ["pixel"],
    "synthesis.method": ["noise", "deepinversion", "records"],
    "synthesis.seed": ["9223372036854775807", "4294967296", "0"],
    "distillation.seed": ["9223372036854775807", "4294967296"],
    "distillation.learning_rate": ["1e30", "1e-30", "100"],
    "distillation.temperature": ["1e-30", "1e30", "1e-3"],
    "distillation.kl_weight": ["0", "1e38"],
    "distillation.label_weight": ["1e38", "1"],
    "distillation.feature_weight": ["1e38", "1"],
    "distillation.clip_norm": ["1e-30", "1e30"],
    "distillation.weight_decay": ["1e30", "0"],
    "distillation.num_steps": ["0", "1"],
    "distillation.shift": ["15", "16", "17", "1000"],
    "distillation.mixup": ["0", "1"],
    "distillation.bn_mode": ["auto", "frozen", "paired", "reestimated", "trained"],
    "distillation.num_images": ["1", "3", "5"],
    "distillation.warmup": ["0.999999"],
    "distillation.patience": ["1"],
    "enough_kl": ["0", "1e-9", "1e30"],
    "bn_num_images": ["2", "5"],
    "reference.num_images": ["2", "5"],
    "pruning.sparsity": ["0", "0.99999999", "0.999", "0.5"],
    "pruning.criterion": ["lamp", "uniform"],
    "pruning.schedule": ["cubic"],
    "pruning.spare_first": ["true"],
    "student.architecture": ["resnet8", "lenet5", "wrn_16_1", "hinton_800", "json:loads", "nothing:make"],
    "student.arguments": ['{"width_multiplier": 0.1}', '{"width_multiplier": 1e-9}', '{"depth": 3}'],
}


def base(teacher: str) -> dict:
    """A trial of seconds, as nested data."""
    return with_overrides({"teacher": teacher, "device": "cpu"}, SETTINGS)


def sweep_file(teacher: str = "teacher") -> dict:
    """A sweep of four trials, as nested data."""
    grid = {"pruning.sparsity": [0.5, 0.7], "distillation.temperature": [2.0, 6.0]}
    return {"about": ABOUT, "base": base(teacher), "grid": grid, "tiny": {"synthesis.num_steps": 1}}


def write_images(folder: Path, size: int = 16) -> None:
    """Class folders of small grey PNG files."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 4), ("test", 2)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for index in range(num):
                pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")


def write_idx(folder: Path) -> None:
    """An MNIST of a few images."""
    rng = np.random.default_rng(0)
    (folder / "mnist").mkdir(parents=True)
    for stem, num in (("train", 20), ("t10k", 10)):
        head = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (num, 28, 28))
        pixels = rng.integers(0, 256, num * 784, dtype=np.uint8).tobytes()
        (folder / "mnist" / f"{stem}-images-idx3-ubyte").write_bytes(head + pixels)
        labels = bytes(index % 10 for index in range(num))
        (folder / "mnist" / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + num.to_bytes(4, "big") + labels)


def write_place(place: Path, row: dict) -> None:
    """The results of a sweep of a few trials, from the row of one."""
    for index in range(NUM_ROWS):
        own = {column: row.get(column) for column in results.schema("trials").names if column != "written_at_s"}
        name = f"t-{index:012x}"
        own |= {"trial_id": name, "pruning.sparsity": 0.5 + index / 10, "agreement": 0.25 * index}
        if index == NUM_ROWS - 1:
            own = {column: own[column] for column in ("trial_id", "teacher", "pruning.sparsity", "synthesis.method")}
            own |= {"status": "failed", "reason": "FloatingPointError: loss is nan"}
        results.write(place, "trials", [own], name)
        looks = [{"trial_id": name, "step": step, "agreement": 0.5} for step in (0, 1, 2)]
        results.write(place, "epochs", looks, name)
    batch = {"synthesis_key": row["synthesis_key"], "batch_index": 0, "teacher_hash": row["teacher_hash"]}
    batch |= {"domain": "train", "method": "deepinversion", "num_images": 4, "wall_s": 0.1}
    results.write_batches(place, [batch])
    (place / "sweep.yaml").write_text("about: {source: a test}\n")


def build(folder: Path, server: "Server") -> None:
    """Make all templates in a folder. `AssertionError` where a good command line does not end well."""
    from fuzz.fuzzing import Case

    folder.mkdir(parents=True)
    write_images(folder / "images")
    write_images(folder / "large", 32)
    write_idx(folder / "digits")
    (folder / "home").mkdir()
    (folder / "tmp").mkdir()

    def good(*words: str) -> None:
        done = server.run(Case(words, cwd="."), folder)
        assert done["code"] == 0, (words, done, (folder / "err").read_text())

    narrow = ["--arguments", '{"width_multiplier": 0.25}', "--num-classes", "3", "--image-shape", "1x16x16"]
    good("teacher", "init", "resnet8", *narrow, "--out", "teacher")
    good("teacher", "init", "lenet5", "--num-classes", "3", "--image-shape", "1x32x32", "--out", "plain")
    good("teacher", "record", "plain", "--dataset", "large", "--rank", "2", "--threads", "1")
    good("recover", "teacher", "--out", "recovered", "--cache", "cache", *TINY)
    write_place(folder / "place", json.loads((folder / "recovered" / "row.json").read_text()))
    for name in ("home", "tmp", "out", "err"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
