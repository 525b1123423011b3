"""The pre-activation nets of the ResNet family: batch norm and ReLU come before each convolution, not after it.

    preact_resnet(200, num_classes=1000)                   ImageNet nets: 18, 34, 50, 101, 152, 200
    cifar_preact_resnet(110, num_classes=10)               CIFAR nets: any 6n+2 of basic blocks
    cifar_preact_resnet(1001, 10)                          and any 9n+2 of bottlenecks

Nothing is left on the way past the blocks but what changes the shape. Source: He et al., "Identity Mappings in Deep
Residual Networks", 2016, arXiv:1603.05027; figures and sections in brackets below. As everywhere in the family, a
bottleneck halves the resolution in its 3x3 convolution.
"""

from typing import Literal

from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.resnet import (
    IMAGENET_STAGES,
    Block,
    ResNet,
    Shortcut,
    check_choice,
    convolution,
    downsample,
)

PreactShortcut = Literal["A", "B", "C"]
"""As of the other nets, but that projections have no norm of their own. A plain net has no addition that activations
could stand before or after, so there is none here."""

PREACT_IMAGENET_STAGES: dict[int, tuple[int, ...]] = {**IMAGENET_STAGES, 200: (3, 24, 36, 3)}


class PreactBlock(Block):
    """What both blocks share: branch(relu(bn1(x))) + x [figure 4(e)].

    Where the shape changes, the shortcut too starts from relu(bn1(x)) [appendix]. `bn1` is None where x comes
    activated, as it does to the first block of a net.
    """

    bn1: nn.BatchNorm2d | None

    def forward(self, x: Tensor) -> Tensor:
        activated = x if self.bn1 is None else self.relu(self.bn1(x))
        out = self.branch(activated)
        out += x if self.downsample is None else self.downsample(activated)
        return out


class PreactBasicBlock(PreactBlock):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__(shortcut)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = convolution(in_channels, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3)
        self.downsample = downsample(in_channels, width, stride, shortcut, _projection)

    def branch(self, x: Tensor) -> Tensor:
        branch: Tensor = self.conv2(self.relu(self.bn2(self.conv1(x))))
        return branch

    @property
    def last_weight(self) -> Tensor:
        return self.conv2.weight


class PreactBottleneck(PreactBlock):
    """1x1 down to `width`, 3x3, 1x1 up to four times `width`."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__(shortcut)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = convolution(in_channels, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, width * self.expansion, 1)
        self.downsample = downsample(in_channels, width * self.expansion, stride, shortcut, _projection)

    def branch(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.bn2(self.conv1(x))))
        branch: Tensor = self.conv3(self.relu(self.bn3(out)))
        return branch

    @property
    def last_weight(self) -> Tensor:
        return self.conv3.weight


class PreactResNet(ResNet):
    """A ResNet of pre-activation blocks, activated once more after the last one [appendix].

    The first block's activation is the stem's own, before the paths part [appendix]; of ImageNet nets it stands before
    the stem's pooling, as in facebook/fb.resnet.torch (preresnet.lua, `no_preact`).
    """

    def __init__(
        self,
        stem: Literal["imagenet", "cifar"],
        block: type[PreactBasicBlock | PreactBottleneck],
        depths: tuple[int, ...],
        width: int,
        num_classes: int,
        shortcut: PreactShortcut,
    ) -> None:
        super().__init__(stem, block, depths, width, num_classes, shortcut)
        self.bn2 = nn.BatchNorm2d(self.fc.in_features)
        first = self.get_submodule(f"{self.stages[0]}.0")
        assert isinstance(first, PreactBlock)
        first.bn1 = None

    def features(self, images: Tensor) -> Tensor:
        activated: Tensor = self.relu(self.bn2(super().features(images)))
        return activated


def preact_resnet(depth: int, num_classes: int, shortcut: PreactShortcut = "B") -> PreactResNet:
    """The ImageNet net of `depth` layers, for images of about 224 pixels; bottlenecks from 50 layers on.

    Raises ConfigError for a depth or shortcut that is not of the family.
    """
    if depth not in PREACT_IMAGENET_STAGES:
        expected = ", ".join(map(str, PREACT_IMAGENET_STAGES))
        raise ConfigError(f"expected a pre-activation ResNet of {expected} layers, got {depth}")
    check_choice("shortcut", shortcut, ("A", "B", "C"))
    block = PreactBottleneck if depth >= 50 else PreactBasicBlock
    return PreactResNet("imagenet", block, PREACT_IMAGENET_STAGES[depth], 64, num_classes, shortcut)


def cifar_preact_resnet(
    depth: int,
    num_classes: int,
    block: Literal["basic", "bottleneck"] | None = None,
    shortcut: PreactShortcut | None = None,
) -> PreactResNet:
    """The CIFAR net of `depth` layers, for images of about 32 pixels.

    Basic blocks make 6n+2 layers, bottlenecks 9n+2. Without `block`, a depth that is both is basic, but for the paper's
    164, which is of bottlenecks. Without `shortcut`, it is A for basic blocks, as of the nets with activations after,
    and B for bottlenecks [appendix]. Raises ConfigError for a depth, block or shortcut that is not of the family.
    """
    if block is None:
        block = "basic" if depth % 6 == 2 and depth != 164 else "bottleneck"
        expected = "6n+2 layers (basic blocks: 20, 56, 110, …) or 9n+2 (bottlenecks: 164, 1001, …)"
    else:
        check_choice("block", block, ("basic", "bottleneck"))
        expected = "6n+2 layers with basic blocks" if block == "basic" else "9n+2 layers with bottlenecks"
    weighted_layers = 6 if block == "basic" else 9  # of one block in each of the three stages
    if depth < weighted_layers + 2 or depth % weighted_layers != 2:
        raise ConfigError(f"expected a CIFAR pre-activation ResNet of {expected}, got {depth}")
    if shortcut is None:
        shortcut = "A" if block == "basic" else "B"
    check_choice("shortcut", shortcut, ("A", "B", "C"))
    kind = PreactBasicBlock if block == "basic" else PreactBottleneck
    return PreactResNet("cifar", kind, ((depth - 2) // weighted_layers,) * 3, 16, num_classes, shortcut)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return convolution(in_channels, out_channels, 1, stride)
