"""The eight torchvision families of the 2025 pruning paper, with a choice of stem and width.

`stem="cifar"` adapts each to small images: a 3x3 first convolution of stride 1, no max-pool, and for MobileNetV2 one
strided stage less (32x32 ends at 4x4 or 2x2, as usual for these data sets). VGG then ends in one linear layer instead
of three with 4,096 units. With the defaults, parameter names and shapes equal torchvision's, so its state dicts load.
Source: Tripurwar et al. 2025, arXiv 2511.20702 (the list of families).

torchvision is imported when one of them is built: with PyTorch's compiler, which it loads, that takes seconds.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models.resnet import BasicBlock, Bottleneck

Stem = Literal["imagenet", "cifar"]


def scaled(channels: int, width_multiplier: float | int, divisor: int = 1) -> int:
    """`channels` times the multiplier, rounded to a multiple of `divisor`, at least one."""
    return max(divisor, round(channels * width_multiplier / divisor) * divisor)


def check_stem(stem: str) -> bool:
    """True for the CIFAR stem; `ValueError` for anything but the two names."""
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem {stem!r}: expected 'imagenet' or 'cifar'")
    return stem == "cifar"


class ResNet(nn.Module):
    """torchvision's ResNet (same names, same blocks) with free width and stem, which its own class does not allow."""

    def __init__(
        self,
        block: "type[BasicBlock] | type[Bottleneck]",
        depths: Sequence[int],
        num_classes: int,
        in_channels: int,
        cifar: bool,
        width_multiplier: float | int,
        bottleneck_width: int = 64,
    ):
        super().__init__()
        channels = scaled(64, width_multiplier)
        kernel, stride, padding = (3, 1, 1) if cifar else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        stages = []
        for stage, depth in enumerate(depths):
            planes = scaled(64 * 2**stage, width_multiplier)
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                downsample = None
                if stride != 1 or channels != planes * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, planes * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(planes * block.expansion),
                    )
                blocks.append(block(channels, planes, stride, downsample, base_width=bottleneck_width))
                channels = planes * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet(
    block: Literal["BasicBlock", "Bottleneck"],
    depths: Sequence[int],
    bottleneck_width: int,
    *,
    num_classes: int,
    image_shape: Sequence[int],
    stem: Stem = "imagenet",
    width_multiplier: float | int = 1.0,
) -> nn.Module:
    """ResNet-18/34/50 and Wide ResNet-50-2."""
    from torchvision.models import resnet as blocks

    cifar, kind = check_stem(stem), getattr(blocks, block)
    return ResNet(kind, depths, num_classes, image_shape[0], cifar, width_multiplier, bottleneck_width)


def first_conv(old: nn.Conv2d, in_channels: int, *, kernel: int | None = None, stride: int | None = None) -> nn.Conv2d:
    """A first convolution like `old`, with other input channels and, for small images, another kernel and stride."""
    kernel, stride = kernel or old.kernel_size[0], stride or old.stride[0]
    conv = nn.Conv2d(in_channels, old.out_channels, kernel, stride, kernel // 2, bias=old.bias is not None)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def mobilenet_v2(
    *, num_classes: int, image_shape: Sequence[int], stem: Stem = "imagenet", width_multiplier: float | int = 1.0
) -> nn.Module:
    """MobileNetV2."""
    from torchvision.models import MobileNetV2

    net = MobileNetV2(num_classes=num_classes, width_mult=width_multiplier)
    cifar = check_stem(stem)
    blocks: Any = net.features
    blocks[0][0] = first_conv(blocks[0][0], image_shape[0], stride=1 if cifar else 2)
    if cifar:
        blocks[2].conv[1][0].stride = (1, 1)
    return net


def vgg(
    layers: str,
    *,
    num_classes: int,
    image_shape: Sequence[int],
    stem: Stem = "imagenet",
    width_multiplier: float | int = 1.0,
) -> nn.Module:
    """VGG with BatchNorm."""
    from torchvision.models.vgg import VGG, cfgs, make_layers

    widths = [item if isinstance(item, str) else scaled(item, width_multiplier) for item in cfgs[layers]]
    features = make_layers(widths, batch_norm=True)  # type: ignore[arg-type]
    features[0] = first_conv(features[0], image_shape[0])  # type: ignore[arg-type]
    last = next(item for item in reversed(widths) if isinstance(item, int))
    if check_stem(stem):
        for module in features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # torchvision's own class would first allocate and then discard its three wide linear layers.
        head = [("features", features), ("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten(1))]
        return nn.Sequential(OrderedDict([*head, ("classifier", nn.Sequential(nn.Linear(last, num_classes)))]))
    net = VGG(features, num_classes=num_classes)
    if last != 512:
        net.classifier[0] = nn.Linear(last * 49, 4096)
    return net


def densenet121(
    *, num_classes: int, image_shape: Sequence[int], stem: Stem = "imagenet", width_multiplier: float | int = 1.0
) -> nn.Module:
    """DenseNet-121; the width multiplier scales the growth rate and the first layer."""
    from torchvision.models import DenseNet

    net = DenseNet(
        growth_rate=scaled(32, width_multiplier),
        block_config=(6, 12, 24, 16),
        num_init_features=scaled(64, width_multiplier, 2),
        num_classes=num_classes,
    )
    cifar = check_stem(stem)
    small = {"kernel": 3, "stride": 1} if cifar else {}
    net.features.conv0 = first_conv(net.features.conv0, image_shape[0], **small)  # type: ignore[arg-type]
    if cifar:
        net.features.pool0 = nn.Identity()
    return net


def shufflenet_v2(
    *, num_classes: int, image_shape: Sequence[int], stem: Stem = "imagenet", width_multiplier: float | int = 1.0
) -> nn.Module:
    """ShuffleNetV2 x1.0."""
    from torchvision.models import ShuffleNetV2

    widths = [scaled(width, width_multiplier, 2) for width in (24, 116, 232, 464, 1024)]
    net = ShuffleNetV2([4, 8, 4], widths, num_classes=num_classes)
    cifar = check_stem(stem)
    net.conv1[0] = first_conv(net.conv1[0], image_shape[0], stride=1 if cifar else 2)  # type: ignore[arg-type]
    if cifar:
        net.maxpool = nn.Identity()  # type: ignore[assignment]
    return net


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(resnet, "BasicBlock", (2, 2, 2, 2), 64),
    "resnet34": partial(resnet, "BasicBlock", (3, 4, 6, 3), 64),
    "resnet50": partial(resnet, "Bottleneck", (3, 4, 6, 3), 64),
    "wide_resnet50_2": partial(resnet, "Bottleneck", (3, 4, 6, 3), 128),
    "mobilenet_v2": mobilenet_v2,
    "vgg11_bn": partial(vgg, "A"),
    "vgg19_bn": partial(vgg, "E"),
    "densenet121": densenet121,
    "shufflenet_v2_x1_0": shufflenet_v2,
}
