"""How a network is judged: which views of an image it sees. Torch is not needed to say it; `views` makes them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Section
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ConfigError


class Protocol(Section):
    """Which views of an image a network judges; their scores are averaged."""

    views: Literal["one_crop", "ten_crop", "multi_scale"] = "one_crop"
    """one_crop: that of the preprocessing, which inference uses. ten_crop: the four corners and the centre of the
    resized image, and their mirror images (Krizhevsky et al. 2012, section 4.1). multi_scale: the whole image, resized
    to each of `scales`, global average pooling making one score of it (He et al. 2015, arXiv:1512.03385, section
    3.4); not for networks of one input size."""
    flip: bool = False
    """Average with the mirror image, for one_crop and multi_scale."""
    scales: list[Annotated[int, Field(ge=2, le=2048)]] = Field([224, 256, 384, 480, 640], min_length=1)
    """Shorter sides after resizing, in pixels, for multi_scale."""

    @model_validator(mode="after")
    def _not_twice(self) -> Self:
        if self.flip and self.views == "ten_crop":
            raise ValueError("expected flip: false, since half of the ten crops are mirror images already")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"expected each of scales once, got {self.scales}")
        return self

    @property
    def has_mirrors(self) -> bool:
        """Whether each view is judged together with its mirror image."""
        return self.flip or self.views == "ten_crop"

    def describe(self, preprocessing: Preprocessing) -> str:
        """The protocol in words, for `Metric.protocol`: "1-crop 224 of 256, bilinear"."""
        crop = f"{preprocessing.crop_size} of {preprocessing.resize_size}"
        views = {
            "one_crop": f"1-crop {crop}",
            "ten_crop": f"10-crop {crop}",
            "multi_scale": f"multi-scale {'/'.join(map(str, self.scales))}, whole image",
        }[self.views]
        return ", ".join([views, preprocessing.interpolation, *(["with mirror image"] if self.flip else [])])

    def check(self, preprocessing: Preprocessing) -> None:
        """Raises ConfigError where ten crops do not fit what `preprocessing` resizes to."""
        if self.views == "ten_crop" and preprocessing.resize_size < preprocessing.crop_size:
            raise ConfigError(
                f"ten_crop: expected a preprocessing whose resize_size is at least its crop_size, got "
                f"{preprocessing.resize_size} and {preprocessing.crop_size}; use one_crop"
            )
