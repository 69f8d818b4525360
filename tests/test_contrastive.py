"""Contrastive model inversion: its views, features, memory bank and loss, and its rounds as pure functions."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_ray import batchnorm, bundles, losses, synthesis
from dfkd_ray.batches import Batch, RoundState, summed
from dfkd_ray.config import CmiConfig
from dfkd_ray.images import PixelSpace, crop_images, flip_images
from dfkd_ray.synthesis import contrastive, inner_loop
from helpers import make_teacher, tiny_network

CPU = torch.device("cpu")
SMALL = CmiConfig(
    batch_size=8,
    num_steps=2,
    num_inputs=6,
    num_channels=4,
    num_projected=5,
    bank_size=20,
    num_negatives=7,
    storage="float32",
    precision="float32",
    num_threads=1,
)
GREY, COLOUR = PixelSpace((0.5,), (0.25,)), PixelSpace((0.4, 0.5, 0.6), (0.2, 0.3, 0.2), low=-1.0, high=1.0)


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> bundles.Teacher:
    return bundles.load(str(tiny_teacher))


@pytest.fixture(scope="module")
def student() -> dict[str, np.ndarray]:
    """The weights of a network of the teacher's shape."""
    return {name: tensor.numpy().copy() for name, tensor in tiny_network(seed=1).state_dict().items()}


def changed(**fields: object) -> CmiConfig:
    return CmiConfig(**{**SMALL.model_dump(), **fields})  # type: ignore[arg-type]


def first(teacher: bundles.Teacher, config: CmiConfig) -> RoundState:
    return RoundState(0, contrastive.first_state(teacher, config))


def made(teacher: bundles.Teacher, config: CmiConfig, state: RoundState, index: int = 0) -> Batch:
    return synthesis.source(teacher, config, CPU, state=state)[1](index)


FOLLOWING: dict[tuple[CmiConfig, int], dict[str, np.ndarray]] = {}  # states made before: they are pure functions


def following(
    teacher: bundles.Teacher, config: CmiConfig, student: dict[str, np.ndarray] | None = None, num_batches: int = 1
) -> RoundState:
    """The state of round 1; with a student's weights, it looks at it."""
    if (config, num_batches) not in FOLLOWING:
        state = first(teacher, config)
        total = summed([made(teacher, config, state, index).contribution for index in range(num_batches)])
        FOLLOWING[config, num_batches] = contrastive.advance(teacher, config, state, total, None)
    return RoundState(1, FOLLOWING[config, num_batches], student)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def units(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_current", [1, 4, 9])
def test_the_contrastive_loss_equals_a_slow_reference(num_current: int):
    queries, keys = (units(torch.randn(9, 3, generator=seeded(seed))) for seed in (0, 1))
    rows = []
    for i, query in enumerate(queries.tolist()):
        near = [sum(a * b for a, b in zip(query, key, strict=True)) / 0.2 for key in keys.tolist()]
        rows.append(math.log(sum(map(math.exp, near))) - near[i])
    expected = sum(rows[:num_current]) / num_current
    if num_current < 9:
        expected += sum(rows[num_current:]) / (9 - num_current)
    assert float(losses.contrastive(queries, keys, num_current, 0.2)) == pytest.approx(expected, rel=1e-5)


def test_the_contrastive_loss_falls_as_matching_rows_are_aligned():
    queries, keys = (units(torch.randn(12, 16, generator=seeded(seed))) for seed in (0, 1))
    shares = torch.linspace(0, 1, 6)
    values = [float(losses.contrastive(units(queries.lerp(keys, share)), keys, 5, 0.2)) for share in shares.tolist()]
    assert values == sorted(values, reverse=True) and values[-1] < 0.5 * values[0]


def test_keys_get_no_gradient_and_queries_do():
    queries, keys = (torch.randn(6, 4, generator=seeded(seed)).requires_grad_() for seed in (0, 1))
    losses.contrastive(queries, keys, 2, 0.2).backward()
    assert keys.grad is None and queries.grad is not None and (queries.grad[:2] != 0).any(dim=1).all()


def test_of_the_features_only_the_local_views_of_current_images_get_a_gradient(teacher: bundles.Teacher):
    contrast = contrastive.Contrast(SMALL, following(teacher, SMALL).arrays, CPU)
    contrast.bank = contrast.bank.float().requires_grad_()
    size = contrast.bank.shape[2]
    features = torch.randn(8, 2, size, generator=seeded()).requires_grad_()
    (own,) = torch.autograd.grad(contrast.loss(features, seeded()), [features])
    assert not own[:, 1].any() and own[:, 0].any(dim=1).all()
    contrast.loss(features, seeded()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in contrast.head.parameters())


# ---- the bank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 100])
def test_the_bank_holds_the_newest_rows_in_order_for_any_sizes_of_additions(size: int):
    bank, all_rows = np.zeros((0, 2, 3), np.float16), np.zeros((0, 2, 3), np.float16)
    draws = np.random.default_rng(size)
    for _ in range(12):
        parts = [draws.normal(size=(number, 2, 3)).astype(np.float16) for number in draws.integers(0, 12, size=3)]
        bank, all_rows = contrastive.newest([bank, *parts], size), np.concatenate([all_rows, *parts])
        assert bank.dtype == np.float16
        np.testing.assert_array_equal(bank, all_rows[len(all_rows) - min(size, len(all_rows)) :])


def test_the_bank_has_the_batches_in_the_order_of_their_numbers(teacher: bundles.Teacher):
    config = changed(bank_size=1000)
    state = first(teacher, config)
    size = state.arrays["bank"].shape[2]
    head = {name: array for name, array in state.arrays.items() if name != "bank"}
    given = [{f"features.{i}": np.full((2, 2, size), i), **head, "batches": np.asarray(1.0)} for i in range(12)]
    bank = contrastive.advance(teacher, config, state, summed(given), None)["bank"]
    assert bank[:, 0, 0].tolist() == [i for i in range(12) for _ in range(2)]


@pytest.mark.parametrize("crop_scale", [1.0, 0.25])
def test_the_bank_holds_features_of_the_kept_images_local_view_first(teacher: bundles.Teacher, crop_scale: float):
    config = changed(num_steps=1, crop_scale=crop_scale, shift=0, flip=False)  # the global view is the image itself
    batch = made(teacher, config, first(teacher, config))
    with torch.no_grad(), contrastive.observed(teacher.network) as taken:
        teacher.network((torch.from_numpy(batch.images.copy()) - 0.5) / 0.25)
        expected = taken(8).numpy()
    local, whole = (batch.contribution["features.0"][:, view] for view in range(2))
    np.testing.assert_allclose(whole, expected, rtol=2e-3, atol=2e-3)
    assert np.allclose(local, expected, rtol=2e-3, atol=2e-3) == (crop_scale == 1.0)


def test_the_bank_does_not_grow_without_end(teacher: bundles.Teacher):
    assert len(following(teacher, changed(num_steps=1), num_batches=4).arrays["bank"]) == SMALL.bank_size == 20


def test_features_beyond_the_type_of_the_bank_stay_finite():
    given = torch.tensor([[[1e6, -1e6, 1.5]]])
    assert contrastive.stored(given, "float16").tolist() == [[[65504.0, -65504.0, 1.5]]]
    np.testing.assert_array_equal(contrastive.stored(given, "float32"), given.numpy())


# ---- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("space", "shape"), [(GREY, (5, 1, 28, 28)), (COLOUR, (5, 3, 11, 6)), (COLOUR, (5, 3, 1, 40))])
def test_a_local_view_of_scale_1_is_the_flipped_image_itself(space: PixelSpace, shape: tuple[int, ...]):
    given, config = torch.randn(shape, generator=seeded()), changed(crop_scale=1.0)
    assert torch.equal(contrastive.local_view(given, config.model_copy(update={"flip": False}), seeded(1)), given)
    draws = seeded(1)
    torch.rand(4, len(given), generator=draws)
    assert torch.equal(contrastive.local_view(given, config, seeded(1)), flip_images(given, draws))


@pytest.mark.parametrize("shape", [(6, 1, 28, 28), (6, 3, 32, 20), (6, 2, 1, 33)])
def test_views_are_differentiable_keep_shape_and_range_and_repeat_with_their_seed(shape: tuple[int, ...]):
    space = PixelSpace((0.5,) * shape[1], (0.25,) * shape[1])
    given = (4 * torch.rand(shape, generator=seeded()) - 2).requires_grad_()
    for view in (
        lambda seed: inner_loop.augmented(given, SMALL, space, seeded(seed)),
        lambda seed: contrastive.local_view(given, SMALL, seeded(seed)),
    ):
        seen = view(1)
        assert seen.shape == given.shape and seen.abs().max() <= 2.0 + 1e-5
        assert torch.equal(seen, view(1)) and not torch.equal(seen, view(2))
        (gradient,) = torch.autograd.grad(seen.square().sum(), [given])
        assert gradient.flatten(1).any(dim=1).all()


def test_a_crop_shows_a_share_of_the_image_between_its_bounds():
    # Of an image whose pixels are their own places, a crop shows the range of places that it spans.
    h, w, n = 64, 48, 400
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    given = torch.stack([rows, columns]).float().expand(n, 2, h, w)
    seen = crop_images(given, 0.25, seeded())
    height = (seen[:, 0, 40, 0] - seen[:, 0, 20, 0]) / 20  # away from the borders, where places repeat
    width = (seen[:, 1, 0, 35] - seen[:, 1, 0, 15]) / 20
    shares, aspects = height * width, height / width
    assert 0.249 < shares.min() < 0.3 and 0.95 < shares.max() < 1.001 and abs(float(shares.mean()) - 0.625) < 0.04
    assert 0.749 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.334
    middle = seen[:, :, h // 2, w // 2]
    assert abs(float(middle[:, 0].mean()) - h / 2) < 1 and abs(float(middle[:, 1].mean()) - w / 2) < 1
    assert middle[:, 0].std() > 2 and middle[:, 1].std() > 2
    assert seen[:, 0].diff(dim=1).min() >= 0 and seen.min() >= 0 and seen[:, 0].max() <= h - 1


# ---- features --------------------------------------------------------------------------------------------------------


class Activated(nn.BatchNorm2d):
    """A subclass that does more than BatchNorm, in its own forward."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return F.relu(y)


def subclassed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), Activated(3), nn.Flatten(), nn.BatchNorm1d(108), nn.Linear(108, 2)).eval()


@pytest.mark.parametrize("network", [tiny_network().eval(), subclassed()], ids=["plain", "subclassed"])
def test_features_are_channel_means_within_and_without_the_recording_of_statistics(network: nn.Module):
    given = (
        torch.randn(5, 1, 8, 8, generator=seeded())
        if isinstance(network, nn.Sequential)
        else torch.randn(5, 1, 16, 16, generator=seeded())
    )
    with torch.no_grad(), contrastive.observed(network) as taken:
        network(given)
        alone = taken(5)
        with batchnorm.recorded(network) as statistics:
            network(given)
            together = taken(5)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(alone.mean(dim=0), torch.cat(statistics.means))
    assert alone.shape == (5, contrastive.num_features(network, given.shape[1:]))
    assert not any(layer._forward_pre_hooks for layer in batchnorm.layers(network))


# ---- rounds ----------------------------------------------------------------------------------------------------------


def same(one: Batch, other: Batch) -> bool:
    names = one.contribution.keys()
    return (
        np.array_equal(one.images, other.images)
        and names == other.contribution.keys()
        and all(np.array_equal(one.contribution[name], other.contribution[name]) for name in names)
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_batch_is_a_function_of_state_and_number(teacher: bundles.Teacher, student, precision: str):
    config = changed(precision=precision)
    state = following(teacher, config, student)
    source = synthesis.source(teacher, config, CPU, state=state)[1]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = source(5)
    assert torch.equal(torch.get_rng_state(), before)
    source(4)
    torch.manual_seed(4)
    assert same(one, source(5)) and same(one, made(teacher, config, state, 5))
    assert not np.array_equal(one.images, source(4).images)
    assert not np.array_equal(one.images, made(teacher, config, first(teacher, config), 5).images)
    assert set(one.terms) > {"label", "bn", "adversarial", "contrastive"}


def test_the_states_are_pure_functions_and_nothing_given_is_changed(teacher: bundles.Teacher, student):
    hashes = [first(teacher, SMALL).hash for _ in range(2)]
    state = following(teacher, SMALL, student)
    batches = [made(teacher, SMALL, state, index) for index in range(2)]
    total = summed([batch.contribution for batch in batches])
    weights = {name: tensor.clone() for name, tensor in teacher.network.state_dict().items()}
    before = RoundState(1, {**total}, None).hash, state.hash
    network = tiny_network(seed=1).eval()  # advancing does not look at it
    after = [RoundState(2, contrastive.advance(teacher, SMALL, state, total, one)).hash for one in (None, network)]
    assert hashes[0] == hashes[1] and after[0] == after[1]
    steps = [float(one["head_adam.step.0.weight"]) for one in (state.arrays, total)]
    assert steps == [SMALL.num_steps, 2 * 2 * SMALL.num_steps], "the head's optimiser goes on, in each of two batches"
    assert (RoundState(1, {**total}, None).hash, RoundState(1, state.arrays, student).hash) == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in teacher.network.state_dict().items())


def test_the_next_head_is_the_mean_of_those_that_the_batches_trained(teacher: bundles.Teacher):
    state = first(teacher, SMALL)
    one, two = (made(teacher, SMALL, state, index).contribution for index in range(2))
    after = contrastive.advance(teacher, SMALL, state, summed([one, two]), None)
    heads = [name for name in after if name != "bank"]
    assert len(heads) == 4 * (1 + 3) and after.keys() == state.arrays.keys()  # weights, biases; moments, steps
    for name in heads:
        np.testing.assert_allclose(after[name], (one[name] + two[name]) / 2, rtol=1e-6, atol=1e-12)
        assert after[name].dtype == state.arrays[name].dtype
    assert not np.array_equal(one["head.0.weight"], two["head.0.weight"])
    assert float(after["head_adam.step.0.weight"]) == SMALL.num_steps


def test_an_empty_bank_and_one_that_never_holds_anything_work(teacher: bundles.Teacher):
    assert len(first(teacher, SMALL).arrays["bank"]) == 0
    assert math.isfinite(made(teacher, SMALL, first(teacher, SMALL)).terms["contrastive"])
    for config in (changed(bank_size=0), changed(num_negatives=0)):
        assert made(teacher, config, following(teacher, config)).terms["num_attempts"] == 1


def test_without_a_weight_a_student_changes_no_byte_and_with_one_it_does(teacher: bundles.Teacher):
    config = changed(adversarial_weight=0.0)
    state = following(teacher, config)
    network = tiny_network(seed=1).eval()
    with_it, without = (contrastive.source(teacher, config, "ab" * 32, CPU, state, one)(0) for one in (network, None))
    assert same(with_it, without) and with_it.terms.keys() == without.terms.keys()
    # One that always agrees on the class, and is less sure of it.
    less_sure = {name: tensor.numpy().copy() for name, tensor in teacher.network.state_dict().items()}
    for name in [*less_sure][-2:]:
        less_sure[name] /= 3
    config = changed(adversarial_weight=50.0, num_steps=3)
    alone = following(teacher, config)
    looked = made(teacher, config, RoundState(1, alone.arrays, less_sure))
    assert looked.terms["adversarial"] < 0
    passes = [[batch.terms[f"num_{who}_passes"] for who in ("teacher", "student")] for batch in (looked, with_it)]
    assert passes == [[2 * 3 * 8, 3 * 8], [2 * 2 * 8, 0]], "both views through the teacher, one through the student"
    assert not np.array_equal(looked.images, made(teacher, config, alone).images)


def test_without_a_contrastive_weight_there_is_no_state_and_other_images(teacher: bundles.Teacher):
    config = changed(contrastive_weight=0.0)
    state = following(teacher, config)
    batch = made(teacher, config, state)
    assert state.arrays == {} and "contrastive" not in batch.terms and batch.terms["num_teacher_passes"] == 2 * 8


def test_the_images_of_the_lowest_loss_are_kept():
    kept: dict[str, Tensor] = {}
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.0, math.nan]):
        kept = contrastive.lower(kept, {"loss": torch.tensor(loss), "images": torch.full((2, 1), step)})
    assert kept["images"].tolist() == [[1], [1]] and float(kept["loss"]) == 1.0


def test_more_steps_lower_the_loss(teacher: bundles.Teacher):
    config = changed(learning_rate=0.01, bn_weight=0.1)
    state = first(teacher, config)
    few, many = (made(teacher, config.model_copy(update={"num_steps": number}), state).terms for number in (1, 25))
    assert sum(many[name] * getattr(config, f"{name}_weight") for name in ("bn", "label", "contrastive")) < 0.9 * sum(
        few[name] * getattr(config, f"{name}_weight") for name in ("bn", "label", "contrastive")
    )


# ---- refusals --------------------------------------------------------------------------------------------------------


class Folded(nn.Module):
    """A network whose BatchNorm layer sees two rows of each image."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(128), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x.reshape(-1, 128)).reshape(len(x), -1))


def test_a_teacher_that_does_not_suit_is_refused_in_one_line(teacher: bundles.Teacher, tmp_path: Path):
    independent = replace(teacher, info=teacher.info.model_copy(update={"head": "sigmoid"}))
    plain = make_teacher(tmp_path / "plain")
    folded = replace(teacher, network=bundles.freeze(Folded()))
    for given, config, words in (
        (independent, SMALL, ("sigmoid", "exclude each other")),
        (plain, SMALL, ("no BatchNorm layer",)),
        (folded, SMALL, ("4 rows of 2 images",)),
        (teacher, changed(bank_size=10**7), ("x.bank_size", "x.num_projected")),
    ):
        with pytest.raises(ValueError) as caught:
            synthesis.check(given, config, "x")
        message = str(caught.value)
        assert message.startswith("x.method=cmi: ") and "\n" not in message
        assert all(word in message for word in words), message
    synthesis.check(teacher, SMALL, "x")
    synthesis.check(folded, changed(contrastive_weight=0.0), "x")
    with pytest.raises(ValueError, match="label_weight and bn_weight are both 0"):
        changed(label_weight=0.0, bn_weight=0.0)
