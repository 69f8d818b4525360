"""Checks of files from outside before they cost memory or time: file type, size, JSON, headers of safetensors files.

All functions refuse with a one-line `ValueError` that names the file. Sizes in the file system and in headers are
checked before anything is read or allocated.
"""

import errno
import json
import math
import os
import resource
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from pydantic import BaseModel
from torch import Tensor

from dfkd_ray.config import validate
from dfkd_ray.config.parsing import distinct, whole
from dfkd_ray.plain import LARGEST, MOST_DEPTH, text_fault
from dfkd_ray.text import MAX_MESSAGE, one_line

MAX_JSON_BYTES = 8 << 20  # a description with 100,000 class names of 80 characters each
MAX_HEADER_BYTES = 16 << 20  # of a safetensors file: 100,000 tensors with names of 100 characters
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 32
SPARE_BYTES = 64 << 20
CGROUP = Path("/sys/fs/cgroup")
# The safetensors dtypes that are read, and their bytes. Float types of 8 bits or fewer need scales and are refused.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NO_FILES = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
Model = TypeVar("Model", bound=BaseModel)


def reason(error: BaseException, most: int = 120) -> str:
    """The type and the first line of a foreign exception."""
    lines = str(error).strip().splitlines()
    return one_line(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, most)


def size(num_bytes: int) -> str:
    """A number of bytes as readable text."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def plain_file(path: Path, where: str | None = None) -> os.stat_result | None:
    """The `stat` result of a plain file; None if it does not exist.

    `ValueError` for a folder, a pipe, a device, or links that form a cycle. `OSError` for disk errors.
    """
    where = one_line(where or path, 120)
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise ValueError(f"{where}: {error.strerror}") from None
        raise
    except ValueError as error:  # a null character in a name
        raise ValueError(f"{where}: {error}") from None
    for is_kind, what in NO_FILES:
        if is_kind(found.st_mode):
            raise ValueError(f"{where}: {what}, expected a file")
    return found


def check_size(num_bytes: int, most: int, where: str) -> None:
    """`ValueError` if a file has more than `most` bytes."""
    if num_bytes > most:
        raise ValueError(f"{one_line(where, 120)}: {size(num_bytes)} or more, expected at most {size(most)}")


def total_bytes() -> int:
    """Memory that this process could have if it were alone, by the machine, its cgroup and its resource limit."""
    total = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if (largest := of_cgroup("memory.max")) is not None:
        total.append(largest)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        total.append(limit)
    return min(total)


def free_bytes() -> int:
    """Memory that this process can still allocate, by the machine, its cgroup and its resource limit."""
    free = [total_bytes()]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):  # not Linux: only the total memory is known
        pass
    largest, current = of_cgroup("memory.max"), of_cgroup("memory.current")
    if largest is not None and current is not None:
        free.append(largest - current)
    return max(0, min(free))


def of_cgroup(name: str) -> int | None:
    """A number of this process's cgroup; None if it has none or no limit."""
    try:
        text = (CGROUP / name).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdigit() else None


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON strictly: no duplicate key, NaN or infinity, no integer beyond 64 bits, bounded depth."""
    where, found = one_line(where, 120), None
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=distinct, parse_constant=float, parse_int=whole)
        problem = fault_of(found)
    except RecursionError:
        problem = f"nested deeper than {MOST_DEPTH} levels"
    except (ValueError, MemoryError) as error:
        problem = one_line(error, 120)
    if problem:
        raise ValueError(f"{where}: not valid JSON: {problem}")
    return found


def fault_of(found: Any) -> str | None:
    """Why data cannot be stored in our tables and files, or None. For headers: 10 times as fast as `plain.fault`."""
    level, depth = [found], 0
    while level:
        if depth > MOST_DEPTH:
            return f"nested deeper than {MOST_DEPTH} levels"
        if any(type(value) is int and abs(value) > LARGEST for value in level):
            return "a number that does not fit into 64 bits"
        if any(type(value) is float and not math.isfinite(value) for value in level):
            return "a number that is not finite"
        if not all(value.isascii() or text_fault(value, len(value)) is None for value in level if type(value) is str):
            return "a text with half a character (a lone surrogate)"
        objects = [value for value in level if type(value) is dict]
        lists = [value for value in level if type(value) is list] + [[*names, *names.values()] for names in objects]
        level = [inner for value in lists for inner in value]
        depth += 1
    return None


def validated(model: type[Model], data: Mapping[str, Any], where: str) -> Model:
    """As `config.validate`, but with only the first error, in one line of bounded length."""
    try:
        return validate(model, data, where)
    except ValueError as error:
        lines = str(error).splitlines() or [f"{where}: not as expected"]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ValueError(one_line(lines[0]) + more) from None


def safetensors_header(file: Path | bytes, where: str, what: str = "safetensors file") -> dict[str, Any]:
    """The header of a safetensors file or of its content: tensor name → dtype, shape, data_offsets; `__metadata__`.

    `ValueError` if it is truncated, or if shapes, dtypes and offsets do not fit the file.
    """
    broken = f"{one_line(where, 120)}: not a whole {what}"
    if isinstance(file, bytes):
        num_bytes, head, rest = len(file), file[:8], file[8 : 8 + MAX_HEADER_BYTES]
    else:
        with file.open("rb") as opened:
            num_bytes, head = os.fstat(opened.fileno()).st_size, opened.read(8)
            rest = opened.read(min(MAX_HEADER_BYTES, int.from_bytes(head, "little")))
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > num_bytes - 8:
        raise ValueError(f"{broken}: its header ends beyond the file")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{broken}: a header of {size(length)}, expected at most {size(MAX_HEADER_BYTES)}")
    header = parse_json(rest[:length], broken)
    if not isinstance(header, dict):
        raise ValueError(f"{broken}: its header is no object")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{broken}: {len(header):,} tensors, expected at most {MAX_TENSORS:,}")
    for name, entry in header.items():
        if name != "__metadata__":
            problem = _entry_problem(entry, num_bytes - 8 - length)
            if problem:
                raise ValueError(f"{broken}: {one_line(name, 60)} {problem}")
    return header


def _entry_problem(entry: Any, num_bytes: int) -> str | None:
    """Why a tensor's entry in a header is invalid, or None."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "is not described by dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_BYTES:
        return f"holds numbers of kind {one_line(repr(dtype), 40)}, expected one of {', '.join(ITEM_BYTES)}"
    if not is_shape(shape):
        return f"has no possible shape: {one_line(shape, 60)}"
    if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= num_bytes:
        return "lies beyond the file"
    if math.prod(shape) * ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        return f"has {offsets[1] - offsets[0]:,} bytes, its shape {one_line(shape, 60)} of {dtype} wants others"
    return None


def is_shape(sides: Any) -> bool:
    """Whether the value is a list of sides of a tensor that can exist."""
    return _counts(sides) and len(sides) <= MAX_DIMENSIONS and math.prod(max(1, side) for side in sides) < 2**60


def _counts(values: Any) -> bool:
    """Whether the value is a list of non-negative integers."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def read_safetensors(file: Path | bytes, where: str | None = None, what: str = "safetensors file") -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of its content; `ValueError`, with `where`, if it is damaged."""
    where = where or str(file)[:MAX_MESSAGE]
    if not isinstance(file, bytes) and plain_file(file, where) is None:
        raise ValueError(f"{one_line(where, 120)}: no such file")
    safetensors_header(file, where, what)
    try:
        return safetensors.torch.load(file) if isinstance(file, bytes) else safetensors.torch.load_file(file)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - any failure means that the foreign file is damaged
        raise ValueError(f"{one_line(where, 120)}: not a whole {what}: {reason(error)}") from None
