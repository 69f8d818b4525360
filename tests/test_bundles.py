import errno
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from dfkd_ray import bundles, trial
from dfkd_ray.bundles import BundleInfo, folders
from dfkd_ray.compression import pruning
from dfkd_ray.config import PruningConfig, TrialConfig, validate
from dfkd_ray.description import ShapeEdit
from helpers import TINY_INFO, earlier_form, tiny_network

MODULE = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("ran").touch()
def make(num_features):
    return nn.Sequential(nn.Flatten(), nn.Linear(num_features, 10))
"""


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def save_tiny(folder, **changes):
    network = tiny_network()
    return network, bundles.save(folder, TINY_INFO.model_copy(update=changes), network.state_dict())


def pruned_network(sparsity):
    network = tiny_network()
    pruning.apply(network, pruning.masks(network, PruningConfig(sparsity=sparsity)))
    return network, list(pruning.prunable(network))


def edit(folder, **fields):
    """Change fields of a bundle's teacher.json by hand."""
    path = folder / "teacher.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_bundle_gives_the_network_back_bit_for_bit(tmp_path):
    network, info = save_tiny(tmp_path / "net")
    teacher = bundles.load(str(tmp_path / "net"))
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(teacher.network(images), network(images))
    assert teacher.info == info and teacher.name == "net"
    for name, tensor in network.state_dict().items():
        loaded = teacher.network.state_dict()[name]
        assert loaded.dtype == tensor.dtype and bits(loaded) == bits(tensor)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
def test_stored_bundle_round_trips_bit_for_bit(tmp_path, sparsity):
    network, names = pruned_network(sparsity)
    bundles.save(tmp_path / "net", TINY_INFO, network.state_dict(), names)
    state = bundles.load(str(tmp_path / "net")).network.state_dict()
    assert all(bits(state[name]) == bits(tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 3), (2, 3, 5, 5), (8,), (0, 4)])
@pytest.mark.parametrize("kind", ["all_zero", "no_zero", "mixed"])
def test_stored_tensors_round_trip_bit_for_bit(dtype, shape, kind):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 10
    values *= {"all_zero": 0, "no_zero": 1, "mixed": (torch.arange(values.numel()) % 3 > 0).view(shape)}[kind]
    state = {"pruned": values.to(dtype), "kept": values.to(dtype), "count": torch.tensor(7), "flag": torch.tensor(True)}
    blob = safetensors.torch.save(bundles.to_stored(state, ["pruned"]))
    loaded = bundles.from_stored(safetensors.torch.load(blob))
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor)


def test_a_weight_that_is_strided_or_shared_is_stored_by_value(tmp_path):
    weight = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    state = {"a": weight, "b": weight, "c": weight}
    (tmp_path / "w.safetensors").write_bytes(bundles.safetensors_bytes(bundles.to_stored(state, ["b"])))
    loaded = bundles.read_state_dicts(tmp_path / "w.safetensors")[""]
    assert all(torch.equal(loaded[name], weight) for name in state)


def test_sparse_file_is_smaller_than_dense(tmp_path):
    network, names = pruned_network(0.9)
    sizes = {}
    for label, pruned in (("dense", []), ("sparse", names)):
        bundles.save(tmp_path / label, TINY_INFO, network.state_dict(), pruned)
        sizes[label] = (tmp_path / label / "weights.safetensors").stat().st_size
    num_weights = sum(weight.numel() for weight in pruning.prunable(network).values())
    # 90 % of the weights leave (4 bytes each), and less than half a bit a weight comes for their positions.
    assert sizes["sparse"] < sizes["dense"] - 4 * 0.9 * num_weights + num_weights / 16
    assert sizes["sparse"] < 0.4 * sizes["dense"]


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_stored_bytes_are_the_size_of_the_file(tmp_path, sparsity):
    network, names = pruned_network(sparsity)
    bundles.save(tmp_path / "net", TINY_INFO, network.state_dict(), names)
    size = (tmp_path / "net" / "weights.safetensors").stat().st_size
    assert bundles.stored_bytes(network.state_dict(), names) == size


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_tiny(tmp_path / name)
    for file in ("teacher.json", "weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_loaded_teacher_is_frozen_in_eval_mode(tiny_teacher):
    network = bundles.load(str(tiny_teacher)).network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_teacher_hash_changes_with_what_is_computed_and_nothing_else():
    base = bundles.teacher_hash(TINY_INFO)
    same = {
        "class_names": tuple("abcdefghij"),
        "dataset": "d",
        "test_accuracy": 0.5,
        "notes": {"a": 1},
        "trained": True,
        "shape_edits": (ShapeEdit(module="conv1", dimension="out", kept=(0,)),),  # the weights have the shape
    }
    for name, value in same.items():
        assert bundles.teacher_hash(TINY_INFO.model_copy(update={name: value})) == base, name
    other = {
        "architecture": "resnet20",
        "arguments": {"width_multiplier": 0.25},
        "num_classes": 11,
        "input_shape": (1, 8, 8),
        "mean": (0.4,),
        "std": (0.2,),
        "pixel_range": (0.0, 2.0),
        "head": "sigmoid",
        "weights_sha256": "00",
    }
    hashes = {bundles.teacher_hash(TINY_INFO.model_copy(update={name: value})) for name, value in other.items()}
    assert len(hashes - {base}) == len(other)
    assert set(same) | set(other) | {"schema_version"} == set(BundleInfo.model_fields)


def test_equal_bundles_in_two_places_have_one_hash(tmp_path, tiny_teacher):
    save_tiny(tmp_path / "elsewhere", notes={"copied": True})
    assert bundles.load(str(tmp_path / "elsewhere")).hash == bundles.load(str(tiny_teacher)).hash


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mean": (0.5, 0.5)}, "expected 1, one per image channel"),
        ({"std": (0.0,)}, "std must be above 0"),
        ({"pixel_range": (1.0, 0.0)}, "low < high"),
        ({"input_shape": (1, 0, 16)}, "at least 1"),
        ({"class_names": ("cat",)}, "1 class names for 10 classes"),
        ({"num_classes": 1}, "num_classes"),
        ({"test_accuracy": 93.5}, "test_accuracy"),
        ({"input_shape": (1,)}, "input_shape"),
        ({"mean": (float("nan"),)}, "mean"),
        ({"licence": "x"}, "licence: unknown field"),
    ],
)
def test_metadata_that_does_not_fit_together_is_refused(fields, says):
    with pytest.raises(ValueError) as caught:
        validate(BundleInfo, TINY_INFO.model_dump() | fields, "teacher.json")
    assert says in str(caught.value)


def test_an_unknown_teacher_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no folder with a teacher\.json.*teacher import"):
        bundles.load(str(tmp_path / "nowhere"))


def test_a_bundled_teacher_is_found_by_name(tmp_path, monkeypatch):
    save_tiny(tmp_path / "shipped")
    monkeypatch.setattr(folders, "BUNDLED", tmp_path)
    assert bundles.load("shipped").name == "shipped"
    with pytest.raises(ValueError, match=r"bundled teacher \(shipped\)"):
        bundles.load("other")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "schema_version is 'list'"),
        (b'{"schema_version": "dfkd_ray.bundle/3"}', "schema_version is 'dfkd_ray.bundle/3', this version reads"),
    ],
)
def test_a_broken_or_newer_description_is_refused(tmp_path, content, says):
    save_tiny(tmp_path / "net")
    (tmp_path / "net" / "teacher.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        bundles.load(str(tmp_path / "net"))
    assert says in str(caught.value)


def test_a_bundle_without_weights_is_refused(tmp_path):
    save_tiny(tmp_path / "net")
    (tmp_path / "net" / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors is missing"):
        bundles.load(str(tmp_path / "net"))


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_refused(tmp_path, size):
    save_tiny(tmp_path / "net")
    path = tmp_path / "net" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="truncated or not the one of this bundle"):
        bundles.load(str(tmp_path / "net"))
    edit(tmp_path / "net", weights_sha256=bundles.sha256(path))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        bundles.load(str(tmp_path / "net"))


def test_one_flipped_bit_of_the_weights_is_refused(tmp_path):
    save_tiny(tmp_path / "net")
    path = tmp_path / "net" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        bundles.load(str(tmp_path / "net"))


def test_wrong_class_count_is_refused(tmp_path):
    save_tiny(tmp_path / "net")
    edit(tmp_path / "net", num_classes=7)
    with pytest.raises(ValueError, match=r"fc\.weight is 10x32, expected 7x32 \(and 1 more\)"):
        bundles.load(str(tmp_path / "net"))


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_tiny(tmp_path / "net")
    edit(tmp_path / "net", architecture="resnet20")
    with pytest.raises(ValueError, match=r"does not fit the architecture.*is missing \(and \d+ more\)"):
        bundles.load(str(tmp_path / "net"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    network = tiny_network()
    network.get_parameter("fc.bias").data[3] = value
    bundles.save(tmp_path / "net", TINY_INFO, network.state_dict())
    with pytest.raises(ValueError, match=r"fc\.bias has values that are not finite"):
        bundles.load(str(tmp_path / "net"))


@pytest.fixture
def code_bundle(tmp_path, monkeypatch):
    """A bundle whose architecture is the import path of a module that leaves a trace when it runs."""
    (tmp_path / "own_net_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    info = TINY_INFO.model_copy(
        update={"architecture": "own_net_of_a_user:make", "arguments": {"num_features": 256}, "notes": {}}
    )
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    bundles.save(tmp_path / "net", info, network.state_dict())
    yield tmp_path / "net"
    sys.modules.pop("own_net_of_a_user", None)


@pytest.mark.parametrize("trusted", [(), ("own_net",), ("own_net_of_a_user.part",), ("own_net_of_a_user:make",), ("",)])
def test_bundle_with_untrusted_import_path_is_refused(code_bundle, trusted):
    with pytest.raises(ValueError, match="`trust_code=own_net_of_a_user`"):
        bundles.load(str(code_bundle), trusted)
    assert not (code_bundle.parent / "ran").exists()


def test_bundle_with_trusted_import_path_loads(code_bundle):
    network = bundles.load(str(code_bundle), ["other", "own_net_of_a_user"]).network
    assert network(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    assert (code_bundle.parent / "ran").exists()


@pytest.mark.parametrize(
    "ending", [".pt", ".pth", ".pth.tar", ".PT", ".bin", ".ckpt", ".th", "", ".safetensors", ".SafeTensors"]
)
def test_a_state_dict_is_read_from_every_ending(tmp_path, ending):
    state, path = tiny_network().state_dict(), tmp_path / f"w{ending}"
    (safetensors.torch.save_file if "safe" in ending.lower() else torch.save)(state, path)
    loaded = bundles.read_state_dicts(path)[""]
    assert list(loaded) == list(state) or sorted(loaded) == sorted(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_training_checkpoint_of_data_parallel_is_read(tmp_path):
    state = tiny_network().state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    found = bundles.match(tiny_network(), bundles.read_state_dicts(tmp_path / "w.pt"), "w.pt")
    assert all(torch.equal(found.state[name], tensor) for name, tensor in state.items())


def test_a_pruned_bundles_weights_are_read_as_a_dense_state_dict(tmp_path):
    network, names = pruned_network(0.9)
    bundles.save(tmp_path / "net", TINY_INFO, network.state_dict(), names)
    loaded = bundles.read_state_dicts(tmp_path / "net" / "weights.safetensors")[""]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network.state_dict().items())


class Runs:
    """A pickle of this touches a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("inside", [False, True])
def test_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, inside):
    payload = Runs(tmp_path / "ran")
    torch.save({"weight": payload} if inside else payload, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="files that run code on loading are refused"):
        bundles.read_state_dicts(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)  # the trap works
    assert (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"save network\.state_dict\(\) alone"):
        bundles.read_state_dicts(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: path.write_bytes(b"\x08\x03ONNX"),
        lambda path: path.write_bytes(pickle.dumps(3, protocol=2)),
        lambda path: torch.save([torch.ones(1)], path),
        lambda path: torch.save({"weight": 3}, path),
        lambda path: torch.save({0: torch.ones(1)}, path),
        lambda path: path.with_suffix(".zip").write_bytes(b"") or path.symlink_to("nowhere"),
        lambda path: torch.save({"weight": torch.ones(4)}, path) or os.truncate(path, path.stat().st_size // 2),
    ],
    ids=["empty", "garbage", "onnx", "pickled_number", "list", "number", "numbered_keys", "dangling_link", "truncated"],
)
def test_a_file_that_is_no_state_dict_is_refused_by_name(tmp_path, write):
    path = tmp_path / "w.pt"
    write(path)
    with pytest.raises(ValueError) as caught:
        bundles.read_state_dicts(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored.pop("a::mask::shape"),
        lambda stored: stored.pop("a::values"),
        lambda stored: stored.update({"a::values": stored["a::values"][1:].clone()}),
        lambda stored: stored.update({"a::mask": stored["a::mask"][1:].clone()}),
    ],
    ids=["no_shape", "no_values", "too_few_values", "short_mask"],
)
def test_a_damaged_sparse_tensor_is_refused_by_file(tmp_path, damage):
    stored = earlier_form({"a": torch.arange(30.0).view(5, 6)}, ["a"])
    damage(stored)
    safetensors.torch.save_file(stored, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as caught:
        bundles.read_state_dicts(tmp_path / "w.safetensors")
    assert str(tmp_path / "w.safetensors") in str(caught.value)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def failing(real, which):
    """A function of `os` that works but for the call number `which`."""
    calls = []

    def called(*arguments):
        calls.append(arguments)
        if len(calls) == which:
            full_disk()
        return real(*arguments)

    return called


FAULTS = {
    "weights": lambda patch: patch.setattr(os, "fsync", failing(os.fsync, 1)),
    "description": lambda patch: patch.setattr(os, "fsync", failing(os.fsync, 2)),
    "first_rename": lambda patch: patch.setattr(os, "replace", failing(os.replace, 1)),
    "second_rename": lambda patch: patch.setattr(os, "replace", failing(os.replace, 2)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_leaves_the_old_bundle_and_nothing_else(tmp_path, fault):
    network, info = save_tiny(tmp_path / "net")
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises(OSError, match="No space left"):
            bundles.save(tmp_path / "net", info, pruned_network(0.5)[0].state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    state = bundles.load(str(tmp_path / "net")).network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("fault", ["weights", "description", "first_rename"])
def test_a_full_disk_leaves_no_half_of_a_new_bundle(tmp_path, fault):
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises(OSError, match="No space left"):
            save_tiny(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_a_bundle_replaces_its_files_and_no_other(tmp_path):
    save_tiny(tmp_path / "net")
    (tmp_path / "net" / "notes.txt").write_text("mine")
    network, names = pruned_network(0.5)
    bundles.save(tmp_path / "net", TINY_INFO, network.state_dict(), names)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert {path.name for path in (tmp_path / "net").iterdir()} == {"teacher.json", "weights.safetensors", "notes.txt"}
    assert (tmp_path / "net" / "notes.txt").read_text() == "mine"
    assert pruning.achieved_sparsity(bundles.load(str(tmp_path / "net")).network) == pytest.approx(0.5, abs=1e-4)


def test_a_new_folder_appears_only_when_all_its_files_are_there(tmp_path, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append((tmp_path / "new" / "a").exists()), replace(*names)))
    bundles.write_folder(tmp_path / "new" / "a", {"file": [b"1"]})
    assert seen == [False, False]
    assert [path.name for path in (tmp_path / "new" / "a").iterdir()] == ["file"]
    assert (tmp_path / "new" / "a").stat().st_mode & 0o777 == 0o755


def test_trusting_a_module_by_a_plain_string_trusts_that_module_only(tmp_path):
    info = TINY_INFO.model_copy(update={"architecture": "own:make"})
    bundles.save(tmp_path / "net", info, {})
    with pytest.raises(ValueError, match="`trust_code=own"):
        bundles.load(str(tmp_path / "net"), "my_own_nets")


def test_trust_in_a_package_covers_a_bundles_and_a_students_modules_below_it(tmp_path, monkeypatch):
    package = tmp_path / "own_zoo" / "nets"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(MODULE + "class Zoo:\n    make = staticmethod(make)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code = {"architecture": "own_zoo.nets:Zoo.make", "arguments": {"num_features": 256}}
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    bundles.save(tmp_path / "net", TINY_INFO.model_copy(update=code), network.state_dict())
    config = validate(TrialConfig, {"teacher": "t", "student": code, "pruning": {"sparsity": 0.0}})
    try:
        teacher = bundles.load(str(tmp_path / "net"), ["own_zoo"])
        student = trial.starting_student(config, teacher, torch.device("cpu"), ["own_zoo"])
        assert [t.shape for t in student.state_dict().values()] == [t.shape for t in network.state_dict().values()]
        with pytest.raises(ValueError, match=r"`trust_code=own_zoo\.nets`"):
            bundles.load(str(tmp_path / "net"), ["own"])
        with pytest.raises(ValueError, match=r"`trust_code=own_zoo\.nets`"):
            trial.starting_student(config, teacher, torch.device("cpu"), ["own_zoo.other"])
    finally:
        for name in [name for name in sys.modules if name.startswith("own_zoo")]:
            del sys.modules[name]


def test_a_teacher_travels_as_arrays_and_comes_back_the_same(tiny_teacher):
    teacher = bundles.load(str(tiny_teacher))
    data = bundles.to_arrays(teacher)
    for array in data["state"].values():
        array.flags.writeable = False  # as in the object store
    back = bundles.from_arrays(data)
    assert (back.hash, back.name, back.info) == (teacher.hash, teacher.name, teacher.info)
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back.network(x), teacher.network(x))
    assert not back.network.training and not any(p.requires_grad for p in back.network.parameters())
    next(back.network.parameters()).data.zero_()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            bundles.from_arrays(data).network.state_dict().values(), teacher.network.state_dict().values(), strict=True
        )
    )
