import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from dfkd_ray.heads import SOFTMAX
from dfkd_ray.losses import (
    batchnorm_distance,
    distillation_kl,
    mean_square,
    output_entropy,
    total_variation,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row, temperature=1.0):
    """Slow reference: a list of probabilities."""
    exps = [math.exp(float(value) / temperature) for value in row]
    return [value / sum(exps) for value in exps]


def test_batchnorm_distance_is_zero_on_matching_statistics():
    mean, variance = normal(7), normal(7, seed=1).square()
    assert batchnorm_distance(mean, variance, mean.clone(), variance.clone()).item() == 0


def test_batchnorm_distance_has_a_finite_gradient_on_matching_statistics():
    mean, variance = normal(7).requires_grad_(), normal(7, seed=1).square().requires_grad_()
    batchnorm_distance(mean, variance, mean.detach(), variance.detach()).backward()
    assert mean.grad is not None and variance.grad is not None
    assert mean.grad.isfinite().all() and variance.grad.isfinite().all()


def test_batchnorm_distance_equals_a_slow_reference():
    mean, variance, running_mean, running_var = (normal(5, seed=seed) for seed in range(4))
    expected = sum(float(a - b) ** 2 for a, b in zip(mean, running_mean, strict=True)) ** 0.5
    expected += sum(float(a - b) ** 2 for a, b in zip(variance, running_var, strict=True)) ** 0.5
    assert batchnorm_distance(mean, variance, running_mean, running_var).item() == pytest.approx(expected, rel=1e-5)


def test_statistics_of_another_shape_are_refused_rather_than_broadcast():
    with pytest.raises(jaxtyping.TypeCheckError):
        batchnorm_distance(normal(1), normal(1), normal(5), normal(5))


def test_total_variation_of_a_constant_image_is_zero():
    assert total_variation(torch.full((2, 3, 4, 5), 1.7)).item() == 0


def test_total_variation_equals_a_slow_reference():
    images = normal(2, 3, 4, 5)
    rows = [abs(float(x[i + 1, j] - x[i, j])) for n in images for x in n for i in range(3) for j in range(5)]
    columns = [abs(float(x[i, j + 1] - x[i, j])) for n in images for x in n for i in range(4) for j in range(4)]
    expected = sum(rows) / len(rows) + sum(columns) / len(columns)
    assert total_variation(images).item() == pytest.approx(expected, rel=1e-5)


def test_total_variation_depends_on_neither_batch_nor_resolution():
    ramp = torch.arange(8.0).view(1, 1, 1, 8)
    values = [total_variation(ramp.expand(n, c, h, 8)[..., :w]).item() for n, c, h, w in [(1, 1, 8, 8), (5, 3, 4, 4)]]
    assert values == [1.0, 1.0]


def test_mean_square_equals_a_slow_reference():
    images = normal(2, 1, 3, 3)
    assert mean_square(images).item() == pytest.approx(sum(v**2 for v in images.flatten().tolist()) / 18, rel=1e-5)


def test_entropy_is_that_of_a_uniform_and_of_a_certain_output():
    assert output_entropy(torch.zeros(3, 8)).item() == pytest.approx(math.log(8), rel=1e-6)
    assert output_entropy(torch.tensor([[1000.0, 0.0, 0.0]])).item() == 0


def test_entropy_equals_a_slow_reference():
    logits = normal(4, 6) * 3
    expected = sum(-sum(p * math.log(p) for p in softmax(row)) for row in logits) / 4
    assert output_entropy(logits).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_kl_equals_a_slow_reference(temperature):
    student, teacher = normal(4, 6) * 3, normal(4, 6, seed=1) * 3
    expected = 0.0
    for row, other in zip(student, teacher, strict=True):
        q, p = softmax(row, temperature), softmax(other, temperature)
        expected += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True)) / 4
    value = distillation_kl(student, teacher, temperature).item()
    assert value == pytest.approx(temperature**2 * expected, rel=1e-4)


def test_distillation_kl_is_zero_for_equal_outputs_and_blind_to_a_constant():
    teacher = normal(4, 6) * 5
    assert distillation_kl(teacher + 3, teacher, 4.0).item() == pytest.approx(0, abs=1e-5)


def test_distillation_kl_is_not_symmetric():
    student, teacher = normal(4, 6) * 3, normal(4, 6, seed=1) * 3
    assert abs(distillation_kl(student, teacher, 1.0) - distillation_kl(teacher, student, 1.0)).item() > 0.1


def test_at_high_temperature_the_gradient_is_the_difference_of_centred_logits():
    # Hinton et al. 2015, section 2.1: with T² the gradient tends to (v - z) / classes, free of T.
    student, teacher = normal(5, 8).requires_grad_(), normal(5, 8, seed=1)
    distillation_kl(student, teacher, 1e3).backward()
    centred = [x - x.mean(dim=1, keepdim=True) for x in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / 8 / 5, rtol=0.02, atol=1e-3)


def test_outputs_of_different_class_counts_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        distillation_kl(normal(4, 1), normal(4, 6), 1.0)


def test_mixed_cross_entropy_equals_cross_entropy_with_soft_labels():
    logits, labels, partners = normal(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([5, 4, 3, 2, 1, 0])
    weight = torch.rand(6, generator=torch.Generator().manual_seed(2))
    hot = F.one_hot(labels, 4).float()
    soft = weight[:, None] * hot + (1 - weight[:, None]) * hot[partners]
    torch.testing.assert_close(
        SOFTMAX.mixed_label_loss(logits, labels, partners, weight), F.cross_entropy(logits, soft)
    )


def test_mixed_cross_entropy_without_mixing_is_cross_entropy():
    logits, labels = normal(3, 4), torch.tensor([0, 1, 2])
    value = SOFTMAX.mixed_label_loss(logits, labels, torch.tensor([1, 2, 0]), torch.ones(3))
    torch.testing.assert_close(value, F.cross_entropy(logits, labels))
