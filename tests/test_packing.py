import base64
import gzip
import json
import resource
import time
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import safetensors.torch
import torch

from dfkd_ray import bundles, models
from dfkd_ray.bundles import packing
from dfkd_ray.compression import pruning
from dfkd_ray.config import PruningConfig
from helpers import earlier_form, refusal

# A file that an earlier version wrote: fc.weight (3 x 4, pruned) and fc.bias (3).
EARLIER = (
    b"7y$qP00000dm?6IE@Ek6b0Ru>B4l)VaAhJoB1SVZA}k_vXkl<=B05_$T`VGGVRT_%Z)Rq5Wpr~QI$JO-F*03!EFxxOE_Y>VXJ~XfI(A`fb!BrRI("
    b"s5yba`-PB03^QGcqD9B6DbAaAhJoTR2@TB4lB7VP9`%W^-k9b0RuhF)}PPG+lixB4%SQcV%g3XmmO{ZDDh3Iy!S`VQ^(4I(s5yba`-PB03^TGcqD9"
    b"B6DbAaAhJoTQXfNB4lB7VP9`%W^-k9b0RuhG&C$VGF^QvB4%SQcV%g3XmmO{ZDDh3B075_WOR9OWg<EvRX8FnB6DbAaAhJoTQXfNB4lB7VP9`%W^-"
    b"k9b0RuhH8LzUG+ljtARr(h0000#004l$000000002M004l$004kL0000$004kM005vs007`X0000%0{{R31ONa4ZLk"
)

# The compressed weights of an earlier version: those of EARLIER, and a counter of 300.
EARLIER_PACKED = (
    b"C!sm?i;h-GOV%q-%}mcIQPNRzGd5Dvi8j_TiPf=))d9;TWhNFQWMXylN^^2RQb~Dwd8N7WNr@%N8L7qbB}IwJ*{LZ&m7ZoMK$TF1u>fOaU<5+|Yp"
    b"AbpXl!h30svzG0fz$&0Aqjx0Apli00RK4t7iZJV_;wa0ApZa003iPWB>qT003hE0Am0EV*mhS003hE0Am6GivR!"
)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def pruned(weights, share):
    """The weights with the smallest ones set to 0."""
    return torch.where(weights.abs() > weights.abs().quantile(share), weights, torch.zeros(()))


def layers(share):
    """The state dict of a small network: two convolutions, BatchNorm, a linear layer."""
    return {
        "conv1.weight": pruned(normal(16, 3, 3, 3), share),
        "bn.running_mean": normal(16),
        "bn.num_batches_tracked": torch.tensor(300),
        "conv2.weight": pruned(0.1 * normal(32, 16, 3, 3), share),
        "fc.weight": pruned(0.3 * normal(10, 512), share),
        "fc.bias": normal(10),
    }


def of_weights(**weights):
    return {f"{name}.weight": weight for name, weight in weights.items()}


def random_signs(share):
    kept = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) > share
    return kept * normal(64, 64).sign()


WHERE = torch.tensor([7])  # a column of zeros of either sign
STATES = {
    "half": lambda: layers(0.5),
    "most": lambda: layers(0.9),
    "nearly_all": lambda: layers(0.995),
    "tiny": lambda: of_weights(fc=pruned(normal(2, 3), 0.5)),
    "one_weight": lambda: of_weights(fc=torch.ones(1, 1)),
    "all_zero": lambda: of_weights(a=torch.zeros(64, 32, 3, 3), b=torch.zeros(10, 64)),
    "no_zero": lambda: of_weights(a=normal(64, 64)),
    "one_value": lambda: of_weights(a=torch.full((64, 64), 0.25)),
    "signs": lambda: of_weights(a=random_signs(0.9), b=random_signs(0.5)),
    "rounded": lambda: of_weights(a=pruned(normal(64, 64).half().float(), 0.8)),
    "grid": lambda: of_weights(a=(normal(64, 64) * 2).round() / 4),
    "repeated_filters": lambda: of_weights(a=pruned(normal(1, 300), 0.5).repeat(40, 1)),
    "empty_channels": lambda: of_weights(a=normal(64, 64, 3, 3) * (torch.arange(64) % 4 == 0)[:, None, None, None]),
    "negative_zeros": lambda: of_weights(a=pruned(normal(64, 64), 0.8) * torch.ones(64).index_fill(0, WHERE, -0.0)),
    "tied": lambda: dict.fromkeys(("a.weight", "b.weight"), pruned(normal(30, 30), 0.7)),
    "doubles": lambda: of_weights(a=pruned(normal(64, 64).double(), 0.0).double()),
    "halves": lambda: of_weights(a=normal(64, 64).half() * (torch.arange(64) % 4 == 0)),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_a_pruned_file_comes_back_bit_for_bit_and_is_smaller_than_gzip_of_the_dense_one(state):
    state = state()
    names = [name for name in state if name.endswith(".weight")]
    stored = bundles.to_stored(state, names)
    found = bundles.from_stored(stored)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert np.array_equal(packing.words_of(found[name]), packing.words_of(tensor))
    dense = gzip.compress(bundles.safetensors_bytes(bundles.to_stored(state, [])), 9)
    assert len(bundles.safetensors_bytes(stored)) < max(len(dense), 256)  # whatever it holds, a file has some 200


def random_network(name, arguments):
    torch.manual_seed(0)
    return models.build(name, arguments, num_classes=10, image_shape=(1, 32, 32))


NETWORKS = {
    "resnet8": lambda: bundles.load("fashion_mnist_resnet8").network,
    "resnet20": lambda: bundles.load("fashion_mnist_resnet20").network,
    "random_resnet18_of_width_32": lambda: random_network("resnet18", {"stem": "cifar", "width_multiplier": 0.5}),
    "random_mobilenet_v2": lambda: random_network("mobilenet_v2", {"stem": "cifar"}),
}


BOTH = ("global_magnitude", "lamp")
PRUNED = [*((name, criterion) for name in ("resnet8", "resnet20") for criterion in BOTH)]
PRUNED += [("random_resnet18_of_width_32", "lamp"), ("random_mobilenet_v2", "global_magnitude")]


@pytest.mark.parametrize(("name", "criterion"), PRUNED)
def test_a_pruned_network_takes_three_quarters_of_gzip_of_the_dense_file(name, criterion):
    network = NETWORKS[name]()
    pruning.apply(network, pruning.masks(network, PruningConfig(criterion=criterion, sparsity=0.9)))
    state = network.state_dict()
    dense = gzip.compress(bundles.safetensors_bytes(state), 9)
    assert bundles.stored_bytes(state, list(pruning.prunable(network))) <= 0.75 * len(dense)


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_at_other_sparsities_it_is_much_smaller_than_gzip_of_the_dense_file_too(share):
    state = bundles.load("fashion_mnist_resnet20").network.state_dict()
    weights = [key for key, tensor in state.items() if tensor.ndim > 1]
    state |= {key: pruned(state[key], share) for key in weights}
    dense = gzip.compress(bundles.safetensors_bytes(state), 9)
    assert bundles.stored_bytes(state, weights) < 0.81 * len(dense)


def test_the_weights_of_a_resnet50_are_packed_and_unpacked_in_seconds():
    state = {f"{i}.weight": pruned(normal(1024, 1024, 1, 1).roll(i), 0.9) for i in range(3)}  # an eighth of it
    start = time.process_time()
    data = packing.pack(state, list(state))
    packed = time.process_time()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded(data).items())
    assert packed - start < 6 and time.process_time() - packed < 2


@pytest.mark.parametrize("gaps", [[], [0], [0, 0], [254], [255], [256], [509, 510, 511, 0], [3, 10_000, 0, 255]])
@pytest.mark.parametrize("chunk", [1, 2, 5, 1 << 20])
def test_gaps_give_the_positions_back(monkeypatch, gaps, chunk):
    monkeypatch.setattr(packing, "CHUNK", chunk)
    positions = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    coded = np.frombuffer(packing.gaps_of(positions), np.uint8)
    entry = packing.Entry("a", "F32", [sum(gaps) + len(gaps) + 600], len(coded))
    words = np.arange(1, len(gaps) + 1, dtype=np.uint32)
    dense = packing.spread(entry, coded, words, "w")
    assert np.array_equal(dense.nonzero()[0], positions) and np.array_equal(dense[positions], words)
    assert packing.num_values(coded) == len(gaps)


@pytest.mark.parametrize("dtype", packing.DTYPES)
@pytest.mark.parametrize("is_pruned", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_any_bits_of_any_type_come_back(dtype, is_pruned, count):
    size = packing.DTYPES[dtype].itemsize
    words = np.random.default_rng(count).integers(0, 256, count * size, np.uint8).view(f"<u{size}")
    for base in (None, 0, 1, 37, 500) if is_pruned and dtype in packing.EXPONENT_BITS else (None,):
        entry = packing.Entry("a", dtype, [count], count if is_pruned else None, base)
        stored = [packing.reordered(part, entry) for part in (words[:1], words[1:])]
        planes = [np.frombuffer(b"".join(parts), np.uint8) for parts in packing.planes_of(stored, entry.num_moved)]
        assert [len(plane) for plane in planes] == packing.plane_sizes(size, entry.num_moved, count)
        assert np.array_equal(packing.restored(packing.words_from(planes, entry.num_moved, count), entry), words)


def test_the_bytes_are_the_same_each_time():
    assert packing.pack(layers(0.9), ["fc.weight"]) == packing.pack(layers(0.9), ["fc.weight"])


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(base64.b85decode(EARLIER))
    weight = torch.tensor([[0.0, -2, -1, 0], [1, 2, 0, 4], [5, 0, 7, 8]])
    state = bundles.read_state_dicts(path)[""]
    assert sorted(state) == ["fc.bias", "fc.weight"]
    assert torch.equal(state["fc.weight"], weight) and torch.equal(state["fc.bias"], torch.tensor([0.5, -1, 0]))
    written = earlier_form(state, ["fc.weight"])  # the tests of damaged files of that form use this
    assert all(torch.equal(written[key], own) for key, own in safetensors.torch.load_file(path).items())


def test_compressed_weights_of_an_earlier_version_are_read():
    data = torch.tensor(list(base64.b85decode(EARLIER_PACKED)), dtype=torch.uint8)
    state = bundles.from_stored({"::packed": data})
    weight = torch.tensor([[0.0, -2, -1, 0], [1, 2, 0, 4], [5, 0, 7, 8]])
    assert list(state) == ["fc.weight", "fc.bias", "bn.num_batches_tracked"]
    assert torch.equal(state["fc.weight"], weight) and torch.equal(state["fc.bias"], torch.tensor([0.5, -1, 0]))
    assert state["bn.num_batches_tracked"] == 300


def test_compressed_weights_of_a_later_form_are_refused_by_name():
    stored = {"::packed/3": torch.zeros(9, dtype=torch.uint8)}
    refusal(lambda: bundles.from_stored(stored, "w"), "w: ", "::packed/3", "this version reads '::packed' and")


def loaded(data, largest=2**30):
    return packing.unpack(data, "w.safetensors", largest)


DATA = packing.pack(layers(0.9), ["conv2.weight", "fc.weight"])


def test_cut_or_lengthened_data_is_refused():
    for length in [*range(0, len(DATA), 97), len(DATA) - 1]:
        refusal(lambda length=length: loaded(DATA[:length]), "w.safetensors", "damaged")
    refusal(lambda: loaded(DATA + b"\0"), "w.safetensors", "damaged")


def test_a_changed_byte_is_refused():
    for position in range(0, len(DATA), 13):
        data = bytearray(DATA)
        data[position] ^= 1 + position % 255
        refusal(lambda data=data: loaded(bytes(data)), "w.safetensors", "damaged")


def test_any_bytes_under_a_right_check_sum_are_refused_or_read():
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        data = bytearray(DATA[4:])
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            data[position] = rng.integers(0, 256)
        try:
            loaded(checked(bytes(data)))
        except ValueError as error:
            assert str(error).startswith("w.safetensors: ") and "\n" not in str(error)
            refused += 1
    assert refused > 30


def checked(data):
    """The data with a right check sum before it."""
    return zlib.crc32(data).to_bytes(4, "little") + data


def with_header(header, *streams):
    """What makes the data. Its test calls it: bombs take a second, and each process of the tests comes by here."""
    text = header if isinstance(header, bytes | Bomb) else json.dumps(header).encode()
    return lambda: checked(b"".join(deflated(stream) for stream in (text, *streams)))


@dataclass(frozen=True)
class Bomb:
    """10^8 times the same byte."""

    byte: bytes


def deflated(stream):
    """A raw deflate stream; of a bomb in pieces, so that memory has no peak before the one that the test looks for."""
    if isinstance(stream, bytes):
        return packing.deflated([stream])
    compressor, piece = zlib.compressobj(wbits=-zlib.MAX_WBITS), stream.byte * 10**6
    return b"".join(compressor.compress(piece) for _ in range(100)) + compressor.flush()


DENSE = [b"\0" * 2] * 4
VALUES = [b"\0" * 2] * 3 + [b"\0", b"\0" * 2]  # of two pruned weights
WRONG = {
    "no_list": with_header({"a": 1}),
    "no_json": with_header(b"\xff"),
    "no_entry": with_header([3]),
    "short_entry": with_header([["a", "F32", [2]]]),
    "two_parts": with_header([["a", "F32"]]),
    "no_base": with_header([["a", "F32", [4], 2]], b"\0\0", *VALUES),
    "null_as_a_base": with_header([["a", "F32", [4], 2, None]], b"\0\0", *DENSE),
    "no_gaps": with_header([["a", "F32", [4], None, 0]], b"", *VALUES),
    "negative_base": with_header([["a", "F32", [4], 2, -1]], b"\0\0", *VALUES),
    "base_beyond_the_exponents": with_header([["a", "F32", [4], 2, 1 << 12]], b"\0\0", *VALUES),
    "base_is_no_integer": with_header([["a", "F32", [4], 2, 1.5]], b"\0\0", *VALUES),
    "base_of_integers": with_header([["a", "I8", [4], 2, 1]], b"\0\0", b"\0\0"),
    "no_name": with_header([[1, "F32", [2]]]),
    "unknown_dtype": with_header([["a", "F8_E5M2", [2]]]),
    "dtype_is_no_text": with_header([["a", ["F32"], [2]]]),
    "negative_side": with_header([["a", "F32", [-2]]]),
    "side_is_no_number": with_header([["a", "F32", ["2"]]]),
    "huge": with_header([["a", "F32", [2**40]]]),
    "huge_and_pruned": with_header([["a", "F32", [2**40], 2, 0]], b"\0\0", *VALUES),
    "impossible": with_header([["a", "F32", [2**31, 2**31], 0, 0]]),
    "many_sides": with_header([["a", "F32", [1] * 40]]),
    "many_gaps": with_header([["a", "F32", [4], 5, 0]], b"\0" * 5, *VALUES),
    "negative_gaps": with_header([["a", "F32", [4], -1, 0]], b"", *VALUES),
    "true_gaps": with_header([["a", "F32", [4], True, 0]], b"\0", *VALUES),
    "fewer_gaps": with_header([["a", "F32", [4], 2, 0]], b"\0", *VALUES),
    "more_gaps": with_header([["a", "F32", [4], 2, 0]], b"\0" * 3, *VALUES),
    "beyond": with_header([["a", "F32", [4], 2, 0]], b"\0\3", *VALUES),
    "fewer_values": with_header([["a", "F32", [4], 3, 0]], b"\0" * 3, *VALUES),
    "more_values": with_header([["a", "F32", [4], 1, 0]], b"\0", *VALUES),
    "more_halves": with_header([["a", "F32", [4], 2, 0]], b"\0" * 2, *VALUES[:3], b"\0" * 2, b"\0" * 2),
    "missing_plane": with_header([["a", "F32", [2]]], b"", *DENSE[1:]),
    "twice": with_header([["a", "F32", [1]]] * 2, b"", *DENSE),
    "bomb": with_header([["a", "F32", [2]]], b"", Bomb(b"\0"), *DENSE[1:]),
    "bomb_of_gaps": with_header([["a", "F32", [10**8], 2, 0]], Bomb(b"\xff"), *VALUES),
    "bomb_of_a_header": with_header(Bomb(b" ")),
    "nothing": lambda: b"",
    "nothing_checked": lambda: checked(b""),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG.keys())
def test_data_that_contradicts_itself_is_refused_before_memory_is_taken(tmp_path, make):
    file = bundles.safetensors_bytes({"::packed/2": torch.tensor(list(make()), dtype=torch.uint8)})
    (tmp_path / "w.safetensors").write_bytes(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(lambda: bundles.read_state_dicts(tmp_path / "w.safetensors"), "w.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KB


def test_tensors_larger_than_allowed_are_refused():
    assert loaded(DATA, largest=16 * 27 * 4 + 16 * 4 + 8 + 32 * 16 * 9 * 4 + 5120 * 4 + 40)
    refusal(lambda: loaded(DATA, largest=16 * 27 * 4 + 16 * 4 + 8 + 32 * 16 * 9 * 4 + 5120 * 4 + 39), "at most")


@pytest.mark.parametrize(
    "packed",
    [torch.zeros(4), torch.zeros((2, 2), dtype=torch.uint8), torch.zeros((), dtype=torch.uint8)],
    ids=["floats", "matrix", "scalar"],
)
def test_packed_weights_that_are_no_bytes_are_refused(packed):
    refusal(lambda: bundles.from_stored({"::packed/2": packed}, "w.safetensors"), "w.safetensors", "::packed/2")


def test_packed_weights_beside_others_are_refused():
    stored = bundles.to_stored(layers(0.9), ["fc.weight"]) | {"a": torch.ones(1)}
    refusal(lambda: bundles.from_stored(stored, "w.safetensors"), "w.safetensors", "::packed")
