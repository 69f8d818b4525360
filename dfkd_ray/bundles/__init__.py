"""Bundles: a trained network as a folder, readable without running any code of it.

`teacher.json` (schema version, architecture and arguments, class count, image shape, mean / std / pixel range, test
accuracy if known, SHA-256 of the weights) and `weights.safetensors`. A pruned student is a bundle too: its pruned
weights lie on disk as non-zero values plus one bit per weight, so the file shrinks with the sparsity.
The folder lies on a disk or under any URI that `storage` opens; only the files that are asked for are read.
An architecture given by import path is imported only when the user has named that module.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from dfkd_ray import models, storage, targets, untrusted
from dfkd_ray.bundles.weights import MASK, SHAPE, VALUES, from_stored, load_state, read_safetensors
from dfkd_ray.bundles.weights import read_state_dict as read_state_dict
from dfkd_ray.config import stable_hash
from dfkd_ray.description import SCHEMA, BundleInfo
from dfkd_ray.records import format, taps
from dfkd_ray.records.format import Record
from dfkd_ray.storage import Folder, Where
from dfkd_ray.text import one_line

BUNDLED = Path(__file__).parents[1] / "bundled"
DESCRIPTION, WEIGHTS, RECORDS = "teacher.json", "weights.safetensors", "records"
ENDING = ".safetensors"
IN_MEMORY = "in memory"  # the architecture of a teacher that no bundle holds
MAX_GROWTH = 16  # a weights file has at most so many times the bytes of its architecture's tensors


@dataclass(frozen=True)
class Teacher:
    """A loaded network in eval mode with frozen parameters, and what its bundle says of it.

    `records` are the activation records read so far, by kind; the others lie in `folder`, if it has one.
    """

    network: nn.Module
    info: BundleInfo
    hash: str
    name: str
    folder: Folder | None = None
    records: dict[str, Record] = field(default_factory=dict, compare=False)

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        *,
        image_shape: Sequence[int],
        num_classes: int,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        pixel_range: tuple[float, float] = (0.0, 1.0),
        name: str = "network",
    ) -> "Teacher":
        """A network in memory as a teacher: a frozen copy in eval mode, on the CPU; the network itself is not touched.

        `image_shape`: channels, height, width. `mean` and `std` per channel (one number: for all), in the units of
        `pixel_range`: what the network's images are normalised with. The hash is over the network's structure and all
        its weights. `ValueError` for a description that is none, or a network that gives no logits of so many classes.
        """
        own = freeze(deepcopy(network)).cpu()
        kind = type(network)
        structure = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__}\n{own!r}".encode()).hexdigest()
        channels = image_shape[0] if len(image_shape) else 1

        def per_channel(values: float | Sequence[float]) -> tuple[float, ...]:
            return (float(values),) * channels if isinstance(values, int | float) else tuple(map(float, values))

        models.checks.check_state(own, IN_MEMORY)
        apart = {key: tensor.clone() for key, tensor in own.state_dict().items()}  # the format takes no shared memory
        described = {
            "architecture": IN_MEMORY,
            "arguments": {"network": kind.__qualname__, "structure_sha256": structure},
            "num_classes": num_classes,
            "image_shape": tuple(image_shape),
            "mean": per_channel(mean),
            "std": per_channel(std),
            "pixel_range": pixel_range,
            "weights_sha256": sha256(safetensors_bytes(apart)),
        }
        info = untrusted.validated(BundleInfo, described, name)
        models.checks.check_output(own, IN_MEMORY, num_classes, image_shape)
        return cls(own, info, teacher_hash(info), name)

    def record_kinds(self) -> list[str]:
        """Kinds of the records in its bundle, and of those read."""
        found: list[str] = []
        if self.folder is not None:
            with told(self.folder):
                found = (self.folder / RECORDS).names()
        return sorted({*self.records, *(kind for kind in format.KINDS if f"{kind}{ENDING}" in found)})

    def record(self, kind: str) -> Record:
        """A record by its kind. `ValueError` where there is none, or one that is damaged or of another teacher."""
        if kind not in format.KINDS:
            raise ValueError(f"a record of kind {one_line(kind, 60)!r}: expected {', '.join(format.KINDS)}")
        if kind not in self.records:
            data, where = None, ""
            if self.folder is not None:
                place, name = self.folder / RECORDS, f"{kind}{ENDING}"
                where = str(place / name)
                with told(self.folder):
                    data = content(place, name, untrusted.free_bytes() // 2)
            if data is None:
                raise ValueError(
                    f"{self.name}: no {kind} record in its bundle (expected records/{kind}.safetensors); where the "
                    f"training data is, `dfkd-ray teacher record` makes one of kind {kind}"
                )
            layers = format.layer_infos(taps.find(self.network, self.info.image_shape))
            self.records[kind] = format.decode(data, where, self.hash, layers, kind)
        return self.records[kind]


def teacher_hash(info: BundleInfo) -> str:
    """Hash of all that decides what the network computes; names, notes and accuracies stay out."""
    fields = ("architecture", "arguments", "num_classes", "image_shape", "mean", "std", "pixel_range", "weights_sha256")
    return stable_hash(info.model_dump(mode="json", include=set(fields)))


@contextmanager
def told(where: Where) -> Iterator[None]:
    """An `OSError` of a store says in one line which bundle it is of; one of the disk names its file already."""
    try:
        yield
    except OSError as error:
        if "://" not in str(where):
            raise
        raise OSError(
            f"teacher {storage.without_secrets(str(where))} cannot be read or written: {storage.in_one_line(error)}; "
            "check the address, and that this machine may use it"
        ) from error


def content(folder: Folder, name: str, most: int) -> bytes | None:
    """The content of a file, None where there is none; `ValueError` for more bytes than `most`, or no plain file."""
    if folder.is_local:
        untrusted.plain_file(folder.path / name)
    found = folder.size(name)
    if found is None:
        return None
    untrusted.check_size(found, most, str(folder / name))
    data = folder.read(name)
    if data is not None:  # a store need not say sizes
        untrusted.check_size(len(data), most, str(folder / name))
    return data


def is_bundle(folder: Folder) -> bool:
    """Whether a bundle lies there. `OSError`, in one line, for a place that does not answer or let us in."""
    with told(folder):
        if folder.is_local:
            return untrusted.plain_file(folder.path / DESCRIPTION) is not None
        return folder.size(DESCRIPTION) is not None


def locate(name: Where) -> Folder:
    """The folder of a bundle: a path, a URI, or the name of a bundled teacher.

    `ValueError` says what was expected and lists the bundled ones; `OSError` for a URI that cannot be read.
    """
    shown = one_line(storage.without_secrets(str(name)), 120)
    if isinstance(name, Folder) or "://" in str(name):
        with told(name):
            folder = storage.folder(name)
        if is_bundle(folder):
            return folder
        raise ValueError(
            f"teacher {shown!r}: no bundle there; expected {DESCRIPTION} and {WEIGHTS} in it, and for activation "
            f"records {RECORDS}/<kind>{ENDING} (make a bundle with `dfkd-ray teacher import`, and copy its files)"
        )
    for path in (Path(name), BUNDLED / name):
        if untrusted.plain_file(path / DESCRIPTION, f"teacher {shown!r}: {DESCRIPTION}") is not None:
            return storage.folder(path)
    shipped = sorted(path.parent.name for path in BUNDLED.glob("*/teacher.json"))
    raise ValueError(
        f"teacher {shown!r}: no folder with a teacher.json there; expected a bundle folder or its URI (make one with "
        f"`dfkd-ray teacher import`) or a bundled teacher ({', '.join(shipped) or 'none'})"
    )


def read_info(where: Where) -> BundleInfo:
    """Read and check `teacher.json`."""
    folder = storage.folder(where)
    path = folder / DESCRIPTION
    with told(folder):
        text = content(folder, DESCRIPTION, untrusted.MAX_JSON_BYTES)
    if text is None:
        raise ValueError(f"{path}: no such file")
    data = untrusted.parse_json(text, str(path))
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA:
        found = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path}: schema_version is {one_line(repr(found), 60)}, this version reads {SCHEMA!r}")
    return untrusted.validated(BundleInfo, data, str(path))


def load(name: Where, trust_code: Sequence[str] | str = ()) -> Teacher:
    """Load a bundle onto the CPU: from a folder, from a URI, or a bundled one by its name.

    `ValueError` where weights are missing, truncated, of another hash or another shape, or where the architecture is
    an import path whose module is not in `trust_code`. `OSError` where a URI cannot be read.
    """
    folder = locate(name)
    info = read_info(folder)
    module_name, colon, _ = info.architecture.partition(":")
    if colon and module_name not in ([trust_code] if isinstance(trust_code, str) else trust_code):
        raise ValueError(
            f"{folder}: its architecture is code, {info.architecture!r}; if you trust that module, "
            f"add `trust_code={module_name}`"
        )
    state = read_weights(folder, info)
    network = models.build(
        info.architecture, info.arguments, num_classes=info.num_classes, image_shape=info.image_shape
    )
    load_state(network, state, str(folder / WEIGHTS))
    return Teacher(freeze(network), info, teacher_hash(info), folder.name, folder)


def read_weights(folder: Folder, info: BundleInfo) -> dict[str, Tensor]:
    """The state in a bundle's weights file, whose SHA-256 is compared before anything in it is looked at."""
    where = str(folder / WEIGHTS)
    largest = untrusted.free_bytes() // 2
    if ":" not in info.architecture:
        own = models.state_bytes(info.architecture, info.arguments, info.num_classes, info.image_shape)
        largest = min(largest, MAX_GROWTH * own + untrusted.SPARE_BYTES)
    file: Path | bytes | None
    if folder.is_local:  # mapped into memory, not copied
        file = folder.path / WEIGHTS
        found = untrusted.plain_file(file, where)
        if found is None:
            file = None
        else:
            untrusted.check_size(found.st_size, largest, where)
    else:
        with told(folder):
            file = content(folder, WEIGHTS, largest)
    if file is None:
        raise ValueError(f"{folder}: {WEIGHTS} is missing")
    digest = sha256(file)
    if digest != info.weights_sha256:
        raise ValueError(
            f"{where}: SHA-256 is {digest[:12]}…, teacher.json says {info.weights_sha256[:12]}…; "
            "the file is truncated or not the one of this bundle"
        )
    return from_stored(read_safetensors(file, where), where, largest)


def to_arrays(teacher: Teacher) -> dict[str, Any]:
    """A teacher as plain data and numpy arrays: what travels between processes, shared without copies on a node."""
    state = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in teacher.network.state_dict().items()}
    plain = {"info": teacher.info.model_dump(mode="json"), "hash": teacher.hash, "name": teacher.name, "state": state}
    plain |= {"code": models.code_folder() if ":" in teacher.info.architecture else None}
    return plain | {"records": {kind: format.to_arrays(record) for kind, record in teacher.records.items()}}


def from_arrays(data: Mapping[str, Any]) -> Teacher:
    """The inverse of `to_arrays`, with a copy of the arrays. Trusts them, as whoever called `load` did."""
    info = untrusted.validated(BundleInfo, data["info"], data["name"])
    with models.code_from(data.get("code")):
        network = models.build(
            info.architecture, info.arguments, num_classes=info.num_classes, image_shape=info.image_shape
        )
    state = {name: torch.from_numpy(np.array(array)) for name, array in data["state"].items()}
    load_state(network, state, data["name"])
    records = {kind: format.from_arrays(record) for kind, record in data.get("records", {}).items()}
    return Teacher(freeze(network), info, data["hash"], data["name"], records=records)


def freeze(network: nn.Module) -> nn.Module:
    """Eval mode, no gradient for any parameter."""
    return network.eval().requires_grad_(False)


def sha256(file: Path | bytes) -> str:
    """SHA-256 of a file or of its content, hex."""
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file; the library's own writer hides a full disk in an error of its own."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata)


def to_stored(state: Mapping[str, Tensor], pruned: Sequence[str]) -> dict[str, Tensor]:
    """A state dict as stored: each tensor named in `pruned` as its non-zero values and a packed bit mask."""
    stored = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if name in pruned:
            mask = (tensor != 0).flatten().numpy()
            stored[name + MASK] = torch.from_numpy(np.packbits(mask))
            stored[name + SHAPE] = torch.tensor(tensor.shape, dtype=torch.int32)
            stored[name + VALUES] = tensor.flatten()[torch.from_numpy(mask)].clone()
        else:
            stored[name] = tensor.clone()
    return stored


def stored_bytes(state: Mapping[str, Tensor], pruned: Sequence[str]) -> int:
    """Size in bytes of the weights file that `save` would write."""
    return len(safetensors.torch.save(to_stored(state, pruned)))


def is_description(data: bytes) -> bool:
    """Whether these bytes are a bundle's `teacher.json`, of this version of the schema or another."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and str(found.get("schema_version")).startswith(SCHEMA.rpartition("/")[0] + "/")


BUNDLE = targets.Product("a bundle", {DESCRIPTION: is_description})


def save(where: Where, info: BundleInfo, state: Mapping[str, Tensor], pruned: Sequence[str] = ()) -> BundleInfo:
    """Write a bundle whole. Returns `info` with the weights' hash.

    A new folder is made hidden beside its place, then renamed. Of a bundle that is there already the two files are
    replaced, weights first, and the records of another teacher go; the hash in `teacher.json` tells whose weights they
    are. `ValueError` where something else lies there; `OSError` (a full disk, say) leaves what was there.
    """
    folder = targets.check(where, BUNDLE)
    weights = safetensors_bytes(to_stored(state, pruned))
    info = info.model_copy(update={"weights_sha256": sha256(weights)})
    description = (info.model_dump_json(indent=2) + "\n").encode()
    if not folder.is_local:
        for name, data in ((WEIGHTS, weights), (DESCRIPTION, description)):
            folder.write(name, data)
    elif targets.contents(folder):
        storage.write_files(folder.path, {WEIGHTS: [weights], DESCRIPTION: [description]})
    else:
        write_folder(folder.path, {WEIGHTS: [weights], DESCRIPTION: [description]})
    remove_records(folder, of_others_than=teacher_hash(info))
    return info


def write_folder(folder: Path, files: Mapping[str, Sequence[bytes]]) -> None:
    """A new folder with these files, all at once: made hidden beside its place, then renamed over nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        storage.write_files(partial, files)
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        for name in files:
            (partial / name).unlink(missing_ok=True)
        if partial.is_dir():
            partial.rmdir()


def remove_records(folder: Folder, of_others_than: str) -> None:
    """Remove the activation records in a bundle that are of another teacher than this hash."""
    place = folder / RECORDS
    for kind in format.KINDS:
        name = f"{kind}{ENDING}"
        if folder.is_local and not (place.path / name).exists():
            continue
        data = place.read(name)
        if data is not None and format.teacher_hash_of(data) not in (None, of_others_than):
            place.remove(name)


def check_record_target(name: Where, kinds: Sequence[str]) -> None:
    """`ValueError` where a file that is no record lies where a record of one of these kinds would be written."""
    folder = locate(name)
    with told(folder):
        for kind in kinds:
            file = f"{kind}{ENDING}"
            targets.check_file(
                folder / RECORDS, file, lambda data: format.teacher_hash_of(data) is not None, "a record"
            )


def save_record(name: Where, record: Record) -> int:
    """Write a record into a bundle, whole, over one of its kind; returns its size in bytes."""
    check_record_target(name, [record.info.kind])
    data, folder = format.encode(record), locate(name)
    with told(folder):
        (folder / RECORDS).write(f"{record.info.kind}{ENDING}", data)
    return len(data)
