"""Images and data sets from elsewhere: read faithfully, or refused in one line that names the file."""

import gzip
import os
import random
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_ray import data, image_files, teachers
from helpers import refusal

SHAPE = (3, 16, 16)
GREY = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


@pytest.fixture
def folder(tmp_path):
    """A data set of two classes, the first of whose images a test replaces."""
    for split in ("train", "test"):
        for label, value in (("cat", 10), ("dog", 200)):
            (tmp_path / "pets" / split / label).mkdir(parents=True)
            Image.new("RGB", (16, 16), (value,) * 3).save(tmp_path / "pets" / split / label / "0.png")
    return tmp_path / "pets"


def first(folder, image_shape=SHAPE):
    """The first training image."""
    return data.open_dataset(str(folder), folder, train=True, image_shape=image_shape).read([0])[0]


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, rows=b"", kind=0, bits=8):
    """A PNG with any header."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def broken_name(path):
    whole = bytearray((path.parent.parent / "dog" / "0.png").read_bytes())
    place = whole.index(b"IDAT")
    whole[place : place + 4] = b"\x00\x01\x02\x03"
    path.write_bytes(whole)


BROKEN = {
    "gigapixels": lambda path: path.write_bytes(png(60_000, 60_000)),
    "many_pixels": lambda path: path.write_bytes(png(10_000, 10_000)),
    "most_pixels": lambda path: path.write_bytes(png(2**31 - 1, 2**31 - 1)),
    "no_pixels": lambda path: path.write_bytes(png(0, 0)),
    "no_rows": lambda path: path.write_bytes(png(16, 16)),
    "chunk_name": broken_name,
    "text_bomb": lambda path: path.write_bytes(
        png(4, 4)[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70 << 20))) + png(4, 4)[33:]
    ),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "cut": lambda path: os.truncate(path, 60),
    "folder_of_that_name": lambda path: path.unlink() or os.mkfifo(path),
    "device": lambda path: path.unlink() or path.symlink_to("/dev/zero"),
    "link_to_nothing": lambda path: path.unlink() or path.symlink_to("nowhere"),
    "loop": lambda path: path.unlink() or path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_image_that_cannot_be_read_is_refused_by_its_files_name(folder, kind):
    BROKEN[kind](folder / "train" / "cat" / "0.png")
    refusal(lambda: first(folder), os.path.join("cat", "0.png"))


@pytest.mark.parametrize("kind", ["gigapixels", "chunk_name", "empty"])
def test_an_image_that_would_give_the_shape_is_refused_by_its_files_name(folder, kind):
    BROKEN[kind](folder / "train" / "cat" / "0.png")
    refusal(lambda: first(folder, None), os.path.join("cat", "0.png"))


def test_sixteen_bit_grey_is_scaled_and_not_clipped(folder):
    Image.fromarray(GREY).save(folder / "train" / "cat" / "0.png")
    expected = np.rint(GREY / 257).astype(np.uint8)
    for channel in first(folder):
        np.testing.assert_array_equal(channel.numpy(), expected)
    Image.fromarray(GREY.astype(">u2")).save(folder / "train" / "cat" / "0.tif")
    (folder / "train" / "cat" / "0.png").unlink()
    np.testing.assert_array_equal(first(folder)[0].numpy(), expected)


def rows_of(array):
    """The rows of a PNG with these big-endian samples."""
    return b"".join(b"\0" + row.tobytes() for row in array)


def test_sixteen_bit_colour_is_scaled(folder):
    colours = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)
    for name, samples, kind in (
        ("rgb.PNG", colours, 2),
        ("rgba.png", np.concatenate([colours, GREY[..., None]], axis=-1), 6),
        ("grey_alpha.png", np.stack([GREY, GREY], axis=-1), 4),
    ):
        (folder / "train" / "cat" / name).write_bytes(png(16, 16, rows_of(samples.astype(">u2")), kind, 16))
        found = image_files.read(folder / "train" / "cat" / name).numpy().astype(int)
        expected = (colours if kind != 4 else np.stack([GREY] * 3, axis=-1)).transpose(2, 0, 1) / 257
        assert abs(found - expected).max() <= 1, name


def tiff(samples, bits, *, black_is_zero=1, kind=1, height=16, width=16):
    """An uncompressed grey TIFF with one sample per pixel; `kind` 1: unsigned, 2: signed, 3: floating-point."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: black_is_zero, 273: 8, 277: 1, 278: height}
    tags |= {279: len(samples), 339: kind}
    fields = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in sorted(tags.items()))
    return struct.pack("<2sHI", b"II", 42, 8 + len(samples)) + samples + struct.pack("<H", 10) + fields + bytes(4)


def twelve_bits(values):
    pairs = values.reshape(-1, 2).tolist()
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


def test_grey_tiffs_of_every_kind_are_scaled_as_they_say(folder):
    path, grey = folder / "train" / "cat" / "0.tif", np.rint(GREY / 257)
    for content, expected in (
        (tiff(GREY.astype("<u2").tobytes(), 16), grey),
        (tiff(GREY.astype("<u2").tobytes(), 16, black_is_zero=0), 255 - grey),
        (tiff(twelve_bits(GREY >> 4), 12), grey),
    ):
        path.write_bytes(content)
        assert abs(image_files.read(path)[0].numpy() - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_signed_pixels_are_refused_by_file_name(folder, bits):
    path = folder / "train" / "cat" / "0.tif"
    path.write_bytes(tiff(bytes(16 * 16 * bits // 8), bits, kind=2))
    refusal(lambda: image_files.read(path), "0.tif", "range")


FRAMES = [Image.new("RGB", (16, 16), (value,) * 3) for value in (10, 200, 90)]


@pytest.mark.parametrize("name", ["a.tif", "a.webp", "a.png", "gif.png"])
def test_a_file_of_several_images_is_refused_and_one_of_that_format_is_read(folder, name):
    path, kind = folder / "train" / "cat" / name, "GIF" if name == "gif.png" else None
    FRAMES[0].save(path, kind, save_all=True, append_images=FRAMES[1:])
    refusal(lambda: image_files.read(path), name, "several images")
    FRAMES[0].save(path, kind)
    assert abs(image_files.read(path).int() - 10).max() <= 4  # WebP is lossy


def test_a_camera_s_second_picture_and_a_smaller_version_are_no_further_image(folder):
    path = folder / "train" / "cat" / "a.jpg"
    FRAMES[1].save(path, "MPO", save_all=True, append_images=FRAMES[:1], quality=100)
    assert abs(image_files.read(path).int() - 200).max() <= 2
    path = path.with_suffix(".tif")
    FRAMES[1].save(path, save_all=True, append_images=[FRAMES[0].resize((8, 8))])
    with Image.open(path) as image:
        image.seek(1)
        place = image.tag_v2._offset  # type: ignore[attr-defined]
    whole = bytearray(path.read_bytes())
    smaller = struct.pack("<HHII", 254, 4, 1, 1)  # in the place of the first tag, which holds the width
    count = struct.unpack_from("<H", whole, place)[0]
    end = place + 2 + 12 * count
    fields = smaller + bytes(whole[place + 2 : end])
    moved = len(whole) + len(whole) % 2
    whole += bytes(moved - len(whole)) + struct.pack("<H", count + 1) + fields + bytes(4)
    first = struct.unpack_from("<I", whole, 4)[0]
    after = first + 2 + 12 * struct.unpack_from("<H", whole, first)[0]
    struct.pack_into("<I", whole, after, moved)
    path.write_bytes(whole)
    assert image_files.read(path).unique().tolist() == [200] and image_files.read(path).shape == SHAPE


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.bmp", "a.ppm", "a.pgm", "a.tif", "a.webp", "a.PNG"])
def test_an_image_of_any_format_is_read_whole_and_refused_when_cut(folder, name):
    path = folder / "train" / "cat" / name
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    (image.convert("L") if name == "a.pgm" else image).save(path)
    assert image_files.read(path).shape == (3, 64, 64)
    assert os.path.join("cat", name) in [os.path.relpath(file, folder / "train") for file in listed(folder)]
    os.truncate(path, path.stat().st_size * 2 // 3)
    refusal(lambda: image_files.read(path), name, "cannot be decoded")


def listed(folder):
    return image_files.class_folders(folder / "train").files


def test_files_that_are_no_images_are_counted_in_a_note(folder):
    for name in ("a.gif", "b.GIF", "list.txt", "README", ".hidden"):
        (folder / "train" / "cat" / name).write_text("no image")
    found = data.open_dataset(str(folder), folder, train=True, image_shape=SHAPE)
    assert len(found) == 2 and len(found.notes) == 1
    assert all(part in found.notes[0] for part in ("4 files", "2 .gif", "1 .txt", "1 no ending"))


def test_hidden_files_and_folders_are_left_out_and_counted(folder):
    for name in (".ipynb_checkpoints", "cat/.ipynb_checkpoints"):
        (folder / "train" / name).mkdir()
        shutil.copy(folder / "train" / "dog" / "0.png", folder / "train" / name / "0-checkpoint.png")
    (folder / "train" / "cat" / "._0.png").write_text("no image")
    found = data.open_dataset(str(folder), folder, train=True, image_shape=SHAPE)
    assert found.class_names == ("cat", "dog") and found.files == ("cat/0.png", "dog/0.png")
    assert "3 hidden" in found.notes[0]


def test_grey_images_of_a_grey_network_keep_their_values_and_colour_becomes_pillows(folder):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(folder / "train" / "cat" / "0.png")
    assert torch.equal(first(folder, (1, 16, 16)).flatten(), torch.arange(256, dtype=torch.uint8))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    noise.save(folder / "train" / "cat" / "0.png")
    assert torch.equal(first(folder, (1, 16, 16))[0], torch.tensor(np.array(noise.convert("L"))))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused_by_file_name(folder, kind):
    Image.fromarray(GREY.astype(kind)).save(folder / "train" / "cat" / "1.tif")
    (folder / "train" / "cat" / "0.png").unlink()
    refusal(lambda: first(folder), os.path.join("cat", "1.tif"), "range")


COLOUR = (200, 100, 50)
MODES = {
    "RGBA": ((*COLOUR, 128), "png", COLOUR),
    "LA": ((90, 10), "png", (90,) * 3),
    "L": (90, "png", (90,) * 3),
    "1": (1, "png", (255,) * 3),
    "CMYK": ((55, 155, 205, 0), "tif", COLOUR),
    "CMYK ": ((55, 155, 205, 0), "jpg", COLOUR),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
def test_other_modes_are_converted(folder, mode):
    colour, ending, expected = MODES[mode]
    (folder / "train" / "cat" / "0.png").unlink()
    Image.new(mode.strip(), (16, 16), colour).save(folder / "train" / "cat" / f"0.{ending}", quality=100)
    assert abs(first(folder)[:, 3, 3].int() - torch.tensor(expected)).max() <= (2 if ending == "jpg" else 0)


@pytest.mark.filterwarnings("error")
def test_palettes_with_transparency_are_converted_without_a_word(folder):
    image = Image.new("RGB", (16, 16), COLOUR).quantize(4)
    image.save(folder / "train" / "cat" / "0.png", transparency=bytes([0, 255, 255, 255]))
    assert first(folder)[:, 3, 3].tolist() == list(COLOUR)


def test_a_training_set_without_variance_is_refused(folder):
    for label in ("cat", "dog"):
        Image.new("RGB", (16, 16), (9, 9, 9)).save(folder / "train" / label / "0.png")
    found = data.open_dataset(str(folder), folder, train=True, image_shape=SHAPE)
    refusal(lambda: teachers.channel_statistics(found, torch.arange(2)), "pets", "channel 0")


def test_damaged_images_are_read_or_refused(folder):
    path = folder / "train" / "cat" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    whole, rng = path.read_bytes(), random.Random(4)
    for _ in range(200):
        damaged = bytearray(whole)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.choice([1, 1, 3, 20])):
                damaged[rng.randrange(60 if rng.random() < 0.6 else len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            first(folder)
        except ValueError as error:
            assert "0.png" in str(error) and "\n" not in str(error)


def test_an_empty_class_folder_is_refused_by_name(folder):
    (folder / "train" / "bird").mkdir()
    refusal(lambda: first(folder), "bird", "train")


def test_links_that_lead_back_are_refused_and_others_followed(folder, tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (16, 16), (10,) * 3).save(tmp_path / "more" / "1.png")
    (folder / "train" / "cat" / "more").symlink_to(tmp_path / "more")
    assert len(data.open_dataset(str(folder), tmp_path, train=True, image_shape=SHAPE)) == 3
    (tmp_path / "more" / "back").symlink_to(folder / "train" / "cat")
    refusal(lambda: first(folder), "leads back")


def test_a_class_whose_name_is_no_text_is_refused(folder):
    os.mkdir(os.fsencode(folder / "train") + b"/\xff\xfe")
    refusal(lambda: first(folder), "UTF-8")


def test_a_file_whose_name_is_no_text_is_read_or_refused(folder):
    path = os.fsencode(folder / "train" / "cat") + b"/\xff.png"
    os.rename(folder / "train" / "cat" / "0.png", path)
    assert first(folder).shape == SHAPE
    with open(path, "wb") as file:
        file.write(b"no image")
    refusal(lambda: first(folder), "cat").encode()


def test_a_name_no_file_system_takes_is_no_data_set(tmp_path):
    for name in ("x" * 1_000_000, "a\0b"):
        refusal(lambda name=name: data.open_dataset(name, tmp_path, train=True), "unknown data set")


def idx(dims, body=b"", kind=8):
    return struct.pack(">HBB", 0, kind, len(dims)) + struct.pack(f">{len(dims)}i", *dims) + body


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    "content",
    [
        idx([2**31 - 1] * 3),
        idx([-1, -1]),
        idx([-28, 28, -28]),
        idx([2] * 200),
        idx([65536, 65536, 65536, 65536]),
        idx([2, 2], bytes(5)),
        idx([2, 2], bytes(100 << 20)),
        idx([2, 2], bytes(4), kind=13),
        b"\0\0\x08\x03\0\0",
    ],
    ids=["large", "negative", "positive_product", "dimensions", "overflow", "more", "bomb", "floats", "cut"],
)
def test_an_idx_file_is_read_no_further_than_its_header_says(tmp_path, content, ending):
    path = tmp_path / f"images{ending}"
    path.write_bytes(gzip.compress(content, 1) if ending else content)
    refusal(lambda: data.read_idx(path), path.name)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_an_idx_file_that_is_no_plain_file_is_refused(tmp_path, kind):
    path = tmp_path / "images"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    refusal(lambda: data.read_idx(path), "images")


def write_mnist(root, images, labels):
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        (root / f"train-{name}-ubyte").write_bytes(idx(array.shape, array.astype(np.uint8).tobytes()))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((3, 28, 28)), np.array([0, 1, 10])),
        (np.zeros((3, 28)), np.array([0, 1, 2])),
        (np.zeros((3, 28, 28)), np.zeros((3, 1))),
        (np.zeros((0, 28, 28)), np.zeros(0)),
        (np.zeros((3, 28, 20)), np.array([0, 1, 2])),
    ],
    ids=["label", "two_dimensions", "label_rows", "none", "oblong"],
)
def test_digits_that_are_none_are_refused_by_file(tmp_path, images, labels):
    write_mnist(tmp_path, images, labels)
    refusal(lambda: data.open_dataset("mnist", tmp_path, train=True), "train-")


def test_damaged_idx_files_are_read_or_refused(tmp_path):
    rng, body = random.Random(5), bytes(range(256)) * 3
    for ending in ("", ".gz"):
        path = tmp_path / f"images{ending}"
        whole = gzip.compress(idx([3, 16, 16], body)) if ending else idx([3, 16, 16], body)
        for _ in range(100):
            damaged = bytearray(whole)
            if rng.random() < 0.2:
                del damaged[rng.randrange(len(damaged)) :]
            else:
                damaged[rng.randrange(16 if rng.random() < 0.5 else len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            try:
                data.read_idx(path)
            except ValueError as error:
                assert path.name in str(error) and "\n" not in str(error)


def test_the_files_that_count_as_images_are_torchvisions():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert image_files.EXTENSIONS == IMG_EXTENSIONS
