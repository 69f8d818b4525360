"""Exports synthetic images for other programs: PNG files in class folders, or Parquet with one batch per file.

`folder`: `train/<class>/<batch>-<row>.png`, 8 bits, grey or colour. `ImageFolder` and this project's folder data set
number classes by the sorted folder names. So a folder has the class's name only if the names sort in class order;
otherwise it begins with the class's number, zero-padded. Images without a label are outside `train`, in `unlabelled/`:
inside `train` they would be read as class 0. Images for independent labels have no class, and so no label here.

`parquet`: `part-<batch>.parquet` with the columns in `COLUMNS`. A uint8 image with 1 or 3 channels is stored as a PNG
file; other images as bytes in C order (channels, height, width), little-endian. uint8 spans the pixel range, floats are
pixel values. Common properties of all images are in the file's metadata.

`synthesis.json` is written last and marks a complete export. Until then `.synthesis.json` claims the folder.
"""

import contextlib
import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import dfkd_ray
from dfkd_ray import storage, targets
from dfkd_ray.batches import NO_LABEL, Batch

SCHEMA = "dfkd_ray.images/1"
RECORD, UNFINISHED = "synthesis.json", ".synthesis.json"
TRAIN, UNLABELLED = "train", "unlabelled"
PNG_CHANNELS = (1, 3)
WRITERS = 8  # threads that write PNG files; they mostly wait for the disk

IMAGE_SET = targets.Product("a set of images", dict.fromkeys((RECORD, UNFINISHED), targets.claims(SCHEMA)))

COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "image": (pa.binary(), "a PNG file (uint8 with 1 or 3 channels), else bytes in C order, little-endian"),
    "dtype": (pa.string(), "type of a stored pixel: uint8, float16 or float32"),
    "shape": (pa.list_(pa.int64()), "channels, height, width"),
    "label": (pa.int64(), "class asked for; -1: none"),
    "batch_index": (pa.int64(), "which batch of the key"),
    "row": (pa.int64(), "which image of the batch"),
    "synthesis_key": (pa.string(), "of teacher hash, synthesis config and domain"),
}


@dataclass(frozen=True)
class Export:
    """An export: target folder, number of images, and the common properties of all images."""

    folder: Path
    format: str
    num_images: int
    key: str
    config: dict[str, Any]
    teacher: str
    teacher_hash: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixel_range: tuple[float, float]
    head: str = "softmax"

    @property
    def num_batches(self) -> int:
        """The number of batches; the last one may be used partly."""
        return -(-self.num_images // self.config["batch_size"])

    def num_rows(self, index: int) -> int:
        """The number of images of a batch that belong to the export."""
        return min(self.config["batch_size"], self.num_images - index * self.config["batch_size"])


def prepare(export: Export) -> list[int]:
    """Claim the folder; returns the indices of the batches to write.

    `ValueError` if the format cannot hold the images, or if the folder holds something else. PNG files of an earlier
    run are written again: checking each one would cost as much.
    """
    if export.format not in FORMATS:
        raise ValueError(f"`format={export.format}`: expected {' or '.join(FORMATS)}")
    channels = export.image_shape[0]
    if export.format == "folder" and channels not in PNG_CHANNELS:
        raise ValueError(
            f"`format=folder` writes PNG files of 1 or 3 channels, the images of {export.teacher} have {channels}; "
            "use `format=parquet`"
        )
    targets.check(export.folder, IMAGE_SET)
    check_folder(export)
    missing = [index for index in range(export.num_batches) if not is_written(export, index)]
    about = {"schema": SCHEMA, "key": export.key, "format": export.format, "num_images": export.num_images}
    storage.folder(export.folder).write(UNFINISHED, as_json(about))
    if missing:
        (export.folder / RECORD).unlink(missing_ok=True)
    return missing


def check_folder(export: Export) -> None:
    """`ValueError` if the folder holds other images, or more of these than requested."""
    folder = export.folder
    images = [folder / TRAIN, folder / UNLABELLED, *sorted(folder.glob("part-*.parquet"))]
    images = [path for path in images if path.exists()]
    # A run that failed before its first image has claimed nothing.
    records = (RECORD, UNFINISHED) if images else (RECORD,)
    known = [read_record(folder / name) for name in records if (folder / name).exists()]
    for record in known:
        for name, ours in (("key", export.key), ("format", export.format)):
            if record[name] != ours:
                raise ValueError(
                    f"`out` {folder}: it holds images of {name} {str(record[name])[:12]}, asked for are those of "
                    f"{name} {ours[:12]}; choose another folder"
                )
        if record["num_images"] > export.num_images:
            raise ValueError(
                f"`out` {folder}: it holds {record['num_images']} images, or was going to; for fewer "
                f"({export.num_images}) choose another folder: their batches are in the cache"
            )


def read_record(path: Path) -> dict[str, Any]:
    """The description of an export in its folder."""
    record: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(path.read_text(encoding="utf-8"))
    kinds = {"schema": str, "key": str, "format": str, "num_images": int}
    whole = isinstance(record, dict) and all(type(record.get(name)) is kind for name, kind in kinds.items())
    if not whole or record["schema"] != SCHEMA:
        raise ValueError(f"{path}: damaged, or not of schema {SCHEMA!r}; choose another folder")
    return record


def is_written(export: Export, index: int) -> bool:
    """Whether a batch's Parquet file is complete and correct. `ValueError` for a file of another key."""
    path = part_path(export.folder, index)
    if export.format != "parquet" or not path.exists():
        return False
    try:
        found = pq.read_metadata(path)
    except pa.ArrowInvalid:  # damaged: write it again
        return False
    if (found.metadata or {}).get(b"dfkd_ray.synthesis_key") != export.key.encode():
        raise ValueError(f"{path}: not of synthesis {export.key[:12]}; choose another folder, or remove it")
    return found.num_rows == export.num_rows(index)


def write(export: Export, batch: Batch) -> None:
    """Write the images of a batch that belong to the export; each file is written atomically."""
    num_rows = export.num_rows(batch.index)
    labels = batch.labels[:num_rows]
    if export.head != "softmax":
        labels = np.full_like(labels, NO_LABEL)
    FORMATS[export.format](export, replace(batch, images=batch.images[:num_rows], labels=labels))


def finish(export: Export, *, seconds: float, num_made: int, num_found: int, num_kept: int) -> Path:
    """Write `synthesis.json`, after all images; the counts are batches of this run."""
    record = {
        "schema": SCHEMA,
        "key": export.key,
        "teacher": export.teacher,
        "teacher_hash": export.teacher_hash,
        "config": export.config,
        "num_images": export.num_images,
        "format": export.format,
        "package_version": dfkd_ray.__version__,
        "seconds": round(seconds, 3),
        "num_made": num_made,
        "num_found": num_found,
        "num_kept": num_kept,
    }
    storage.folder(export.folder).write(RECORD, as_json(record))
    (export.folder / UNFINISHED).unlink(missing_ok=True)
    return export.folder / RECORD


def as_json(record: dict[str, Any]) -> bytes:
    """A record as readable JSON."""
    return (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()


def write_pngs(export: Export, batch: Batch) -> None:
    """One PNG file per image, in the folder of its class."""
    classes = class_folders(export.num_classes, export.class_names)
    images = eight_bit(batch.images, export.pixel_range)

    def write_one(row: int) -> None:
        label = int(batch.labels[row])
        parent = UNLABELLED if label == NO_LABEL else f"{TRAIN}/{classes[label]}"
        storage.folder(export.folder / parent).write(f"{batch.index:06d}-{row:04d}.png", png(images[row]))

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write_one, range(len(images))))


def class_folders(num_classes: int, class_names: Sequence[str]) -> list[str]:
    """A folder name per class; the sorted names are in class order."""
    width = len(str(num_classes - 1))
    numbers = [f"{number:0{width}d}" for number in range(num_classes)]
    if not class_names:
        return numbers
    names = file_names(class_names)
    alike = len({name.casefold() for name in names}) < num_classes
    if all(names) and names == sorted(names) and not alike:
        return names
    return [f"{number}-{name}" if name else number for number, name in zip(numbers, names, strict=True)]


def file_names(class_names: Sequence[str]) -> list[str]:
    """Class names without characters that file systems refuse, and without a leading dot, which hides a folder."""
    return [re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).strip(" .")[:60] for name in class_names]


def eight_bit(images: np.ndarray, pixel_range: tuple[float, float]) -> np.ndarray:
    """Stored images as uint8 over the pixel range: round(255 (x - low) / (high - low)) where they are floats."""
    if images.dtype == np.uint8:
        return images
    low, high = pixel_range
    scaled = (images.astype(np.float32) - low) / (high - low)
    return (scaled * 255).round().clip(0, 255).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    """A uint8 image (channels, height, width) of 1 or 3 channels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def part_path(folder: Path, index: int) -> Path:
    """The Parquet file of batch `index`."""
    return folder / f"part-{index:06d}.parquet"


def write_part(export: Export, batch: Batch) -> None:
    """One Parquet file with a row per image."""
    encode = png if is_png(batch.images.dtype.name, batch.images.shape[1:]) else raw
    size = len(batch.labels)
    columns = {
        "image": [encode(image) for image in batch.images],
        "dtype": [batch.images.dtype.name] * size,
        "shape": [list(batch.images.shape[1:])] * size,
        "label": batch.labels,
        "batch_index": [batch.index] * size,
        "row": list(range(size)),
        "synthesis_key": [batch.key] * size,
    }
    fields = [pa.field(name, kind, metadata={"meaning": meaning}) for name, (kind, meaning) in COLUMNS.items()]
    table = pa.table(columns, schema=pa.schema(fields, metadata=part_metadata(export)))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, use_dictionary=False)
    path = part_path(export.folder, batch.index)
    storage.folder(path.parent).write(path.name, memoryview(sink.getvalue()))


def part_metadata(export: Export) -> dict[str, str]:
    """The metadata of a Parquet file: common properties of its images; values other than text are JSON."""
    texts = {
        "schema": SCHEMA,
        "synthesis_key": export.key,
        "teacher": export.teacher,
        "teacher_hash": export.teacher_hash,
        "config": json.dumps(export.config, sort_keys=True),
        "num_classes": json.dumps(export.num_classes),
        "class_names": json.dumps(export.class_names),
        "mean": json.dumps(export.mean),
        "std": json.dumps(export.std),
        "pixel_range": json.dumps(export.pixel_range),
    }
    return {f"dfkd_ray.{name}": text for name, text in texts.items()}


def read_part(path: Path) -> Batch:
    """The batch in a Parquet file, pixels exactly as they were stored. `ValueError` for a file of another schema."""
    table = pq.read_table(path)
    found = (table.schema.metadata or {}).get(b"dfkd_ray.schema", b"none").decode()
    if found != SCHEMA:
        raise ValueError(f"{path}: schema is {found!r}, this version reads {SCHEMA!r}")
    rows = table.to_pylist()
    images = np.stack([read_image(row["image"], row["dtype"], row["shape"]) for row in rows])
    return Batch(rows[0]["batch_index"], images, table["label"].to_numpy(), rows[0]["synthesis_key"])


def is_png(dtype: str, shape: Sequence[int]) -> bool:
    """Whether Parquet stores images of this dtype and shape (channels, height, width) as PNG files."""
    return dtype == "uint8" and shape[0] in PNG_CHANNELS


def raw(image: np.ndarray) -> bytes:
    """An image's bytes, C order, little-endian."""
    return image.astype(image.dtype.newbyteorder("<")).tobytes()


def read_image(data: bytes, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """The image in an `image` column, (channels, height, width)."""
    if is_png(dtype, shape):
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        return pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(tuple(shape)).astype(dtype)


FORMATS: dict[str, Callable[[Export, Batch], None]] = {"folder": write_pngs, "parquet": write_part}
