"""The command line: its errors are one line and an exit code, its results are files."""

import errno
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from dfkd_ray import bundles, image_files
from dfkd_ray.images import decode
from dfkd_ray.results import measurements
from helpers import TINY_SETS, assert_one_error, set_words, write_idx_set

# Without the device: some tests name it, and it may be said once.
SETS = {name: value for name, value in TINY_SETS.items() if name != "device"}
TINY = set_words(SETS)


def import_words(weights: Path, out: Path, *, architecture="resnet8", classes="10", shape="1x16x16") -> list[str]:
    words = ["teacher", "import", str(weights), "--architecture", architecture, "--num-classes", classes]
    words += ["--image-shape", shape, "--mean", "0.5", "--std", "0.25", "--out", str(out)]
    return words + (["--arguments", '{"width_multiplier": 0.5}'] if architecture == "resnet8" else [])


@pytest.fixture
def weights(tiny_teacher: Path, tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    torch.save(bundles.load(str(tiny_teacher)).network.state_dict(), path)
    return path


def test_help_takes_less_than_half_a_second_of_cpu_and_loads_neither_torch_nor_ray():
    program = (
        "import sys, time\nfrom dfkd_ray import cli\nsys.argv = ['dfkd-ray', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print('\\nLOADED', 'torch' in sys.modules, 'ray' in sys.modules, time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900, check=True)
    _, torch_loaded, ray_loaded, seconds = done.stdout.strip().splitlines()[-1].split()
    assert (torch_loaded, ray_loaded) == ("False", "False")
    assert float(seconds) < 2.0  # a generous bound for loaded machines; the usual figure is 0.3
    assert "recover" in done.stdout and "sweep" in done.stdout


def test_recover_writes_student_row_and_picture_and_prints_the_ladder(run_cli, tiny_teacher, tmp_path):
    out = tmp_path / "out"
    done = run_cli("recover", str(tiny_teacher), "--sparsity", "0.9", "--out", str(out), *TINY)
    assert done.code == 0, done.err
    for rung in ("teacher", "pruned", "BN re-estimated", "reconstructed", "recovered"):
        assert rung in done.out
    assert ", reconstructed in " in done.out
    assert json.loads((out / "row.json").read_text())["pruning.sparsity"] == 0.9
    assert (out / "images.png").read_bytes().startswith(b"\x89PNG")
    assert bundles.load(str(out / "student")).info.num_classes == 10


def test_row_and_bundle_of_a_student_name_the_test_set_or_have_no_accuracy(run_cli, tiny_teacher, tmp_path):
    bundle = bundles.load(str(tiny_teacher))
    info = bundle.info.model_copy(
        update={"dataset": "svhn", "test_accuracy": 0.8797, "class_names": tuple("abcdefghij")}
    )
    bundles.save(tmp_path / "t", info, bundle.network.state_dict())
    for number, name in enumerate("bdj"):
        (tmp_path / "pets" / "test" / name).mkdir(parents=True)
        Image.new("L", (16, 16), number * 90).save(tmp_path / "pets" / "test" / name / "0.png")
    for loose in ("a.png", "b.PNG", "readme.txt"):
        (tmp_path / "pets" / "test" / loose).write_bytes(b"")
    words = ["recover", str(tmp_path / "t"), "--cache", str(tmp_path / "cache"), *TINY]
    done = run_cli(*words, "--out", str(tmp_path / "o"), "--test-data", str(tmp_path / "pets"))
    assert done.code == 0, done.err
    assert "note: pets has no images of the network's a, c, e, f and 3 more" in done.err
    assert "2 files are left out: no images, hidden or in no class (2 in no class)" in done.err
    row = json.loads((tmp_path / "o" / "row.json").read_text())
    student = bundles.read_info(tmp_path / "o" / "student")
    assert (row["test_set"], row["num_test_images"], student.test_accuracy) == ("pets", 3, row["recovered_accuracy"])
    assert student.notes["test_set"] == {"name": "pets", "num_images": 3, "sha256": row["test_sha256"]}
    assert (
        f"on pets (3 images, sha256 {row['test_sha256'][:12]})"
        in run_cli("teacher", "info", f"{tmp_path}/o/student").out
    )
    assert "tested on pets, 3 images" in done.out and " from the cache" not in done.out
    done = run_cli(*words, "--out", str(tmp_path / "none"), "--test-data", "none")
    assert done.code == 0 and "8 images from the cache, made earlier in" in done.out, done.err
    row = json.loads((tmp_path / "none" / "row.json").read_text())
    assert (row["test_set"], row["num_test_images"], row["test_sha256"]) == (None, None, None)
    student = bundles.read_info(tmp_path / "none" / "student")
    assert student.test_accuracy is None and "test_set" not in student.notes


def test_a_refused_recover_leaves_no_folder_and_none_of_an_earlier_run_is_touched(
    run_cli, tiny_teacher, tmp_path, monkeypatch
):
    def refuse(*_words, **_options):
        raise ValueError("refused late")

    monkeypatch.setattr("dfkd_ray.trial.run", refuse)
    words = ["recover", str(tiny_teacher), *TINY, "--out"]
    assert_one_error(run_cli(*words, str(tmp_path / "o")), 2, "refused late")
    assert not (tmp_path / "o").exists()
    (tmp_path / "own").mkdir()
    assert_one_error(run_cli(*words, str(tmp_path / "own")), 2, "refused late")
    assert list((tmp_path / "own").iterdir()) == []
    (tmp_path / "own" / "checkpoints").mkdir()
    (tmp_path / "own" / ".recovery.json").write_text('{"schema": "dfkd_ray.recovery/1"}')
    assert_one_error(run_cli(*words, str(tmp_path / "own")), 2, "refused late")
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [".recovery.json", "checkpoints"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["recover"], ["teacher", "--out"]),
        (["recover", "--sparsity", "0.5"], ["teacher", "--out"]),
        (["recover", "t"], ["--out"]),
    ],
)
def test_all_missing_options_are_named_in_one_line(run_cli, words, parts):
    done = run_cli(*words)
    assert_one_error(done, 2, *parts)
    assert done.err.count("Missing") == len(parts)


def test_all_that_an_import_lacks_is_named_in_one_line(run_cli):
    done = run_cli("teacher", "import", "w.pt", "--mean", "0")
    assert_one_error(done, 2, "--architecture, --num-classes, --input-shape, --std, --out: missing")
    assert_one_error(run_cli("teacher", "import", "torchvision:resnet18"), 2, "--out", "missing")


def test_training_maps_test_folders_by_name_and_refuses_others_before_it_begins(run_cli, tmp_path):
    shades = {"ant": 20, "bee": 120, "cat": 220}
    for part, names in (("train", shades), ("test", ("ant", "cat"))):
        for name in names:
            (tmp_path / "d" / part / name).mkdir(parents=True)
            for index in range(8):
                image = Image.new("L", (16, 16), shades[name] + index)
                image.save(tmp_path / "d" / part / name / f"{index}.png")
    words = ["teacher", "train", "resnet8", "--dataset", str(tmp_path / "d"), "--out", str(tmp_path / "t")]
    words += ["--arguments", '{"width_multiplier": 0.25}', "--epochs", "2", "--set", "batch_size=8"]
    words += ["--set", "num_threads=1", "--validation", "3"]
    done = run_cli(*words)
    assert done.code == 0 and "note: d has no images of the network's bee" in done.err, done.err
    teacher = bundles.load(str(tmp_path / "t"))
    hits = 0
    for label, name in ((0, "ant"), (2, "cat")):
        for file in sorted((tmp_path / "d" / "test" / name).iterdir()):
            x = decode(image_files.read(file)[None], teacher.info.space)
            hits += int(teacher.network(x).argmax()) == label
    assert teacher.info.test_accuracy == pytest.approx(hits / 16, abs=1 / 16)
    assert teacher.info.notes["test_set"]["name"] == "d" and teacher.info.notes["test_set"]["num_images"] == 16
    assert len(teacher.info.notes["training_set"]["held_out"]) == 3
    (tmp_path / "d" / "test" / "cat").rename(tmp_path / "d" / "test" / "wasp")
    refused = run_cli(*words[:5], "--out", str(tmp_path / "u"))
    assert_one_error(refused, 2, "wasp", "ant, bee, cat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "t"]


def test_seed_option_sets_both_seeds(run_cli, tiny_teacher, tmp_path):
    run_cli("recover", str(tiny_teacher), "--seed", "5", "--out", str(tmp_path / "o"), *TINY)
    row = json.loads((tmp_path / "o" / "row.json").read_text())
    assert row["synthesis.seed"] == row["distillation.seed"] == 5


def test_real_images_are_refused_unless_asked_for_and_marked_when_used(run_cli, tiny_teacher, tmp_path):
    alone = run_cli("recover", str(tiny_teacher), "--method", "real", "--out", str(tmp_path / "o"))
    assert_one_error(alone, 2, "--real-data")
    unasked = run_cli("recover", str(tiny_teacher), "--real-data", "mnist", "--out", str(tmp_path / "o"))
    assert_one_error(unasked, 2, "--method real")
    write_idx_set(tmp_path / "data")
    sets = set_words({name: value for name, value in SETS.items() if not name.startswith("synthesis.")})
    sets += ["--set", "synthesis.batch_size=8"]
    words = ["--method", "real", "--real-data", "mnist", "--data-root", str(tmp_path / "data")]
    done = run_cli("recover", str(tiny_teacher), "--out", str(tmp_path / "o"), *words, *sets)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "o" / "row.json").read_text())["real_data"] is True
    assert "upper bound" in done.out


def test_teacher_train_makes_a_bundle_with_test_accuracy_and_held_out_images(run_cli, tmp_path):
    write_idx_set(tmp_path / "data")
    words = ["teacher", "train", "resnet8", "--dataset", "mnist", "--data-root", str(tmp_path / "data")]
    words += ["--epochs", "2", "--validation", "8", "--set", "batch_size=8", "--set", "image_size=16"]
    words += ["--arguments", '{"width_multiplier": 0.25}', "--set", "num_threads=1", "--out", str(tmp_path / "t")]
    done = run_cli(*words)
    assert done.code == 0, done.err
    info = bundles.read_info(tmp_path / "t")
    assert info.image_shape == (1, 16, 16) and info.trained and info.dataset == "mnist"
    assert info.test_accuracy is not None and f"{info.test_accuracy:.4f}" in done.out
    shown = run_cli("teacher", "info", str(tmp_path / "t"))
    assert "mnist" in shown.out and "BatchNorm layers" in shown.out
    rows = ["recover", str(tmp_path / "t"), "--out", str(tmp_path / "o"), "--data-root", str(tmp_path / "data")]
    done = run_cli(*rows, "--test-data", "validation", *TINY)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "o" / "row.json").read_text())["num_test_images"] == 8


def test_import_reads_a_state_dict_and_recover_takes_the_bundle(run_cli, weights, tmp_path):
    assert run_cli(*import_words(weights, tmp_path / "b")).code == 0
    done = run_cli("recover", str(tmp_path / "b"), "--out", str(tmp_path / "o"), *TINY)
    assert done.code == 0, done.err


def test_import_of_an_own_network_by_import_path_and_the_trust_it_needs(run_cli, tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def make(width):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    my_nets = importlib.import_module("my_nets")

    torch.save(my_nets.make(6).state_dict(), tmp_path / "own.pth")
    words = import_words(tmp_path / "own.pth", tmp_path / "b", architecture="my_nets:make")
    assert run_cli(*words, "--arguments", '{"width": 6}').code == 0
    refused = run_cli("recover", str(tmp_path / "b"), "--out", str(tmp_path / "o"), *TINY)
    assert_one_error(refused, 2, "my_nets", "--trust-code")
    done = run_cli("recover", str(tmp_path / "b"), "--out", str(tmp_path / "o"), "--trust-code", "my_nets", *TINY)
    assert done.code == 0, done.err


def test_bad_input_missing_weights(run_cli, tmp_path):
    assert_one_error(run_cli(*import_words(tmp_path / "no.pt", tmp_path / "b")), 2, "no.pt", "no such")


def test_bad_input_truncated_weights(run_cli, weights, tmp_path):
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_one_error(run_cli(*import_words(weights, tmp_path / "b")), 2, "weights.pt", "cannot be read")
    short = tmp_path / "short.safetensors"
    short.write_bytes(safetensors.torch.save({"x": torch.zeros(100)})[:-10])
    assert_one_error(run_cli(*import_words(short, tmp_path / "b")), 2, "short.safetensors")


def test_bad_input_truncated_bundle(run_cli, tiny_teacher, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_teacher, copy)
    (copy / "weights.safetensors").write_bytes((copy / "weights.safetensors").read_bytes()[:-7])
    assert_one_error(run_cli("recover", str(copy), "--out", str(tmp_path / "o")), 2, "truncated")
    (copy / "weights.safetensors").unlink()
    assert_one_error(run_cli("recover", str(copy), "--out", str(tmp_path / "o")), 2, "missing")
    assert not (tmp_path / "o").exists()


def test_bad_input_wrong_shape_and_wrong_class_count(run_cli, weights, tmp_path):
    done = run_cli(*import_words(weights, tmp_path / "b", classes="100"))
    assert_one_error(done, 2, "fc.weight", "10x32", "100x32", "class count")
    other = import_words(weights, tmp_path / "b")
    other[-1] = '{"width_multiplier": 1.0}'
    assert_one_error(run_cli(*other), 2, "does not fit")
    assert not (tmp_path / "b").exists()


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_bad_input_a_pickle_that_runs_code_is_refused_and_does_not_run(run_cli, tmp_path):
    torch.save({"fc.weight": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    assert_one_error(run_cli(*import_words(tmp_path / "evil.pt", tmp_path / "b")), 2, "evil.pt", "refused")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert_one_error(run_cli(*import_words(tmp_path / "raw.pt", tmp_path / "b")), 2, "raw.pt")
    assert not (tmp_path / "ran").exists()


def test_bad_input_a_network_without_batchnorm(run_cli, tmp_path, monkeypatch):
    (tmp_path / "plain_nets.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.save({f"1.{k}": v for k, v in nn.Linear(256, 10).state_dict().items()}, tmp_path / "w.pt")
    done = run_cli(*import_words(tmp_path / "w.pt", tmp_path / "b", architecture="plain_nets:make"))
    assert done.code == 0 and "no BatchNorm" in done.out
    words = ["recover", str(tmp_path / "b"), "--out", str(tmp_path / "o"), "--trust-code", "plain_nets"]
    assert_one_error(run_cli(*words, *TINY), 2, "no BatchNorm layer", "activation records")


def test_bad_input_sparsity_of_one_and_a_half(run_cli, tiny_teacher, tmp_path):
    done = run_cli("recover", str(tiny_teacher), "--sparsity", "1.5", "--out", str(tmp_path / "o"))
    assert_one_error(done, 2, "pruning.sparsity", "less than 1", "1.5")


def test_bad_input_two_typos_are_told_at_once(run_cli, tiny_teacher, tmp_path):
    words = ["--set", "synthesis.bn_wieght=1", "--set", "distillation.temprature=3"]
    done = run_cli("recover", str(tiny_teacher), "--out", str(tmp_path / "o"), *words)
    lines = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert done.code == 2 and len(lines) == 2
    assert "did you mean synthesis.bn_weight?" in lines[0]
    assert "did you mean distillation.temperature?" in lines[1]


def test_bad_input_unknown_dataset_and_missing_dataset(run_cli, tmp_path, tiny_teacher):
    words = ["teacher", "train", "resnet8", "--out", str(tmp_path / "t"), "--data-root", str(tmp_path)]
    assert_one_error(run_cli(*words, "--dataset", "imagnet"), 2, "imagnet", "cifar10")
    assert_one_error(run_cli(*words, "--dataset", "cifar10"), 2, str(tmp_path), "--download")
    done = run_cli("recover", str(tiny_teacher), "--test-data", "nonsense", "--out", str(tmp_path / "o"))
    assert_one_error(done, 2, "nonsense")


@pytest.mark.parametrize(
    "words, parts",
    [
        (["recover", "nobody"], ["--out"]),
        (["recover", "nobody", "--out", "o"], ["nobody", "bundled"]),
        (["recover", "nobody", "--out", "o", "--method", "magic"], ["magic", "deepinversion"]),
        (["recover", "nobody", "--out", "o", "--config", "no.yaml"], ["no.yaml"]),
        (["teacher", "init", "resnet9", "--out", "o"], ["resnet9", "resnet8"]),
        (["teacher", "init", "resnet8", "--out", "o", "--image-shape", "32"], ["'32'", "CHANNELS"]),
        (
            ["teacher", "init", "resnet8", "--out", "o", "--input-shape", "32x32"],
            ["32x32", "channels, height and width"],
        ),
        (
            ["teacher", "init", "resnet8", "--out", "o", "--input-shape", "1x8x8", "--image-shape", "1x8x8"],
            ["old name of --input-shape"],
        ),
        (["teacher", "init", "resnet8", "--out", "o", "--arguments", "{"], ["--arguments", "JSON"]),
        (["teacher", "init", "resnet8", "--out", "o", "--arguments", '{"stem": "cifar"}'], ["stem"]),
        (["teacher", "init", "wrn_11_1", "--out", "o"], ["6n + 4"]),
        (["recover", "fashion_mnist_resnet8", "--out", "s3://bucket/o"], ["s3://bucket/o", "folder on this machine"]),
        (["teacher", "init", "resnet8", "--out", "nowhere://b/o"], ["nowhere://b/o", "pyarrow or fsspec"]),
        (["sweep", "no.yaml"], ["no.yaml"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_every_other_wrong_word_is_one_line(run_cli, words, parts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert_one_error(run_cli(*words), 2, *parts)


def test_cuda_where_there_is_none_is_refused(run_cli, tiny_teacher, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = run_cli("recover", str(tiny_teacher), "--device", "cuda", "--out", str(tmp_path / "o"), *TINY)
    assert_one_error(done, 2, "cuda")


def test_options_that_cannot_act_are_refused(run_cli, tiny_teacher, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("on CUDA tf32 and fast do act")
    for field in ("synthesis.precision=tf32", "synthesis.fast=true", "pruning.schedule_end=0.7"):
        done = run_cli("recover", str(tiny_teacher), "--out", str(tmp_path / "o"), *TINY, "--set", field)
        assert_one_error(done, 2, field.split("=")[0].split(".")[1].split("_")[0])


def test_a_full_disk_is_exit_3_and_leaves_nothing_half_written(run_cli, tiny_teacher, tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if Path(target).name == "student":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    done = run_cli("recover", str(tiny_teacher), "--out", str(tmp_path / "o"), *TINY)
    assert_one_error(done, 3, "No space left", "free some space")
    assert not (tmp_path / "o" / "student").exists() and not list((tmp_path / "o").glob(".student*"))


def test_a_nan_loss_marks_the_trial_with_exit_1(run_cli, tiny_teacher, tmp_path):
    words = ["--set", "synthesis.bn_weight=1e38"]
    done = run_cli("recover", str(tiny_teacher), "--out", str(tmp_path / "o"), *TINY, *words)
    assert_one_error(done, 1, "failed", "loss is")
    row = json.loads((tmp_path / "o" / "row.json").read_text())
    assert row["status"] == "failed" and "FloatingPointError" in row["reason"]


def test_a_failed_trial_leaves_the_row_of_the_student_that_is_there(run_cli, tiny_teacher, tmp_path):
    out = tmp_path / "o"
    run = ["recover", str(tiny_teacher), "--out", str(out), *TINY]
    assert run_cli(*run).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    done = run_cli(*run, "--set", "synthesis.bn_weight=1e38")
    assert_one_error(done, 1, "its row is failed.json; row.json, student and images stay those of another trial")
    failed = json.loads((out / "failed.json").read_text())
    assert failed["status"] == "failed" and failed["trial_id"] != json.loads(before["row.json"])["trial_id"]
    assert {name: (out / name).read_bytes() for name in before} == before
    assert run_cli(*run).code == 0 and not (out / "failed.json").exists()
    (out / "failed.json").write_text("somebody's own")
    assert_one_error(run_cli(*run), 2, "failed.json")
    assert (out / "failed.json").read_text() == "somebody's own"


def test_bench_inversion_prints_both_ratios(run_cli, tiny_teacher):
    words = ["--batch-size", "8", "--steps", "1", "--repeats", "2", "--threads", "1"]
    done = run_cli("bench", "inversion", str(tiny_teacher), *words)
    assert done.code == 0, done.err
    assert "ours / reference" in done.out and "ours / bare" in done.out


def test_bench_recovery_measures_both_sides_on_the_same_teacher(run_cli, tmp_path):
    write_idx_set(tmp_path / "data")
    words = ["teacher", "train", "resnet8", "--dataset", "mnist", "--data-root", str(tmp_path / "data")]
    words += ["--epochs", "1", "--set", "batch_size=8", "--set", "num_threads=1"]
    words += ["--arguments", '{"width_multiplier": 0.25}']
    assert run_cli(*words, "--out", str(tmp_path / "t")).code == 0
    words = ["bench", "recovery", str(tmp_path / "t"), "--test-data", "mnist", "--data-root", str(tmp_path / "data")]
    done = run_cli(*words, "--scale", "0.02", "--sparsity", "0.5", *TINY, "--rows", str(tmp_path / "rows.parquet"))
    assert done.code == 0, done.err
    assert "recipe / ours wall time" in done.out
    ours, recipe = measurements.read(tmp_path / "rows.parquet").frame.to_dict("records")
    assert [(row["side"], row["network"], row["effort"], row["seed"]) for row in (ours, recipe)] == [
        ("ours", "t", "fast", 0),
        ("recipe", "t", "fast", 0),
    ]
    assert recipe["recipe_to_this"] == 1.0 and ours["recipe_to_this"] == recipe["wall_s"] / ours["wall_s"]
