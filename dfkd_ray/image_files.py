"""Reads image files and class folders of unknown origin as uint8 RGB; refuses what cannot be converted correctly.

The size is checked in the header before pixels are decoded. 16-bit grey is scaled (Pillow's own conversion clips it).
Floating-point and 32-bit images are refused, because their value range is unknown.
"""

import os
import warnings
from pathlib import Path

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
    return None


def colours(image: Image.Image) -> np.ndarray:
    """The pixels as uint8 (height, width, 3)."""
    if image.mode in SIXTEEN_BITS or image.mode == "I":
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def class_folders(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """For a folder of class folders: the sorted class names, the image files in order, and the class of each file.

    `ValueError` if there is no class folder, if one has no image or an undecodable name, or if links form a cycle.
    """
    expected = f"{one_line(folder, 120)}: expected class folders with images"
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if os.path.isdir(entry.path))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{expected} (there is no such folder)") from None
    if not names:
        raise ValueError(f"{expected} (there is none in it)")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{expected} (the name {one_line(name, 60)} is no UTF-8 text; rename it)") from None
        found = image_files(os.path.join(folder, name))
        if not found:
            raise ValueError(f"{expected} (no image in {one_line(name, 60)}; known: {', '.join(EXTENSIONS)})")
        files += found
        labels += [label] * len(found)
    return names, files, labels


def image_files(folder: str) -> list[str]:
    """The image files in a folder and those below it, sorted by folder and name; links are followed."""
    found: dict[str, list[str]] = {}
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
            if os.path.isdir(inner):  # False for a link to itself, for which DirEntry.is_dir raises
                todo.append((inner, above | {itself}))
            elif name.lower().endswith(EXTENSIONS):
                found[place].append(name)
    return [os.path.join(place, name) for place in sorted(found) for name in sorted(found[place])]
