"""HintonNet, LeNet-5 and AlexNet, the networks of the 2017 paper on activation records: none has BatchNorm.

Every linear and convolution layer is a module of its own that runs once per forward pass, because records tap layers by
module path. No ReLU is in-place: it would overwrite the recorded output. Weights are initialised as in He et al. 2015
(arXiv 1502.01852), with zero biases: with PyTorch's default, the signal vanishes in AlexNet's eight layers without
BatchNorm. Source: Lopes et al. 2017, arXiv 1710.07535 (the networks, and half of the filters for the small ones).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def dropout(p: Any, name: str) -> nn.Dropout:
    """A dropout layer; `ValueError` unless `p` is a probability in [0, 1)."""
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        raise ValueError(f"{name} is {p!r}, expected a probability in [0, 1)")
    return nn.Dropout(p)


def initialise(network: nn.Module) -> None:
    """Normal weights of variance 2 / fan_in, zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)


class HintonNet(nn.Module):
    """Two hidden layers of `width` units on the flattened image. Source: Hinton et al. 2015, arXiv 1503.02531, 3."""

    def __init__(self, width: int, num_inputs: int, num_classes: int, input_dropout: Any, hidden_dropout: Any):
        super().__init__()
        self.input_dropout = dropout(input_dropout, "input_dropout")
        self.fc1 = nn.Linear(num_inputs, width)
        self.dropout1 = dropout(hidden_dropout, "hidden_dropout")
        self.fc2 = nn.Linear(width, width)
        self.dropout2 = dropout(hidden_dropout, "hidden_dropout")
        self.fc3 = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        x = self.input_dropout(x.flatten(1))
        x = self.dropout1(F.relu(self.fc1(x)))
        x = self.dropout2(F.relu(self.fc2(x)))
        return self.fc3(x)


class LeNet5(nn.Module):
    """Two convolutions with pooling, then 120, 84 and `num_classes` units. Source: LeCun et al. 1998, figure 2.

    Pooling averages 2x2 pixels after ReLU: LeCun's subsampling without its coefficient, bias and sigmoid. C5, there a
    5x5 convolution over a 5x5 map, is the equivalent linear layer for 32x32 images.
    """

    def __init__(self, filters: tuple[int, int], image_shape: Sequence[int], num_classes: int):
        super().__init__()
        channels, height, width = image_shape
        sides = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
        if min(sides) < 1:
            raise ValueError(f"LeNet-5 takes images from 16x16 pixels on, not {height}x{width}")
        self.conv1 = nn.Conv2d(channels, filters[0], 5)
        self.conv2 = nn.Conv2d(filters[0], filters[1], 5)
        self.fc1 = nn.Linear(filters[1] * sides[0] * sides[1], 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        initialise(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        x = F.avg_pool2d(F.relu(self.conv1(x)), 2)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class AlexNet(nn.Module):
    """torchvision's AlexNet (same names and shapes at full width), its ReLUs not in place.

    Source: Krizhevsky 2014, arXiv 1404.5997: one column, 64-192-384-256-256 filters, then 4,096, 4,096, `num_classes`.
    """

    def __init__(self, filters: Sequence[int], in_channels: int, num_classes: int, p: Any):
        super().__init__()
        a, b, c, d, e = filters
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, a, 11, 4, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, 1, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(c, d, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(d, e, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            dropout(p, "dropout"),
            nn.Linear(e * 36, 4096),
            nn.ReLU(),
            dropout(p, "dropout"),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, num_classes),
        )
        initialise(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def hinton(
    width: int, *, num_classes: int, image_shape: Sequence[int], input_dropout: Any, hidden_dropout: Any
) -> nn.Module:
    """HintonNet on images of any shape: the paper's 784 inputs are an image_shape of 1x28x28."""
    channels, height, pixels = image_shape
    return HintonNet(width, channels * height * pixels, num_classes, input_dropout, hidden_dropout)


def lenet5(filters: tuple[int, int], *, num_classes: int, image_shape: Sequence[int]) -> nn.Module:
    """LeNet-5, made for 32x32."""
    return LeNet5(filters, image_shape, num_classes)


def alexnet(filters: Sequence[int], *, num_classes: int, image_shape: Sequence[int], dropout: Any = 0.5) -> nn.Module:
    """AlexNet, made for 224x224; images from 63x63 pixels on."""
    return AlexNet(filters, image_shape[0], num_classes, dropout)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "hinton_1200": partial(hinton, 1200, input_dropout=0.2, hidden_dropout=0.5),
    # Hinton et al.'s small network has no dropout; the arguments can give it the large one's.
    "hinton_800": partial(hinton, 800, input_dropout=0.0, hidden_dropout=0.0),
    "lenet5": partial(lenet5, (6, 16)),
    "lenet5_half": partial(lenet5, (3, 8)),
    "alexnet": partial(alexnet, (64, 192, 384, 256, 256)),
    "alexnet_half": partial(alexnet, (32, 96, 192, 128, 128)),
}
