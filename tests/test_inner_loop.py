"""Fast and NAYER: what a batch and a round give, and that they are pure."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dfkd_ray import batchnorm, bundles, config, devices, synthesis
from dfkd_ray.batches import Batch, RoundState, summed
from dfkd_ray.config import FastConfig, NayerConfig, StudentConfig
from dfkd_ray.heads import SOFTMAX
from dfkd_ray.synthesis import fast, generator, inner_loop, nayer
from dfkd_ray.synthesis.optimiser import Aim, bn_term
from helpers import tiny_network

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "batch_size": 8,
    "num_steps": 2,
    "num_inputs": 6,
    "num_channels": 4,
    "num_threads": 1,
    "shift": 1,
}
FAST, NAYER = FastConfig(**TINY), NayerConfig(**TINY)
METHODS = pytest.mark.parametrize("settings", [FAST, NAYER], ids=["fast", "nayer"])


@pytest.fixture
def teacher(tiny_teacher: Path) -> bundles.Teacher:
    return bundles.load(str(tiny_teacher))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed(settings: Any, **fields: Any) -> Any:
    return type(settings).model_validate(settings.model_dump() | fields)


def snapshot() -> dict[str, np.ndarray]:
    """The weights of a student that differs from the teacher."""
    return {name: tensor.numpy().copy() for name, tensor in tiny_network(seed=1).state_dict().items()}


def restored(teacher: bundles.Teacher, settings: Any, state: RoundState) -> generator.Generator:
    return generator.restored(teacher.info.image_shape, settings, state.arrays, CPU)


def made(teacher: bundles.Teacher, settings: Any, state: RoundState, index: int = 0) -> Batch:
    student = None if state.student is None else StudentConfig()
    return synthesis.source(teacher, settings, CPU, "train", state, student)[1](index)


def first(teacher: bundles.Teacher, settings: Any) -> RoundState:
    module: Any = synthesis.module_of(settings)
    return RoundState(0, module.first_state(teacher, settings))


def advanced(teacher: bundles.Teacher, settings: Any, state: RoundState, total: Mapping[str, np.ndarray]) -> RoundState:
    module: Any = synthesis.module_of(settings)
    return RoundState(state.number + 1, module.advance(teacher, settings, state, total, None))


def second(teacher: bundles.Teacher, settings: Any, student: Mapping[str, np.ndarray] | None = None) -> RoundState:
    """The state of round 1, after one batch of round 0."""
    state = first(teacher, settings)
    after = advanced(teacher, settings, state, summed([made(teacher, settings, state).contribution]))
    return replace(after, student=student)


def same(one: Batch, other: Batch) -> bool:
    arrays = [one.contribution[name].tobytes() == array.tobytes() for name, array in other.contribution.items()]
    return (
        one.images.tobytes() == other.images.tobytes()
        and set(one.contribution) == set(other.contribution)
        and all(arrays)
    )


@METHODS
def test_equal_state_and_index_give_equal_bytes_and_leave_state_teacher_and_global_generator(teacher, settings):
    state = second(teacher, settings, snapshot())
    held, weights = state.hash, {name: tensor.clone() for name, tensor in teacher.network.state_dict().items()}
    before = torch.get_rng_state()
    one = made(teacher, settings, state)
    torch.manual_seed(123)
    source = synthesis.source(teacher, settings, CPU, "train", state, StudentConfig())[1]
    other, again = source(1), source(0)  # in another order, of one source
    torch.set_rng_state(before)
    module: Any = synthesis.module_of(settings)
    module.first_state(teacher, settings)
    assert torch.equal(before, torch.get_rng_state())
    assert same(one, again) and not same(one, other)
    assert replace(state).hash == held
    assert all(torch.equal(weights[name], tensor) for name, tensor in teacher.network.state_dict().items())


@METHODS
def test_a_rounds_state_is_a_function_of_what_it_is_given(teacher, settings):
    state = second(teacher, settings)
    total = summed([made(teacher, settings, state, index).contribution for index in range(2)])
    held = {name: array.copy() for name, array in total.items()}
    hashes = {advanced(teacher, settings, state, total).hash for _ in range(2)}
    assert len(hashes) == 1 and hashes != {state.hash}
    assert all(np.array_equal(held[name], array) for name, array in total.items())


@METHODS
def test_a_student_of_weight_0_changes_no_byte_and_one_of_more_weight_does(teacher, settings):
    deaf = changed(settings, adversarial_weight=0)
    state = second(teacher, deaf)
    alone, beside = made(teacher, deaf, state), made(teacher, deaf, replace(state, student=snapshot()))
    assert same(alone, beside) and "adversarial" not in beside.terms
    assert not config.METHODS[settings.method].looks_at_student(deaf)
    # One whose classes are the teacher's but for the temperature: the mask is open.
    agreeing = {name: tensor.numpy().copy() for name, tensor in teacher.network.state_dict().items()}
    agreeing |= {name: agreeing[name] * 3 for name in ("fc.weight", "fc.bias")}
    heard = changed(settings, adversarial_weight=5, precision="float32")
    state = second(teacher, heard, agreeing)
    looked = made(teacher, heard, state)
    assert looked.terms["adversarial"] < 0
    # Seeds follow from the config, so the same config is compared.
    assert not same(looked, made(teacher, heard, replace(state, student=None)))


def test_images_of_the_lowest_loss_are_kept(teacher):
    settings = changed(FAST, num_steps=4, shift=0, flip=False, precision="float32")
    against = inner_loop.fixed(teacher, settings, CPU, RoundState(0), None)
    aim, unmoved = Aim(torch.arange(8), SOFTMAX), torch.zeros((), requires_grad=True)
    shown = [normal(8, 1, 16, 16, seed=seed).mul(scale).sigmoid() for seed, scale in enumerate((1.0, 2.0, 0.2, 4.0))]
    images = [generator.pixels(one, against.space) for one in shown]
    terms = [inner_loop.measure(settings, one, against, aim) for one in images]
    losses = [settings.label_weight * one["label"] + settings.bn_weight * one["bn"] for one in terms]
    for place in range(4):  # of the lowest
        order = [i for i in range(4) if i != np.argmin(losses)]
        order.insert(place, int(np.argmin(losses)))
        steps = iter(order)
        kept, _ = inner_loop.lowest(
            lambda steps=steps: shown[next(steps)] + 0 * unmoved,
            devices.Adam([unmoved], lr=0.1),
            against,
            settings,
            aim,
            torch.Generator(),
        )
        assert torch.equal(kept, images[int(np.argmin(losses))])


@METHODS
def test_batchnorm_averages_are_the_running_averages_of_the_rounds_means(teacher, settings):
    state, expected = first(teacher, settings), {}
    for number in range(3):
        parts = [made(teacher, settings, state, index).contribution for index in range(2)]
        names = [name for name in parts[0] if name.startswith("bn_")]
        assert len(names) == 2 * len(batchnorm.layers(teacher.network))
        for name in names:
            mean = (parts[0][name] + parts[1][name]) / 2
            expected[name] = mean if number == 0 else 0.1 * mean + 0.9 * expected[name]
        state = advanced(teacher, settings, state, summed(parts))
        for name in names:
            np.testing.assert_allclose(state.arrays[name], expected[name], rtol=1e-4, atol=1e-6)


def test_the_batchnorm_term_compares_moving_averages_and_in_the_first_round_the_batchs_own(teacher):
    images = normal(8, 1, 16, 16)
    with batchnorm.recorded(teacher.network) as statistics:
        teacher.network(images)

    def term(earlier: Any, momentum: float) -> torch.Tensor:
        return bn_term(inner_loop.averaged(statistics, earlier, momentum), CPU)

    own = losses_of(statistics, [(None, None)] * len(statistics.layers))
    torch.testing.assert_close(term([], 0.9), own)
    earlier = [(normal(len(mean), seed=3), normal(len(mean), seed=4).square()) for mean in statistics.means]
    torch.testing.assert_close(term(earlier, 0.9), losses_of(statistics, earlier))
    torch.testing.assert_close(term(earlier, 0.0), own)
    matched: Any = [(layer.running_mean, layer.running_var) for layer in statistics.layers]
    torch.testing.assert_close(term(matched, 0.75), own / 4)


def losses_of(statistics: batchnorm.Statistics, earlier: Any) -> torch.Tensor:
    total = torch.zeros(())
    for place, layer in enumerate(statistics.layers):
        pairs: Any = (statistics.means[place], layer.running_mean), (statistics.variances[place], layer.running_var)
        for (batch, running), old in zip(pairs, earlier[place], strict=True):
            average = batch if old is None else 0.1 * batch + 0.9 * old
            total = total + (average - running).square().sum().sqrt()
    return total


def test_fasts_contribution_is_the_sum_of_the_inner_gradients_of_a_hand_written_loop(teacher):
    settings = changed(FAST, num_steps=3, precision="float32", shift=0, flip=False, batch_size=8)
    state = first(teacher, settings)
    learner = restored(teacher, settings, state)
    own, aim = restored(teacher, settings, state), Aim(torch.arange(8), SOFTMAX)
    against = inner_loop.fixed(teacher, settings, CPU, state, None)
    _, contribution = fast.adapt(learner, against, settings, aim, torch.Generator().manual_seed(5))

    z = normal(8, 6, seed=5).requires_grad_()
    weights, sums = [*own.parameters()], [torch.zeros_like(weight) for weight in own.parameters()]
    variables = [*weights, z]
    first_moments, second_moments = ([torch.zeros_like(one) for one in variables] for _ in range(2))
    for step in range(1, 4):
        images = generator.pixels(own(z), teacher.info.space)
        with batchnorm.recorded(against.network) as statistics:
            label = torch.nn.functional.cross_entropy(against.network(images), aim.labels)
            loss = 0.5 * label + 10 * losses_of(statistics, [(None, None)] * len(statistics.layers))
        gradients = torch.autograd.grad(loss, variables)
        with torch.no_grad():
            for total, gradient in zip(sums, gradients, strict=False):
                total += gradient
            for place, (variable, gradient) in enumerate(zip(variables, gradients, strict=True)):
                m = first_moments[place].mul_(0.5).add_(0.5 * gradient) / (1 - 0.5**step)
                v = second_moments[place].mul_(0.999).add_(0.001 * gradient**2) / (1 - 0.999**step)
                rate = settings.input_learning_rate if variable is z else settings.learning_rate
                variable -= rate * m / (v.sqrt() + 1e-8)
    for (name, _), total in zip(own.named_parameters(), sums, strict=True):
        found = torch.from_numpy(np.array(contribution[f"gradient.{name}"]))
        assert (found - total).norm() <= 0.02 * total.norm() + 1e-4, name


def test_fasts_generator_takes_adam_steps_along_the_mean_contribution_and_keeps_its_moments(teacher):
    settings = changed(FAST, num_steps=3, learning_rate=0.01)
    state, reference = first(teacher, settings), restored(teacher, settings, first(teacher, settings))
    adam = devices.Adam(reference.parameters(), lr=0.03, betas=generator.BETAS)
    for number in range(3):
        parts = []
        for place in range(2):
            shapes = enumerate(reference.named_parameters())
            part = {
                f"gradient.{n}": normal(*p.shape, seed=100 * number + 10 * place + i).numpy() for i, (n, p) in shapes
            }
            parts.append({**part, "batches": np.asarray(1.0)})
        for name, parameter in reference.named_parameters():
            parameter.grad = torch.from_numpy((parts[0][f"gradient.{name}"] + parts[1][f"gradient.{name}"]) / 2)
        adam.step()
        state = advanced(teacher, settings, state, summed(parts))
    for name, parameter in reference.named_parameters():
        found = torch.from_numpy(np.array(state.arrays[f"generator.{name}"]))
        torch.testing.assert_close(found, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_every_batch_of_fast_starts_from_the_rounds_generator_with_inputs_of_its_own(teacher):
    settings = changed(FAST, num_steps=1, storage="float32", precision="float32")
    state = first(teacher, settings)
    batch = made(teacher, settings, state, 3)
    seeds = config.seeds_key(teacher.hash, settings, "train", 0)
    from dfkd_ray.batches import batch_seed

    z = normal(8, 6, seed=batch_seed(seeds, 3))
    images = generator.pixels(restored(teacher, settings, state)(z), teacher.info.space).detach()
    mean, std = teacher.info.space.per_channel()
    np.testing.assert_allclose(batch.images, (images * std + mean).numpy(), atol=1e-4)


def test_a_reset_of_fast_draws_the_first_linear_and_batchnorm_anew_and_nothing_else(teacher):
    settings, never = changed(FAST, reset_round=1), FAST
    state = first(teacher, settings)
    total = summed([made(teacher, settings, state).contribution])
    with_reset, without = (advanced(teacher, one, state, total).arrays for one in (settings, never))
    differ = {name for name in without if not np.array_equal(with_reset[name], without[name])}
    expected = {f"generator.{name}" for name in ("linear.weight", "first.weight")}
    zeroed = {f"generator.{name}" for name in ("linear.bias", "first.bias")}
    assert with_reset.keys() == without.keys() and expected <= differ <= expected | zeroed
    assert all(not with_reset[name].any() for name in zeroed)
    assert with_reset["generator.linear.weight"].std() == pytest.approx(generator.INIT_STD, rel=0.2)
    assert not np.array_equal(with_reset["generator.linear.weight"], state.arrays["generator.linear.weight"])
    later = RoundState(1, with_reset)
    assert np.array_equal(
        advanced(teacher, settings, later, total).arrays["generator.linear.weight"],
        advanced(teacher, never, later, total).arrays["generator.linear.weight"],
    )


@pytest.mark.parametrize("num_images", [3, 6, 8])
def test_images_i_of_nayer_gets_the_noisy_layer_of_floor_i_over_c(num_images):
    embeddings, given = normal(3, 5), normal(num_images, 5, seed=1)
    noisy = nayer.noisy_layers(num_images, embeddings, 4, torch.Generator().manual_seed(2))
    assert len(noisy.weights) == -(-num_images // 3) and not noisy.biases.any()
    noisy = nayer.Noisy(noisy.weights, normal(*noisy.biases.shape, seed=3))
    expected = torch.stack([noisy.weights[i // 3] @ given[i] + noisy.biases[i // 3] for i in range(num_images)])
    torch.testing.assert_close(nayer.mixed(given, noisy, 3), expected)


def test_with_more_classes_than_images_a_batch_of_nayer_has_one_noisy_layer():
    noisy = nayer.noisy_layers(4, normal(10, 5), 6, torch.Generator().manual_seed(2))
    given = normal(4, 5, seed=1)
    assert len(noisy.weights) == 1
    torch.testing.assert_close(nayer.mixed(given, noisy, 10), given @ noisy.weights[0].T)


def test_noisy_layers_are_standard_normal_and_differ():
    noisy = nayer.noisy_layers(40, normal(10, 30), 50, torch.Generator().manual_seed(0))
    assert noisy.weights.std().item() == pytest.approx(1, abs=0.03) and abs(noisy.weights.mean().item()) < 0.03
    assert not torch.equal(noisy.weights[0], noisy.weights[1])


@pytest.mark.parametrize("kind", ["classifier", "orthonormal", "one_hot"])
def test_embeddings_have_length_1_differ_and_stay_over_the_rounds(teacher, kind):
    settings = changed(NAYER, embedding=kind, generator_life=1)
    state = first(teacher, settings)
    embeddings = state.arrays["embeddings"]
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    products = embeddings @ embeddings.T - np.eye(10)
    assert products.max() < 0.9999 if kind == "classifier" else np.abs(products).max() < 1e-5
    after = advanced(teacher, settings, state, summed([made(teacher, settings, state).contribution]))
    assert after.arrays["embeddings"].tobytes() == embeddings.tobytes()
    assert np.array_equal(embeddings, first(teacher, settings).arrays["embeddings"])


def test_classifier_embeddings_are_the_directions_of_the_last_linear_layers_rows(teacher):
    weight = teacher.network.get_parameter("fc.weight").detach()
    torch.testing.assert_close(nayer.embeddings_of(teacher, NAYER), nn.functional.normalize(weight))


def test_nayer_makes_every_class_equally_often(teacher):
    labels = np.concatenate([made(teacher, NAYER, first(teacher, NAYER), index).labels for index in range(5)])
    assert np.bincount(labels, minlength=10).tolist() == [4] * 10


def test_nayers_generator_and_moments_are_the_means_over_the_batches(teacher):
    state = first(teacher, NAYER)
    parts = [made(teacher, NAYER, state, index).contribution for index in range(2)]
    after = advanced(teacher, NAYER, state, summed(parts)).arrays
    for name in state.arrays:
        if name != "embeddings":
            np.testing.assert_allclose(after[name], (parts[0][name] + parts[1][name]) / 2, rtol=1e-5, atol=1e-7)
    assert after["adam.step.norm.weight"] == NAYER.num_steps
    assert after["generator.body.linear.weight"].dtype == np.float32


def test_a_new_generator_of_nayer_comes_at_the_end_of_a_life_and_without_moments(teacher):
    settings = changed(NAYER, generator_life=2)
    state, states = first(teacher, settings), []
    for _ in range(4):
        states.append(state)
        state = advanced(teacher, settings, state, summed([made(teacher, settings, state).contribution]))
    steps = [float(one.arrays["adam.step.norm.weight"]) for one in states]
    assert steps == [0, 2, 0, 2]
    weights = [one.arrays["generator.body.linear.weight"] for one in states]
    assert not np.array_equal(weights[0], weights[2])
    assert weights[2].std() == pytest.approx(generator.INIT_STD, rel=0.2)
    assert "bn_mean.0" in states[2].arrays  # what earlier generators made still counts


@METHODS
def test_later_rounds_lower_the_loss_that_a_batch_starts_from(teacher, settings):
    """What is carried from round to round has learnt: one step from it is better than one step from a new generator."""
    settings = changed(settings, num_steps=5, adversarial_weight=0, bn_momentum=0, num_channels=8)
    state = first(teacher, settings)
    for _ in range(4):
        state = advanced(teacher, settings, state, summed([made(teacher, settings, state).contribution]))
    begin, end = made(teacher, settings, first(teacher, settings)).terms, made(teacher, settings, state).terms
    assert 0.5 * end["label"] + 10 * end["bn"] < 0.5 * begin["label"] + 10 * begin["bn"]


def test_a_batch_of_fast_that_starts_again_halves_both_learning_rates(teacher, monkeypatch):
    rates, adapt = [], fast.adapt

    def fail_first(learner: Any, against: Any, given: FastConfig, *rest: Any) -> Any:
        rates.append((given.learning_rate, given.input_learning_rate))
        images, contribution = adapt(learner, against, given, *rest)
        if len(rates) == 1:
            contribution["gradient.last.bias"] = np.full(1, np.nan, np.float32)
        return images, contribution

    monkeypatch.setattr(fast, "adapt", fail_first)
    batch = made(teacher, FAST, first(teacher, FAST))
    assert rates == [(2e-3, 0.01), (1e-3, 0.005)] and batch.terms["num_attempts"] == 2
    assert all(np.isfinite(array).all() for array in batch.contribution.values())


def test_a_contribution_that_is_not_finite_is_no_contribution():
    with pytest.raises(FloatingPointError, match=r"gradient\.x is not finite"):
        inner_loop.finite({"gradient.x": np.asarray([1.0, np.nan])})


class Plain(nn.Module):
    """Logits without BatchNorm; the last linear layer has `rows` rows."""

    def __init__(self, rows: int, linear: bool = True):
        super().__init__()
        self.last = nn.Linear(64, rows) if linear else nn.Conv2d(1, rows, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.flatten(1) if isinstance(self.last, nn.Linear) else x).flatten(1)[:, :4]


class Normed(Plain):
    """The same behind a BatchNorm layer."""

    def __init__(self, rows: int, linear: bool = True):
        super().__init__(rows, linear)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


def teacher_of(network: nn.Module, **fields: Any) -> bundles.Teacher:
    described: dict[str, Any] = {"mean": (0.5,), "std": (0.25,), "num_classes": 4, "input_shape": (1, 8, 8)} | fields
    return bundles.Teacher.from_network(network, **described)


@METHODS
def test_a_teacher_of_independent_labels_is_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"^at.method={settings.method}: .*sigmoid, expected softmax.*deepinversion$"):
        synthesis.check(teacher_of(Normed(4), head="sigmoid"), settings, "at")


@METHODS
def test_a_teacher_without_batchnorm_is_refused_by_name_unless_no_statistics_are_matched(settings):
    teacher = teacher_of(Plain(4))
    with pytest.raises(ValueError, match=f"^at.method={settings.method}: .*no BatchNorm.*at.bn_weight=0$"):
        synthesis.check(teacher, settings, "at")
    without = changed(settings, bn_weight=0)
    synthesis.check(teacher, without, "at")
    batch = made(teacher, without, second(teacher, without))
    assert "bn" not in batch.terms and not [name for name in batch.contribution if name.startswith("bn_")]


def twins() -> Normed:
    network = Normed(4)
    with torch.no_grad():
        network.last.weight[3] = 2 * network.last.weight[1]
    return network


def dead() -> Normed:
    network = Normed(4)
    with torch.no_grad():
        network.last.weight[2] = 0
    return network


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Normed(5), "each of the 4 classes: the teacher's has 5 rows"),
        (Normed(4, linear=False), "it has none"),
        (twins(), "classes 1 and 3 are the same"),
        (dead(), "finite and not 0"),
    ],
)
def test_a_classifier_that_does_not_tell_the_classes_apart_is_refused_with_the_alternatives(network, reason):
    teacher, end = teacher_of(network), "use at.embedding=orthonormal or one_hot$"
    with pytest.raises(ValueError, match=f"^at.method=nayer: at.embedding=classifier .*{reason}.*{end}"):
        synthesis.check(teacher, NAYER, "at")
    for kind in ("orthonormal", "one_hot"):
        synthesis.check(teacher, changed(NAYER, embedding=kind), "at")


@METHODS
def test_images_that_nothing_ties_to_the_teacher_are_refused(settings):
    with pytest.raises(ValueError, match="both 0"):
        changed(settings, label_weight=0, bn_weight=0)


def test_a_reset_that_never_comes_is_refused():
    with pytest.raises(ValueError, match="round 20 never comes with num_rounds=20"):
        changed(FAST, reset_round=20)
