import gzip
import pickle
import struct

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

from dfkd_ray import data, image_files, image_sets
from helpers import refusal


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_digits(folder, ending="", stem="t10k", num_images=5, size=28):
    images, labels = random_bytes(num_images, size, size), np.arange(num_images, dtype=np.uint8) % 10
    write_idx(folder / f"{stem}-images-idx3-ubyte{ending}", images)
    write_idx(folder / f"{stem}-labels-idx1-ubyte{ending}", labels)
    return images, labels


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (7,), (0, 28, 28)])
def test_an_idx_file_is_read_plain_and_compressed(tmp_path, ending, shape):
    array = random_bytes(*shape)
    write_idx(tmp_path / f"a{ending}", array)
    np.testing.assert_array_equal(data.read_idx(tmp_path / f"a{ending}"), array)


@pytest.mark.parametrize("size", [0, 3, 6, 15, 40, -1])
def test_a_truncated_idx_file_is_refused_by_name(tmp_path, size):
    content = idx_bytes(random_bytes(3, 4, 5))
    (tmp_path / "a").write_bytes(content[:size])
    (tmp_path / "a.gz").write_bytes(gzip.compress(content)[:size])
    (tmp_path / "b.gz").write_bytes(gzip.compress(content[:size]))
    for name in ("a", "a.gz", "b.gz"):
        with pytest.raises(ValueError) as caught:
            data.read_idx(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize(
    "content",
    [
        idx_bytes(random_bytes(3, 4)) + b"\0",
        b"\x00\x00\x0d\x01" + struct.pack(">If", 1, 1.0),  # float32
        b"PK\x03\x04 a zip file",
        struct.pack(">HBBi", 0, 8, 1, -4),
    ],
    ids=["too_long", "floats", "zip", "negative"],
)
def test_a_file_that_is_no_idx_of_bytes_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError):
        data.read_idx(tmp_path / "a")


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "fashion_mnist", "fashion-mnist", "."])
def test_fashion_mnist_is_found_in_every_usual_folder(tmp_path, folder, ending):
    images, labels = write_digits(tmp_path / folder, ending)
    found = data.open_dataset("fashion_mnist", tmp_path, train=False)
    assert len(found) == 5 and found.image_shape == (1, 32, 32) and found.class_names[9] == "Ankle boot"
    assert found.labels.tolist() == labels.tolist() and found.labels.dtype == torch.int64
    np.testing.assert_array_equal(found.read([0, 3])[:, 0, 2:30, 2:30], images[[0, 3]])


def test_train_and_test_are_different_files(tmp_path):
    write_digits(tmp_path / "mnist", stem="train", num_images=7)
    write_digits(tmp_path / "mnist", stem="t10k", num_images=4)
    sizes = [len(data.open_dataset("mnist", tmp_path, train=train)) for train in (True, False)]
    assert sizes == [7, 4]


def test_more_labels_than_images_are_refused(tmp_path):
    write_digits(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(6, np.uint8))
    with pytest.raises(ValueError, match="6"):
        data.open_dataset("mnist", tmp_path, train=False)


def test_digits_of_28_pixels_are_left_as_they_are_where_28_is_asked_for(tmp_path):
    pixels, _ = write_digits(tmp_path)
    found = data.open_dataset("mnist", tmp_path, train=False, image_shape=(1, 28, 28))
    assert found.image_shape == (1, 28, 28)
    np.testing.assert_array_equal(found.read(range(5))[:, 0], pixels)
    bundled = data.bundled_test_set("fashion_mnist", (1, 28, 28))
    assert bundled is not None and bundled.read([0]).shape == (1, 1, 28, 28)


def test_digits_are_padded_with_black(tmp_path):
    write_digits(tmp_path)
    images = data.open_dataset("mnist", tmp_path, train=False).read(range(5))
    border = images.clone()
    border[:, :, 2:30, 2:30] = 0
    assert images.any() and not border.any()


@pytest.mark.parametrize("index", [[1, 1, 0], torch.tensor([1, 1, 0])])
def test_images_come_in_the_order_asked_for(tmp_path, index):
    write_digits(tmp_path)
    found = data.open_dataset("mnist", tmp_path, train=False)
    one, zero = found.read([1])[0], found.read([0])[0]
    images = found.read(index)
    assert images.dtype == torch.uint8 and images.shape == (3, 1, 32, 32)
    assert torch.equal(images[0], one) and torch.equal(images[1], one) and torch.equal(images[2], zero)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "celeba"])
def test_a_missing_data_set_is_refused_with_where_it_was_looked_for_and_what_to_do(tmp_path, name):
    with pytest.raises(ValueError) as caught:
        data.open_dataset(name, tmp_path / "root", train=True)
    message = str(caught.value)
    assert repr(name) in message and str(tmp_path / "root") in message
    assert "`data_root`" in message and "`download`" in message


def test_an_unknown_data_set_is_refused_with_the_names_there_are(tmp_path):
    with pytest.raises(ValueError) as caught:
        data.open_dataset("imagenet21k", tmp_path, train=True)
    assert all(name in str(caught.value) for name in ("imagenet21k", *data.OPENERS, "folder"))


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn", "celeba"])
def test_nothing_is_downloaded_unless_asked_for(tmp_path, monkeypatch, name):
    asked = []

    def downloads(self, *args, **kwargs):
        asked.append(name)
        raise RuntimeError("no network in tests")

    classes = {"mnist": "MNIST", "cifar10": "CIFAR10", "svhn": "SVHN", "celeba": "CelebA"}
    monkeypatch.setattr(getattr(torchvision.datasets, classes[name]), "download", downloads)
    with pytest.raises(ValueError, match="not found"):
        data.open_dataset(name, tmp_path, train=True)
    assert asked == []
    with pytest.raises((ValueError, RuntimeError)):
        data.open_dataset(name, tmp_path, train=True, download=True)
    assert asked == [name]


def test_the_bundled_test_set_is_balanced_and_whole():
    found = data.bundled_test_set("fashion_mnist", (1, 32, 32))
    assert found is not None and len(found) == 10_000
    assert found.labels.bincount().tolist() == [1000] * 10
    images = found.read(range(10_000))
    # The published mean of Fashion-MNIST's pixels is 0.286 of white, over 28x28.
    assert float(images.float().mean()) / 255 * 32**2 / 28**2 == pytest.approx(0.2868, abs=2e-3)


def test_no_test_set_is_bundled_for_other_data():
    assert data.bundled_test_set("cifar10", (3, 32, 32)) is None


def pickled(path, entry):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(entry))


def whole_files(monkeypatch):
    """Let torchvision read generated files: their MD5 sums are not the published ones."""
    for kind in ("CIFAR10", "SVHN", "CelebA"):
        monkeypatch.setattr(getattr(torchvision.datasets, kind), "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)


def test_cifar10_is_read_from_its_pickles(tmp_path, monkeypatch):
    whole_files(monkeypatch)
    folder = tmp_path / "cifar-10-batches-py"
    batches = {f"data_batch_{i}": random_bytes(2, 3072, seed=i) for i in range(1, 6)}
    for i, (name, pixels) in enumerate(batches.items()):
        pickled(folder / name, {"data": pixels, "labels": [i, 9 - i]})
    pickled(folder / "test_batch", {"data": random_bytes(3, 3072), "labels": [5, 6, 7]})
    names = [f"class {i}" for i in range(10)]
    pickled(folder / "batches.meta", {"label_names": names})
    found = data.open_dataset("cifar10", tmp_path, train=True)
    assert len(found) == 10 and found.image_shape == (3, 32, 32) and found.class_names == tuple(names)
    assert found.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    np.testing.assert_array_equal(found.read([4])[0], batches["data_batch_3"][0].reshape(3, 32, 32))
    assert data.open_dataset("cifar10", tmp_path, train=False).labels.tolist() == [5, 6, 7]


def test_cifar100_has_its_fine_labels(tmp_path, monkeypatch):
    whole_files(monkeypatch)
    folder = tmp_path / "cifar-100-python"
    pixels = random_bytes(3, 3072)
    pickled(folder / "test", {"data": pixels, "fine_labels": [99, 0, 50], "coarse_labels": [1, 2, 3]})
    pickled(folder / "meta", {"fine_label_names": [f"class {i}" for i in range(100)]})
    found = data.open_dataset("cifar100", tmp_path, train=False)
    assert found.labels.tolist() == [99, 0, 50] and len(found.class_names) == 100
    np.testing.assert_array_equal(found.read(range(3)), pixels.reshape(3, 3, 32, 32))


def test_cifar_pickles_of_another_checksum_are_not_opened(tmp_path):
    ran = tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return type(ran).touch, (ran,)

    folder = tmp_path / "cifar-10-batches-py"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        pickled(folder / name, Runs())
    with pytest.raises(ValueError, match="not found or corrupted"):
        data.open_dataset("cifar10", tmp_path, train=True)
    assert not ran.exists()


@pytest.mark.parametrize("train", [True, False])
def test_svhn_is_read_from_its_matlab_file(tmp_path, monkeypatch, train):
    whole_files(monkeypatch)
    pixels = random_bytes(32, 32, 3, 4)  # height, width, channels, images
    labels = np.array([[1], [10], [9], [5]], np.uint8)  # ten is the digit 0
    scipy.io.savemat(tmp_path / f"{'train' if train else 'test'}_32x32.mat", {"X": pixels, "y": labels})
    found = data.open_dataset("svhn", tmp_path, train=train)
    assert found.labels.tolist() == [1, 0, 9, 5] and found.image_shape == (3, 32, 32)
    assert found.class_names == tuple("0123456789")
    np.testing.assert_array_equal(found.read(range(4)), pixels.transpose(3, 2, 0, 1))


def write_celeba(root):
    """Six portraits in CelebA's format: 0 to 2 for training, 3 for validation, 4 and 5 for testing."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 7)]
    for i, name in enumerate(names):
        Image.new("RGB", (178, 218), (40 * i, 0, 255 - 40 * i)).save(folder / "img_align_celeba" / name)

    def table(filename, header, rows):
        lines = [f"{name} {row}" for name, row in zip(names, rows, strict=True)]
        (folder / filename).write_text("\n".join(header + lines) + "\n")

    table("list_eval_partition.txt", [], [0, 0, 0, 1, 2, 2])
    table("identity_CelebA.txt", [], range(6))
    table("list_bbox_celeba.txt", ["6", "image_id x_1 y_1 width height"], ["95  71 226 313"] * 6)
    table("list_landmarks_align_celeba.txt", ["6", "lefteye_x lefteye_y "], ["69  109"] * 6)
    rows = ["-1  1", " 1 -1", "-1 -1", "1 1", " 1  1", "-1 -1"]
    table("list_attr_celeba.txt", ["6", "Male Smiling "], rows)


def test_celeba_is_one_attribute_of_decoded_portraits(tmp_path, monkeypatch):
    whole_files(monkeypatch)
    write_celeba(tmp_path)
    found = data.open_dataset("celeba", tmp_path, train=True, image_shape=(3, 24, 20), equal_classes=False)
    assert found.labels.tolist() == [1, 0, 0] and found.class_names == ("not Smiling", "Smiling")
    images = found.read([2, 0])
    assert images.shape == (2, 3, 24, 20) and images.dtype == torch.uint8
    assert abs(int(images[0, 0, 5, 5]) - 80) < 4 and abs(int(images[1, 2, 5, 5]) - 255) < 4
    male = data.open_dataset("celeba", tmp_path, train=False, attribute="Male")
    assert male.labels.tolist() == [1, 0] and male.read([0]).shape == (1, 3, 224, 224)


def test_celeba_has_equal_classes_of_the_same_images_each_time(tmp_path, monkeypatch):
    whole_files(monkeypatch)
    write_celeba(tmp_path)
    every = data.open_dataset("celeba", tmp_path, train=True, image_shape=(3, 24, 20), equal_classes=False)
    chosen = [data.open_dataset("celeba", tmp_path, train=True, image_shape=(3, 24, 20)) for _ in range(2)]
    assert chosen[0].labels.tolist() == chosen[1].labels.tolist() == [1, 0]
    images = chosen[0].read(range(2))
    assert torch.equal(images, chosen[1].read([0, 1])) and torch.equal(images[0], every.read([0])[0])
    assert any(torch.equal(images[1], image) for image in every.read([1, 2]))
    assert torch.equal(chosen[0].read(torch.tensor([1])), images[1:])


def labelled(labels, num_classes=2):
    labels = torch.tensor(labels)
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    names = tuple(f"class {index}" for index in range(num_classes))
    return data.LabelledImages("made", lambda rows: images[rows], labels, names, (1, 1, 1))


def test_balancing_keeps_as_many_of_each_class_as_the_rarest_has_in_order_with_their_own_labels():
    labels = [0] * 30 + [1] * 9 + [0] * 20 + [2] * 15
    found = data.balanced(labelled(labels, 3))
    kept = found.read(range(len(found))).flatten()
    assert torch.bincount(found.labels).tolist() == [9, 9, 9] and kept.tolist() == sorted(kept.tolist())
    assert found.labels.tolist() == [labels[row] for row in kept]
    assert kept[found.labels == 1].tolist() == list(range(30, 39))


def test_the_choice_of_balancing_follows_its_seed_and_is_spread_over_the_set():
    whole = labelled([0] * 200 + [1] * 20)
    rows = [data.balanced(whole, seed).read(range(40)).flatten().tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0][0] < 60 and rows[0][19] > 140


def test_a_class_without_an_image_cannot_be_balanced():
    with pytest.raises(ValueError, match=r"no image of class 'class 1' among 3, .* `all_images`"):
        data.balanced(labelled([0, 0, 0]))


@pytest.mark.parametrize("attribute", ["Smilling", ""])
def test_an_unknown_celeba_attribute_is_refused_with_the_names_there_are(tmp_path, monkeypatch, attribute):
    whole_files(monkeypatch)
    write_celeba(tmp_path)
    with pytest.raises(ValueError, match=r"it has Male, Smiling$"):
        data.open_dataset("celeba", tmp_path, train=True, attribute=attribute)


def write_folder(root):
    """Class folders of PNGs of several modes and sizes: cats are dark, dogs bright."""
    for split, count in (("train", 3), ("test", 2)):
        for label, value in (("cat", 10), ("dog", 200)):
            (root / split / label).mkdir(parents=True)
            for i, mode in zip(range(count), ("RGB", "L", "RGBA"), strict=False):
                colour = {"RGB": (value,) * 3, "L": value, "RGBA": (value, value, value, 255)}[mode]
                Image.new(mode, (20 + i, 16), colour).save(root / split / label / f"{i}.png")


def test_a_folder_of_class_folders_is_a_data_set(tmp_path):
    write_folder(tmp_path / "pets")
    found = data.open_dataset(str(tmp_path / "pets"), tmp_path, train=True, image_shape=(3, 8, 8))
    assert found.name == "pets" and found.class_names == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(found) == 6
    images = found.read(torch.tensor([5, 0, 1, 2]))
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
    assert [set(image.flatten().tolist()) for image in images] == [{200}, {10}, {10}, {10}]
    assert len(data.open_dataset(str(tmp_path / "pets"), tmp_path, train=False)) == 4


def test_a_folders_first_image_gives_the_shape_where_none_is_given(tmp_path):
    write_folder(tmp_path / "pets")
    found = data.open_dataset(str(tmp_path / "pets"), tmp_path, train=True)
    assert found.image_shape == (3, 16, 20)
    assert found.read([0, 2, 4]).shape == (3, 3, 16, 20)


def test_a_folder_without_class_folders_is_refused(tmp_path):
    (tmp_path / "pets" / "train").mkdir(parents=True)
    for train in (True, False):
        with pytest.raises(ValueError, match="expected class folders with images"):
            data.open_dataset(str(tmp_path / "pets"), tmp_path, train=train)


def class_folders(root, *names, split="test"):
    """One image in each class folder: its brightness is the number of the folder."""
    for number, name in enumerate(names):
        (root / split / name).mkdir(parents=True)
        Image.new("L", (4, 4), number).save(root / split / name / "0.png")
    return str(root)


def labels_by_name(root, names, split="test"):
    """Brightness (see `class_folders`) -> label."""
    found = data.open_dataset(str(root), root, train=split == "train", image_shape=(3, 4, 4), class_names=names)
    assert found.class_names == tuple(names) and len(found.files) == len(found)
    assert found.labels.tolist() == sorted(found.labels.tolist())
    images = found.read(range(len(found)))[:, 0, 0, 0].tolist()
    return dict(zip(images, found.labels.tolist(), strict=True)), found


def test_the_networks_class_names_decide_the_labels_of_class_folders(tmp_path):
    class_folders(tmp_path, "ant", "bee", "cat")
    assert labels_by_name(tmp_path, ["cat", "ant", "bee"])[0] == {0: 1, 1: 2, 2: 0}
    numbers = [str(number) for number in range(11)]
    class_folders(tmp_path / "numbers", *numbers)
    assert labels_by_name(tmp_path / "numbers", numbers)[0] == {number: number for number in range(11)}
    assert labels_by_name(tmp_path / "numbers", sorted(numbers))[0][10] == 2


def test_classes_without_images_are_a_note(tmp_path):
    class_folders(tmp_path, "ant", "cat")
    found, opened = labels_by_name(tmp_path, ["ant", "bee", "cat", "dog"])
    assert found == {0: 0, 1: 2} and len(opened.notes) == 1
    assert opened.notes[0].endswith("has no images of the network's bee, dog")
    assert labels_by_name(tmp_path, ["ant", "cat"])[1].notes == ()


@pytest.mark.parametrize("name", ["wasp", "Ant", "0", "ants", "\x1b[31m"])
def test_a_class_that_the_network_does_not_have_is_refused_with_the_names(tmp_path, name):
    class_folders(tmp_path, "bee", name)
    shown = refusal(lambda: labels_by_name(tmp_path, ["ant", "bee"]), "ant, bee")
    assert name.replace("\x1b", "\\x1b") in shown


def test_a_folder_that_could_be_several_classes_is_refused(tmp_path):
    class_folders(tmp_path, "crane", "ant")
    refusal(lambda: labels_by_name(tmp_path, ["crane", "ant", "crane"]), "several classes", "crane")


def test_accents_count_in_either_form_and_so_do_exported_names(tmp_path):
    class_folders(tmp_path / "accents", "cafe\u0301", "the\u0301")
    assert labels_by_name(tmp_path / "accents", ["th\u00e9", "caf\u00e9"])[0] == {0: 1, 1: 0}
    names = ("T-shirt/top", "Bag")
    class_folders(tmp_path / "numbered", *image_sets.class_folders(2, names))
    assert labels_by_name(tmp_path / "numbered", names)[0] == {0: 0, 1: 1}
    class_folders(tmp_path / "plain", "Bag", "T-shirt_top")
    assert labels_by_name(tmp_path / "plain", names)[0] == {0: 1, 1: 0}


def test_a_known_sets_labels_follow_the_networks_names_too(tmp_path):
    write_digits(tmp_path)
    found = data.open_dataset("mnist", tmp_path, train=False, class_names=[str(9 - digit) for digit in range(10)])
    assert found.labels.tolist() == [9, 8, 7, 6, 5]
    refusal(lambda: data.open_dataset("mnist", tmp_path, train=False, class_names=["zero", "one"]), "zero, one")


def test_numbers_are_sorted_as_numbers_and_other_names_as_text(tmp_path):
    for names in (["0", "2", "10"], ["-2", "-1", "0.5", "3"], ["01", "1", "2"], ["1", "10", "2", "x"], ["v10", "v2"]):
        assert image_files.in_order(sorted(names, reverse=True)) == names


def test_a_folder_has_one_name_by_whatever_path(tmp_path, monkeypatch):
    write_folder(tmp_path / "pets")
    (tmp_path / "link").symlink_to(tmp_path / "pets")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "pets")
    paths = [str(tmp_path / "pets"), ".", "../pets", "../link/", "~/pets", f"{tmp_path}/pets/train/.."]
    found = [data.open_dataset(path, tmp_path, train=True, image_shape=(3, 8, 8)) for path in paths]
    assert {(one.name, one.folder, one.files) for one in found} == {("pets", found[0].folder, found[0].files)}
    assert found[0].files[0] == "cat/0.png"


def test_a_folder_is_never_taken_for_a_known_set_of_its_name(tmp_path):
    write_folder(tmp_path / "mnist")
    assert data.open_dataset(str(tmp_path / "mnist"), tmp_path, train=True).name == "mnist/"


def test_fitting_makes_colour_by_repeating_grey_and_grey_by_luminance():
    grey = torch.from_numpy(random_bytes(2, 1, 8, 8))
    assert torch.equal(data.fit_images(grey, (3, 8, 8)), grey.repeat(1, 3, 1, 1))
    red = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 200
    assert data.fit_images(red, (1, 4, 4)).unique().tolist() == [60]  # 0.299 of 200


def test_fitting_resizes_with_antialiasing():
    checkers = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    small = data.fit_images(checkers.to(torch.uint8).view(1, 1, 64, 64), (1, 8, 8))
    assert small.shape == (1, 1, 8, 8)
    assert (small.int() - 127).abs().max() < 20


def test_fitting_an_image_that_fits_changes_nothing():
    images = torch.from_numpy(random_bytes(2, 3, 9, 7))
    assert torch.equal(data.fit_images(images, (3, 9, 7)), images)


def test_channels_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="images have 2 channels, the network wants 3"):
        data.fit_images(torch.zeros(1, 2, 8, 8, dtype=torch.uint8), (3, 8, 8))
