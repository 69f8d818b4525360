import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_ray.batches import Batch, batch_seed, mix_seed
from dfkd_ray.images import PixelSpace, class_grid, decode, decoded, encode, flip_images, mix_images, shift_images

COLOUR = PixelSpace((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
IDENTITY = PixelSpace((0.0,), (1.0,))
WIDE = PixelSpace((100.0,), (50.0,), 0.0, 255.0)
SIGNED = PixelSpace((0.0,), (0.5,), -1.0, 1.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_pixels(space, n=4, size=5, seed=0):
    """Normalised images whose pixels lie inside the range."""
    low, high = space.bounds()
    return low + (high - low) * torch.rand(n, len(space.mean), size, size, generator=seeded(seed))


@pytest.mark.parametrize("space", [COLOUR, IDENTITY, WIDE, SIGNED])
def test_bounds_are_the_pixel_range_in_normalised_units(space):
    low, high = space.bounds()
    mean, std = space.per_channel()
    torch.testing.assert_close(low * std + mean, torch.full_like(mean, space.low), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(high * std + mean, torch.full_like(mean, space.high), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("space", [COLOUR, IDENTITY, WIDE, SIGNED])
@pytest.mark.parametrize(
    ("storage", "dtype", "share_of_range"),
    [("uint8", "u1", 0.5 / 255), ("float16", "f2", 5e-4), ("float32", "f4", 1e-6)],
)
def test_a_stored_image_is_decoded_within_half_a_step(space, storage, dtype, share_of_range):
    images = random_pixels(space)
    stored = encode(images, space, storage)
    assert stored.dtype == np.dtype(dtype) and stored.shape == images.shape and stored.flags.c_contiguous
    decoded = decode(stored, space)
    assert decoded.dtype == torch.float32
    low, high = space.bounds()
    assert ((decoded - images).abs() <= (high - low) * share_of_range * 1.01 + 1e-6).all()


@pytest.mark.parametrize("space", [COLOUR, WIDE, SIGNED])
def test_uint8_spans_the_pixel_range(space):
    low, high = space.bounds()
    images = torch.cat([low, (low + high) / 2 + 1e-3, high]).expand(3, -1, 2, 2)
    stored = encode(images, space, "uint8")
    assert [set(image.flatten().tolist()) for image in stored] == [{0}, {128}, {255}]


def test_every_uint8_value_survives_decoding_and_encoding():
    stored = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    np.testing.assert_array_equal(encode(decode(stored, COLOUR), COLOUR, "uint8"), stored)


@pytest.mark.parametrize("storage", ["uint8", "float16", "float32"])
def test_pixels_outside_the_range_are_clipped_to_it(storage):
    low, high = COLOUR.bounds()
    images = torch.cat([low - 5, high + 5]).expand(2, 3, 2, 2)
    decoded = decode(encode(images, COLOUR, storage), COLOUR)
    torch.testing.assert_close(decoded, torch.cat([low, high]).expand(2, 3, 2, 2), atol=5e-3, rtol=0)


def test_encoding_ignores_memory_format_and_gradient():
    images = random_pixels(COLOUR)
    awkward = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    np.testing.assert_array_equal(encode(awkward, COLOUR, "uint8"), encode(images, COLOUR, "uint8"))


@pytest.mark.parametrize("space", [COLOUR, IDENTITY])
@pytest.mark.parametrize("storage", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("writeable", [True, False])
def test_decoding_never_aliases_the_stored_array(space, storage, writeable):
    before = encode(random_pixels(space), space, storage)
    stored = before.copy()  # numpy's own memory, so that the flag can be set both ways
    stored.flags.writeable = writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(stored, space)
    decoded.fill_(7.0)
    np.testing.assert_array_equal(stored, before)


def test_decoding_never_aliases_a_stored_tensor():
    stored = torch.rand(2, 1, 3, 3)
    before = stored.clone()
    decode(stored, IDENTITY).zero_()
    assert torch.equal(stored, before)


def test_slices_and_unaligned_arrays_are_decoded_like_copies():
    stored = encode(random_pixels(COLOUR, n=6), COLOUR, "float32")
    raw = np.zeros(stored.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(stored.shape)
    unaligned[...] = stored
    assert not unaligned.flags.aligned
    for view in (stored[1::2], stored[:, :, ::2, 1:], unaligned):
        assert torch.equal(decode(view, COLOUR), decode(view.copy(), COLOUR))


def test_a_tensor_is_decoded_like_its_array():
    stored = encode(random_pixels(COLOUR), COLOUR, "uint8")
    assert torch.equal(decode(torch.from_numpy(stored), COLOUR), decode(stored, COLOUR))


def shifted(image, fill, down, right):
    """Slow reference: out[y, x] = image[y + down, x + right], `fill` outside."""
    out = fill.expand_as(image).clone()
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                out[:, y, x] = image[:, y + down, x + right]
    return out


def test_shifting_moves_each_image_whole_and_fills_the_rest():
    images = torch.randn(60, 2, 4, 5, generator=seeded())
    fill = torch.tensor([-3.0, 9.0]).view(1, 2, 1, 1)
    result = shift_images(images, 1, fill, seeded(1))
    seen = set()
    for image, moved in zip(images, result, strict=True):
        matches = [
            (down, right)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            if torch.equal(moved, shifted(image, fill[0], down, right))
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 9


def test_a_shift_of_zero_changes_nothing():
    images = torch.randn(3, 1, 4, 4)
    assert torch.equal(shift_images(images, 0, torch.zeros(1, 1, 1, 1), seeded()), images)


def test_flipping_mirrors_whole_images_and_about_half_of_them():
    images = torch.randn(200, 1, 3, 4, generator=seeded())
    result = flip_images(images, seeded(1))
    mirrored = [torch.equal(after, before.flip(2)) for before, after in zip(images, result, strict=True)]
    kept = [torch.equal(after, before) for before, after in zip(images, result, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 70 < sum(mirrored) < 130


def test_mixing_is_the_weighted_sum_of_an_image_and_its_partner():
    images = torch.randn(50, 2, 3, 3, generator=seeded())
    mixed, weight, partner = mix_images(images, 0.5, seeded(1))
    assert sorted(partner.tolist()) == list(range(50))
    for i in range(50):
        expected = float(weight[i]) * images[i] + (1 - float(weight[i])) * images[int(partner[i])]
        torch.testing.assert_close(mixed[i], expected)
    assert 10 < int((weight < 1).sum()) < 40


def test_mixing_no_share_of_images_changes_none():
    images = torch.randn(8, 1, 3, 3, generator=seeded())
    mixed, weight, _ = mix_images(images, 0.0, seeded(1))
    assert torch.equal(mixed, images) and torch.equal(weight, torch.ones(8))


@pytest.mark.parametrize(
    "augment",
    [
        lambda x, g: shift_images(x, 2, torch.zeros(1, 1, 1, 1), g),
        flip_images,
        lambda x, g: mix_images(x, 0.5, g)[0],
    ],
    ids=["shift", "flip", "mix"],
)
def test_augmentation_is_a_function_of_the_generator_and_changes_no_input(augment):
    images = torch.randn(16, 1, 6, 6, generator=seeded())
    before = images.clone()
    first, again, other = augment(images, seeded(1)), augment(images, seeded(1)), augment(images, seeded(2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(images, before)


def test_mixed_seeds_of_neighbours_never_collide_and_fit_63_bits():
    seeds = {mix_seed(a, b) for a in range(60) for b in range(60)} | {mix_seed(a) for a in range(60)}
    assert len(seeds) == 60 * 60 + 60
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_mixed_seeds_are_the_same_for_ever():
    # The first output of the published splitmix64 from state 0, without its lowest bit.
    assert mix_seed(0) == 0xE220A8397B1DCDAF >> 1
    assert mix_seed(1, 2) != mix_seed(2, 1)


def test_batch_seeds_differ_between_batches_and_keys():
    seeds = {batch_seed(key * 64, index) for key in "0123456789abcdef" for index in range(100)}
    assert len(seeds) == 1600


def grid_of(png):
    with Image.open(io.BytesIO(png)) as picture:
        return picture.mode, np.array(picture)


def test_a_class_grid_has_one_row_a_class_in_the_order_of_the_batches():
    images = np.arange(1, 7, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(2, axis=2).repeat(2, axis=3) * 10
    batches = [
        Batch(0, images[:4], np.array([1, 0, 1, 2]), "k"),
        Batch(1, images[4:], np.array([1, 0]), "k"),
    ]
    mode, picture = grid_of(class_grid(batches, 3, IDENTITY, per_class=2))
    assert mode == "L" and picture.shape == (3 * 4 - 2, 2 * 4 - 2)
    assert picture[::4, ::4].tolist() == [[20, 60], [10, 30], [40, 255]]


def test_a_class_grid_of_float_images_equals_that_of_uint8_ones():
    normalised, labels = random_pixels(COLOUR, n=4), np.array([0, 1, 1, 0])
    (mode, picture), (_, other) = (
        grid_of(class_grid([Batch(0, encode(normalised, COLOUR, kind), labels, "k")], 2, COLOUR, per_class=2))
        for kind in ("uint8", "float32")
    )
    assert mode == "RGB"
    np.testing.assert_array_equal(picture, other)


def test_a_class_grid_has_no_empty_columns():
    images, labels = np.full((5, 1, 2, 2), 9, np.uint8), np.array([0, 1, 2, 0, 0])
    assert grid_of(class_grid([Batch(0, images, labels, "k")], 3, IDENTITY))[1].shape == (3 * 4 - 2, 3 * 4 - 2)


@pytest.mark.parametrize(("side", "num_images"), [(224, 30), (224, 400), (32, 400), (2000, 3)])
def test_a_class_grid_of_a_thousand_classes_is_a_sheet_that_is_full_and_small(side, num_images):
    labels = np.random.default_rng(0).permutation(1000)[:num_images]
    values = np.arange(num_images) % 200
    images = np.broadcast_to(values.astype(np.uint8)[:, None, None, None], (num_images, 1, side, side))
    picture = grid_of(class_grid([Batch(0, images, labels, "k")], 1000, IDENTITY))[1]
    tiles = picture[:: side + 2, :: side + 2].flatten()
    assert (
        max(picture.shape) <= max(1200, side) and (tiles != 255).mean() > 0.8 and len(tiles) >= min(num_images, 25) / 25
    )
    shown = [value for value in tiles.tolist() if value != 255]
    assert len(shown) == min(num_images, (1200 // 226) ** 2 if side == 224 else 240 if side == 32 else 1)
    if num_images <= 200:  # then a value is an image: they stand in the order of their classes
        places = [int(labels[value]) for value in shown]
        assert places == sorted(places)


def test_a_class_grid_whose_rows_are_full_shows_the_first_classes_of_many():
    labels = np.repeat(np.arange(30), 2)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (60, 1, 2, 2))
    picture = grid_of(class_grid([Batch(0, images, labels, "k")], 30, IDENTITY, per_class=2, largest=5))[1]
    assert picture[::4, ::4].tolist() == [[label] * 2 for label in range(5)]


def test_a_class_grid_shows_images_without_labels():
    images = np.full((4, 1, 2, 2), 9, np.uint8)
    png = class_grid([Batch(0, images, np.full(4, -1), "k")], 2, IDENTITY, per_class=2)
    assert grid_of(png)[1][::4, ::4].tolist() == [[9, 9], [9, 9]]


def test_arrays_are_decoded_one_after_the_other_in_order():
    arrays = [np.full((2, 3, 4, 4), value, np.uint8) for value in (0, 7, 255)]
    for array in arrays:
        array.flags.writeable = False
    found = list(decoded(iter(arrays), COLOUR, torch.device("cpu")))
    assert len(found) == 3
    for array, tensor in zip(arrays, found, strict=True):
        assert torch.equal(tensor, decode(array, COLOUR))


def test_the_arrays_of_a_batch_cannot_be_written_to():
    own = np.zeros((2, 1, 4, 4), np.float32)
    batch = Batch(0, own, np.zeros(2, np.int64), "key")
    with pytest.raises(ValueError, match="read-only"):
        np.add(batch.images, 1, out=batch.images)
    with pytest.raises(ValueError, match="read-only"):
        batch.labels[0] = 1
    own[0] = 1  # the maker's array stays its own, and no copy was made
    assert np.shares_memory(own, batch.images)
