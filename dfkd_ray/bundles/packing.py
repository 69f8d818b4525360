"""The compressed form of a state dict with pruned tensors: one string of bytes that gives back every bit.

It is the CRC-32 of what follows (4 bytes, little-endian), and a sequence of raw deflate streams (RFC 1951):

1. JSON: [name, dtype, shape, gaps] of each tensor, in the state dict's order, dtypes named as in safetensors. `gaps` is
   null for a tensor that is not pruned.
2. The gaps of the pruned tensors, in that order. A gap is the number of zeros before the next value, in one byte; 255
   means 255 zeros and no value. The zeros after the last value have none. `gaps` above counts a tensor's bytes.
3. The values, by kind (dtype; pruned or not) in the order in which the kinds appear. A kind has a stream for each byte
   of its values, most significant byte first. Values are rotated left by one bit before: then the first byte of a
   float32 is its exponent, and the sign is beside the last bits of the fraction.

Gaps are nearly geometric, which Huffman's code fits. Masks as bits take about as much at 50 % zeros and more from 90 %
on, with zlib and lzma. The exponents of weights need 1 to 3 of 8 bits. A fraction has 23 random bits, which nothing
compresses, so the file is about a fifth smaller than `gzip -9` of the dense one. Bits that are 0 in all weights cost
nothing: of weights rounded to float16 it is less than half of that.

A value is left out if all its bits are 0; a negative zero is stored. Another version of zlib may write other bytes for
the same weights. Every version reads them.
"""

import itertools
import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfkd_ray import untrusted
from dfkd_ray.text import one_line

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SKIP = 255  # zeros, and no value
# The shortest result is taken. Only the first strategy finds repetitions (of filters, say); only the last ignores runs,
# which in random bytes are chance. Level 9 takes 25 times as long as 6 on exponents, for 5 % of their size.
LEVEL = 6
STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY)


class Entry(NamedTuple):
    """One tensor; `num_gaps` is None if it is not pruned."""

    name: str
    dtype: str
    shape: list[int]
    num_gaps: int | None

    @property
    def kind(self) -> tuple[str, bool]:
        """The values of a kind are stored together."""
        return self.dtype, self.num_gaps is not None

    @property
    def num_elements(self) -> int:
        """Elements of the dense tensor."""
        return math.prod(self.shape)


def pack(state: Mapping[str, Tensor], pruned: Collection[str]) -> bytes:
    """The compressed form; of a tensor named in `pruned`, only the values that are not zero are stored."""
    entries: list[Entry] = []
    gaps: list[bytes] = []
    values: dict[tuple[str, bool], list[np.ndarray]] = {}
    for name, tensor in state.items():
        words, num_gaps = words_of(tensor), None
        if name in pruned:
            positions = words.nonzero()[0]
            words = words[positions]
            gaps.append(gaps_of(positions))
            num_gaps = len(gaps[-1])
        entries.append(Entry(name, NAMES[tensor.dtype], list(tensor.shape), num_gaps))
        values.setdefault(entries[-1].kind, []).append(words)
    header = json.dumps(entries, separators=(",", ":")).encode()
    planes = itertools.chain.from_iterable(planes_of(np.concatenate(own)) for own in values.values())
    packed = b"".join(map(deflated, itertools.chain([header, b"".join(gaps)], planes)))
    return zlib.crc32(packed).to_bytes(4, "little") + packed


def unpack(data: bytes, where: str, largest: int) -> dict[str, Tensor]:
    """The inverse of `pack`. `ValueError`, with `where`, if the data is damaged, or, before memory is allocated, if the
    dense tensors need more than `largest` bytes.
    """
    if zlib.crc32(data[4:]) != int.from_bytes(data[:4], "little"):
        raise damaged(where, "the check sum of its compressed weights is wrong")
    header, data = inflated(data[4:], untrusted.MAX_HEADER_BYTES, where)
    entries = entries_of(untrusted.parse_json(header, where), where)
    untrusted.check_size(sum(e.num_elements * DTYPES[e.dtype].itemsize for e in entries), largest, where)
    gaps, data = inflated(data, sum(entry.num_gaps or 0 for entry in entries), where, exact=True)
    positions = positions_of(entries, gaps, where)
    dense: dict[str, np.ndarray] = {}
    for kind in dict.fromkeys(entry.kind for entry in entries):
        own = [entry for entry in entries if entry.kind == kind]
        counts = [len(positions[e.name]) if e.name in positions else e.num_elements for e in own]
        planes = []
        for _ in range(DTYPES[kind[0]].itemsize):
            plane, data = inflated(data, sum(counts), where, exact=True)
            planes.append(plane)
        split = np.split(words_from(planes), np.cumsum(counts)[:-1])
        for entry, words in zip(own, split, strict=True):
            dense[entry.name] = words
            if entry.name in positions:
                dense[entry.name] = np.zeros(entry.num_elements, words.dtype)
                dense[entry.name][positions[entry.name]] = words
    if data:
        raise damaged(where, f"{len(data):,} bytes after the last tensor")
    return {entry.name: tensor_of(dense[entry.name], entry) for entry in entries}


def damaged(where: str, problem: str) -> ValueError:
    """The error for a file that `pack` has not written."""
    return ValueError(f"{where}: {problem}; the file is damaged")


def deflated(data: bytes) -> bytes:
    """A raw deflate stream, the shortest of `STRATEGIES`."""

    def compressed(strategy: int) -> bytes:
        compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
        return compressor.compress(data) + compressor.flush()

    return min(map(compressed, STRATEGIES), key=len)


def inflated(data: bytes, most: int, where: str, *, exact: bool = False) -> tuple[bytes, bytes]:
    """The content of the deflate stream at the start, at most (or exactly) `most` bytes, and the data after it."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(data, most + 1)
    except zlib.error as error:
        raise damaged(where, f"its compressed weights cannot be read ({error})") from None
    if not inflater.eof or len(content) > most or (exact and len(content) < most):
        raise damaged(where, f"its compressed weights have other than {most:,} bytes where its header says so")
    return content, inflater.unused_data


def entries_of(header: Any, where: str) -> list[Entry]:
    """The checked entries of a header."""
    if not isinstance(header, list) or len(header) > untrusted.MAX_TENSORS:
        raise damaged(where, f"its compressed weights are no list of at most {untrusted.MAX_TENSORS:,} tensors")
    entries = []
    for given in header:
        if not isinstance(given, list) or len(given) != 4 or not isinstance(given[0], str):
            raise damaged(where, f"a tensor is described by {one_line(repr(given), 60)}")
        entry = Entry(*given)
        shown = one_line(entry.name, 80)
        if not isinstance(entry.dtype, str) or entry.dtype not in DTYPES:
            raise damaged(where, f"{shown} holds numbers of kind {one_line(repr(entry.dtype), 40)}")
        if not untrusted.is_shape(entry.shape):
            raise damaged(where, f"{shown} has no possible shape: {one_line(entry.shape, 60)}")
        if entry.num_gaps is not None:
            most = entry.num_elements + entry.num_elements // SKIP
            if type(entry.num_gaps) is not int or not 0 <= entry.num_gaps <= most:
                raise damaged(where, f"{shown} has {one_line(repr(entry.num_gaps), 40)} gaps, expected 0 to {most:,}")
        entries.append(entry)
    if len({entry.name for entry in entries}) < len(entries):
        raise damaged(where, "a tensor is there twice")
    return entries


def gaps_of(positions: np.ndarray) -> bytes:
    """The gaps before ascending positions, each after as many `SKIP` as fit into it."""
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum(gaps // SKIP + 1)
    coded = np.full(ends[-1] if len(ends) else 0, SKIP, np.uint8)
    coded[ends - 1] = gaps % SKIP
    return coded.tobytes()


def positions_of(entries: list[Entry], gaps: bytes, where: str) -> dict[str, np.ndarray]:
    """The inverse of `gaps_of`, by name, for the pruned tensors among the entries."""
    positions, start = {}, 0
    for entry in entries:
        if entry.num_gaps is None:
            continue
        coded = np.frombuffer(gaps, np.uint8, entry.num_gaps, start)
        start += entry.num_gaps
        is_value = coded != SKIP
        found = (np.cumsum(coded, dtype=np.int64) + np.cumsum(is_value) - 1)[is_value]
        if len(found) and found[-1] >= entry.num_elements:
            raise damaged(where, f"{one_line(entry.name, 80)} has values beyond its shape")
        positions[entry.name] = found
    return positions


def words_of(tensor: Tensor) -> np.ndarray:
    """The elements' bits, as unsigned integers of their size: (elements,)."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return raw.view(f"<u{tensor.element_size()}")


def tensor_of(words: np.ndarray, entry: Entry) -> Tensor:
    """The inverse of `words_of`; each tensor has memory of its own."""
    raw = torch.from_numpy(words.copy().view(np.uint8))
    return raw.view(DTYPES[entry.dtype]).view(entry.shape)


def planes_of(words: np.ndarray) -> Iterator[bytes]:
    """The bytes of the rotated words, by significance from the highest."""
    rotated = words << 1 | words >> 8 * words.itemsize - 1
    for shift in range(8 * words.itemsize - 8, -1, -8):
        yield (rotated >> shift).astype(np.uint8).tobytes()


def words_from(planes: list[bytes]) -> np.ndarray:
    """The inverse of `planes_of`."""
    dtype = np.dtype(f"<u{len(planes)}")
    rotated = np.zeros(len(planes[0]), dtype)
    for plane in planes:
        rotated = (rotated << 8 if len(planes) > 1 else rotated) | np.frombuffer(plane, np.uint8)
    return rotated >> 1 | rotated << 8 * len(planes) - 1
