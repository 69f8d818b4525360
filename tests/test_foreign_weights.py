"""Weights in PyTorch's own formats: looked through before they are opened, refused in one line that names the file."""

import io
import os
import pickle
import random
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from dfkd_ray import bundles
from helpers import refusal, tiny_network

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def state_file(path, legacy=False):
    torch.save(tiny_network().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    return path


def rewritten(path, change):
    """The archive with its entries (name → bytes) changed; large ones compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if len(data) > 1 << 20 else zipfile.ZIP_STORED)
    return path


def data_pkl(entries):
    return next(name for name in entries if name.endswith("data.pkl"))


def pickled(code):
    """A pickle of these opcodes in place of the archive's own."""
    return lambda entries: entries.update({data_pkl(entries): b"\x80\x02" + code + b"."})


def test_an_archive_that_expands_beyond_bounds_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    path = rewritten(
        state_file(tmp_path / "w.pt"), lambda entries: entries.update({"archive/data/9": bytes(300 << 20)})
    )
    assert path.stat().st_size < 2 << 20
    monkeypatch.setattr(torch, "load", lambda *_args, **_named: pytest.fail("it was opened"))
    refusal(lambda: bundles.read_state_dicts(path), path.name, "expands to")


def test_a_tensor_larger_than_what_is_stored_of_it_is_refused(tmp_path):
    def change(entries):
        name = next(name for name in entries if name.endswith("data/0"))
        entries[name] = entries[name][:-4]

    refusal(lambda: bundles.read_state_dicts(rewritten(state_file(tmp_path / "w.pt"), change)), "w.pt", "damaged")


@pytest.mark.parametrize(
    "code",
    [
        b"}" * 5_000_000,
        b"(" * 1000,
        b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R",
        b"\x96" + struct.pack("<Q", 2**40),
        b"\x8d" + struct.pack("<Q", 2**40),
        b"r\xff\xff\xff\xff",
        b"}r\xff\xff\xff\xff",
        b"]q\x00h\x00a",
        b"]" + b"(l" * 50_000,
        b"cos\nsystem\nX\x04\x00\x00\x00true\x85R",
        b"ccollections\nOrderedDict\n)R",
        b"K\x01",
        b"",
    ],
    ids=range(13),
)
def test_a_pickle_that_takes_memory_or_recurses_is_refused(tmp_path, code):
    path = rewritten(state_file(tmp_path / "w.pt"), pickled(code))
    refusal(lambda: bundles.read_state_dicts(path), path)


def numbered(*names):
    """A change that gives entries of an archive other names, or takes some away."""

    def change(entries):
        for name in list(entries):
            if any(name.endswith(ending) for ending in names):
                del entries[name]

    return change


@pytest.mark.parametrize("missing", ["data.pkl", "data/3", "version"])
def test_an_archive_without_one_of_its_parts_is_refused(tmp_path, missing):
    path = rewritten(state_file(tmp_path / "w.pt"), numbered(missing))
    refusal(lambda: bundles.read_state_dicts(path), "w.pt")


def tar(path):
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04"),
        lambda path: path.write_bytes(b"\x80\x02"),
        lambda path: path.write_bytes(b"\x7fELF" * 100),
        lambda path: path.write_bytes(pickle.dumps([1] * 3)),
        lambda path: tar(path),
        lambda path: os.truncate(state_file(path, legacy=True), 3000),
        lambda path: os.truncate(state_file(path), 3000),
    ],
    ids=["folder", "pipe", "device", "loop", "empty", "zip", "pickle", "elf", "list", "tar", "legacy", "cut"],
)
def test_a_file_that_is_none_of_pytorchs_is_refused_by_name(tmp_path, write):
    write(tmp_path / "w.pt")
    text = refusal(lambda: bundles.read_state_dicts(tmp_path / "w.pt"), "w.pt")
    assert "Traceback" not in text


@pytest.mark.parametrize("legacy", [False, True])
def test_both_formats_are_read(tmp_path, legacy):
    state = bundles.read_state_dicts(state_file(tmp_path / "w.pt", legacy))[""]
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_network().state_dict().items())


def test_tensors_that_share_a_storage_and_parameters_are_read(tmp_path):
    whole = torch.arange(12.0)
    saved = {
        "a": whole[:4],
        "b": whole.view(3, 4).T,
        "c": torch.nn.Parameter(whole[8:]),
        "d": whole[3:3],
        "e": whole[5],
    }
    for legacy in (False, True):
        torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
        state = bundles.read_state_dicts(tmp_path / "w.pt")[""]
        assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.safetensors"])
def test_the_format_is_told_by_the_content_and_not_by_the_ending(tmp_path, name):
    saved = {"a": torch.ones(2)}
    safetensors.torch.save_file(saved, tmp_path / name)
    assert torch.equal(bundles.read_state_dicts(tmp_path / name)[""]["a"], saved["a"])
    for legacy in (False, True):
        torch.save(saved, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        assert torch.equal(bundles.read_state_dicts(tmp_path / name)[""]["a"], saved["a"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("w.pt", lambda path: torch.jit.script(torch.nn.Linear(1, 1)).save(str(path)), "torch.jit.load"),
        (
            "w.pkl",
            lambda path: path.write_bytes(pickle.dumps({"a": torch.ones(2)})),
            "a pickle not written by torch.save",
        ),
        ("w.npz", lambda path: np.savez(path, a=np.ones(2)), "save network.state_dict() with torch.save"),
        ("w.pt", lambda path: torch.save({"a": np.ones(2)}, path), "save network.state_dict() with torch.save"),
        ("w.bin", lambda path: path.write_text(POINTER), "git lfs pull"),
        ("w.safetensors", lambda path: path.write_text(POINTER), "git lfs pull"),
        ("model.safetensors.index.json", lambda path: path.write_text("{}"), "an index of several files"),
    ],
)
def test_what_is_taken_for_weights_by_mistake_is_told_what_to_do(tmp_path, name, write, says):
    write(tmp_path / name)
    refusal(lambda: bundles.read_state_dicts(tmp_path / name), name, says)


def test_a_checkpoint_with_its_optimiser_is_looked_through(tmp_path):
    network = tiny_network()
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.zeros(2, 1, 16, 16)).sum().backward()
    optimiser.step()
    torch.save({"state_dict": network.state_dict(), "optimiser": optimiser.state_dict(), "epoch": 3}, tmp_path / "w.pt")
    assert set(bundles.read_state_dicts(tmp_path / "w.pt")["state_dict"]) == set(network.state_dict())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused(tmp_path, legacy):
    network = tiny_network()
    whole = state_file(tmp_path / "w.pt", legacy).read_bytes()
    rng = random.Random(1)
    for _ in range(100):
        data = bytearray(whole)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice([1, 1, 3, 20])):
                data[rng.randrange(8000 if rng.random() < 0.7 else len(data))] = rng.randrange(256)
        (tmp_path / "w.pt").write_bytes(data)
        try:
            found = bundles.match(network, bundles.read_state_dicts(tmp_path / "w.pt"), "w.pt")
            bundles.load_state(network, found.state, "w.pt")
        except ValueError as error:
            assert "\n" not in str(error) and "w.pt" in str(error)
