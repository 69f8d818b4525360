"""Reads PyTorch weight files with `weights_only=True`, after checking how much memory they would take.

There are two formats: a zip archive with `data.pkl` and one entry per storage, and the older sequence of pickles
followed by raw storages. PyTorch trusts the sizes in them: a compressed entry may expand to any size, a storage larger
than its entry is read beyond its end, and a pickle may create any number of objects. This module first walks through
the pickle with stand-ins for all named objects (nothing is imported or called), and compares sizes with the file.
A few harmless types that training scripts save beside the weights (`HARMLESS`) are read as stand-ins too.
"""

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd_ray.text import one_line
from dfkd_ray.untrusted import SPARE_BYTES, check_size, size

ZIP_HEAD, PICKLE_HEAD = b"PK\x03\x04", b"\x80"
MAX_GROWTH = 16  # largest expansion of an archive (PyTorch does not compress at all)
MAX_ENTRIES = 100_000
MAX_PICKLE_BYTES = 32 << 20
MAX_OPERATIONS = 2_000_000  # of a pickle: a training checkpoint with all optimiser counters has fewer
ADVICE = "save network.state_dict() with torch.save"
LEGACY_PICKLES = 5  # magic number, protocol, system, the object, the names of its storages
STORAGE_BYTES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "ComplexFloat": 8}
PATHS = ("Posix", "Windows", "PurePosix", "PureWindows")
# Read as stand-ins: not one of them is imported, called or kept.
HARMLESS = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace"),
    *(f"builtins.{kind}" for kind in ("list", "dict", "int", "float", "str")),  # what a defaultdict makes
    *(f"datetime.{kind}" for kind in ("datetime", "date", "timedelta")),
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in PATHS),
)
# Torch fills these two as a dict and a list.
PLAIN = (((lambda *_: {}), "collections.defaultdict"), ((lambda *_: []), "collections.deque"))
# How torch's messages name what it does not load.
NAMED = re.compile(r"(?:GLOBAL|unrecognized function|but got) (<class '[^']+'>|[\w.]+)")
FORBIDDEN = {("builtins", "bytearray"), ("__builtin__", "bytearray")}  # PyTorch lets it allocate any size


def load(path: Path, largest: int) -> Any:
    """The content of a weight file, on the CPU; objects of `HARMLESS` types are `StandIn`s.

    `largest`: the most bytes that it may take in memory. `ValueError` if it is damaged, or names any other type.
    """
    where = one_line(path, 120)
    with path.open("rb") as file:
        head = file.read(4)
        try:
            if head == ZIP_HEAD:
                check_archive(file, where, largest)
            elif head[:1] == PICKLE_HEAD:
                check_legacy(file, where)
            else:
                raise ValueError(
                    f"{where}: cannot be read as plain tensors (it is empty, cut short, or no file of PyTorch's); "
                    f"{ADVICE}"
                )
        except OSError:
            raise
        except Exception as error:
            if str(error).startswith(where):
                raise
            raise refused(where, error) from None
    try:
        allowed = torch.serialization.safe_globals([*((StandIn, name) for name in HARMLESS), *PLAIN])
        # A file and not its path, by whose ending torch chooses a format.
        with path.open("rb") as file, warnings.catch_warnings(), allowed:
            warnings.simplefilter("ignore")  # about tensor types that are refused anyway
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - any failure means that the foreign file is not usable
        raise refused(where, error) from None


def refused(where: str, error: Exception) -> ValueError:
    """The error for a file that cannot be read: the type that torch does not load, or what else its message says."""
    # Advice on how to load it all the same comes before torch's reason.
    message = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    named = NAMED.search(message)
    if named:
        return ValueError(
            f"{where}: cannot be read as plain tensors: it holds {one_line(named[1], 100)}; files that run code on "
            "loading are refused, save network.state_dict() alone"
        )
    text = " ".join(re.split(r"Please |Check the |\. ", message)[0].split()) or "it is empty or cut short"
    return ValueError(
        f"{where}: cannot be read as plain tensors ({type(error).__name__}: {one_line(text, 120)}); files that run "
        "code on loading are refused, save network.state_dict() alone"
    )


def check_archive(file: Any, where: str, largest: int) -> None:
    """`ValueError` for an archive that expands too much, or whose tensors are larger than its entries."""
    file.seek(0)
    num_bytes = file.seek(0, io.SEEK_END)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{where}: cannot be read as plain tensors: an archive that is cut short ({error})") from None
    entries = archive.infolist()
    sizes = {entry.filename: entry.file_size for entry in entries}
    if len(entries) > MAX_ENTRIES or len(sizes) < len(entries):
        raise ValueError(f"{where}: cannot be read as plain tensors: {len(entries):,} entries, or names that repeat")
    total = sum(sizes.values())
    if total > MAX_GROWTH * num_bytes + SPARE_BYTES:
        raise ValueError(
            f"{where}: an archive of {size(num_bytes)} that expands to {size(total)}: no weights are packed so tightly"
        )
    check_size(total, largest, where)
    described = [name for name in sizes if name.partition("/")[2] == "data.pkl"]
    if len(described) != 1:
        raise ValueError(f"{where}: cannot be read as plain tensors: an archive without PyTorch's data.pkl; {ADVICE}")
    if described[0].removesuffix("data.pkl") + "constants.pkl" in sizes:
        raise ValueError(f"{where}: TorchScript, which is code; save torch.jit.load(…).state_dict() with torch.save")
    check_size(sizes[described[0]], MAX_PICKLE_BYTES, f"{where}: its data.pkl")
    with archive.open(described[0]) as opened:
        data = opened.read(MAX_PICKLE_BYTES)
    prefix = described[0].removesuffix("data.pkl") + "data/"
    count_operations(io.BytesIO(data), where, MAX_OPERATIONS)
    for key, wanted in storages(io.BytesIO(data)).items():
        if wanted > sizes.get(prefix + key, 0):
            raise ValueError(
                f"{where}: damaged: a tensor of {wanted:,} bytes where {sizes.get(prefix + key, 0):,} are stored"
            )


def check_legacy(file: Any, where: str) -> None:
    """`ValueError` for a sequence of pickles that is truncated, endless, or whose tensors are larger than the file."""
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    left = MAX_OPERATIONS
    for _ in range(LEGACY_PICKLES):
        left -= count_operations(file, where, left)
        if file.tell() == num_bytes:
            raise ValueError(f"{where}: cannot be read as plain tensors: a pickle not written by torch.save; {ADVICE}")
    file.seek(0)
    for _ in range(LEGACY_PICKLES):
        found = storages(file)
        if sum(found.values()) > num_bytes:
            raise ValueError(f"{where}: damaged: tensors of {sum(found.values()):,} bytes in {num_bytes:,}")


def count_operations(file: Any, where: str, most: int) -> int:
    """The number of operations of the next pickle; `ValueError` if it has more than `most` or is damaged."""
    count = 0
    for count, (operation, argument, _) in enumerate(pickletools.genops(file), 1):
        if count > most:
            raise ValueError(f"{where}: a pickle of more than {MAX_OPERATIONS:,} operations; save the weights alone")
        if operation.name == "BYTEARRAY8" or (isinstance(argument, str) and argument.endswith(" bytearray")):
            raise ValueError(f"{where}: it holds a bytearray; save network.state_dict() alone")
    return count


def storages(file: Any) -> Mapping[str, int]:
    """The storages of the next pickle: name → declared bytes. Refuses tensors that reach beyond them."""
    walker = Walker(file)
    walker.load()
    return walker.num_bytes


@dataclass(frozen=True)
class Storage:
    """A storage as declared in a pickle: its element type and number of elements."""

    item_bytes: int
    num_items: int


class StandIn:
    """Replaces every object that a pickle names: accepts all calls and does nothing."""

    def __new__(cls, *_args: Any, **_named: Any) -> "StandIn":
        """Accepts any arguments."""
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_named: Any):
        pass

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _value: Any) -> None:
        """Ignores the value."""

    extend = update = add = append


class Walker(pickle._Unpickler):
    """A pure Python unpickler that imports and calls nothing, and records the storages."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.num_bytes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for the named object, except for ordered dicts and the functions that build tensors."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in FORBIDDEN:
            raise ValueError(f"it names {name}")
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return reaching
        return type(name, (StandIn,), {"item_bytes": STORAGE_BYTES.get(name.removesuffix("Storage"), 1)})

    def persistent_load(self, pid: Any) -> Any:
        """Record a storage from ("storage", type, key, device, number of elements, …)."""
        if isinstance(pid, tuple) and pid[:1] == ("module",):
            raise ValueError(f"it holds a whole {getattr(pid[1], '__name__', 'module')}")
        if not isinstance(pid, tuple) or len(pid) < 5 or type(pid[4]) is not int or pid[4] < 0:
            raise ValueError("an entry that is not a PyTorch storage")
        found = Storage(getattr(pid[1], "item_bytes", 1), pid[4])
        self.num_bytes[str(pid[2])] = max(self.num_bytes.get(str(pid[2]), 0), found.item_bytes * found.num_items)
        return found


def reaching(storage: Any, offset: Any, shape: Any, stride: Any, *_others: Any) -> StandIn:
    """Replaces PyTorch's tensor constructor; `ValueError` if the tensor reaches beyond its storage."""
    if isinstance(storage, Storage) and all(type(side) is int and side >= 0 for side in (offset, *shape, *stride)):
        last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
        if 0 in shape or last < storage.num_items:
            return StandIn()
    raise ValueError("a tensor that reaches beyond its storage")
