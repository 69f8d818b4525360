"""Records from elsewhere: their counts, parts, bases, layers and exemplars are held against each other."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from dfkd_ray import bundles, models
from dfkd_ray.records import finishing, fitting, format
from helpers import refusal

INFO = bundles.BundleInfo(
    architecture="lenet5_half", num_classes=3, input_shape=(1, 16, 16), mean=(0.5,), std=(0.25,), trained=False
)
KINDS = [*format.KINDS, "exemplars"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bundle with a record of every kind, and beside it one with exemplars of the spectral kind."""
    folder = tmp_path_factory.mktemp("recorded")
    torch.manual_seed(0)
    network = models.build("lenet5_half", {}, num_classes=3, image_shape=(1, 16, 16))
    bundles.save(folder / "net", INFO, network.state_dict())
    shutil.copytree(folder / "net", folder / "exemplars")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (30, 1, 16, 16), dtype=np.uint8))
    labels = torch.arange(30) % 3
    for name, kinds, storage in (("net", format.KINDS, "gaussian"), ("exemplars", ("spectral",), "exemplars")):
        teacher = bundles.load(str(folder / name))
        rows = np.arange(30)
        plan = fitting.plan(
            teacher, labels.numpy(), rows, kinds, fitting.Options(storage=storage, rank=6, num_exemplars=4)
        )
        shard = fitting.shards(lambda chosen: images[chosen], labels, rows, 1)[0]
        for record in finishing.finish(plan, fitting.fit(plan, teacher.network, shard), teacher):
            bundles.save_record(folder / name, record)
    return folder


def copied(place, tmp_path, kind):
    """A copy of the bundle, the kind of the record and its file."""
    name = "exemplars" if kind == "exemplars" else "net"
    shutil.copytree(place / name, tmp_path / "copy")
    own = "spectral" if kind == "exemplars" else kind
    return tmp_path / "copy", own, tmp_path / "copy" / "records" / f"{own}.safetensors"


def rewrite(path, change):
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[format.METADATA])
    tensors = safetensors.torch.load_file(path)
    change(header, tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={format.METADATA: json.dumps(header)}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_our_own_is_read(place, kind, tmp_path):
    folder, own, _ = copied(place, tmp_path, kind)
    assert bundles.load(str(folder)).record(own).info.kind == own


def put(tensors, name, value):
    tensors[name] = value.contiguous()


def wider(header, tensors, part):
    """A part with a unit more, in header and tensors alike."""
    header["parts"][0].update(units=header["parts"][0]["units"] + 1, rank=header["parts"][0]["rank"] + 1)
    name, mean, factor = part, tensors[f"{part}.mean"], tensors[f"{part}.factor"]
    put(tensors, f"{name}.mean", torch.nn.functional.pad(mean, (0, 1)))
    put(tensors, f"{name}.factor", torch.nn.functional.pad(factor, (0, 1, 0, 1)))


CHANGES = {
    "no_examples": ("top", lambda h, t: h.update(num_examples=[0, 1, 1])),
    "negative_examples": ("top", lambda h, t: h.update(num_examples=[-1, 1, 1])),
    "too_many_examples": ("top", lambda h, t: h.update(num_examples=[2**62, 1, 1])),
    "counts_of_other_classes": ("top", lambda h, t: h.update(num_examples=[1, 1])),
    "temperature_of_nothing": ("top", lambda h, t: h.update(temperature=1e-300)),
    "temperature_of_everything": ("top", lambda h, t: h.update(temperature=1e300)),
    "kind_of_another_file": ("top", lambda h, t: h.update(kind="all")),
    "share_of_layers": ("top", lambda h, t: h.update(share=0.5)),
    "rank_of_a_dense_part": (
        "top",
        lambda h, t: (h["parts"][0].update(rank=2), put(t, "fc3.factor", t["fc3.factor"][:, :, :2])),
    ),
    "shrinkage_of_two": ("top", lambda h, t: h["parts"][0].update(shrinkage=[0.0, 0.0])),
    "shrinkage_beyond_one": ("top", lambda h, t: h["parts"][0].update(shrinkage=[0.0, 0.0, 3.0])),
    "no_parts": ("top", lambda h, t: (h.update(parts=[]), t.clear())),
    "a_part_twice": ("top", lambda h, t: h["parts"].append(h["parts"][0])),
    "top_of_another_layer": (
        "top",
        lambda h, t: (
            h["parts"][0].update(name="fc2"),
            t.update({"fc2.mean": t.pop("fc3.mean"), "fc2.factor": t.pop("fc3.factor")}),
        ),
    ),
    "units_of_a_layer": ("top", lambda h, t: wider(h, t, "fc3")),
    "a_layer_missing": (
        "all",
        lambda h, t: (h["parts"].pop(0), t.pop("conv1.mean"), t.pop("conv1.factor")),
    ),
    "layers_in_another_order": ("all", lambda h, t: h["parts"].reverse()),
    "top_as_exemplars": ("top", lambda h, t: h.update(storage="exemplars")),
    "integer_means": ("top", lambda h, t: put(t, "fc3.mean", t["fc3.mean"].int())),
    "double_factors": ("top", lambda h, t: put(t, "fc3.factor", t["fc3.factor"].double())),
    "infinite_means": ("top", lambda h, t: put(t, "fc3.mean", t["fc3.mean"] / 0)),
    "no_share": ("spectral", lambda h, t: h.update(share=None)),
    "share_of_two": ("spectral", lambda h, t: h.update(share=2.0)),
    "units_beyond_columns": ("spectral", lambda h, t: wider(h, t, "coefficients")),
    "a_part_of_another_name": (
        "spectral",
        lambda h, t: (
            h["parts"][0].update(name="others"),
            t.update({f"others.{n}": t.pop(f"coefficients.{n}") for n in ("mean", "factor")}),
        ),
    ),
    "a_basis_of_another_signal": ("spectral", lambda h, t: h["bases"][0].update(signal="conv1.input")),
    "a_basis_of_other_units": (
        "spectral",
        lambda h, t: (h["bases"][0].update(units=3), put(t, "basis.0", t["basis.0"][:3])),
    ),
    "a_basis_less": ("spectral_pairs", lambda h, t: (h["bases"].pop(), t.pop(f"basis.{len(h['bases'])}"))),
    "labels_beyond_classes": ("exemplars", lambda h, t: t["labels"].fill_(3)),
    "negative_labels": ("exemplars", lambda h, t: t["labels"].fill_(-1)),
    "a_class_without_exemplar": ("exemplars", lambda h, t: t["labels"].clamp_(max=1)),
    "more_exemplars_than_examples": ("exemplars", lambda h, t: h.update(num_examples=[1, 1, 1])),
    "labels_as_numbers": ("exemplars", lambda h, t: put(t, "labels", t["labels"].float())),
    "labels_without_length": ("exemplars", lambda h, t: put(t, "labels", torch.tensor(1))),
    "indices_beyond_columns": ("exemplars", lambda h, t: t["indices"].fill_(10_000)),
    "negative_indices": ("exemplars", lambda h, t: t["indices"].fill_(-1)),
    "indices_twice": ("exemplars", lambda h, t: t["indices"].fill_(0)),
    "no_exemplars": (
        "exemplars",
        lambda h, t: [put(t, name, t[name][:0]) for name in ("labels", "indices", "values")],
    ),
    "values_not_finite": ("exemplars", lambda h, t: t["values"].fill_(float("inf"))),
    "values_as_integers": ("exemplars", lambda h, t: put(t, "values", t["values"].int())),
    "gaussian_with_exemplars": ("exemplars", lambda h, t: h.update(storage="gaussian")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_record_whose_parts_do_not_belong_together_is_refused(place, tmp_path, name):
    kind, change = CHANGES[name]
    folder, own, path = copied(place, tmp_path, kind)
    rewrite(path, change)
    refusal(lambda: bundles.load(str(folder)).record(own), f"{own}.safetensors")


def test_a_record_under_the_name_of_another_kind_is_refused(place, tmp_path):
    folder, _, path = copied(place, tmp_path, "top")
    (folder / "records" / "all.safetensors").write_bytes(path.read_bytes())
    refusal(lambda: bundles.load(str(folder)).record("all"), "all.safetensors", "kind top")


def test_a_kind_never_becomes_a_path(place):
    teacher = bundles.load(str(place / "net"))
    for kind in ("../teacher", "/etc/passwd", "", "x" * 10_000, "a\0b"):
        refusal(lambda kind=kind: teacher.record(kind), "expected top, all")


def test_files_that_are_no_kind_of_record_are_not_listed(place, tmp_path):
    folder, _, path = copied(place, tmp_path, "top")
    path.with_name("other\x1b.safetensors").write_bytes(b"")
    assert bundles.load(str(folder)).record_kinds() == sorted(format.KINDS)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_a_record_that_is_no_plain_file_is_refused(place, tmp_path, kind):
    folder, own, path = copied(place, tmp_path, "top")
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    refusal(lambda: bundles.load(str(folder)).record(own), "top.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_records_are_read_or_refused(place, tmp_path, kind):
    folder, own, path = copied(place, tmp_path, kind)
    whole, rng = path.read_bytes(), random.Random(2)
    teacher = bundles.load(str(folder))
    header = int.from_bytes(whole[:8], "little")
    for _ in range(40):
        data = bytearray(whole)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice([1, 1, 3, 20])):
                data[rng.randrange(header if rng.random() < 0.8 else len(data))] = rng.randrange(256)
        path.write_bytes(data)
        teacher.records.clear()
        try:
            teacher.record(own)
        except ValueError as error:
            assert "\n" not in str(error) and f"{own}.safetensors" in str(error)
