"""Generator of data sets with images, folders or files in them that are none."""

import gzip
import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from fuzz.bundle_files import OUT, WRITES
from fuzz.damage import damaged
from fuzz.fuzzing import ANY, TRIED, Case, Desk
from fuzz.templates import TINY
from fuzz.weight_files import bomb


def png(width: int, height: int, depth: int = 8, colour: int = 0, rows: bytes = b"") -> bytes:
    """A PNG with a header that says so, and whatever rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def odd_image(rng: random.Random, path: Path) -> None:
    """Put something in the place of an image."""
    good = path.read_bytes()
    path.unlink()
    kind = rng.choice(
        ["bytes"] * 4 + ["bomb", "huge", "mode", "mode", "folder", "pipe", "loop", "zero", "size", "chunk", "text"]
    )
    if kind == "bytes":
        path.write_bytes(damaged(rng, good))
    elif kind == "bomb":
        path.write_bytes(png(20_000, 20_000, rows=bytes(20_001 * 20_000 // 8)))
    elif kind == "huge":
        path.write_bytes(png(rng.choice([2**31 - 1, 0, 100_000]), rng.choice([2**31 - 1, 1, 100_000])))
    elif kind == "mode":
        mode = rng.choice(["I;16", "F", "I", "RGBA", "P", "1", "LA", "CMYK"])
        number = {"I;16": np.uint16, "F": np.float32, "I": np.int32}.get(mode, np.uint8)
        image = Image.fromarray((np.arange(256) * 200).reshape(16, 16).astype(number))
        image = image if image.mode == mode else image.convert(mode)
        image.save(path, "TIFF" if mode in ("F", "I", "CMYK") else "PNG")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("loop", "zero"):
        path.symlink_to(path.name if kind == "loop" else "/dev/zero")
    elif kind == "size":
        path.write_bytes(png(*rng.choice([(1, 1), (1, 2000), (0, 0), (17, 3)]), rows=bytes(2001)))
    elif kind == "chunk":
        path.write_bytes(good.replace(b"IDAT", rng.choice([b"\x00DAT", b"IDA\xff", b"iDAT", b"    "])))
    else:
        path.write_text("not an image")


def odd_folder(rng: random.Random, folder: Path) -> None:
    """Class folders that do not fit together."""
    kind = rng.choice(["gone", "empty", "more", "test", "names", "none", "link", "file"])
    train = folder / "train"
    if kind in ("gone", "empty"):
        for path in (train / "bee").iterdir():
            path.unlink()
        if kind == "gone":
            (train / "bee").rmdir()
    elif kind == "more":
        (train / rng.choice(["dog", "[red]x", "a\x1b[31mb", "réseau", "a\u202eb", ".hidden"])).mkdir()
    elif kind == "test":
        (folder / "test" / "bee").rename(folder / "test" / rng.choice(["wasp", "[b]", "\x1b[31m"]))
    elif kind == "names":
        for split in ("train", "test"):
            for index, name in enumerate(("ant", "bee", "cat")):
                (folder / split / name).rename(folder / split / f"{rng.choice(['', '[b]', ' '])}{index * 5}")
    elif kind == "none":
        (folder / "test").rename(folder / "tests")
    elif kind == "link":
        (train / "bee" / "loop").symlink_to("../..")
    else:
        (folder / rng.choice(["train", "test"]) / "dog").write_text("a file where a class folder is")


def odd_idx(rng: random.Random, folder: Path) -> None:
    """An IDX file that is not what it says."""
    path = rng.choice(sorted((folder / "mnist").iterdir()))
    data = path.read_bytes()
    numbers = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 10**6]
    heads = [
        b"\0\0\x08" + bytes([dims]) + b"".join(rng.choice(numbers).to_bytes(4, "big") for _ in range(dims))
        for dims in (0, 1, 2, 3, 4, 255)
    ]
    kind = rng.choice(["bytes", "head", "head", "gz", "labels", "bomb", "type"])
    if kind == "gz":
        path.with_name(f"{path.name}.gz").write_bytes(damaged(rng, gzip.compress(data)))
        path.unlink()
    elif kind == "bomb":
        path.with_name(f"{path.name}.gz").write_bytes(bomb("gz", gz_bomb))
        path.unlink()
    elif kind == "labels" and "labels" in path.name:
        path.write_bytes(data[:8] + bytes([rng.choice([10, 200, 255])]) * (len(data) - 8))
    elif kind == "type":
        path.write_bytes(b"\0\0" + bytes([rng.choice([0, 9, 11, 13])]) + data[3:])
    else:
        path.write_bytes(damaged(rng, data) if kind == "bytes" else rng.choice(heads) + data[16:])


def gz_bomb() -> bytes:
    """A few megabytes that unpack to gigabytes."""
    buffer = io.BytesIO()
    with gzip.open(buffer, "wb", compresslevel=1) as file:
        file.write(b"\0\0\x08\x03" + (5 * 10**6).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2)
        for _ in range(240):
            file.write(bytes(16 << 20))
    return buffer.getvalue()


def images(rng: random.Random, desk: Desk) -> Case:
    """Data sets with images, folders or files in them that are none."""
    desk.take("teacher")
    desk.take("plain")
    kind = rng.choice(["image"] * 5 + ["folder"] * 2 + ["idx"] * 2)
    data = "large" if rng.random() < 0.3 else "images"
    desk.take(data)
    if kind == "image":
        for path in rng.sample(sorted((desk.work / data).rglob("*.png")), rng.choice([1, 1, 3, 18])):
            odd_image(rng, path)
    elif kind == "folder":
        odd_folder(rng, desk.work / data)
    else:
        odd_idx(rng, desk.take("digits"))
        train = ["teacher", "train", "resnet8", "--dataset", "mnist", "--data-root", "digits", "--epochs", "1"]
        train += ["--arguments", '{"width_multiplier": 0.25}', "--set", "batch_size=8", "--out", "target"]
        return Case(train, ANY, writes=["work/target", "work/.target-training"])
    train = [
        "teacher",
        "train",
        "resnet8",
        "--dataset",
        data,
        "--epochs",
        "1",
        "--arguments",
        '{"width_multiplier": 0.25}',
    ]
    train += ["--set", "batch_size=4", "--set", "num_threads=1", "--out", "target"]
    real = ["--method", "real", "--real-data", data]
    words = rng.choice(
        [
            train,
            train,
            ["teacher", "record", "plain", "--dataset", data, "--rank", "2", "--threads", "1", "--kinds", "top"],
            ["recover", "teacher", *OUT, *TINY, "--test-data", data],
            ["recover", "teacher", *OUT, *TINY, *real],
        ]
    )
    writes = [*WRITES, "work/.target-training", "work/plain/records"]
    return Case(words, TRIED, writes=writes, encoding=rng.choice(["utf-8", "ascii"]))
