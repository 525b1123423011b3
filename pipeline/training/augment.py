"""What happens to a training image between decoding and the network: geometry per image, the rest in batches.

    Geometry(config, preprocessing).apply(image, size, draws)            CPU, uint8, in decoding threads
    BatchAugment(config, preprocessing, num_classes)(pixels, labels, draws, seed)       on the device

All randomness of one image comes from its `draws`, NUM_DRAWS numbers of [0, 1), so it is the same whichever worker,
thread or batch the image is in; only mixing, which pairs images, depends on the batch.
"""

import math
from collections.abc import Callable
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.train_loader import to_device
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ConfigError
from pipeline.training.config import AugmentConfig

CROP, CROP_Y, CROP_X, FLIP, POLICY, ERASE = range(6)
"""Columns of `draws`. CROP: the shorter side of `scale`, or the seed of all that random_resized draws. CROP_Y, CROP_X:
where `pad` and `scale` cut. FLIP, ERASE: below the chance, it happens; ERASE then also seeds the rectangle. POLICY: its
seed."""
NUM_DRAWS = 6

_ATTEMPTS = 10  # of finding a rectangle that fits, as in torchvision
_SCALE_SIZE = 224  # the size that `AugmentConfig.sides` are meant for
_ERASED_AREA = (0.02, 0.33)
_ERASED_RATIO = (0.3, 3.3)

Box = tuple[int, int, int, int]
"""Top, left, height, width, in pixels."""


def size_at(config: AugmentConfig, progress: float) -> int:
    """Side of the training images after the share `progress` of the training, in pixels (progressive resizing)."""
    sizes = [size for share, size in config.progressive if share <= progress]
    return sizes[-1] if sizes else config.size


def sizes(config: AugmentConfig) -> list[int]:
    """The sides of the training images, from the beginning on."""
    starts = [start for start, _ in config.progressive]
    return [*([] if 0 in starts else [config.size]), *(size for _, size in config.progressive)]


class Geometry:
    """Cuts an image to the square that the network is trained on; holds no state, so threads may share it.

    What is resized is cut first, so the work grows with what is kept; resizing is bilinear, antialiased, on uint8.
    Raises ConfigError for ranges of the config that are none.
    """

    def __init__(self, config: AugmentConfig, preprocessing: Preprocessing) -> None:
        _check_range("scale", config.scale, above=0, most=1)
        _check_range("ratio", config.ratio, above=0)
        _check_range("sides", config.sides, above=_SCALE_SIZE - 1)
        smallest = min(sizes(config))
        if config.crop == "pad" and config.padding >= smallest:
            raise ConfigError(f"augment.padding: expected less than the size, {smallest}, got {config.padding}")
        self._config = config
        self._preprocessing = preprocessing
        self._crop: Callable[[Tensor, int, NDArray[np.float64]], Tensor] = {
            "random_resized": self._random_resized,
            "pad": self._pad,
            "scale": self._scale,
            "center": self._center,
        }[config.crop]

    def apply(self, image: Tensor, size: int, draws: NDArray[np.float64]) -> Tensor:
        """One image, uint8 3×H×W on the CPU, to uint8 3×size×size, strides as they come; `draws` are its NUM_DRAWS.

        Raises ImageError at stage `preprocess` where `pad` or `center` would resize a very narrow image to a huge one.
        """
        assert image.dtype == torch.uint8
        assert image.ndim == 3
        assert len(draws) == NUM_DRAWS
        return self._crop(image, size, draws)

    def _random_resized(self, image: Tensor, size: int, draws: NDArray[np.float64]) -> Tensor:
        height, width = image.shape[1:]
        scale, ratio = self._config.scale, self._config.ratio
        box = _random_box(Random(float(draws[CROP])), height, width, scale, ratio)
        return _resize(_cut(image, box or _central_box(height, width, ratio)), (size, size))

    def _pad(self, image: Tensor, size: int, draws: NDArray[np.float64]) -> Tensor:
        padding = self._config.padding
        if min(image.shape[1:]) + 2 * padding < size:
            to_size = self._preprocessing.model_copy(update={"resize_size": size})
            image = _resize(image, to_size.resized_size(*image.shape[1:]))
        height, width = image.shape[1:]
        assert padding < size  # else a crop might miss the image
        top = int(draws[CROP_Y] * (height + 2 * padding - size + 1)) - padding
        left = int(draws[CROP_X] * (width + 2 * padding - size + 1)) - padding
        return F.pad(image, (-left, left + size - width, -top, top + size - height))  # where negative, it cuts

    def _scale(self, image: Tensor, size: int, draws: NDArray[np.float64]) -> Tensor:
        fewest, most = self._config.sides
        side = fewest + int(draws[CROP] * (most - fewest + 1))
        height, width = image.shape[1:]
        # A side scaled by size/224, then a crop of `size`, is this part of the image whatever the size.
        kept = max(round(min(height, width) * _SCALE_SIZE / side), 1)
        top, left = int(draws[CROP_Y] * (height - kept + 1)), int(draws[CROP_X] * (width - kept + 1))
        return _resize(_cut(image, (top, left, kept, kept)), (size, size))

    def _center(self, image: Tensor, size: int, _draws: NDArray[np.float64]) -> Tensor:
        evaluated = self._preprocessing
        resize_size = max(round(evaluated.resize_size * size / evaluated.crop_size), 2)
        return evaluated.model_copy(update={"resize_size": resize_size, "crop_size": size}).apply(image)


def crop_padded(pixels: Tensor, padding: int, size: int, draws: Tensor) -> Tensor:
    """The `pad` crop of Geometry on a whole batch, bit for bit: uint8 N×3×H×W on any device to N×3×size×size there.

    `draws` is float64 N×NUM_DRAWS on the CPU. Raises ConfigError where a padded image is smaller than `size`.
    """
    height, width = pixels.shape[2:]
    if min(height, width) + 2 * padding < size:
        raise ConfigError(
            f"augment.size, progressive: expected at most {min(height, width) + 2 * padding} for cached images of "
            f"{height}×{width} with padding {padding}, got {size}; lower it or set data.cache to none, with another "
            "run_id"
        )
    top = to_device((draws[:, CROP_Y] * (height + 2 * padding - size + 1)).long(), pixels.device)
    left = to_device((draws[:, CROP_X] * (width + 2 * padding - size + 1)).long(), pixels.device)
    side = torch.arange(size, device=pixels.device)
    rows, columns = (top[:, None] + side)[:, :, None], (left[:, None] + side)[:, None, :]
    images = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    padded = F.pad(pixels, (padding,) * 4).permute(0, 2, 3, 1)
    return padded[images, rows, columns].permute(0, 3, 1, 2)


class BatchAugment:
    """What is done to whole batches on the device: policy, flip, normalisation, erasing, mixing, in this order."""

    def __init__(self, config: AugmentConfig, preprocessing: Preprocessing, num_classes: int) -> None:
        self._config = config
        self._preprocessing = preprocessing
        with torch.device("cpu"):  # trials are made on no device, where what draws cannot be
            self._policy = _policy(config)
            self._mix = _mix(config, num_classes)

    def __call__(
        self, pixels: Tensor, labels: Tensor, draws: Tensor, seed: int, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A batch of crops to what the network is trained on: images float32 N×3×S×S, normalised, and their targets.

        `pixels` uint8 N×3×S×S and `labels` int64 N lie on the device, `draws` float64 N×NUM_DRAWS on the CPU. Targets
        are the labels, or with mixup or cutmix float32 N×num_classes. `seed` is of the mixing only: one choice of mixup
        or cutmix, one lambda and one box for the batch, whose neighbours are mixed with each other, but for images of
        weight 0, which could not be had; batches are mixed within a worker, so with mixing a training depends on the
        number of workers.
        """
        assert draws.shape == (len(pixels), NUM_DRAWS)
        if self._policy is not None:
            pixels = _apply_policy(self._policy, pixels, draws[:, POLICY])
        if self._config.horizontal_flip > 0:
            is_flipped = to_device(draws[:, FLIP] < self._config.horizontal_flip, pixels.device)
            pixels = torch.where(is_flipped.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        images = self._preprocessing.normalise(pixels)
        if self._config.random_erasing > 0:
            _erase(images, draws[:, ERASE], self._config.random_erasing)
        if self._mix is None or len(images) == 0:
            return images, labels
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            mixed, targets = self._mix(images, labels)  # each with the one before it
        if weights is None:
            return mixed, targets
        is_whole = (weights == 0) | (weights.roll(1) == 0)
        labels = F.one_hot(labels, targets.shape[1]).to(targets.dtype)
        return torch.where(is_whole.view(-1, 1, 1, 1), images, mixed), torch.where(is_whole[:, None], labels, targets)


def _policy(config: AugmentConfig) -> Callable[[Tensor], Tensor] | None:
    if config.policy == "none":
        return None
    from torchvision.transforms import v2  # 6 s

    policy: Callable[[Tensor], Tensor]
    if config.policy == "trivial_augment":
        policy = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
    else:
        policy = v2.RandAugment(config.rand_num_ops, config.rand_magnitude, interpolation=v2.InterpolationMode.BILINEAR)
    return policy


def _mix(config: AugmentConfig, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    if config.mixup == 0 and config.cutmix == 0:
        return None
    from torchvision.transforms import v2

    kinds = [(v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)]
    choice: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    choice = v2.RandomChoice([kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0])
    return choice


def _apply_policy(policy: Callable[[Tensor], Tensor], pixels: Tensor, draws: Tensor) -> Tensor:
    changed = torch.empty_like(pixels)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's generator, whatever the device
        for position, draw in enumerate(draws.tolist()):
            torch.default_generator.manual_seed(int(draw * 2**32))  # it heeds 32 bits
            changed[position] = policy(pixels[position])
    return changed


def _erase(images: Tensor, draws: Tensor, probability: float) -> None:
    """Set rectangles of `images` to 0, the mean colour after normalisation, in place."""
    height, width = images.shape[2:]
    nothing = (0, 0, 0, 0)
    boxes = [
        _random_box(Random(draw), height, width, _ERASED_AREA, _ERASED_RATIO) or nothing
        if draw < probability
        else nothing
        for draw in draws.tolist()
    ]
    sides = torch.tensor(boxes, dtype=torch.int64).view(len(boxes), 4, 1, 1, 1)
    top, left, tall, wide = to_device(sides, images.device).unbind(1)
    y, x = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    images.masked_fill_((y >= top) & (y < top + tall) & (x >= left) & (x < left + wide), 0)


def _random_box(
    random: Random, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box | None:
    """A box of random area and aspect as torchvision's RandomResizedCrop draws it; None where ten did not fit."""
    smallest, largest = map(math.log, ratio)
    for _ in range(_ATTEMPTS):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(smallest, largest))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return int(random.random() * (height - tall + 1)), int(random.random() * (width - wide + 1)), tall, wide
    return None


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest central box with an aspect within `ratio`: what torchvision falls back to."""
    tall = min(height, round(width / ratio[0]))
    wide = min(width, round(height * ratio[1]))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _cut(image: Tensor, box: Box) -> Tensor:
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if image.shape[1:] == size:
        return image
    # Batches of one are ambiguous to torch; with this stride an H×W×3 memory order is kept, not repacked.
    batch = image.as_strided((1, *image.shape), (image.numel(), *image.stride()))
    return F.interpolate(batch, size, mode="bilinear", align_corners=False, antialias=True)[0]


def _check_range(name: str, pair: tuple[float, float], above: float, most: float = math.inf) -> None:
    if not above < pair[0] <= pair[1] <= most:
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise ConfigError(f"augment.{name}: expected the smaller first, above {above:g}{limit}, got {pair}")
