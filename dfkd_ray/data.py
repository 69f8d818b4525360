"""Real data sets, for training teachers, for test accuracy and for the upper bound. Imported by teachers and cli only.

Labels are numbers of a network's classes. A data set and a network are compared by the classes' names, where the
network has some: the order of class folders is no property of the network.

Nothing is downloaded unless requested. Small sets are kept in memory as uint8; images of celeba and of folders are
decoded when they are read. torchvision reads CIFAR's pickles only after checking their MD5 sums. It is imported where
it is needed: it loads PyTorch's compiler, which takes seconds.
"""

import errno
import gzip
import math
import os
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_ray import image_files, image_sets
from dfkd_ray.text import one_line
from dfkd_ray.untrusted import plain_file

BUNDLED = Path(__file__).parent / "bundled"
MAX_IDX_BYTES = 2**30  # EMNIST's largest file has 0.6 of it
MAX_IDX_DIMENSIONS = 4
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class LabelledImages:
    """A data set: `read(indices)` gives uint8 images (n, channels, height, width), `labels` is int64 (num_images,).

    `files`: of a folder, the image files in the order of the labels, relative to `folder`. `notes`: what a user should
    know about the set, a sentence each.
    """

    name: str
    read: Callable[[Sequence[int] | Tensor], Tensor]
    labels: Tensor
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    folder: Path | None = None
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def open_dataset(
    name: str,
    root: Path,
    *,
    train: bool,
    image_shape: Sequence[int] | None = None,
    download: bool = False,
    attribute: str = "Smiling",
    equal_classes: bool = True,
    class_names: Sequence[str] = (),
) -> LabelledImages:
    """Open a data set by name, or a folder with `train/<class>/…` and `test/<class>/…` by its path.

    Images are converted to `image_shape` (channels, height, width): grey is repeated or computed from colour, 28x28 is
    padded to 32x32 (unless 28x28 is requested), other sizes are resized. `attribute` is CelebA's label, and
    `equal_classes` keeps equally many images with and without it. `class_names`: those of the network, in its order;
    they decide the labels. `ValueError` for a class that the network does not have, and for an unknown or missing set;
    for the latter it tells where it looked and what to run.
    """
    if name in OPENERS:
        found = OPENERS[name](name, root, train, image_shape, download, attribute)
        found = balanced(found) if name == "celeba" and equal_classes else found
        return by_class_name(found, class_names)
    for folder in (Path(name), Path(os.path.expanduser(name))):
        if is_folder(folder):
            # One folder has one name, by whatever path it is given.
            found = open_folder(Path(os.path.realpath(folder)) / ("train" if train else "test"), image_shape)
            return by_class_name(found, class_names)
    shown = one_line(name, 120)
    raise ValueError(f"unknown data set {shown!r}; expected one of {', '.join(OPENERS)}, or a folder of class folders")


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; False for a name that is impossible on the file system."""
    try:
        return path.is_dir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def by_class_name(data: LabelledImages, class_names: Sequence[str]) -> LabelledImages:
    """A data set with the labels of a network with these classes, found by name, and its images in the order of them.

    A class folder may also have the name that `image_sets` gives it. `ValueError` for a class that the network does not
    have. A class without images is a note.
    """
    if not class_names or data.class_names == tuple(class_names):
        return data
    classes: dict[str, set[int]] = {}
    exported = image_sets.class_folders(len(class_names), class_names)
    for names in (class_names, image_sets.file_names(class_names), exported):
        for label, name in enumerate(names):
            classes.setdefault(comparable(name), set()).add(label)
    found = [classes.get(comparable(name), set()) for name in data.class_names]
    unknown = [name for name, labels in zip(data.class_names, found, strict=True) if len(labels) != 1]
    where, network = one_line(data.name, 60), listed(class_names)
    if unknown:
        several = all(classes.get(comparable(name)) for name in unknown)
        why = "several classes of the network have the name" if several else "the network has no class"
        raise ValueError(f"{where}: {why} {listed(unknown)}; its classes are {network}: call them by these names")
    numbers = torch.tensor([labels.pop() for labels in found])
    missing = [name for label, name in enumerate(class_names) if label not in numbers]
    labels = numbers[data.labels]
    notes = (f"{where} has no images of the network's {listed(missing)}",) if missing else ()
    if not data.files:
        return replace(data, labels=labels, class_names=tuple(class_names), notes=data.notes + notes)
    order = torch.argsort(labels, stable=True)
    return replace(
        data,
        read=partial(rows_through, data.read, order),
        labels=labels[order],
        class_names=tuple(class_names),
        files=tuple(data.files[row] for row in order.tolist()),
        notes=data.notes + notes,
    )


def comparable(name: str) -> str:
    """A class name for comparison: file systems differ in the form of accented letters."""
    return unicodedata.normalize("NFC", name).strip()


def listed(names: Sequence[str], most: int = 4) -> str:
    """Class names for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name, 20) for name in names[:most]) + more


def fit_images(images: Tensor, image_shape: Sequence[int]) -> Tensor:
    """uint8 images (n, c, h, w) in the wanted shape: channels, then padding (28 to 32) or antialiased resizing."""
    channels, height, width = image_shape
    if images.shape[1] != channels:
        if images.shape[1] == 1:
            images = images.expand(-1, channels, -1, -1)
        elif images.shape[1] == 3 and channels == 1:
            images = luminance(images)
        else:
            raise ValueError(f"images have {images.shape[1]} channels, the network wants {channels}")
    if is_padded(images.shape[1:], image_shape):
        images = F.pad(images, [2, 2, 2, 2])
    elif images.shape[2:] != (height, width):
        from torchvision.transforms.v2.functional import resize

        images = resize(images, [height, width], antialias=True)
    return images.contiguous()


def is_padded(given: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether images (c, h, w) get a border, as MNIST's do, and are not resized."""
    return tuple(given[1:]) == (28, 28) and tuple(wanted[1:]) == (32, 32)


def luminance(images: Tensor) -> Tensor:
    """uint8 colour images as grey, rounded as in Pillow: grey stays as it is (torchvision makes it darker by 1)."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)
    return ((images * weights).sum(dim=1, keepdim=True) + (1 << 15) >> 16).to(torch.uint8)


def in_memory(
    name: str, images: Tensor, labels: Tensor, class_names: Sequence[str], image_shape: Sequence[int] | None
) -> LabelledImages:
    """A data set that is kept in memory."""
    if image_shape is None:
        size = 32 if images.shape[2:] == (28, 28) else images.shape[2]
        image_shape = (images.shape[1], size, size)
    images = fit_images(images, image_shape)
    c, h, w = image_shape
    return LabelledImages(name, partial(rows_of, images), labels.long(), tuple(class_names), (c, h, w))


# Readers are partial functions instead of closures, so that they can be pickled for other processes.


def rows_of(images: Tensor, indices: Sequence[int] | Tensor) -> Tensor:
    """Images by index, from memory."""
    return images[indices]


def rows_through(
    read: Callable[[Sequence[int] | Tensor], Tensor], kept: Tensor, indices: Sequence[int] | Tensor
) -> Tensor:
    """Images by index into `kept`, a subset of a data set."""
    return read(kept[torch.as_tensor(indices)])


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes (LeCun's format), plain or `.gz`; reads only the declared size."""
    where = one_line(path, 120)
    if plain_file(path) is None:
        raise ValueError(f"{where}: no such file")
    shape: list[int] = []
    size = MAX_IDX_BYTES
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\x00\x00\x08" or head[3] > MAX_IDX_DIMENSIONS:
                raise ValueError(f"{where}: not an IDX file of unsigned bytes")
            sides = file.read(4 * head[3])
            if len(sides) == 4 * head[3]:
                shape = np.frombuffer(sides, ">i4").tolist()
                size = math.prod(shape)
            if min(shape, default=0) < 0 or size > MAX_IDX_BYTES:
                raise ValueError(f"{where}: its shape {shape} is none, or of more than {MAX_IDX_BYTES:,} bytes")
            data = file.read(size + 1) if shape or head[3] == 0 else b""
    except (OSError, EOFError, MemoryError, zlib.error) as error:
        raise ValueError(f"{where}: cannot be read: {one_line(error, 120)}") from None
    if len(data) != size:
        many = "more" if len(data) > size else f"{len(data):,}"
        raise ValueError(f"{where}: {many} bytes do not fit its shape {shape}; the file is truncated or damaged")
    return np.frombuffer(data, np.uint8).reshape(shape)


def open_idx(
    name: str, root: Path, train: bool, image_shape: Sequence[int] | None, download: bool, _attribute: str
) -> LabelledImages:
    """MNIST or Fashion-MNIST from IDX files, in the folders of torchvision or of the publisher's download."""
    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
    if download:
        from torchvision import datasets

        getattr(datasets, kind)(str(root), train=train, download=True)
    stem = "train" if train else "t10k"
    folders = [root / kind / "raw", root / name, root / name.replace("_", "-"), root]
    for folder in folders:
        for ending in ("", ".gz"):
            images, labels = (folder / f"{stem}-{part}-ubyte{ending}" for part in ("images-idx3", "labels-idx1"))
            if images.is_file() and labels.is_file():
                names = FASHION_CLASSES if name == "fashion_mnist" else [str(digit) for digit in range(10)]
                pixels, classes = torch.tensor(read_idx(images)).unsqueeze(1), torch.tensor(read_idx(labels))
                if (
                    pixels.ndim != 4
                    or classes.ndim != 1
                    or not pixels.numel() > 0
                    or pixels.shape[2] != pixels.shape[3]
                ):
                    raise ValueError(f"{images}: expected square images, and {labels.name} one label for each")
                if len(pixels) != len(classes):
                    raise ValueError(f"{images}: {len(pixels)} images, but {labels.name} has {len(classes)} labels")
                if int(classes.max()) >= len(names):
                    raise ValueError(f"{labels}: a label of {int(classes.max())}, expected 0 to {len(names) - 1}")
                return in_memory(name, pixels, classes, names, image_shape)
    raise missing(name, ", ".join(str(folder) for folder in folders))


def open_vision(
    name: str, root: Path, train: bool, image_shape: Sequence[int] | None, download: bool, _attribute: str
) -> LabelledImages:
    """CIFAR-10, CIFAR-100 or SVHN through torchvision."""
    from torchvision import datasets

    try:
        if name == "svhn":
            found = datasets.SVHN(str(root), split="train" if train else "test", download=download)
            return in_memory(name, torch.tensor(found.data), torch.tensor(found.labels), [*"0123456789"], image_shape)
        vision = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        found = vision(str(root), train=train, download=download)
    except RuntimeError as error:
        raise missing(name, f"{root} ({str(error).splitlines()[0]})") from None
    pixels = torch.tensor(found.data).permute(0, 3, 1, 2).contiguous()
    return in_memory(name, pixels, torch.tensor(found.targets), found.classes, image_shape)


def open_celeba(
    name: str, root: Path, train: bool, image_shape: Sequence[int] | None, download: bool, attribute: str
) -> LabelledImages:
    """CelebA with one attribute as a two-class problem, through torchvision; images are decoded as they are read."""
    from torchvision import datasets

    try:
        found = datasets.CelebA(str(root), split="train" if train else "test", download=download)
    except RuntimeError as error:
        raise missing(name, f"{root / 'celeba'} ({str(error).splitlines()[0]})") from None
    names = [name for name in found.attr_names if name]
    if attribute not in names:
        raise ValueError(f"celeba has no attribute {attribute!r}; it has {', '.join(names)}")
    labels = found.attr[:, names.index(attribute)]
    c, h, w = image_shape or (3, 224, 224)

    portraits = root / found.base_folder / "img_align_celeba"
    read = partial(decode_images, tuple(str(portraits / file) for file in found.filename), image_shape=(c, h, w))
    return LabelledImages(name, read, labels.long(), (f"not {attribute}", attribute), (c, h, w))


def balanced(data: LabelledImages, seed: int = 0) -> LabelledImages:
    """Equally many images of each class, as many as the rarest has: a seeded choice, in the set's order.

    The seed is fixed and not the training's: networks of all seeds are trained and tested on the same images.
    `ValueError` if a class has no image.
    """
    counts = torch.bincount(data.labels, minlength=len(data.class_names))
    size = int(counts.min())
    if size == 0:
        raise ValueError(
            f"{data.name}: no image of class {data.class_names[int(counts.argmin())]!r} among {len(data)}, so the "
            "classes cannot be made equal; take all images with `all_images`"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.nonzero(data.labels == label).flatten() for label in range(len(counts))]
    kept = torch.cat([some[torch.randperm(len(some), generator=generator)[:size]] for some in rows]).sort().values

    return replace(data, read=partial(rows_through, data.read, kept), labels=data.labels[kept])


def open_folder(folder: Path, image_shape: Sequence[int] | None) -> LabelledImages:
    """A folder of class folders; images are decoded when read. Without a shape, the first image defines it.

    Its name is that of the folder above, with a slash if a known data set has that name.
    """
    found = image_files.class_folders(folder)
    first = tuple(image_files.read(found.files[0]).shape)
    c, h, w = image_shape or first
    name = folder.parent.name or str(folder.parent)
    notes: tuple[str, ...] = ()
    if first[1:] != (h, w):
        how = "padded" if is_padded(first, (c, h, w)) else "resized"
        notes += (
            f"{one_line(folder, 80)}: its images (the first has {first[1]}x{first[2]} pixels) are {how} to {h}x{w}",
        )
    if found.left_out:
        endings = ", ".join(f"{count} {one_line(ending, 12)}" for ending, count in found.left_out.most_common(4))
        count = found.left_out.total()
        notes += (f"{one_line(folder, 80)}: {count} files are left out: no images, hidden or in no class ({endings})",)
    return LabelledImages(
        f"{name}/" if name in OPENERS else name,
        partial(decode_images, tuple(found.files), image_shape=(c, h, w)),
        torch.tensor(found.labels),
        tuple(found.names),
        (c, h, w),
        folder,
        tuple(file[len(f"{folder}/") :] for file in found.files),
        notes,
    )


def decode_images(files: Sequence[str], indices: Sequence[int] | Tensor, image_shape: Sequence[int]) -> Tensor:
    """Image files by index, decoded and converted to `image_shape`. `ValueError` for an invalid or truncated file."""
    return torch.cat([fit_images(image_files.read(files[int(index)])[None], image_shape) for index in indices])


def missing(name: str, where: str) -> ValueError:
    """The error for a missing data set."""
    return ValueError(
        f"data set {name!r} not found; looked in {where}; give its folder as `data_root`, or fetch it with `download`"
    )


def bundled_test_set(name: str, image_shape: Sequence[int]) -> LabelledImages | None:
    """The bundled test images of a data set, or None."""
    folder = BUNDLED / name
    if not (folder / "t10k-images-idx3-ubyte.gz").is_file():
        return None
    return open_idx(name, folder, False, image_shape, False, "")


OPENERS: dict[str, Callable[..., LabelledImages]] = {
    "cifar10": open_vision,
    "cifar100": open_vision,
    "mnist": open_idx,
    "fashion_mnist": open_idx,
    "svhn": open_vision,
    "celeba": open_celeba,
}
