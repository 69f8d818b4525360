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


def batch_balance(logits: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """sum_c p_c ln p_c of the mean softmax p over the batch: minus its entropy, lowest where classes are equally many.

    Source: Chen et al. 2019, arXiv 1904.01186, equation 4.
    """
    mean = logits.softmax(dim=1).mean(dim=0)
    return torch.special.xlogy(mean, mean).sum()


def activation(features: Float[Tensor, "n f *sides"]) -> Float[Tensor, ""]:
    """-mean |f|: lowest where the features are strongly active.

    Source: Chen et al. 2019, arXiv 1904.01186, equation 3.
    """
    return -features.abs().mean()


def disagreement(student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """mean |t - s| of the logits. Source: Fang et al. 2019, arXiv 1912.11006, equation 3."""
    return (teacher - student).abs().mean()


def divergences(student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
    """KL(softmax(teacher) || softmax(student)) of each image, in nats."""
    log_student, log_teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


def decision_adversary(student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """-mean_n 1(student's class = teacher's class) KL(teacher || student).

    Lowest where the two agree on the class and differ in the distribution. An image on which they differ in the class
    gets no gradient. Source: Fang et al. 2021, arXiv 2105.08584, equation 8.
    """
    agrees = student.argmax(dim=1) == teacher.argmax(dim=1)
    return -(agrees * divergences(student, teacher)).mean()


def attention(x: Float[Tensor, "n c *sides"]) -> Float[Tensor, "n positions"]:
    """The attention map: squares, mean over channels, flattened, length 1 for each image.

    Source: Zagoruyko and Komodakis 2017, arXiv 1612.03928, section 3.1.
    """
    return F.normalize(x.square().mean(dim=1).flatten(1), dim=1)


def attention_distance(student: Float[Tensor, "n c *sides"], teacher: Float[Tensor, "n d *sides"]) -> Float[Tensor, ""]:
    """Mean squared difference of two layers' attention maps; their sides must be equal, channels need not be."""
    return (attention(student) - attention(teacher)).square().mean()


def moving(mean: Float[Tensor, " c"], average: Float[Tensor, " c"] | None, momentum: float) -> Float[Tensor, " c"]:
    """(1 - momentum) mean + momentum average: a batch's statistic, with those of earlier batches; the first is itself.

    Source: Fang et al. 2022, arXiv 2112.06253, section 3.3.
    """
    return mean if average is None else (1 - momentum) * mean + momentum * average


def contrastive(
    queries: Float[Tensor, "n features"], keys: Float[Tensor, "n features"], num_current: int, temperature: float
) -> Float[Tensor, ""]:
    """Each query finds its own key among all keys: cross-entropy over the rows of queries · keys / temperature.

    Row i of either is a view of image i, of length 1. The first `num_current` rows are the images being made, the rest
    a memory. It is the mean over the former plus the mean over the latter, in nats. Keys get no gradient: each image is
    moved away from the keys of the others, and the others are not moved. Source: Fang et al. 2021, arXiv 2105.08584.
    """
    similarity = queries @ keys.detach().T / temperature
    own = torch.arange(len(queries), device=queries.device)
    rows = F.cross_entropy(similarity, own, reduction="none")
    parts = [part.mean() for part in (rows[:num_current], rows[num_current:]) if len(part)]
    return torch.stack(parts).sum()
