"""Parses values of the command line, and opens the teachers and real data sets that commands pass on."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd_ray import config as configs
from dfkd_ray.cli import held_out
from dfkd_ray.cli.streams import say
from dfkd_ray.config import parsing
from dfkd_ray.plain import given, named

if TYPE_CHECKING:
    from dfkd_ray.batches import Batch, BatchSource
    from dfkd_ray.bundles import Teacher
    from dfkd_ray.data import LabelledImages


def parse_json(text: str, option: str) -> dict[str, Any]:
    """A JSON object from the command line."""
    data = parsing.parse_json(text, f"{option} {given(text)}")
    if not isinstance(data, dict):
        raise ValueError(f'{option} {given(text)}: expected a JSON object, as in \'{{"stem": "cifar"}}\'')
    return data


def parse_shape(text: str) -> tuple[int, ...]:
    """`3x32x32` as (3, 32, 32), `2x1000` (signals) as (2, 1000)."""
    parts = text.lower().split("x")
    are_sizes = all(part.isascii() and part.isdigit() and 0 < int(part[:7]) < 10**6 for part in parts)
    if len(parts) not in (2, 3) or not are_sizes:
        raise ValueError(
            f"--input-shape {given(text)}: expected CHANNELSxHEIGHTxWIDTH, as in 3x32x32, or CHANNELSxLENGTH (signals)"
        )
    return tuple(map(int, parts))


def parse_floats(text: str, option: str) -> tuple[float, ...]:
    """`0.5,0.5,0.5` as numbers."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("not finite")
        return numbers
    except ValueError:
        raise ValueError(f"{option} {given(text)}: expected numbers with commas, as in 0.4914,0.4822,0.4465") from None


def as_batches(data: "LabelledImages") -> "list[Batch]":
    """A data set as batches for evaluation."""
    import torch

    from dfkd_ray.batches import Batch
    from dfkd_ray.evaluation import EVALUATION_BATCH

    batches = []
    for index, start in enumerate(range(0, len(data), EVALUATION_BATCH)):
        rows = torch.arange(start, min(start + EVALUATION_BATCH, len(data)))
        batches.append(Batch(index, data.read(rows).numpy(), data.labels[rows].numpy(), data.name))
    return batches


def data_options(teacher: "Teacher", name: str) -> dict[str, Any]:
    """Further options of a data set (such as CelebA's attribute), as the teacher was trained with them."""
    return teacher.info.notes.get("data", {}) if name == teacher.info.dataset else {}


def open_for(teacher: "Teacher", name: str, root: Path, *, train: bool, download: bool) -> "LabelledImages":
    """A data set with images and labels as a teacher has them; its notes are printed.

    `ValueError` for classes that are not the teacher's.
    """
    from dfkd_ray import data

    info, options = teacher.info, data_options(teacher, name)
    held = not_held(teacher)
    if held is not None:
        raise ValueError(f"{named(name)}: {held}; its test data is given from Python (`test` of dfkd_ray.recover)")
    found = data.open_dataset(
        name,
        root,
        train=train,
        image_shape=info.image_shape,
        download=download,
        class_names=info.class_names,
        **options,
    )
    if len(found.class_names) != info.num_classes:
        raise ValueError(
            f"{named(name)}: {len(found.class_names)} classes, the teacher has {info.num_classes}, and no names by "
            "which to tell them apart (`dfkd-ray teacher import` takes some)"
        )
    print_notes(found)
    if not info.class_names and list(found.class_names) != sorted(found.class_names):
        first = ", ".join(found.class_names[:3])
        say(
            f"note: {named(name)}: its class folders are numbered {first}, …, and the teacher's classes have no names: "
            "its outputs are taken in this order, and not in that of the names as text, which some libraries use",
            error=True,
        )
    return found


def not_held(teacher: "Teacher") -> str | None:
    """Why no data set has what a teacher takes; None if one may."""
    shape = teacher.info.input_shape
    if len(shape) == 2:
        return f"a data set has images, and {teacher.name} takes signals of {'x'.join(map(str, shape))}"
    if teacher.info.head == "sigmoid":
        return f"a data set has one class for each image, and {teacher.name} has independent labels"
    return None


def print_notes(data: "LabelledImages") -> None:
    """Print the notes of a data set."""
    for note in data.notes:
        say(f"note: {note}", error=True)


def training_split(teacher: "Teacher", name: str, root: Path, download: bool) -> "tuple[LabelledImages, Any, Any]":
    """A training set, the rows that the teacher was trained on, and the rows that were held out."""
    from dfkd_ray import teachers

    notes = teacher.info.notes.get("training", {})
    found = open_for(teacher, name, root, train=True, download=download)
    own = held_out.is_training_set(teacher, found, name)
    num_validation, seed = (notes.get("num_validation", 0), notes.get("seed", 0)) if own else (0, 0)
    return found, *teachers.split(len(found), num_validation, seed)


def subset(data: "LabelledImages", rows: Any) -> "LabelledImages":
    """Some rows of a data set."""
    from dataclasses import replace

    return replace(data, read=lambda indices: data.read(rows[indices]), labels=data.labels[rows])


def open_test(teacher: "Teacher", name: str, root: Path, download: bool = False) -> "list[Batch] | None":
    """The test batches for reporting, or None."""
    from dfkd_ray import data

    if name == "none" or (name == "auto" and (teacher.info.dataset is None or not_held(teacher))):
        return None
    if name == "auto":
        info = teacher.info
        found = data.bundled_test_set(str(info.dataset), info.image_shape)
        return None if found is None else as_batches(data.by_class_name(found, info.class_names))
    if name == "validation":
        place = held_out.own_training_set(teacher, root)
        found, _, rows = training_split(teacher, place, root, download)
        if len(rows) == 0:
            raise ValueError(f"--test-data validation: {teacher.name} was trained without holding images out")
        return as_batches(subset(found, rows))
    return as_batches(open_for(teacher, name, root, train=False, download=download))


def images_wanted(trials: Iterable[configs.TrialConfig]) -> tuple[int, str]:
    """The largest number of images that one of these trials needs, and the field that sets it."""
    most: dict[str, int] = {}
    for trial in trials:
        for name, num in (
            ("distillation.num_images", trial.distillation.num_images),
            ("bn_num_images", trial.bn_num_images),
        ):
            most[name] = max(num, most.get(name, 0))
    name = max(most, key=lambda name: most[name])
    return most[name], name


def open_real(
    teacher: "Teacher",
    name: str,
    root: Path,
    settings: configs.RealConfig,
    download: bool,
    wanted: tuple[int, str] = (0, ""),
) -> "BatchSource":
    """A source of real training images for the upper bound: in a seeded order, each image once.

    `wanted`: the number of images needed, and the field that sets it; `ValueError` if there are fewer.
    """
    import torch

    from dfkd_ray.batches import Batch, mix_seed
    from dfkd_ray.config import synthesis_key
    from dfkd_ray.images import PixelSpace, decode, encode

    found, rows, _ = training_split(teacher, name, root, download)
    if len(rows) < wanted[0]:
        raise ValueError(
            f"--real-data {named(name)}: {len(rows):,} images to train on, and {wanted[1]} asks for {wanted[0]:,}; "
            "lower it"
        )
    order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(mix_seed(settings.seed, 0x4EA1)))]
    identity = held_out.fingerprint(found) if found.files else name
    key = synthesis_key(teacher.hash, settings, f"real:{identity}")
    plain = PixelSpace((0.0,) * teacher.info.image_shape[0], (1.0,) * teacher.info.image_shape[0])

    def batch(index: int) -> Batch:
        chosen = order[index * settings.batch_size : (index + 1) * settings.batch_size]
        if len(chosen) == 0:
            raise ValueError(f"--real-data {named(name)}: {len(rows):,} images are fewer than the trial asks for")
        images = found.read(chosen).numpy()
        if settings.storage != "uint8":
            images = encode(decode(images, plain), plain, settings.storage)
        return Batch(index, images, found.labels[chosen].numpy(), key)

    return batch


def load_teacher(
    name: str, trust_code: Sequence[str] | None, below: str | None = None, download: bool = False
) -> "Teacher":
    """`find_teacher`, and warnings on standard error about what looks wrong in it."""
    teacher = find_teacher(name, trust_code, below, download)
    say_doubts(teacher)
    return teacher


def say_doubts(teacher: "Teacher") -> None:
    """Print what was changed in a network from elsewhere, and what looks wrong in a teacher."""
    from dfkd_ray.bundles.doubts import doubts
    from dfkd_ray.models import adapting

    for note in adapting.notes(teacher.network):
        say(f"note: {teacher.name}: {note}", error=True)
    for doubt in doubts(teacher):
        say(f"warning: {teacher.name}: {doubt}", error=True)


def find_teacher(
    name: str, trust_code: Sequence[str] | None, below: str | None = None, download: bool = False
) -> "Teacher":
    """Load a bundle by folder, URI or name, or a library's network by name.

    A bundle of that name in the folder or URI `below` takes precedence.
    """
    from dfkd_ray import bundles, storage
    from dfkd_ray.bundles import pretrained

    trusted = tuple(trust_code or ())
    if below is None or "://" in name or pretrained.is_named(name):
        return bundles.load(name, trusted, download=download)
    with bundles.explained(below):
        inner = found = storage.folder(below)
    if inner.is_local:
        inner = storage.folder(inner.path / name)
    elif not name.startswith("/") and ".." not in name.split("/"):
        for part in name.split("/"):
            inner = inner / part if part not in ("", ".") else inner
    if inner != found and bundles.is_bundle(inner):
        return bundles.load(inner, trusted)
    try:
        return bundles.load(name, trusted)
    except ValueError as error:
        raise ValueError(f"{error}; nor is there one in --teachers {storage.without_secrets(below)}") from None
