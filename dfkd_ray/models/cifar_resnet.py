"""ResNet-8/20/32/56 for small images. Source: He et al. 2015, arXiv 1512.03385, section 4.2 (shortcut option A)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions; where the shape changes the shortcut is strided and padded with zero channels."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.extra_channels = channels - in_channels

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """One residual block."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.extra_channels:
            x = F.pad(x, (0, 0, 0, 0, self.extra_channels // 2, self.extra_channels - self.extra_channels // 2))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """Three stages of `num_blocks` blocks with 16, 32, 64 channels (times the width multiplier)."""

    def __init__(self, num_blocks: int, num_classes: int, in_channels: int, width_multiplier: float | int):
        super().__init__()
        widths = [max(1, round(width * width_multiplier)) for width in (16, 32, 64)]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks, channels = [], widths[0]
        for stage, width in enumerate(widths):
            for index in range(num_blocks):
                blocks.append(Block(channels, width, stride=2 if stage > 0 and index == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))


def _build(
    num_blocks: int, *, num_classes: int, image_shape: Sequence[int], width_multiplier: float | int = 1.0
) -> nn.Module:
    return CifarResNet(num_blocks, num_classes, image_shape[0], width_multiplier)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    f"resnet{6 * num_blocks + 2}": partial(_build, num_blocks) for num_blocks in (1, 3, 5, 9)
}
