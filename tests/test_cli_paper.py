"""Commands on the 2017 paper's networks and data: CelebA's layout, digits of 28 pixels, teachers without BatchNorm."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from dfkd_ray import bundles
from dfkd_ray.config import flat, with_overrides
from helpers import TINY_NOISE, TINY_TRIAL, set_words

# Of networks without BatchNorm: no steps of a synthesis that looks at it.
TINY_SETS = with_overrides(TINY_TRIAL, {"synthesis": {"batch_size": 8}, "reference.synthesis": TINY_NOISE})
TINY = set_words(flat(TINY_SETS))
NUM_PORTRAITS = {"0": 14, "1": 2, "2": 8}  # for training, validation, testing


@pytest.fixture
def celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with portraits in CelebA's layout, every third one smiling; smiles are bright."""
    # torchvision compares MD5 sums with the published files', which no generated file has.
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda self: True)
    folder = tmp_path / "data" / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    parts = [part for part, count in NUM_PORTRAITS.items() for _ in range(count)]
    names = [f"{index:06d}.jpg" for index in range(1, len(parts) + 1)]
    smiling = [index % 3 == 0 for index in range(len(parts))]
    for name, smiles in zip(names, smiling, strict=True):
        Image.new("RGB", (178, 218), (230 if smiles else 20,) * 3).save(folder / "img_align_celeba" / name)

    def table(name: str, header: list[str], rows: list[str]) -> None:
        lines = [f"{image} {row}" for image, row in zip(names, rows, strict=True)]
        (folder / name).write_text("\n".join(header + lines) + "\n")

    count, num = str(len(parts)), len(parts)
    table("list_eval_partition.txt", [], parts)
    table("identity_CelebA.txt", [], [str(index) for index in range(num)])
    table("list_bbox_celeba.txt", [count, "image_id x_1 y_1 width height"], ["95 71 226 313"] * num)
    table("list_landmarks_align_celeba.txt", [count, "lefteye_x lefteye_y "], ["69 109"] * num)
    table("list_attr_celeba.txt", [count, "Male Smiling "], [f"-1 {1 if smiles else -1}" for smiles in smiling])
    return tmp_path / "data"


def train(run_cli, architecture: str, root: Path, out: Path, *more: str):
    words = ["teacher", "train", architecture, "--dataset", "celeba", "--data-root", str(root), "--epochs", "2"]
    words += ["--set", "batch_size=4", "--set", "learning_rate=0.01", "--set", "num_threads=1"]
    return run_cli(*words, "--out", str(out), *more)


def test_alexnet_is_trained_on_one_attribute_of_celeba_with_equal_classes(run_cli, celeba, tmp_path):
    done = train(run_cli, "alexnet", celeba, tmp_path / "t", "--attribute", "Smiling")
    assert done.code == 0, done.err
    info = bundles.read_info(tmp_path / "t")
    assert info.image_shape == (3, 224, 224) and info.class_names == ("not Smiling", "Smiling")
    assert info.notes["data"] == {"attribute": "Smiling", "equal_classes": True}
    # Of the 8 test portraits 3 smile (18 to 23 hold three multiples of 3): 2 x 3 = 6, or fewer.
    assert f"on {2 * sum(index % 3 == 0 for index in range(16, 24))} images" in done.out


def test_a_teachers_attribute_and_classes_decide_what_is_tested_and_distilled_on(run_cli, celeba, tmp_path):
    small = ["--set", "image_size=32"]
    done = train(run_cli, "lenet5", celeba, tmp_path / "t", *small, "--validation", "2")
    assert done.code == 0, done.err
    done = train(run_cli, "lenet5", celeba, tmp_path / "all", *small, "--all-images")
    assert done.code == 0 and "on 8 images" in done.out, done.err
    counts = {}
    words = ["--data-root", str(celeba), "--set", "student.architecture=lenet5_half", "--set", "pruning.sparsity=0"]
    for name, test_data in (("t", "celeba"), ("all", "celeba"), ("t", "validation")):
        out = tmp_path / f"{name}-{test_data}"
        more = ["--method", "real", "--real-data", "celeba"] if name == "all" else ["--method", "noise"]
        done = run_cli(
            "recover", str(tmp_path / name), "--out", str(out), "--test-data", test_data, *words, *TINY, *more
        )
        assert done.code == 0, done.err
        row = json.loads((out / "row.json").read_text())
        counts[name, test_data] = row["num_test_images"]
        assert row["bn_reestimated_accuracy"] is None and row["real_data"] is (name == "all")
    smiles = sum(index % 3 == 0 for index in range(16, 24))
    assert counts == {("t", "celeba"): 2 * smiles, ("all", "celeba"): 8, ("t", "validation"): 2}


@pytest.mark.parametrize("word", [["--attribute", "Smiling"], ["--all-images"]])
def test_options_of_celeba_are_refused_for_other_sets(run_cli, tmp_path, word):
    done = run_cli("teacher", "train", "lenet5", "--dataset", "mnist", "--out", str(tmp_path / "t"), *word)
    assert done.code == 2 and "options of celeba" in done.err and "Traceback" not in done.err


def test_a_hinton_net_of_784_inputs_is_trained_tested_and_distilled_on_images_of_28_pixels(run_cli, tmp_path):
    folder = tmp_path / "data" / "fashion-mnist"
    folder.mkdir(parents=True)
    for stem in ("train", "t10k"):
        labels = np.arange(40, dtype=np.uint8) % 10
        images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">I{array.ndim}I", 0x800 | array.ndim, *array.shape)
            path = folder / f"{stem}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
    words = ["teacher", "train", "hinton_1200", "--dataset", "fashion_mnist", "--data-root", str(tmp_path / "data")]
    words += ["--epochs", "1", "--set", "image_size=28", "--set", "batch_size=20", "--set", "learning_rate=0.05"]
    words += ["--set", "num_threads=1"]
    done = run_cli(*words, "--out", str(tmp_path / "t"))
    assert done.code == 0, done.err
    teacher = bundles.load(str(tmp_path / "t"))
    assert teacher.info.image_shape == (1, 28, 28) and teacher.network.get_parameter("fc1.weight").shape[1] == 784
    words = ["recover", str(tmp_path / "t"), "--method", "noise", "--sparsity", "0", "--out", str(tmp_path / "o")]
    words += ["--set", "student.architecture=hinton_800", "--data-root", str(tmp_path / "data")]
    done = run_cli(*words, "--test-data", "fashion_mnist", *TINY)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "o" / "row.json").read_text())["num_test_images"] == 40
    assert bundles.read_info(tmp_path / "o" / "student").image_shape == (1, 28, 28)
    shown = run_cli("teacher", "info", str(tmp_path / "t"))
    assert "none: DeepInversion will refuse it" in shown.out
