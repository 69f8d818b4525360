"""What a network's outputs mean: classes that exclude each other (softmax), or independent labels (sigmoid).

A `Head` has every function of logits that depends on it. `labels` are int64 (n,), as stored beside images. For a
softmax they are classes. For a sigmoid each is a seed, from which the image's targets follow: 0 or 1 for each label,
drawn independently. So images of both heads are stored, cached and sent in one form.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dfkd_ray import losses
from dfkd_ray.batches import mix_seed

Name = Literal["softmax", "sigmoid"]
SHARE = 0.5  # of positive targets, with few labels
POSITIVES = 2.0  # expected positive targets of an image, with many labels: natural images have few
MASK = (1 << 64) - 1


def positive_share(num_labels: int) -> float:
    """The expected share of positive targets of independent labels."""
    return min(SHARE, POSITIVES / num_labels)


class Head(ABC):
    """The functions of logits (n, classes) that depend on the head. Losses are means over images, in nats."""

    name: Name

    @abstractmethod
    def labels(self, key: str, index: int, batch_size: int, num_classes: int) -> Int[Tensor, " n"]:
        """The labels that the images of a batch are made for: a function of the key and the batch's index."""

    @abstractmethod
    def label_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each image to its labels, (n,)."""

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Their mean."""
        return self.label_losses(logits, labels).mean()

    @abstractmethod
    def entropy(self, logits: Tensor) -> Tensor:
        """Mean entropy of the outputs."""

    @abstractmethod
    def kl(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """T² mean KL(teacher || student) at temperature T."""

    @abstractmethod
    def answers(self, logits: Tensor) -> Tensor:
        """What a network answers: the class (n,), or each label as a boolean (n, classes)."""

    @abstractmethod
    def agrees(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Where the answers are the labels, boolean."""

    @abstractmethod
    def confidence(self, logits: Tensor) -> Tensor:
        """The probability of the answers, mean over images (and labels)."""

    def agreement(self, first: Tensor, second: Tensor) -> float:
        """The share of equal answers of two networks."""
        return float((self.answers(first) == self.answers(second)).float().mean())

    def histogram(self, logits: Tensor) -> list[int]:
        """How many images have each class, or label, as an answer."""
        answers = self.answers(logits)
        counts = answers.sum(dim=0) if answers.ndim == 2 else torch.bincount(answers, minlength=logits.shape[1])
        return counts.tolist()

    def mixed_label_loss(self, logits: Tensor, labels: Tensor, partners: Tensor, weight: Tensor) -> Tensor:
        """mean of w loss(labels) + (1 - w) loss(labels of the partners). Source: arXiv 1710.09412 (mixup)."""
        own, other = self.label_losses(logits, labels), self.label_losses(logits, labels[partners])
        return (weight * own + (1 - weight) * other).mean()


class Softmax(Head):
    """Classes that exclude each other."""

    name = "softmax"

    def labels(self, key: str, index: int, batch_size: int, num_classes: int) -> Int[Tensor, " n"]:
        """Labels cycle over the classes and continue from batch to batch.

        With more classes than images in a batch each cycle has an order of its own, a function of the key, so that no
        class is preferred where the images are too few for all.
        """
        places = torch.arange(batch_size) + index * batch_size
        labels = places % num_classes
        if num_classes > batch_size:
            for cycle in (places // num_classes).unique().tolist():
                chosen = places // num_classes == cycle
                seed = mix_seed(int(key[:16], 16), 0xC7C1E, cycle)
                order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
                labels[chosen] = order[labels[chosen]]
        return labels

    def label_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, labels, reduction="none")

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, in PyTorch's order of summation."""
        return F.cross_entropy(logits, labels)

    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy of the softmax."""
        return losses.output_entropy(logits)

    def kl(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """KL between the softmaxes. Source: Hinton et al. 2015, arXiv 1503.02531, section 2."""
        return losses.distillation_kl(student, teacher, temperature)

    def answers(self, logits: Tensor) -> Tensor:
        """The class of the highest logit."""
        return logits.argmax(dim=1)

    def agrees(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(n,)"""
        return self.answers(logits) == labels

    def confidence(self, logits: Tensor) -> Tensor:
        """The highest probability."""
        return logits.softmax(dim=1).amax(dim=1).mean()


class Sigmoid(Head):
    """Independent labels: an image may have any number of them."""

    name = "sigmoid"

    def labels(self, key: str, index: int, batch_size: int, num_classes: int) -> Int[Tensor, " n"]:
        """A seed per image."""
        base, start = int(key[:16], 16), index * batch_size
        return torch.tensor([mix_seed(base, 0x1ABE1, start + place) for place in range(batch_size)])

    def targets(self, labels: Tensor, num_classes: int) -> Float[Tensor, "n classes"]:
        """0 or 1 for each label; labels of shape (n, classes) are targets themselves, as of real images."""
        if labels.ndim == 2:
            return labels.float()
        share = positive_share(num_classes)
        rows = []
        for label in labels.tolist():
            generator = torch.Generator().manual_seed(label & (MASK >> 1))
            rows.append(torch.rand(num_classes, generator=generator) < share)
        return torch.stack(rows).float().to(labels.device)

    def label_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, summed over the labels."""
        targets = self.targets(labels, logits.shape[1])
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)

    def entropy(self, logits: Tensor) -> Tensor:
        """Entropies of the labels' probabilities, summed over the labels."""
        p = logits.sigmoid()
        return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)).sum(dim=1).mean()

    def kl(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """KL between the labels' Bernoulli distributions, summed over the labels."""
        s, t = student / temperature, teacher / temperature
        p = t.sigmoid()
        positive = p * (F.logsigmoid(t) - F.logsigmoid(s))
        negative = (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
        return temperature**2 * (positive + negative).sum(dim=1).mean()

    def answers(self, logits: Tensor) -> Tensor:
        """Labels whose probability is above one half."""
        return logits > 0

    def agrees(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(n, classes)"""
        return self.answers(logits) == (self.targets(labels, logits.shape[1]) > 0.5)

    def confidence(self, logits: Tensor) -> Tensor:
        """The probability of each label's answer."""
        return logits.abs().sigmoid().mean()


HEADS: dict[Name, Head] = {head.name: head for head in (Softmax(), Sigmoid())}
SOFTMAX = HEADS["softmax"]
