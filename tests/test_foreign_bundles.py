"""Bundles from elsewhere: whatever is wrong with them is one line that names the file, in bounded memory and time."""

import json
import os
import random
import resource
import shutil
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from dfkd_ray import bundles
from dfkd_ray.compression import pruning
from dfkd_ray.config import PruningConfig
from helpers import TINY_INFO, earlier_form, refusal, tiny_network

WEIGHTS = "weights.safetensors"


@pytest.fixture
def folder(tmp_path, tiny_teacher):
    shutil.copytree(tiny_teacher, tmp_path / "net")
    return tmp_path / "net"


def described(folder, **fields):
    """Change fields of a bundle's teacher.json; a text stands for its own JSON."""
    path = folder / "teacher.json"
    plain = json.loads(path.read_text())
    lines = {name: json.dumps(value) for name, value in plain.items()} | fields
    path.write_text("{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in lines.items()) + "}")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": ' * 5000 + "1" + "}" * 5000,
        '{"schema_version": "dfkd_ray.bundle/1", "schema_version": "dfkd_ray.bundle/1"}',
        '"\\ud800"',
        "\ufeff{}",
        "",
        "null",
        "[1]",
        '{"schema_version": 10e5000}',
        '{"schema_version": ["' + "x" * 100_000 + '"]}',
        " " * (9 << 20),
    ],
    ids=["brackets", "deep", "twice", "surrogate", "bom", "empty", "null", "list", "infinite", "long", "large"],
)
def test_a_description_that_is_no_plain_json_is_refused_by_name(folder, text):
    (folder / "teacher.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    refusal(lambda: bundles.load(str(folder)), "teacher.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", "true"),
        ("num_classes", "1" + "0" * 400),
        ("num_classes", "1e30"),
        ("num_classes", "100000000"),
        ("image_shape", "[true, 16, 16]"),
        ("image_shape", "[1, 100000, 100000]"),
        ("image_shape", "[1, 9223372036854775807, 9223372036854775807]"),
        ("image_shape", "[1, -16, -16]"),
        ("mean", "[true]"),
        ("mean", "[1" + "0" * 400 + "]"),
        ("mean", "[NaN]"),
        ("mean", "[Infinity]"),
        ("mean", "[1e999]"),
        ("std", "[1e-320]"),
        ("std", "[false]"),
        ("pixel_range", "[-1e308, 1e308]"),
        ("test_accuracy", "true"),
        ("architecture", json.dumps("x" * 10_000)),
        ("class_names", json.dumps(["y" * 5000] * 10)),
        ("class_names", json.dumps([1] * 5000)),
        ("arguments", '{"width_multiplier": 1' + "0" * 400 + "}"),
        ("arguments", '{"width_multiplier": NaN}'),
        ("arguments", '{"width_multiplier": 1e999}'),
        ("arguments", '{"width_multiplier": 999}'),
        ("arguments", '{"' + "z" * 5000 + '": 1}'),
        ("weights_sha256", json.dumps("\u001b[31m" * 3000)),
        ("notes", '{"training": 3}'),
        ("notes", '{"training": {"num_validation": "all"}}'),
        ("notes", '{"data": {"download": true}}'),
    ],
)
def test_a_description_with_impossible_values_is_refused_by_name(folder, name, value):
    described(folder, **{name: value})
    refusal(lambda: bundles.load(str(folder)))


def test_a_mean_outside_the_pixel_range_is_refused_and_names_it(folder):
    described(folder, mean="[123.675]", std="[58.395]")
    refusal(lambda: bundles.load(str(folder)), "teacher.json", "123.675", "pixel_range")
    described(folder, mean="[123.675]", std="[58.395]", pixel_range="[0, 255]")
    bundles.load(str(folder))


def test_a_hundred_thousand_class_names_fit():
    names = tuple(f"class number {index} of many, with a name of some length" for index in range(100_000))
    info = TINY_INFO.model_copy(update={"num_classes": 100_000, "class_names": names})
    assert len(info.model_dump_json(indent=2)) < 8 << 20
    bundles.BundleInfo.model_validate(info.model_dump())


def test_names_keep_their_control_characters(folder):
    described(folder, dataset=json.dumps("a\u001b[31m\u202eb"))
    assert bundles.load(str(folder)).info.dataset == "a\u001b[31m\u202eb"


NO_FILES = {
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["teacher.json", WEIGHTS])
def test_what_is_no_plain_file_is_refused_and_not_opened(folder, name, kind):
    (folder / name).unlink()
    NO_FILES[kind](folder / name)
    refusal(lambda: bundles.load(str(folder)), name)


def test_a_bundle_behind_a_loop_of_links_or_of_an_endless_name_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for name in (str(tmp_path / "a"), "x" * 1_000_000, "a\0b", "/" * 5000 + "x" * 300):
        refusal(lambda name=name: bundles.load(name), "teacher.json")


def sealed(folder, data):
    """Other weights in a bundle, with their hash in its description."""
    (folder / WEIGHTS).write_bytes(data)
    described(folder, weights_sha256=json.dumps(bundles.sha256(data)))


def framed(header, body=b""):
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 1 << 40) + b"{}",
        framed(b"[" * 50_000),
        framed(b"[]"),
        framed(b'{"a": 1, "a": 1}'),
        framed({"a": entry(shape=(2**40, 2**40), offsets=(0, 4))}, b"\0" * 4),
        framed({"a": entry(shape=(2**31, 2**31, 0), offsets=(0, 0))}),
        framed({"a": entry(shape=(-1, -1))}, b"\0" * 4),
        framed({"a": entry(shape=(True,))}, b"\0" * 4),
        framed({"a": entry(shape=(1,) * 100)}, b"\0" * 4),
        framed({"a": entry(dtype="F32", offsets=(4, 0))}, b"\0" * 4),
        framed({"a": entry(offsets=(0, 2**60))}, b"\0" * 4),
        framed({"a": entry(dtype="F8_E4M3", offsets=(0, 1))}, b"\0"),
        framed({"a": entry(dtype="F4", shape=(2,), offsets=(0, 1))}, b"\0"),
        framed({"a": entry(dtype="C64", offsets=(0, 8))}, b"\0" * 8),
        framed({"a": entry(dtype="X", offsets=(0, 1))}, b"\0"),
        framed({"a": {"dtype": "F32"}}),
        framed({"a": 3}),
        framed({"__metadata__": {"a": 3}}),
        framed({"__metadata__": 3}),
        b"",
        b"\0" * 7,
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused_by_name(folder, data):
    sealed(folder, data)
    refusal(lambda: bundles.load(str(folder)), WEIGHTS)
    (folder / "w.safetensors").write_bytes(data)
    refusal(lambda: bundles.read_state_dicts(folder / "w.safetensors"), "w.safetensors")


def test_a_header_of_too_many_tensors_is_refused(folder, monkeypatch):
    monkeypatch.setattr("dfkd_ray.untrusted.MAX_TENSORS", 100)
    sealed(folder, framed({f"t{index}": entry(shape=(0,), offsets=(0, 0)) for index in range(101)}))
    refusal(lambda: bundles.load(str(folder)), WEIGHTS, "101 tensors")


def test_weights_larger_than_the_architecture_can_have_are_refused_before_they_are_read(folder):
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)  # a file of holes
    refusal(lambda: bundles.load(str(folder)), WEIGHTS, "expected at most")


def stored(**changes):
    """A weight of 5 x 6 as a pruned bundle stored it in earlier versions, with changes."""
    tensors = earlier_form({"a": torch.arange(30.0).view(5, 6)}, ["a"])
    for name, tensor in changes.items():
        tensors[name.replace("_", "::")] = tensor
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"a_mask_shape": torch.tensor([2**30, 2**30], dtype=torch.int32)},
        {"a_mask_shape": torch.tensor([2**31 - 1] * 3, dtype=torch.int32)},
        {"a_mask_shape": torch.tensor([2**40, 2**40])},
        {"a_mask_shape": torch.tensor([-5, -6], dtype=torch.int32)},
        {"a_mask_shape": torch.tensor([5.0, 6.0])},
        {"a_mask_shape": torch.tensor([[5, 6]], dtype=torch.int32)},
        {"a_mask_shape": torch.tensor([], dtype=torch.int32)},
        {"a_mask_shape": torch.tensor([5, 7], dtype=torch.int32)},
        {"a_mask_shape": torch.tensor([1] * 60 + [5, 6], dtype=torch.int32)},
        {"a_mask": torch.ones(4)},
        {"a_mask": torch.full((2, 2), 255, dtype=torch.uint8)},
        {"a_mask": torch.full((4,), 255, dtype=torch.uint8)},
        {"a_values": torch.ones(29, 1)},
        {"a_values": None},
        {"a_mask": None},
        {"b_mask": torch.zeros(1, dtype=torch.uint8)},
        {"b_values": torch.zeros(1)},
        {"b_other": torch.zeros(1)},
        {"a": torch.zeros(5, 6)},
    ],
)
def test_a_mask_that_does_not_fit_is_refused_before_memory_is_taken(tmp_path, changes):
    safetensors.torch.save_file(stored(**changes), tmp_path / "w.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(lambda: bundles.read_state_dicts(tmp_path / "w.safetensors"), "w.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


def loaded_with(change):
    network = tiny_network()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    change(state)
    bundles.load_state(network, state, "w.pt")
    return network


def changed(name, make):
    return lambda state: state.update({name: make(state[name])})


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("fc.weight", lambda w: w.long()),
        ("fc.weight", lambda w: w > 0),
        ("fc.weight", lambda w: w.to(torch.complex64)),
        ("fc.weight", lambda w: w.to(torch.float8_e4m3fn)),
        ("fc.weight", lambda w: w.to_sparse()),
        ("fc.weight", lambda w: w.to_sparse_csr()),
        ("fc.weight", lambda w: w.to("meta")),
        ("fc.weight", lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        ("fc.weight", lambda w: w.double() * 1e200),
        ("fc.weight", lambda w: w * float("nan")),
        ("bn1.num_batches_tracked", lambda w: w.float()),
        ("bn1.num_batches_tracked", lambda w: w > 0),
        ("bn1.running_var", lambda w: -w),
        ("bn1.running_var", lambda w: w * float("nan")),
        ("bn1.weight", lambda w: w / 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(deprecated|beta|torch.ao)")
def test_weights_of_another_kind_than_the_networks_are_refused_by_name(name, make):
    refusal(lambda: loaded_with(changed(name, make)), "w.pt", name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_weights_of_other_sizes_are_taken(dtype):
    network = loaded_with(changed("fc.weight", lambda w: w.to(dtype)))
    weight, expected = network.get_parameter("fc.weight"), tiny_network().get_parameter("fc.weight")
    assert weight.dtype == torch.float32
    assert torch.allclose(weight, expected, rtol=1e-2)


def test_damaged_bundles_load_or_are_refused(tmp_path):
    network = tiny_network()
    pruning.apply(network, pruning.masks(network, PruningConfig(sparsity=0.9)))
    bundles.save(tmp_path / "net", TINY_INFO, network.state_dict(), list(pruning.prunable(network)))
    rng = random.Random(0)
    whole = {name: (tmp_path / "net" / name).read_bytes() for name in ("teacher.json", WEIGHTS)}
    header = int.from_bytes(whole[WEIGHTS][:8], "little")
    for _ in range(120):
        name = rng.choice(["teacher.json", WEIGHTS, WEIGHTS])
        data = bytearray(whole[name])
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice([1, 1, 3, 20])):
                data[rng.randrange(header if name == WEIGHTS and rng.random() < 0.8 else len(data))] = rng.randrange(
                    256
                )
        (tmp_path / "net" / "teacher.json").write_bytes(whole["teacher.json"])
        (tmp_path / "net" / name).write_bytes(data)
        if name == WEIGHTS:
            sealed(tmp_path / "net", bytes(data))
        try:
            bundles.load(str(tmp_path / "net"))
        except ValueError as error:
            assert "\n" not in str(error)
        (tmp_path / "net" / WEIGHTS).write_bytes(whole[WEIGHTS])


def test_a_network_whose_variances_are_batchnorms_of_any_dimension_is_checked():
    network = nn.Sequential(nn.BatchNorm1d(3)).eval()
    state = network.state_dict() | {"0.running_var": torch.tensor([1.0, -1.0, np.inf])}
    refusal(lambda: bundles.load_state(network, state, "w"), "0.running_var")
