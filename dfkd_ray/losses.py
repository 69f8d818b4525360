"""Losses as pure functions of tensors: each returns one scalar, unweighted; weights and sums belong to the loops."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def batchnorm_distance(
    mean: Float[Tensor, " c"],
    variance: Float[Tensor, " c"],
    running_mean: Float[Tensor, " c"],
    running_var: Float[Tensor, " c"],
) -> Float[Tensor, ""]:
    """||mean - running_mean||_2 + ||variance - running_var||_2 of one layer's input.

    Norms over channels, not squared. Source: Yin et al. 2020, arXiv 1912.08795, equation 4.
    """
    return torch.linalg.vector_norm(mean - running_mean) + torch.linalg.vector_norm(variance - running_var)


def total_variation(images: Float[Tensor, "n c *sides"]) -> Float[Tensor, ""]:
    """mean |x[i+1] - x[i]|, summed over the axes of an image, in normalised pixels.

    Mean-reduced, so that its weight does not depend on batch or resolution. An axis of length 1 adds nothing.
    """
    total = images.new_zeros(())
    for axis in range(2, images.ndim):
        if images.shape[axis] > 1:
            total = total + images.diff(dim=axis).abs().mean()
    return total


def mean_square(images: Float[Tensor, "n c *sides"]) -> Float[Tensor, ""]:
    """mean x², in normalised pixels squared."""
    return images.square().mean()


def output_entropy(logits: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """Mean entropy of the softmax, in nats: low if the teacher is confident of any class."""
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def distillation_kl(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], temperature: float
) -> Float[Tensor, ""]:
    """T² mean_n KL(softmax(teacher / T) || softmax(student / T)), in nats.

    T² keeps the size of the gradient. Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
