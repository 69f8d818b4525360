"""Generators of bundles, weights and records that are damaged, foreign or made to harm."""

import hashlib
import json
import os
import random
import zlib
from pathlib import Path
from typing import Any

import torch
import yaml

from fuzz.damage import MARKS, anything, changed, damaged, scalar
from fuzz.fuzzing import ANY, TRIED, Case, Desk
from fuzz.templates import TINY, sweep_file

OUT = ["--out", "target", "--cache", "target-cache"]
WRITES = ["work/target", "work/target-cache"]


def read_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: Any, body: bytes) -> bytes:
    """The inverse of `read_header`, for whatever is put there."""
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(told).to_bytes(8, "little") + told + body


def fit_hash(bundle: Path) -> None:
    """Write into a bundle's description what hash its weights have now."""
    info = json.loads((bundle / "teacher.json").read_text())
    info["weights_sha256"] = hashlib.sha256((bundle / "weights.safetensors").read_bytes()).hexdigest()
    (bundle / "teacher.json").write_text(json.dumps(info))


def uses_of(rng: random.Random, desk: Desk, bundle: str) -> Case:
    """A command that reads a bundle."""
    desk.file("sweep.yaml", yaml.safe_dump(sweep_file(bundle)))
    words = rng.choice(
        [
            ["teacher", "info", bundle],
            ["teacher", "info", bundle],
            ["recover", bundle, *OUT, *TINY],
            ["synthesize", bundle, *OUT, "--num-images", "4", "--device", "cpu"],
            ["sweep", "sweep.yaml", "--results", "target", "--cache", "target-cache", "--test-data", "none"],
        ]
    )
    return Case(words, TRIED, writes=WRITES, encoding=rng.choice(["utf-8", "ascii"]))


# ---- bundles --------------------------------------------------------------------------------------------------------


def manifests(rng: random.Random, desk: Desk) -> Case:
    """`teacher.json` with something in it that is not so."""
    bundle = desk.take("teacher")
    path = bundle / "teacher.json"
    info = json.loads(path.read_text())
    kind = rng.choice(["field"] * 5 + ["changed"] * 3 + ["notes"] * 3 + ["edge", "edge", "bytes", "document", "size"])
    if kind == "notes":
        desk.take("images")
        values = [anything(rng), -1, 2**62, "x", 1.5, {"attribute": 3}, {"nothing": 1}, {"num_validation": 10**9}]
        name = rng.choice(["training", "data", "init", "x"])
        part = rng.choice(["num_validation", "seed", "attribute", "equal_classes", "classes"])
        notes = rng.choice([{name: rng.choice(values)}, {name: {part: rng.choice(values)}}, rng.choice(values)])
        info |= {
            "notes": notes,
            "dataset": rng.choice(["images", str(desk.work / "images"), "mnist", "celeba", "\x1b[31m"]),
        }
        path.write_text(json.dumps(info))
        words = ["recover", "teacher", *OUT, *TINY, "--test-data", rng.choice(["images", "validation", "auto"])]
        info_words = ["teacher", "record", "teacher", "--dataset", "images", "--threads", "1", "--kinds", "top"]
        return Case(rng.choice([words, info_words]), TRIED, writes=[*WRITES, "work/teacher/records"])
    if kind == "edge":
        edges: dict[str, list[Any]] = {"mean": [[1e30], [1e-38]], "std": [[1e-38], [1e38]]}
        edges |= {
            "pixel_range": [[-1e38, 1e38], [0, 1e-38]],
            "class_names": [[f"{mark}{i}" for i in range(3)] for mark in MARKS],
        }
        for name in rng.sample(sorted(edges), 2):
            info[name] = rng.choice(edges[name])
    elif kind == "field":
        info[rng.choice([*info, "class_names", "nothing"])] = anything(rng)
    elif kind == "changed":
        info = changed(rng, info, rng.choice([1, 2]))
    elif kind == "size":
        sizes = [{"image_shape": [1, 10**6, 10**6]}, {"num_classes": 10**9}, {"arguments": {"width_multiplier": 500}}]
        sizes += [
            {"architecture": "wrn_9999994_9999"},
            {"architecture": "hinton_1200", "image_shape": [1, 99999, 99999]},
        ]
        sizes += [{"class_names": ["x"] * 10**5, "num_classes": 10**5}, {"image_shape": [10**5, 16, 16]}]
        info |= rng.choice(sizes)
    text_of = json.dumps(info)
    documents = [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        "{" + '"a": 1,' * 10,
        '"' + "x" * 2_000_000 + '"',
        "NaN",
    ]
    documents += [text_of.replace("{", '{"num_classes": 4, ', 1), text_of[:-1] + ', "notes": ' + "9" * 5000 + "}"]
    content = text_of.encode()
    if kind == "bytes":
        content = damaged(rng, content)
    elif kind == "document":
        content = rng.choice(
            [*(each.encode() for each in documents), text_of.encode("utf-16"), b"\xef\xbb\xbf" + content]
        )
    path.write_bytes(content)
    return uses_of(rng, desk, "teacher")


DTYPES = [
    "F64",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "U64",
    "F4",
    "x",
    "",
    3,
    None,
]


def changed_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    header, body = read_header(data)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = rng.choice(["dtype", "shape", "offsets", "rename", "more", "meta", "field", "document", "remove", "deep"])
    if kind == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == "shape":
        shapes = [[], [0], [-1], [2**62, 4], [10**20], "x", [1.5], [True], [10**6] * 3, entry["shape"][::-1]]
        entry["shape"] = rng.choice(shapes)
    elif kind == "offsets":
        entry["data_offsets"] = rng.choice(
            [[0, 0], [1, 0], [0, 2**63], [-4, 0], [0], "x", [0, len(body) + 4], [0, 2**64]]
        )
    elif kind == "rename":
        header[rng.choice([f"{name}::mask", f"{name}::values", "", "a.b", "[/b]\x1b[31m", "x" * 5000])] = header.pop(
            name
        )
    elif kind == "more":
        header[rng.choice(["extra", "x::mask", "x::values", "::mask", "x\u202e"])] = dict(entry)
    elif kind == "meta":
        header["__metadata__"] = rng.choice(
            [{"a": "b" * 10_000}, {"a": 1}, [], {"format": "pt", "a": "\x1b[31m"}, None]
        )
    elif kind == "remove":
        del header[name]
    elif kind == "field":
        header[name] = anything(rng)
    elif kind == "deep":
        return with_header(b'{"a":' + b"[" * 100_000, body)
    else:
        sizes = [2**63, 2**64 - 1, 10**9, 0, 1, 7]
        return rng.choice(
            [rng.choice(sizes).to_bytes(8, "little") + data[8:], with_header([], body), with_header(b"{}", b"")]
        )
    try:
        return with_header(header, body)
    except (TypeError, ValueError):
        return with_header(b"null", body)


def tensors_of(rng: random.Random, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state whose tensors are of other kinds, shapes or values, as safetensors can hold them."""
    from safetensors.torch import save  # noqa: F401 - the kinds below are those it writes

    state = dict(state)
    names = sorted(state)
    name = rng.choice(names)
    kinds = [torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    kinds += [torch.complex64, torch.int8]
    what = rng.choice(["kind", "kinds", "value", "shape", "missing", "more", "mask", "huge", "running"])
    if what == "kind":
        state[name] = state[name].to(rng.choice(kinds))
    elif what == "kinds":
        state = {key: value.to(rng.choice(kinds)) for key, value in state.items()}
    elif what == "value":
        floats = [key for key in names if state[key].is_floating_point()]
        if not floats:  # compressed: any byte of it
            state[name].view(-1)[rng.randrange(state[name].numel())] = rng.randrange(128)
            return state
        state[rng.choice(floats)].view(-1)[0] = rng.choice([float("nan"), float("inf"), -float("inf"), 1e38, -1e38])
    elif what == "shape":
        shape = rng.choice([(), (1,), (0,), (*state[name].shape, 1), tuple(state[name].shape)[::-1], (1, 1, 1, 1, 1)])
        state[name] = torch.zeros(shape)
    elif what == "missing":
        del state[name]
    elif what == "more":
        state[rng.choice(["extra", "[/b]", "\x1b[31m", "x" * 3000, "a\u202eb", ""])] = torch.zeros(1)
    elif what == "mask":
        values = state.pop(name)
        bits = torch.randint(0, 256, (rng.choice([1, -(-values.numel() // 8), values.numel()]),), dtype=torch.uint8)
        state[f"{name}::mask"] = rng.choice([bits, bits.float(), bits[:0], torch.zeros(2, 2, dtype=torch.uint8)])
        if rng.random() < 0.7:
            number = rng.choice([1, values.numel(), 3 * values.numel()])
            state[f"{name}::values"] = rng.choice([torch.ones(number), torch.ones(number, dtype=torch.int64)])
    elif what == "huge":
        state = {key: value.double() * 1e300 if value.is_floating_point() else value for key, value in state.items()}
    else:
        found = [key for key in names if "running_var" in key]
        if found:
            state[rng.choice(found)].fill_(rng.choice([-1.0, 0.0, 1e38]))
    return state


def repacked(rng: random.Random, data: bytes) -> bytes:
    """Compressed weights with a right check sum, whose header or streams are others; or under another name."""
    from safetensors.torch import load, save

    ((name, packed),) = load(data).items()
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    header, rest = json.loads(inflater.decompress(packed.numpy().tobytes()[4:])), inflater.unused_data
    what = rng.choice(["entry", "entry", "entry", "header", "streams", "bomb", "cut", "name"])
    if what == "entry":
        entry = rng.choice(header)
        numbers = [0, -1, 1, 255, 4095, 4096, 2**31, 2**62, 10**30, 1.5, True, None, "x", [], [2**40], [0], [-1]]
        entry[rng.randrange(len(entry))] = rng.choice([*numbers, *DTYPES])
    elif what == "header":
        header = rng.choice([header[::-1], header[1:], header * 2, [], [[]], changed(rng, header, 2), anything(rng)])
    elif what == "streams":
        rest = damaged(rng, rest)
    elif what == "bomb":
        rest = zlib.compress(bytes(1 << 24), 9)[2:-4] + rest
    elif what == "cut":
        rest = rest[: rng.randrange(len(rest))]
    else:
        name = rng.choice(["::packed", "::packed/3", "::packed/", "::packed/\x1b[31m", "packed"])
    body = zlib.compress(json.dumps(header).encode())[2:-4] + rest
    body = zlib.crc32(body).to_bytes(4, "little") + body
    return save({name: torch.frombuffer(bytearray(body), dtype=torch.uint8)})


def weights(rng: random.Random, desk: Desk) -> Case:
    """`weights.safetensors` that is damaged, or of other tensors; its hash may say so or not."""
    from safetensors.torch import load, save

    is_packed = rng.random() < 0.3
    bundle = desk.take("recovered/student", "teacher") if is_packed else desk.take("teacher")
    path = bundle / "weights.safetensors"
    data = path.read_bytes()
    kind = rng.choice(["bytes", "header", "header", "tensors", "tensors", "tensors", "file"])
    if is_packed and rng.random() < 0.6:
        kind = "packed"
    if kind == "file":
        path.unlink()
        what = rng.choice(["gone", "folder", "pipe", "loop", "zero", "link"])
        if what == "folder":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
        elif what != "gone":
            path.symlink_to({"loop": path.name, "zero": "/dev/zero", "link": "../notes.txt"}[what])
    elif kind == "tensors":
        path.write_bytes(save(tensors_of(rng, load(data))))
    elif kind == "packed":
        path.write_bytes(repacked(rng, data))
    else:
        path.write_bytes(damaged(rng, data) if kind == "bytes" else changed_header(rng, data))
    if kind != "file" and rng.random() < 0.9:
        fit_hash(bundle)
    if path.is_file() and not path.is_symlink() and rng.random() < 0.4:
        return imported(rng, "teacher/weights.safetensors")
    return uses_of(rng, desk, "teacher")


def imported(rng: random.Random, file: str) -> Case:
    """`teacher import` of a file."""
    words = ["teacher", "import", file, "--architecture", "resnet8", "--arguments", '{"width_multiplier": 0.25}']
    words += ["--num-classes", "3", "--image-shape", "1x16x16", "--mean", "0.5", "--std", "0.25", "--out", "target"]
    return Case(words, ANY, writes=["work/target"], encoding=rng.choice(["utf-8", "ascii"]))


def records(rng: random.Random, desk: Desk) -> Case:
    """Activation records whose header or tensors are not those of the teacher."""
    bundle = desk.take("plain")
    kind = rng.choice(["top", "all", "spectral", "spectral_pairs"])
    path = bundle / "records" / f"{kind}.safetensors"
    header, body = read_header(path.read_bytes())
    what = rng.choice(["header"] * 5 + ["info"] * 5 + ["tensor"] * 3 + ["bytes", "other", "name"])
    if what == "info":
        info = json.loads(header["__metadata__"]["dfkd_ray.record"])
        fields = [
            "num_examples",
            "num_classes",
            "layers",
            "parts",
            "bases",
            "share",
            "temperature",
            "kind",
            "storage",
            "notes",
        ]
        if rng.random() < 0.6:
            info[rng.choice(fields)] = rng.choice([anything(rng), scalar(rng), [], [0] * 3, 10**9, [-1, 2, 3]])
        else:
            info = changed(rng, info, rng.choice([1, 3]))
        header["__metadata__"]["dfkd_ray.record"] = json.dumps(info)
        path.write_bytes(with_header(header, body))
    elif what == "header":
        path.write_bytes(changed_header(rng, path.read_bytes()))
    elif what == "tensor":
        from safetensors.torch import load, save

        state = tensors_of(rng, load(path.read_bytes()))
        path.write_bytes(save(state, {"dfkd_ray.record": header["__metadata__"]["dfkd_ray.record"]}))
    elif what == "other":
        other = rng.choice(["top", "all", "spectral", "spectral_pairs"])
        path.write_bytes((bundle / "records" / f"{other}.safetensors").read_bytes())
    elif what == "name":
        names = ["magic", "[red]x", "\x1b[31mx", "a\u202eb", "..x", "top.safetensors", "a" * 200]
        path.rename(path.with_name(f"{rng.choice(names)}.safetensors"))
    else:
        path.write_bytes(damaged(rng, path.read_bytes()))
    record = ["--set", "synthesis.method=records", "--set", f"synthesis.record={kind}"]
    own = [word for word in record if word != "--set"]
    synthesis = [word.removeprefix("synthesis.") for word in own]
    reference = ["--set", "reference.synthesis.method=records", "--set", f"reference.synthesis.record={kind}"]
    sets = [word for each in synthesis for word in ("--set", each)]
    words = rng.choice(
        [
            ["teacher", "info", "plain"],
            ["recover", "plain", *OUT, *TINY, *record, *reference],
            ["recover", "plain", *OUT, *TINY, *record, *reference],
            ["synthesize", "plain", *OUT, "--num-images", "4", "--device", "cpu", *sets],
        ]
    )
    return Case(words, TRIED, writes=WRITES)
