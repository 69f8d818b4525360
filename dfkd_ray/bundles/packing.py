"""The compressed form of a state dict with pruned tensors: one string of bytes that gives back every bit.

It is the CRC-32 of what follows (4 bytes, little-endian), and a sequence of raw deflate streams (RFC 1951):

1. JSON: [name, dtype, shape] of each tensor, of a pruned one [name, dtype, shape, gaps] or [name, dtype, shape, gaps,
   base], in the state dict's order, dtypes named as in safetensors.
2. The gaps of the pruned tensors, in that order. A gap is the number of zeros before the next value, in one byte; 255
   means 255 zeros and no value. The zeros after the last value have none. `gaps` above counts a tensor's bytes.
3. The values, by kind (dtype; pruned or not; with a base or not) in the order in which the kinds appear. A kind has a
   stream for each byte of its values, most significant byte first. The last byte of float32 and bfloat16 with a base
   has two: the upper halves, two in a byte, and the lower halves, one in a byte.

Before, values are rotated left by one bit: then the first byte of a float32 is its exponent, and the sign is beside the
last bits of the fraction. A pruned tensor whose magnitudes lie within 16 octaves has a base. It is subtracted (modulo
the word, in sixteenths of an octave), and the bits of the exponent but the last four are moved to the end. The first
byte is then smoothly distributed above the pruning's threshold, and takes 4 to 5 of 8 bits. Of a float32, the other 20
bits are random, which nothing compresses: 19 of the fraction, and the sign.

Gaps are nearly geometric, which Huffman's code fits. Masks as bits take about as much at 50 % zeros and more from 90 %
on, with zlib and lzma. lzma codes gaps and first bytes within 2 % of deflate, and random bytes worse.

At 90 % zeros the file is 0.72 to 0.75 of `gzip -9` of the dense one (of a distilled ResNet-8, where nothing ends at a
threshold any more, 0.76). Bits that are 0 in all weights cost nothing: of weights rounded to float16 it is 0.44.

A value is left out if all its bits are 0; a negative zero is stored. Another version of zlib may write other bytes for
the same weights. Every version reads them. Earlier versions of this module wrote no base, and null as the gaps of a
tensor that is not pruned.
"""

import itertools
import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
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
EXPONENT_BITS = {"F64": 11, "F32": 8, "F16": 5, "BF16": 8}
OCTAVES = 4  # the first byte of a value has so many bits of its exponent, and as many of its fraction
HALF = 4  # bits; where so many are moved, they share the last byte with as many random ones
SKIP = 255  # zeros, and no value
CHUNK = 1 << 20  # gaps that are expanded at a time
# The shortest result is taken. Only the first strategy finds repetitions (of filters, say); only the last ignores runs,
# which in random bytes are chance. Level 9 takes 25 times as long as 6 on exponents, for 5 % of their size.
LEVEL, LEVEL_OF_SHORT, SHORT = 6, 9, 1 << 16  # bytes
STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY)
OWN_CODES = (512, 1024, 2048, 4096)  # least bytes of tensors for which codes of their own are tried


class Entry(NamedTuple):
    """One tensor. `num_gaps` is None if it is not pruned; `base` (see above) is None if it has none."""

    name: str
    dtype: str
    shape: list[int]
    num_gaps: int | None = None
    base: int | None = None

    @property
    def kind(self) -> tuple[str, bool, bool]:
        """The values of a kind are stored together."""
        return self.dtype, self.num_gaps is not None, self.base is not None

    @property
    def num_moved(self) -> int:
        """How many bits of the exponent are moved to the end."""
        return 0 if self.base is None else EXPONENT_BITS[self.dtype] - OCTAVES

    @property
    def num_elements(self) -> int:
        """Elements of the dense tensor."""
        return math.prod(self.shape)


def pack(state: Mapping[str, Tensor], pruned: Collection[str]) -> bytes:
    """The compressed form; of a tensor named in `pruned`, only the values that are not zero are stored."""
    entries: list[Entry] = []
    gaps: list[bytes] = []
    values: dict[tuple, list[np.ndarray]] = {}
    for name, tensor in state.items():
        words, dtype = words_of(tensor), NAMES[tensor.dtype]
        entry = Entry(name, dtype, list(tensor.shape))
        if name in pruned:
            positions = words.nonzero()[0]
            words = words[positions]
            gaps.append(gaps_of(positions))
            entry = entry._replace(num_gaps=len(gaps[-1]), base=base_of(words, dtype))
        entries.append(entry)
        values.setdefault(entry.kind, []).append(reordered(words, entry))
    told = [entry[: 3 if entry.num_gaps is None else 4 if entry.base is None else 5] for entry in entries]
    header = json.dumps(told, separators=(",", ":")).encode()
    moved = {entry.kind: entry.num_moved for entry in entries}
    planes = (parts for kind, own in values.items() for parts in planes_of(own, moved[kind]))
    packed = b"".join(map(deflated, itertools.chain([[header], gaps], planes)))
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
    streams, data = inflated(data, sum(entry.num_gaps or 0 for entry in entries), where, exact=True)
    gaps = dict(gaps_by_name(entries, streams))
    dense: dict[str, np.ndarray] = {}
    for kind in dict.fromkeys(entry.kind for entry in entries):
        own = [entry for entry in entries if entry.kind == kind]
        counts = [num_values(gaps[e.name]) if e.name in gaps else e.num_elements for e in own]
        planes = []
        moved = own[0].num_moved
        for size in plane_sizes(DTYPES[kind[0]].itemsize, moved, sum(counts)):
            plane, data = inflated(data, size, where, exact=True)
            planes.append(np.frombuffer(plane, np.uint8))
        split = np.split(words_from(planes, moved, sum(counts)), np.cumsum(counts)[:-1])
        for entry, stored in zip(own, split, strict=True):
            words = restored(stored, entry)
            dense[entry.name] = spread(entry, gaps[entry.name], words, where) if entry.name in gaps else words
    if data:
        raise damaged(where, f"{len(data):,} bytes after the last tensor")
    return {entry.name: tensor_of(dense[entry.name], entry) for entry in entries}


def damaged(where: str, problem: str) -> ValueError:
    """The error for a file that `pack` has not written."""
    return ValueError(f"{where}: {problem}; the file is damaged")


def deflated(parts: Sequence[bytes]) -> bytes:
    """The parts, one after another, as a raw deflate stream: the shortest of `STRATEGIES`, or a code for each part."""

    level = LEVEL_OF_SHORT if sum(map(len, parts)) <= SHORT else LEVEL

    def compressed(strategy: int, blocks: Sequence[bytes]) -> bytes:
        compressor = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
        made = [compressor.compress(block) + compressor.flush(zlib.Z_BLOCK) for block in blocks[:-1]]
        return b"".join([*made, compressor.compress(blocks[-1]), compressor.flush()])

    tried = [compressed(strategy, [b"".join(parts)]) for strategy in STRATEGIES]
    if len(parts) > 1:
        tried += [compressed(zlib.Z_HUFFMAN_ONLY, long_enough(parts, least)) for least in OWN_CODES]
    return min(tried, key=len)


def long_enough(parts: Sequence[bytes], least: int) -> list[bytes]:
    """The parts, each joined with the next ones until it has `least` bytes."""
    blocks = [b""]
    for part in parts:
        if len(blocks[-1]) >= least:
            blocks.append(b"")
        blocks[-1] += part
    return blocks


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
        if not isinstance(given, list) or len(given) not in (3, 4, 5) or not isinstance(given[0], str):
            raise damaged(where, f"a tensor is described by {one_line(repr(given), 60)}")
        entry = Entry(*given)
        shown = one_line(entry.name, 80)
        if not isinstance(entry.dtype, str) or entry.dtype not in DTYPES:
            raise damaged(where, f"{shown} holds numbers of kind {one_line(repr(entry.dtype), 40)}")
        if not untrusted.is_shape(entry.shape):
            raise damaged(where, f"{shown} has no possible shape: {one_line(entry.shape, 60)}")
        if entry.num_gaps is not None or len(given) == 5:
            most = entry.num_elements + entry.num_elements // SKIP
            if type(entry.num_gaps) is not int or not 0 <= entry.num_gaps <= most:
                raise damaged(where, f"{shown} has {one_line(repr(entry.num_gaps), 40)} gaps, expected 0 to {most:,}")
        if len(given) == 5:
            most = (1 << EXPONENT_BITS.get(entry.dtype, -OCTAVES) + OCTAVES) - 1
            if type(entry.base) is not int or not 0 <= entry.base <= most:
                raise damaged(where, f"{shown} has the base {one_line(repr(entry.base), 40)}, expected 0 to {most:,}")
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


def gaps_by_name(entries: Sequence[Entry], gaps: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """The gaps of each pruned tensor, by name."""
    start = 0
    for entry in entries:
        if entry.num_gaps is not None:
            yield entry.name, np.frombuffer(gaps, np.uint8, entry.num_gaps, start)
            start += entry.num_gaps


def num_values(gaps: np.ndarray) -> int:
    """How many values a tensor's gaps stand before."""
    return int(np.count_nonzero(gaps != SKIP))


def spread(entry: Entry, gaps: np.ndarray, words: np.ndarray, where: str) -> np.ndarray:
    """A tensor's values at their places among zeros: the inverse of `gaps_of`, in memory that a chunk bounds."""
    dense, at, done = np.zeros(entry.num_elements, words.dtype), 0, 0
    for start in range(0, len(gaps), CHUNK):
        coded = gaps[start : start + CHUNK]
        is_value = coded != SKIP
        ends = at + np.cumsum(coded + is_value.astype(np.int64))
        positions, at = ends[is_value] - 1, int(ends[-1])
        if len(positions) and positions[-1] >= entry.num_elements:
            raise damaged(where, f"{one_line(entry.name, 80)} has values beyond its shape")
        dense[positions] = words[done : done + len(positions)]
        done += len(positions)
    return dense


def words_of(tensor: Tensor) -> np.ndarray:
    """The elements' bits, as unsigned integers of their size: (elements,)."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return raw.view(f"<u{tensor.element_size()}")


def tensor_of(words: np.ndarray, entry: Entry) -> Tensor:
    """The inverse of `words_of`; each tensor has memory of its own."""
    raw = torch.from_numpy(words.copy().view(np.uint8))
    return raw.view(DTYPES[entry.dtype]).view(entry.shape)


def base_of(words: np.ndarray, dtype: str) -> int | None:
    """Two octaves below the smallest magnitudes but a twentieth, in sixteenths of an octave.

    None for integers, and if more than a hundredth of the values lies outside the 16 octaves from there. The minimum
    would be at the mercy of one weight: trained ones pass through zero.
    """
    if dtype not in EXPONENT_BITS or not len(words):
        return None
    magnitudes = rotated(words, 1) >> 8 * words.itemsize - EXPONENT_BITS[dtype] - OCTAVES
    low = int(np.partition(magnitudes, len(words) // 20)[len(words) // 20])
    base = max(0, low - (2 << OCTAVES))
    outside = np.count_nonzero((magnitudes < base) | (magnitudes >= base + (16 << OCTAVES)))
    return base if outside <= len(words) // 100 else None


def reordered(words: np.ndarray, entry: Entry) -> np.ndarray:
    """The bits of values as they are stored (see above)."""
    return rotated(rotated(words, 1) - first_of(entry), entry.num_moved)


def restored(words: np.ndarray, entry: Entry) -> np.ndarray:
    """The inverse of `reordered`."""
    num_bits = 8 * words.itemsize
    return rotated(rotated(words, num_bits - entry.num_moved) + first_of(entry), num_bits - 1)


def first_of(entry: Entry) -> np.integer:
    """The rotated value where a tensor's range begins."""
    dtype = np.dtype(f"u{DTYPES[entry.dtype].itemsize}")
    below = 0 if entry.base is None else 8 * dtype.itemsize - EXPONENT_BITS[entry.dtype] - OCTAVES
    return dtype.type((entry.base or 0) << below)


def rotated(words: np.ndarray, places: int) -> np.ndarray:
    """Unsigned integers, their bits moved up in a circle."""
    num_bits = 8 * words.itemsize
    return words << places | words >> num_bits - places if 0 < places < num_bits else words


def plane_sizes(itemsize: int, moved: int, count: int) -> list[int]:
    """The bytes of each stream of a kind with so many values."""
    sizes = [count] * itemsize
    return [*sizes[:-1], (count + 1) // 2, count] if moved == HALF else sizes


def planes_of(own: Sequence[np.ndarray], moved: int) -> Iterator[list[bytes]]:
    """The content of each stream of a kind, in a part for each tensor's reordered values where that is possible."""
    for shift in range(8 * own[0].itemsize - 8, -1, -8):
        parts = [(words >> shift).astype(np.uint8) for words in own]
        if shift == 0 and moved == HALF:
            upper = np.concatenate(parts) & 0xF0
            second = np.zeros_like(upper[::2])
            second[: len(upper) // 2] = upper[1::2] >> HALF
            yield [(upper[::2] | second).tobytes()]
            parts = [part & 0x0F for part in parts]
        yield [part.tobytes() for part in parts]


def words_from(planes: list[np.ndarray], moved: int, count: int) -> np.ndarray:
    """The inverse of `planes_of`, for all tensors of a kind together: (count,)."""
    if moved == HALF:
        pairs = planes[-2]
        upper = np.stack([pairs & 0xF0, pairs << HALF], 1).ravel()[:count]
        planes = [*planes[:-2], upper | planes[-1] & 0x0F]
    words = np.zeros(count, f"<u{len(planes)}")
    for plane in planes:
        words = (words << 8 if len(planes) > 1 else words) | plane
    return words
