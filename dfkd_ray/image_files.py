"""Reads image files and class folders of unknown origin as uint8 RGB; refuses what cannot be converted correctly.

The size is checked in the header before pixels are decoded. Grey of 12 and 16 bits is scaled (Pillow's own conversion
clips it). Floating-point and 32-bit images are refused, because their value range is unknown, and so are files of
several images, because only the first would be used.
"""

import os
import re
import warnings
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dfkd_ray.text import one_line
from dfkd_ray.untrusted import plain_file, reason

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
MAX_PIXELS = 2**26  # of one image
MAX_FOLDERS = 100_000  # within a class folder
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # older Pillow opens their 16-bit grey as 32-bit
# Tags of a TIFF file. Bit 0 of its kind: a smaller version of another image.
TIFF_KIND, TIFF_BITS, TIFF_BLACK_IS_ZERO, TIFF_SAMPLE = 254, 258, 262, 339
SIGNED = 2  # of the samples
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


class ClassFolders(NamedTuple):
    """The contents of a folder of class folders; `labels` are indices into `names`, one per file.

    `left_out`: number of files that are no images, by ending, of hidden ones, and of images outside all class folders.
    """

    names: list[str]
    files: list[str]
    labels: list[int]
    left_out: Counter[str]


def read(path: str | Path) -> Tensor:
    """Read an image file as uint8 (3, height, width). `ValueError`, with the file's name, if that is impossible."""
    where = one_line(path, 120)
    if plain_file(Path(path)) is None:
        raise ValueError(f"{where}: no such image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which are checked here, and metadata, which is not used
            with Image.open(path) as image:
                problem = problem_of(image)
                picture = None if problem else colours(image)
    except PermissionError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise various exceptions for damaged files
        raise ValueError(f"{where}: cannot be decoded: {reason(error)}") from None
    if picture is None:
        raise ValueError(f"{where}: {problem}")
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


def problem_of(image: Image.Image) -> str | None:
    """Why an opened image is refused, or None."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"an image of {width:,} x {height:,} pixels, expected at most {MAX_PIXELS:,} altogether"
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BIT_FORMATS):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        return f"{kind} pixels (mode {image.mode}), whose range is not known; convert it to 8 or 16 bits"
    if SIGNED in tag(image, TIFF_SAMPLE, ()):
        return "signed pixels, whose range is not known; convert it to unsigned ones"
    if has_several(image):
        return f"a {image.format} file of several images, expected one; write each into a file of its own"
    return None


def has_several(image: Image.Image) -> bool:
    """Whether a file has a second picture; smaller versions of the first (a camera's preview, a pyramid) are none."""
    if image.format == "MPO":  # a camera's JPEG
        return False
    try:
        image.seek(1)
    except EOFError:
        return False
    smaller = tag(image, TIFF_KIND, 0) & 1
    image.seek(0)
    return not smaller


def tag(image: Image.Image, number: int, default: Any) -> Any:
    """A tag of a TIFF file; the default for other files."""
    return getattr(image, "tag_v2", {}).get(number, default) if image.format == "TIFF" else default


def colours(image: Image.Image) -> np.ndarray:
    """The pixels as uint8 (height, width, 3)."""
    if image.mode in SIXTEEN_BITS or image.mode == "I":
        most = 2 ** tag(image, TIFF_BITS, (16,))[0] - 1
        grey = np.asarray(image).astype(np.int64).clip(0, most)
        if tag(image, TIFF_BLACK_IS_ZERO, 1) == 0:  # Pillow inverts only 8 bits
            grey = most - grey
        return np.repeat(((grey * 255 + most // 2) // most).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def class_folders(folder: Path) -> ClassFolders:
    """What a folder of class folders holds, in the order of the class names: numbers as numbers, others as text.

    `ValueError` if there is no class folder, if one has no image or an undecodable name, or if links form a cycle.
    """
    expected = f"{one_line(folder, 120)}: expected class folders with images"
    try:
        with os.scandir(folder) as entries:
            is_folder = {entry.name: os.path.isdir(entry.path) for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{expected} (there is no such folder)") from None
    names = in_order([name for name, is_one in is_folder.items() if is_one and not is_hidden(name)])
    if not names:
        raise ValueError(f"{expected} (there is none in it)")
    files: list[str] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter("hidden" for name, is_one in is_folder.items() if is_one and is_hidden(name))
    loose = [name for name, is_one in is_folder.items() if not is_one and not is_hidden(name)]
    left_out += Counter("in no class" for name in loose if name.lower().endswith(EXTENSIONS))
    for label, name in enumerate(names):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{expected} (the name {one_line(name, 60)} is no UTF-8 text; rename it)") from None
        found, others = image_files(os.path.join(folder, name))
        if not found:
            raise ValueError(f"{expected} (no image in {one_line(name, 60)}; known: {', '.join(EXTENSIONS)})")
        files += found
        labels += [label] * len(found)
        left_out += others
    return ClassFolders(names, files, labels, left_out)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden."""
    return name.startswith(".")


def in_order(names: list[str]) -> list[str]:
    """Names of class folders, sorted: as numbers if all of them are numbers (2 before 10), otherwise as text."""
    if all(NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (Decimal(name), name))
    return sorted(names)


def image_files(folder: str) -> tuple[list[str], Counter[str]]:
    """The image files in a folder and those below it, sorted by folder and name, and the endings of all other files.

    Links are followed. What is hidden (`.ipynb_checkpoints`, and `._1.png`, where macOS keeps what it knows of 1.png)
    is left out, and counted if it looks like images.
    """
    found: dict[str, list[str]] = {}
    others: Counter[str] = Counter()
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while todo:
        place, above = todo.pop()
        status = os.stat(place)
        itself = (status.st_dev, status.st_ino)
        if itself in above:
            raise ValueError(f"{one_line(place, 120)}: a link that leads back to a folder it lies in")
        if len(found) >= MAX_FOLDERS:
            raise ValueError(f"{one_line(folder, 120)}: more than {MAX_FOLDERS:,} folders, those behind links counted")
        found[place] = []
        for name in os.listdir(place):
            inner = os.path.join(place, name)
            if is_hidden(name):
                if name.lower().endswith(EXTENSIONS) or os.path.isdir(inner):
                    others["hidden"] += 1
            elif os.path.isdir(inner):  # False for a link to itself, for which DirEntry.is_dir raises
                todo.append((inner, above | {itself}))
            elif name.lower().endswith(EXTENSIONS):
                found[place].append(name)
            else:
                others[os.path.splitext(name)[1].lower() or "no ending"] += 1
    return [os.path.join(place, name) for place in sorted(found) for name in sorted(found[place])], others
