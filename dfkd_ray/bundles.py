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
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from dfkd_ray import models, storage
from dfkd_ray.config import STRICT, stable_hash, validate
from dfkd_ray.images import PixelSpace
from dfkd_ray.records import format, taps
from dfkd_ray.records.format import Record
from dfkd_ray.storage import Folder, Where

SCHEMA = "dfkd_ray.bundle/1"
BUNDLED = Path(__file__).parent / "bundled"
MASK, VALUES = "::mask", "::values"
DESCRIPTION, WEIGHTS, RECORDS = "teacher.json", "weights.safetensors", "records"
ENDING = ".safetensors"


class BundleInfo(BaseModel):
    """The contents of `teacher.json`."""

    model_config = STRICT

    schema_version: str = SCHEMA
    architecture: str = Field(description="a name of models.FAMILIES, wrn_<d>_<k>, or package.module:factory")
    arguments: dict[str, Any] = Field(default_factory=dict)
    num_classes: int = Field(ge=2)
    image_shape: tuple[int, int, int] = Field(description="channels, height, width")
    mean: tuple[float, ...] = Field(description="per channel, in pixel units")
    std: tuple[float, ...]
    pixel_range: tuple[float, float] = (0.0, 1.0)
    class_names: tuple[str, ...] = ()
    dataset: str | None = Field(default=None, description="what it was trained on, where known")
    test_accuracy: float | None = Field(default=None, ge=0, le=1)
    trained: bool = Field(default=True, description="false: random weights, for tests")
    weights_sha256: str = ""
    notes: dict[str, Any] = Field(default_factory=dict, description="how it was made: command, seed, epochs, …")

    @model_validator(mode="after")
    def _fits_together(self) -> "BundleInfo":
        channels = self.image_shape[0]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, expected {channels}, one per image channel"
            )
        if min(self.std) <= 0:
            raise ValueError("std must be above 0 in every channel")
        if self.pixel_range[0] >= self.pixel_range[1]:
            raise ValueError("pixel_range must be (low, high) with low < high")
        if min(self.image_shape) < 1:
            raise ValueError("image_shape must be three sizes of at least 1: channels, height, width")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        return self

    @property
    def space(self) -> PixelSpace:
        """The pixel space of the network's images."""
        return PixelSpace(self.mean, self.std, *self.pixel_range)


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

    def record_kinds(self) -> list[str]:
        """Kinds of the records in its bundle, and of those read."""
        found: list[str] = []
        if self.folder is not None:
            with told(self.folder):
                found = (self.folder / RECORDS).names()
        return sorted({*self.records, *(name.removesuffix(ENDING) for name in found if name.endswith(ENDING))})

    def record(self, kind: str) -> Record:
        """A record by its kind. `ValueError` where there is none, or one that is damaged or of another teacher."""
        if kind not in self.records:
            data, where = None, ""
            if self.folder is not None:
                place, name = self.folder / RECORDS, f"{kind}{ENDING}"
                where = str(place / name)
                with told(self.folder):
                    data = place.read(name)
            if data is None:
                raise ValueError(
                    f"{self.name}: no {kind} record in its bundle (expected records/{kind}.safetensors); where the "
                    f"training data is, make one with `dfkd-ray teacher record {self.name} --kinds {kind} --dataset …`"
                )
            layers = format.layer_infos(taps.find(self.network, self.info.image_shape))
            self.records[kind] = format.decode(data, where, self.hash, layers)
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


def is_bundle(folder: Folder) -> bool:
    """Whether a bundle lies there. `OSError`, in one line, for a place that does not answer or let us in."""
    with told(folder):
        return (folder.path / DESCRIPTION).is_file() if folder.is_local else folder.read(DESCRIPTION) is not None


def locate(name: Where) -> Folder:
    """The folder of a bundle: a path, a URI, or the name of a bundled teacher.

    `ValueError` says what was expected and lists the bundled ones; `OSError` for a URI that cannot be read.
    """
    shown = storage.without_secrets(str(name))
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
        if (path / DESCRIPTION).is_file():
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
        text = folder.read(DESCRIPTION)
    if text is None:
        raise ValueError(f"{path}: no such file")
    try:
        data = json.loads(text.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA:
        found = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path}: schema_version is {found!r}, this version reads {SCHEMA!r}")
    return validate(BundleInfo, data, str(path))


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
            f"add --trust-code {module_name}"
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
    file: Path | bytes | None
    if folder.is_local:  # mapped into memory, not copied
        file = folder.path / WEIGHTS
        file = file if file.is_file() else None
    else:
        with told(folder):
            file = folder.read(WEIGHTS)
    if file is None:
        raise ValueError(f"{folder}: {WEIGHTS} is missing")
    digest = sha256(file)
    if digest != info.weights_sha256:
        raise ValueError(
            f"{where}: SHA-256 is {digest[:12]}…, teacher.json says {info.weights_sha256[:12]}…; "
            "the file is truncated or not the one of this bundle"
        )
    return from_stored(read_safetensors(file, where), where)


def to_arrays(teacher: Teacher) -> dict[str, Any]:
    """A teacher as plain data and numpy arrays: what travels between processes, shared without copies on a node."""
    state = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in teacher.network.state_dict().items()}
    plain = {"info": teacher.info.model_dump(mode="json"), "hash": teacher.hash, "name": teacher.name, "state": state}
    return plain | {"records": {kind: format.to_arrays(record) for kind, record in teacher.records.items()}}


def from_arrays(data: Mapping[str, Any]) -> Teacher:
    """The inverse of `to_arrays`, with a copy of the arrays. Trusts them, as whoever called `load` did."""
    info = validate(BundleInfo, data["info"], data["name"])
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


def read_safetensors(file: Path | bytes, where: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of its content; `ValueError`, naming `where`, for a damaged one."""
    try:
        return safetensors.torch.load(file) if isinstance(file, bytes) else safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where or file}: not a whole safetensors file: {error}") from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict from `.safetensors`, or from `.pt` / `.pth` read without running code.

    `ValueError` for a missing file, another ending, a pickle with more than tensors in it, or no state dict.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        return from_stored(read_safetensors(path), str(path))
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{path}: expected .safetensors, .pt or .pth")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - any failure of reading a foreign file is the same one: it is not usable
        reason = " ".join(str(error).split("Please file")[0].split(". ")[0].split()) or "it is empty or cut short"
        raise ValueError(
            f"{path}: cannot be read as plain tensors ({type(error).__name__}: {reason[:120]}); files that run code on "
            "loading are refused, save network.state_dict() alone"
        ) from None
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    plain = isinstance(data, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items())
    if not plain:
        raise ValueError(f"{path}: expected a state dict (name → tensor), got {type(data).__name__}")
    return {key.removeprefix("module."): value for key, value in data.items()}


def load_state(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict; `ValueError` names the first mismatch and counts the others."""
    expected = network.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not of this architecture" for name in state if name not in expected]
    problems += [
        f"{name} is {'x'.join(map(str, state[name].shape))}, expected {'x'.join(map(str, tensor.shape))}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{where}: does not fit the architecture or class count: {problems[0]}{more}")
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{where}: {broken[0]} has values that are not finite")
    network.load_state_dict(state)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors; a full disk is an `OSError`, which the library's own writer hides in an error of its own."""
    path.write_bytes(
        safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    )


def to_stored(state: Mapping[str, Tensor], pruned: Sequence[str]) -> dict[str, Tensor]:
    """A state dict as stored: each tensor named in `pruned` as its non-zero values and a packed bit mask."""
    stored = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if name in pruned:
            mask = (tensor != 0).flatten().numpy()
            stored[name + MASK] = torch.from_numpy(np.packbits(mask))
            stored[name + MASK + "::shape"] = torch.tensor(tensor.shape, dtype=torch.int32)
            stored[name + VALUES] = tensor.flatten()[torch.from_numpy(mask)].clone()
        else:
            stored[name] = tensor.clone()
    return stored


def from_stored(stored: Mapping[str, Tensor], where: str = "weights") -> dict[str, Tensor]:
    """The inverse of `to_stored`; a plain state dict passes through. `ValueError` where mask and values do not fit."""
    state = {}
    for key, tensor in stored.items():
        if key.endswith(MASK):
            name = key.removesuffix(MASK)
            shape, values = stored.get(key + "::shape"), stored.get(name + VALUES)
            if shape is None or values is None:
                raise ValueError(f"{where}: {name} has a mask but no shape or no values; the file is damaged")
            size = int(np.prod(shape.tolist()))
            mask = torch.from_numpy(np.unpackbits(tensor.numpy())[:size].astype(bool))
            if len(mask) != size or int(mask.sum()) != values.numel():
                raise ValueError(
                    f"{where}: {name} has {values.numel()} values, its mask wants {int(mask.sum())}; damaged"
                )
            dense = torch.zeros(size, dtype=values.dtype)
            dense[mask] = values
            state[name] = dense.view(shape.tolist())
        elif "::" not in key:
            state[key] = tensor
    return state


def stored_bytes(state: Mapping[str, Tensor], pruned: Sequence[str]) -> int:
    """Size in bytes of the weights file that `save` would write."""
    return len(safetensors.torch.save(to_stored(state, pruned)))


def save(where: Where, info: BundleInfo, state: Mapping[str, Tensor], pruned: Sequence[str] = ()) -> BundleInfo:
    """Write a bundle whole: into a hidden folder beside it, then renamed. Returns `info` with the weights' hash.

    An existing bundle there is replaced. `OSError` (a full disk, say) leaves nothing half-written. Under a URI the
    weights come first: a bundle is there when its `teacher.json` is, and the hash in it tells whose weights they are.
    """
    folder = storage.folder(where)
    if not folder.is_local:
        with tempfile.TemporaryDirectory(prefix="dfkd_ray-bundle-") as scratch:
            info = save(Path(scratch) / "bundle", info, state, pruned)
            for name in (WEIGHTS, DESCRIPTION):
                folder.write(name, (Path(scratch) / "bundle" / name).read_bytes())
        return info
    with whole_folder(folder.path) as partial:
        write_safetensors(partial / WEIGHTS, to_stored(state, pruned))
        info = info.model_copy(update={"weights_sha256": sha256(partial / WEIGHTS)})
        (partial / DESCRIPTION).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return info


def save_record(name: Where, record: Record) -> int:
    """Write a record into a bundle, whole, over one of its kind; returns its size in bytes."""
    data, folder = format.encode(record), locate(name)
    with told(folder):
        (folder / RECORDS).write(f"{record.info.kind}{ENDING}", data)
    return len(data)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of `folder` when the block ends well, and is removed when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if folder.is_dir():
            swap_folders(partial, folder)
        else:
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def swap_folders(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; when that fails, the old one is back where it was."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    try:
        os.replace(folder, aside / "old")
        try:
            os.replace(new, folder)
        except OSError:
            (aside / "old").rename(folder)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
