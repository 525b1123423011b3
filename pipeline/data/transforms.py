"""The preprocessing of a model: resize, center crop, normalise. It travels in the bundle, and nothing else is used.

Resizing works on uint8 tensors with torch's integer kernels, which round between the two passes as Pillow does and so
come closer to the PIL images that published weights were evaluated on than float tensors do. GPUs have no such kernels
and resize in float32, rounded once. torchvision is not needed to run this, nor is torch to describe it.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PositiveFloat

from pipeline.config import Section
from pipeline.errors import ConfigError, ImageError

if TYPE_CHECKING:
    import torch

_MAX_RESIZED_PIXELS = 2**26  # 200 MB; a shorter side of 256 comes to it at an aspect ratio of 1,024


class Preprocessing(Section):
    """From an upright RGB image to what a model takes, as torchvision's `ImageClassification` preset defines it."""

    resize_size: int = Field(ge=2, le=8192)  # torch's uint8 kernels fail on an output of one pixel
    """Shorter side after resizing, in pixels; the longer one keeps the aspect ratio."""
    crop_size: int = Field(ge=1, le=8192)
    """Side of the central square that is kept, in pixels; what the image lacks is filled with 0."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    """How to resize."""
    antialias: bool = True
    """Whether to average over all source pixels when shrinking, as Pillow always does; without effect on `nearest`."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from each channel, on a scale of 0 to 1."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Divides each channel, on a scale of 0 to 1."""

    @classmethod
    def from_torchvision(cls, preset: Any) -> Self:
        """Take over the preset that `weights.transforms()` of a torchvision classifier returns.

        Raises ConfigError where it is another kind of transform, or resizes or crops to anything but one size.
        """
        try:
            ((resize_size,), (crop_size,)) = (preset.resize_size, preset.crop_size)
            return cls(
                resize_size=resize_size,
                crop_size=crop_size,
                interpolation=preset.interpolation.value,
                antialias=bool(preset.antialias),
                mean=tuple(preset.mean),
                std=tuple(preset.std),
            )
        except (AttributeError, ValueError) as error:
            raise ConfigError(f"expected torchvision's ImageClassification preset, got {preset!r}") from error

    @property
    def digest(self) -> str:
        """SHA-256 over the fields as canonical JSON, in hex."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def apply(self, image: "torch.Tensor") -> "torch.Tensor":
        """Resize and crop one image: uint8 3×H×W to uint8 3×crop_size×crop_size, strides as they come.

        On a CPU it equals torchvision's v2 `resize` and `center_crop` on the same tensor bit for bit. Raises ImageError
        at stage `preprocess`, `aspect_ratio`, where the image is so narrow that resizing it would take some hundred
        megabytes.
        """
        return self.crop(self.resize(image))

    def apply_to_all(self, images: "Sequence[torch.Tensor]") -> "torch.Tensor":
        """`apply` on images of one device, whatever their sizes: uint8 N×3×crop_size×crop_size. Raises as `apply`.

        On a GPU in one kernel where the interpolation is antialiased, whose roundings are its own: of one value in a
        thousand, by one level.
        """
        import torch

        if images[0].is_cuda and self.antialias and self.interpolation != "nearest":
            return self._apply_in_one_kernel(images)
        return torch.stack([self.apply(image) for image in images])

    def _apply_in_one_kernel(self, images: "Sequence[torch.Tensor]") -> "torch.Tensor":
        from pipeline.data.gpu_resize import resize_and_crop

        sizes = [self.resized_size(*image.shape[1:]) for image in images]
        return resize_and_crop(images, sizes, self.crop_size, is_bicubic=self.interpolation == "bicubic")

    def resize(self, image: "torch.Tensor") -> "torch.Tensor":
        """The first half of `apply`: uint8 3×H×W to uint8 3×H'×W' of `resized_size`. Raises as `apply`."""
        import torch

        assert image.dtype == torch.uint8
        assert image.ndim == 3
        height, width = image.shape[1:]
        resized = self.resized_size(height, width)
        if resized != (height, width):
            # Batches of one are ambiguous to torch; with this stride an H×W×3 memory order is kept, not repacked.
            batch = image.as_strided((1, *image.shape), (image.numel(), *image.stride()))
            is_cpu = image.device.type == "cpu"
            image = (self._interpolate(batch, resized) if is_cpu else self._interpolate_in_float(batch, resized))[0]
        return image

    def crop(self, image: "torch.Tensor") -> "torch.Tensor":
        """The second half of `apply`: 3×H×W to its centre, 3×crop_size×crop_size, a view where nothing is lacking."""
        from torch.nn import functional as F

        lacking_y, lacking_x = (max(self.crop_size - side, 0) for side in image.shape[1:])
        if lacking_y or lacking_x:
            image = F.pad(image, (lacking_x // 2, (lacking_x + 1) // 2, lacking_y // 2, (lacking_y + 1) // 2))
        top, left = (round((side - self.crop_size) / 2) for side in image.shape[1:])
        return image[:, top : top + self.crop_size, left : left + self.crop_size]

    def _interpolate(self, batch: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
        from torch.nn import functional as F

        antialias = self.antialias and self.interpolation != "nearest"
        align_corners = None if self.interpolation == "nearest" else False
        return F.interpolate(batch, size, None, self.interpolation, align_corners, antialias=antialias)

    def _interpolate_in_float(self, batch: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
        return self._interpolate(batch.float(), size).round_().clamp_(0, 255).to(batch.dtype)

    def normalise(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Scale a batch to the model's range: uint8 N×3×H×W to float32 N×3×H×W on the same device.

        The operations of torchvision's preset in their order, so that results agree bit for bit.
        """
        import torch

        channels = _channels if torch.compiler.is_compiling() else _kept_channels  # a traced graph has constants
        mean, std = (channels(values, batch.device) for values in (self.mean, self.std))
        return batch.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)  # in place: several times faster

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, the longer side rounded down as torchvision rounds it."""
        short, long = min(height, width), max(height, width)
        new_long = int(self.resize_size * long / short)
        if self.resize_size * new_long > _MAX_RESIZED_PIXELS:
            raise ImageError(
                "preprocess",
                "aspect_ratio",
                f"expected a resized image of at most {_MAX_RESIZED_PIXELS} pixels, got {self.resize_size}×{new_long} "
                f"from {width}×{height}",
            )
        return (new_long, self.resize_size) if width <= height else (self.resize_size, new_long)


def _channels(values: tuple[float, ...], device: "torch.device") -> "torch.Tensor":
    """A value for each channel: float32 3×1×1."""
    import torch

    with torch.inference_mode(False):  # so that training may use what inference made
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


_kept_channels = functools.cache(_channels)  # copying them again would hold the host until a GPU has done all its work
