"""WRN-d-k, pre-activation. Source: Zagoruyko and Komodakis 2016, arXiv 1605.07146, table 1 (B(3,3), no dropout)."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MAX_DEPTH = 1_000  # even small modules cost memory


class Block(nn.Module):
    """BN-ReLU-conv twice; where the shape changes the shortcut is a 1x1 convolution of the activated input."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """One residual block."""
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """Three stages of (depth - 4) / 6 blocks with 16k, 32k, 64k channels."""

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int):
        super().__init__()
        num_blocks, channels = (depth - 4) // 6, 16
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        blocks = []
        for stage in range(3):
            for index in range(num_blocks):
                blocks.append(Block(channels, 16 * width * 2**stage, stride=2 if stage > 0 and index == 0 else 1))
                channels = 16 * width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))


def builder(depth: int, width: int) -> Callable[..., nn.Module]:
    """The builder of WRN-`depth`-`width`; `ValueError` unless depth is 6n + 4 with n ≥ 1, up to `MAX_DEPTH`."""
    if depth > MAX_DEPTH:
        raise ValueError(f"wrn_{depth}_{width}: expected a depth of at most {MAX_DEPTH:,}")
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ValueError(f"wrn_{depth}_{width}: expected a depth of 6n + 4 (10, 16, 22, 28, 40, …) and a width ≥ 1")

    def build(*, num_classes: int, image_shape: Sequence[int]) -> nn.Module:
        return WideResNet(depth, width, num_classes, image_shape[0])

    return build
