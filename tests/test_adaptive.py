"""Generators, the terms of the methods that go by rounds, and one batch of each: pure in its state, or refused."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dfkd_ray import bundles, losses, synthesis
from dfkd_ray.batches import RoundState, summed
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import TrialConfig, parse_synthesis, seeds_key, validate
from dfkd_ray.image_sources import Local, Round
from dfkd_ray.synthesis import adaptive, generative, generator
from dfkd_ray.trial.images import Rounds
from helpers import tiny_trial

CPU = torch.device("cpu")
SMALL = {"batch_size": 8, "num_steps": 2, "num_channels": 4, "num_inputs": 4, "num_threads": 1, "precision": "float32"}
GENERATIVE = ("dfq", "dafl", "dfad", "zskt")


@pytest.fixture(scope="module")
def teacher(tiny_teacher) -> Teacher:
    return bundles.load(str(tiny_teacher))


@pytest.fixture(scope="module")
def student(teacher) -> nn.Module:
    """The teacher with its weights moved a little."""
    network = deepcopy(teacher.network)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return bundles.freeze(network)


def small(method: str, **fields) -> Any:
    return parse_synthesis({"method": method, **SMALL, **fields})


# Generators


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 7, 5), (1, 28, 28), (3, 48, 20), (3, 64, 64), (1, 1, 300)])
def test_a_generator_gives_images_of_exactly_the_size_within_the_pixel_range(shape):
    made = generator.new(shape, 6, 4, seed=0)(torch.randn(3, 6, generator=torch.Generator().manual_seed(0))).detach()
    assert made.shape == (3, *shape) and float(made.min()) >= 0 and float(made.max()) <= 1
    assert generator.grids(*shape[1:])[-1] == shape[1:]


def test_a_generator_begins_small_and_doubles():
    assert generator.grids(28, 28) == [(7, 7), (14, 14), (28, 28)]
    assert generator.grids(32, 32)[0] == (8, 8) and generator.grids(224, 224)[0] == (7, 7)
    assert generator.grids(6, 6) == [(6, 6)]


def test_parameters_of_a_new_generator_follow_from_the_seed_alone():
    one, same, other = (generator.arrays_of(generator.new((1, 8, 8), 4, 4, seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["generator.linear.weight"], other["generator.linear.weight"])
    before = torch.random.get_rng_state()
    generator.new((1, 8, 8), 4, 4, 0)
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator is left alone"


def trained(steps: int, arrays=None):
    """A generator and its Adam after some steps towards dark images, from a state or from new."""
    made = generator.new((1, 8, 8), 4, 4, seed=0)
    optimiser = torch.optim.Adam(made.parameters(), lr=0.01, betas=generator.BETAS)
    begun = arrays or generator.arrays_of(made) | generator.adam_arrays(optimiser, made)
    generator.load(made, begun, CPU)
    generator.put_adam(optimiser, made, begun)
    for _ in range(steps):
        optimiser.zero_grad()
        made(torch.ones(2, 4).cumsum(0)).mean().backward()
        optimiser.step()
    return generator.arrays_of(made) | generator.adam_arrays(optimiser, made)


def test_a_generator_goes_on_from_its_arrays_as_if_it_had_not_stopped():
    whole, resumed = trained(4), trained(2, trained(2))
    assert whole.keys() == resumed.keys() and all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_the_next_generator_is_the_mean_of_the_batches_ones():
    like = {"w": np.zeros(2, np.float32), "n": np.zeros((), np.int64)}
    parts = [{"w": np.array([value, 1], np.float32), "n": np.array(4), "batches": np.asarray(1.0)} for value in (1, 3)]
    mean = generator.mean_of(summed(parts), like)
    assert mean["w"].tolist() == [2, 1] and mean["w"].dtype == np.float32
    assert mean["n"] == 4 and mean["n"].dtype == np.int64


# Terms


def test_the_masked_term_has_no_gradient_where_the_classes_differ():
    own = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    term = losses.decision_adversary(own, teacher)
    term.backward()
    assert own.grad is not None and own.grad[0].abs().sum() > 0 and not own.grad[1].any()
    expected = -nn.functional.kl_div(own[0].log_softmax(0), teacher[0].softmax(0), reduction="sum") / 2
    torch.testing.assert_close(term, expected)


def test_balance_is_lowest_where_the_classes_are_equally_many():
    even = losses.batch_balance(20 * torch.eye(4))
    torch.testing.assert_close(even, -torch.tensor(4.0).log(), rtol=1e-4, atol=1e-4)
    one_class = losses.batch_balance(torch.tensor([[200.0, 0, 0, 0]] * 4))
    assert float(one_class) == 0.0 and float(even) < float(one_class)


def test_a_moving_statistic_is_the_running_average():
    means = [torch.tensor([float(value)]) for value in (1, 5, 2)]
    average = None
    for mean in means:
        average = losses.moving(mean, average, 0.9)
    torch.testing.assert_close(average, torch.tensor([0.1 * 2 + 0.9 * (0.1 * 5 + 0.9 * 1)]))


def test_attention_is_free_of_scale_and_channels():
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses.attention(7 * x), losses.attention(x))
    torch.testing.assert_close(losses.attention_distance(x.repeat(1, 2, 1, 1), x), torch.zeros(()))
    torch.testing.assert_close(losses.attention(x).square().sum(1), torch.ones(2))
    assert losses.attention_distance(x, x.flip(3)) > 0


def test_activation_and_disagreement_have_their_signs():
    features = torch.tensor([[1.0, -3.0]])
    assert float(losses.activation(features)) == -2.0
    assert float(losses.disagreement(features, features + 1)) == 1.0


# One batch of each method


def batch_of(teacher, config, state, student, index=0):
    key = seeds_key(teacher.hash, config)
    module = synthesis.module_of(config)
    assert module is not None
    return module.source(teacher, config, key, CPU, state, student)(index)


@pytest.mark.parametrize("method", GENERATIVE)
def test_a_batch_is_a_function_of_state_and_index(teacher, student, method):
    config = small(method)
    state = RoundState(1, generative.first_state(teacher, config))
    one, again, other = (batch_of(teacher, config, state, student, index) for index in (1, 1, 2))
    assert one.images.tobytes() == again.images.tobytes() != other.images.tobytes()
    assert one.contribution.keys() == again.contribution.keys()
    assert all(np.array_equal(one.contribution[name], again.contribution[name]) for name in one.contribution)
    after = generative.advance(teacher, config, state, summed([one.contribution, other.contribution]), student)
    assert after.keys() == state.arrays.keys() and all(after[n].shape == state.arrays[n].shape for n in after)
    assert float(after["adam.step.linear.weight"]) == 2.0


@pytest.mark.parametrize("method", GENERATIVE)
def test_training_a_generator_lowers_its_loss(teacher, student, method):
    config = small(method, num_steps=40, learning_rate=0.01, jitter=0, flip=False, batch_size=16)
    state = RoundState(1, generative.first_state(teacher, config))
    names = generative.terms_of(config, student)

    def loss(made: RoundState) -> float:
        short = config.model_copy(update={"num_steps": 1, "learning_rate": 1e-9})
        terms = batch_of(teacher, short, made, student, 5).terms
        return sum(getattr(config, f"{name}_weight") * terms[name] for name in names)

    trained = generative.advance(teacher, config, state, batch_of(teacher, config, state, student).contribution, None)
    assert loss(RoundState(1, trained)) < loss(state) - 0.01


def test_a_trial_holds_the_generator_of_its_last_round_alone(teacher, student):
    fields = {"synthesis.method": "dafl", "synthesis.num_rounds": 4, "distillation.num_steps": 4}
    config = validate(TrialConfig, tiny_trial(**fields))
    first = Round(teacher, config.synthesis, CPU)
    rounds = Rounds(config, first, Local(), None, lambda *_: None, "a trial", reestimates=False)
    for step in rounds.starts:
        rounds.pool_at(step, student)
    assert [bool(one.total) for one in rounds.gathered] == [False, False, False, True]


def test_dfq_without_its_students_term_gives_the_same_bytes_with_and_without_a_student(teacher, student):
    config = small("dfq", adversarial_weight=0.0)
    state = RoundState(1, generative.first_state(teacher, config))
    with_one, without = (batch_of(teacher, config, state, one) for one in (student, None))
    assert with_one.images.tobytes() == without.images.tobytes()
    assert with_one.terms.keys() == without.terms.keys()


def adi(**fields) -> Any:
    plain = {"batch_size": 8, "num_steps": 2, "num_threads": 1, "precision": "float32", "bn_weight": 0.2}
    return parse_synthesis({"method": "adi", "adaptive_steps": 3, **plain, **fields})


def adi_state(teacher, config) -> RoundState:
    _, plain = synthesis.source(teacher, config.plain, CPU)
    made = plain(0)
    arrays = {"images": made.images, "labels": made.labels}
    return RoundState(1, adaptive.advance(teacher, config, RoundState(0), arrays, None))


@pytest.mark.parametrize("parametrisation", ["pyramid", "pixel"])
def test_adi_moves_images_to_where_the_student_differs_within_their_class(teacher, student, parametrisation):
    config = adi(adversarial_weight=20.0, adaptive_steps=10, parametrisation=parametrisation)
    state = adi_state(teacher, config)
    moved = batch_of(teacher, config, state, student)
    still = batch_of(teacher, config.model_copy(update={"adaptive_learning_rate": 1e-9}), state, student)
    assert still.images.tobytes() == state.arrays["images"].tobytes(), "it starts from the images of round 0"
    assert moved.terms["adversarial"] < still.terms["adversarial"]
    assert moved.labels.tolist() == state.arrays["labels"].tolist()
    assert adaptive.advance(teacher, config, state, {}, student)["images"].tobytes() == still.images.tobytes()


def test_adi_without_its_students_term_gives_the_same_bytes_with_and_without_a_student(teacher, student):
    config = adi(adversarial_weight=0.0)
    state = adi_state(teacher, config)
    with_one, without = (batch_of(teacher, config, state, one) for one in (student, None))
    assert with_one.images.tobytes() == without.images.tobytes()


# Refusals


def with_(teacher: Teacher, network: nn.Module | None = None, **info) -> Teacher:
    return Teacher(network or teacher.network, teacher.info.model_copy(update=info), teacher.hash, teacher.name)


@pytest.mark.parametrize("method", ["adi", *GENERATIVE])
def test_classes_that_do_not_exclude_each_other_are_refused(teacher, method):
    config = adi() if method == "adi" else small(method)
    with pytest.raises(ValueError, match=rf"^synthesis\.method={method}: .*sigmoid.* compares classes.*deepinversion$"):
        synthesis.check(with_(teacher, head="sigmoid"), config)


def test_a_teacher_without_batchnorm_is_refused_where_its_statistics_are_matched(teacher):
    channels, height, width = teacher.info.image_shape
    classes = teacher.info.num_classes
    plain = with_(teacher, nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes)).eval())
    for config in (adi(), small("dfq")):
        with pytest.raises(ValueError, match=f"method={config.method}: .*no BatchNorm"):
            synthesis.check(plain, config)
    for method in ("dafl", "dfad", "zskt"):
        synthesis.check(plain, small(method))
    synthesis.check(plain, small("dfq", bn_weight=0.0))
    convolutions = nn.Sequential(nn.Conv2d(channels, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match=r"dafl wants .* last Linear layer.*activation_weight=0"):
        synthesis.check(with_(teacher, convolutions), small("dafl"))
    synthesis.check(with_(teacher, convolutions), small("dafl", activation_weight=0.0))


def test_a_method_whose_weights_are_all_zero_is_refused(teacher):
    weights = {"label_weight": 0.0, "balance_weight": 0.0, "activation_weight": 0.0}
    with pytest.raises(ValueError, match="method=dafl: all weights are 0"):
        synthesis.check(teacher, small("dafl", **weights))
