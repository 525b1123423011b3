"""The ResNet family, written once: two blocks, two stems, four shortcuts.

    resnet(50, num_classes=1000)                     ImageNet nets: 18, 34, 50, 101, 152
    resnet(18, 1000, shortcut="none")                their plain counterparts: 18 and 34
    cifar_resnet(20, num_classes=10)                 CIFAR nets: any 6n+2, among them 20, 32, 44, 56, 110, 1202
    cifar_resnet(20, 10, shortcut="none")            their plain counterparts
    zero_init_last_norm(network)                     begins with every block as its shortcut alone

Parameter names and arithmetic of the ImageNet nets are torchvision's, so that weights go either way; as there, a
bottleneck halves the resolution in its 3x3 convolution. Source: He et al., "Deep Residual Learning for Image
Recognition", 2015, arXiv:1512.03385; sections in brackets below. The pre-activation nets are in preact.py.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError

Shortcut = Literal["A", "B", "C", "none"]
"""What carries a block's input past it [3.3]: A, identity, padded with zeros where the width grows; B, projection
where the shape changes, identity elsewhere; C, projection everywhere; none, nothing: a plain net [3.3]."""

SHORTCUTS: tuple[Shortcut, ...] = ("A", "B", "C", "none")

IMAGENET_STAGES: dict[int, tuple[int, ...]] = {  # [table 1]
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Depth to the blocks of each stage; from 50 layers on they are bottlenecks."""


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
        super().__init__(convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class Block(nn.Module):
    """What the blocks share: relu(branch(x) + shortcut(x)), or relu(branch(x)) in a plain net.

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
        """The weighted layers, up to the addition."""
        raise NotImplementedError

    @property
    def last_weight(self) -> Tensor:
        """The weight of the branch's last layer: where it is 0, the branch adds nothing."""
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
        self.conv1 = convolution(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample(in_channels, width, stride, shortcut)

    def branch(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        branch: Tensor = self.bn2(self.conv2(out))
        return branch

    @property
    def last_weight(self) -> Tensor:
        return self.bn2.weight


class Bottleneck(Block):
    """1x1 down to `width`, 3x3, 1x1 up to four times `width` [figure 5, right]."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__(shortcut)
        self.conv1 = convolution(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = downsample(in_channels, width * self.expansion, stride, shortcut)

    def branch(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        branch: Tensor = self.bn3(self.conv3(out))
        return branch

    @property
    def last_weight(self) -> Tensor:
        return self.bn3.weight


class MakesBlock(Protocol):
    """The class of a block: what a network builds its stages of."""

    expansion: int

    def __call__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> Block: ...


class ResNet(nn.Module):
    """Stem, stages of blocks, global average pooling, one linear layer: images (N, 3, H, W) to logits (N, num_classes).

    `depths` are the blocks of each stage; every stage after the first halves the resolution and doubles the width,
    which starts at `width`.
    """

    def __init__(
        self,
        stem: Literal["imagenet", "cifar"],
        block: MakesBlock,
        depths: tuple[int, ...],
        width: int,
        num_classes: int,
        shortcut: Shortcut,
    ) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = convolution(3, width, 7, stride=2)
            self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = convolution(3, width, 3)
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

    def features(self, images: Tensor) -> Tensor:
        """The map that is pooled: images (N, 3, H, W) to (N, channels, h, w), 1/32 of their size, of CIFAR nets 1/4."""
        x: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.flatten(self.avgpool(self.features(images)), 1))
        return logits


def resnet(depth: int, num_classes: int, shortcut: Shortcut = "B") -> ResNet:
    """The ImageNet net of `depth` layers [table 1], for images of about 224 pixels; B is torchvision's shortcut.

    Raises ConfigError for a depth or shortcut that is not of the family.
    """
    if depth not in IMAGENET_STAGES:
        raise ConfigError(f"expected a ResNet of {', '.join(map(str, IMAGENET_STAGES))} layers, got {depth}")
    check_choice("shortcut", shortcut, SHORTCUTS)
    block: MakesBlock = Bottleneck if depth >= 50 else BasicBlock
    return ResNet("imagenet", block, IMAGENET_STAGES[depth], 64, num_classes, shortcut)


def cifar_resnet(depth: int, num_classes: int, shortcut: Shortcut = "A") -> ResNet:
    """The CIFAR net of `depth` = 6n+2 layers [4.2], for images of about 32 pixels; A is the paper's shortcut there.

    Raises ConfigError for a depth or shortcut that is not of the family.
    """
    if depth < 8 or depth % 6 != 2:
        raise ConfigError(f"expected a CIFAR ResNet of 6n+2 layers (20, 32, 44, 56, 110, …), got {depth}")
    check_choice("shortcut", shortcut, SHORTCUTS)
    return ResNet("cifar", BasicBlock, ((depth - 2) // 6,) * 3, 16, num_classes, shortcut)


def zero_init_last_norm(network: nn.Module) -> None:
    """Set the weight of the last norm of every residual branch to 0, so that each block begins as its shortcut alone.

    The branch of a pre-activation block ends in a convolution, not a norm: there that convolution's weight is set to 0.
    Raises ConfigError for a network that is not of this family, or is plain: nothing would come through its blocks.
    Source: Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677, section 5.1.
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    if not blocks:
        raise ConfigError("zero_init_last_norm: expected a net of the ResNet family of this package, got another")
    if not all(block.has_shortcut for block in blocks):
        raise ConfigError("zero_init_last_norm: expected a net with shortcuts, got a plain one; leave it unset there")
    for block in blocks:
        nn.init.zeros_(block.last_weight)


def downsample(
    in_channels: int,
    out_channels: int,
    stride: int,
    shortcut: Shortcut,
    project: Callable[[int, int, int], nn.Module] = Projection,
) -> nn.Module | None:
    """What a block's input goes through on its way past it; None is the identity, or of a plain net nothing."""
    changes_shape = stride != 1 or in_channels != out_channels
    if shortcut == "C" or (shortcut == "B" and changes_shape):
        return project(in_channels, out_channels, stride)
    return Subsample(in_channels, out_channels, stride) if shortcut == "A" and changes_shape else None


def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, since a norm comes before or after it, that keeps the resolution at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def check_choice(argument: str, choice: str, choices: Sequence[str]) -> None:
    """Raises ConfigError, naming the argument, where `choice` is none of `choices`."""
    if choice not in choices:
        raise ConfigError(f"{argument}: expected one of {', '.join(choices)}, got {choice!r}")
