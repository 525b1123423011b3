"""The ResNet family, written once: two blocks, two stems, four shortcuts.

    resnet(50, num_classes=1000)                     ImageNet nets: 18, 34, 50, 101, 152
    resnet(18, 1000, shortcut="none")                their plain counterparts: 18 and 34
    cifar_resnet(20, num_classes=10)                 CIFAR nets: any 6n+2, among them 20, 32, 44, 56, 110, 1202
    cifar_resnet(20, 10, shortcut="none")            their plain counterparts

Parameter names and arithmetic of the ImageNet nets are torchvision's, so that weights go either way; as there, a
bottleneck halves the resolution in its 3x3 convolution. Source: He et al., "Deep Residual Learning for Image
Recognition", 2015, arXiv:1512.03385; sections in brackets below.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError

Shortcut = Literal["A", "B", "C", "none"]
"""What carries a block's input past it [3.3]: A, identity, padded with zeros where the width grows; B, projection
where the shape changes, identity elsewhere; C, projection everywhere; none, nothing: a plain net [3.3]."""

SHORTCUTS: tuple[Shortcut, ...] = ("A", "B", "C", "none")


class Subsample(nn.Module):
    """Option A where the shape changes: every `stride`-th pixel, zero channels added half before, half after.

    (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)). Without parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class Projection(nn.Sequential):
    """Options B and C: a 1x1 convolution with batch norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class Block(nn.Module):
    """What both blocks share: relu(branch(x) + shortcut(x)), or relu(branch(x)) in a plain net.

    `downsample` is the shortcut where it is not the identity; its name, and its place after the branch, where the order
    of the parameters has it, are torchvision's.
    """

    expansion: ClassVar[int]
    downsample: nn.Module | None

    def __init__(self, shortcut: Shortcut) -> None:
        super().__init__()
        self.has_shortcut = shortcut != "none"
        self.relu = nn.ReLU(inplace=True)

    def branch(self, x: Tensor) -> Tensor:
        """The weighted layers, up to the last batch norm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        if self.has_shortcut:
            out += x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(out)
        return activated


class BasicBlock(Block):
    """Two 3x3 convolutions [figure 5, left]."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__(shortcut)
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(in_channels, width, stride, shortcut)

    def branch(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        branch: Tensor = self.bn2(self.conv2(out))
        return branch


class Bottleneck(Block):
    """1x1 down to `width`, 3x3, 1x1 up to four times `width` [figure 5, right]."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__(shortcut)
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _downsample(in_channels, width * self.expansion, stride, shortcut)

    def branch(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        branch: Tensor = self.bn3(self.conv3(out))
        return branch


class ResNet(nn.Module):
    """Stem, stages of blocks, global average pooling, one linear layer: images (N, 3, H, W) to logits (N, num_classes).

    `depths` are the blocks of each stage; every stage after the first halves the resolution and doubles the width,
    which starts at `width`.
    """

    def __init__(
        self,
        stem: Literal["imagenet", "cifar"],
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, ...],
        width: int,
        num_classes: int,
        shortcut: Shortcut,
    ) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = _conv(3, width, 7, stride=2)
            self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = _conv(3, width, 3)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.stages = [f"layer{stage}" for stage, _ in enumerate(depths, start=1)]
        channels = width
        for stage, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            stage_width, stride = width * 2**stage, 1 if stage == 0 else 2
            first = block(channels, stage_width, stride, shortcut)
            channels = stage_width * block.expansion
            self.add_module(
                name, nn.Sequential(first, *(block(channels, stage_width, 1, shortcut) for _ in range(depth - 1)))
            )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions as in [3.4], which is He et al. 2015 (arXiv:1502.01852) section 2.2, fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        x = torch.flatten(self.avgpool(x), 1)
        logits: Tensor = self.fc(x)
        return logits


_IMAGENET_NETS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {  # [table 1]
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def resnet(depth: int, num_classes: int, shortcut: Shortcut = "B") -> ResNet:
    """The ImageNet net of `depth` layers [table 1], for images of about 224 pixels; B is torchvision's shortcut.

    Raises ConfigError for a depth or shortcut that is not of the family.
    """
    if depth not in _IMAGENET_NETS:
        raise ConfigError(f"expected a ResNet of {', '.join(map(str, _IMAGENET_NETS))} layers, got {depth}")
    block, depths = _IMAGENET_NETS[depth]
    return ResNet("imagenet", block, depths, 64, num_classes, _checked(shortcut))


def cifar_resnet(depth: int, num_classes: int, shortcut: Shortcut = "A") -> ResNet:
    """The CIFAR net of `depth` = 6n+2 layers [4.2], for images of about 32 pixels; A is the paper's shortcut there.

    Raises ConfigError for a depth or shortcut that is not of the family.
    """
    if depth < 8 or depth % 6 != 2:
        raise ConfigError(f"expected a CIFAR ResNet of 6n+2 layers (20, 32, 44, 56, 110, …), got {depth}")
    return ResNet("cifar", BasicBlock, ((depth - 2) // 6,) * 3, 16, num_classes, _checked(shortcut))


def _downsample(in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> nn.Module | None:
    changes_shape = stride != 1 or in_channels != out_channels
    if shortcut == "C" or (shortcut == "B" and changes_shape):
        return Projection(in_channels, out_channels, stride)
    return Subsample(in_channels, out_channels, stride) if shortcut == "A" and changes_shape else None


def _checked(shortcut: Shortcut) -> Shortcut:
    if shortcut not in SHORTCUTS:
        raise ConfigError(f"shortcut: expected one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
    return shortcut


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
