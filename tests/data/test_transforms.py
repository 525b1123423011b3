"""The preprocessing against torchvision's own, at every size and setting."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torchvision.models import EfficientNet_V2_S_Weights, ResNet50_Weights, ViT_B_16_Weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification, SemanticSegmentation
from torchvision.transforms.v2 import functional as F

from pipeline.data.transforms import Preprocessing
from pipeline.errors import ConfigError, ImageError

INTERPOLATIONS = st.sampled_from(["nearest", "bilinear", "bicubic"])
SIZES = st.integers(1, 90)


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@given(SIZES, SIZES, st.integers(2, 40), st.integers(1, 60), INTERPOLATIONS, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_apply_equals_torchvision_bit_for_bit(
    height: int, width: int, resize: int, crop: int, interpolation: str, antialias: bool, is_channels_last: bool
) -> None:
    image = noise(height, width)
    if is_channels_last:
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    resized = F.resize(image, [resize], InterpolationMode(interpolation), antialias=antialias)
    fields = {"resize_size": resize, "crop_size": crop, "interpolation": interpolation, "antialias": antialias}
    assert torch.equal(Preprocessing(**fields).apply(image), F.center_crop(resized, [crop]))


@given(SIZES, SIZES, st.integers(2, 40), st.integers(1, 60), st.booleans())
@settings(deadline=None, max_examples=100)
def test_the_whole_stays_within_one_level_of_torchvisions_preset(
    height: int, width: int, resize: int, crop: int, antialias: bool
) -> None:
    preset = ImageClassification(crop_size=crop, resize_size=resize, antialias=antialias)
    preprocessing = Preprocessing.from_torchvision(preset)
    image = noise(height, width)
    ours = preprocessing.normalise(preprocessing.apply(image)[None])[0]
    levels = (ours - preset(image)).abs() * torch.tensor(preset.std).view(3, 1, 1) * 255
    assert levels.max() < 1.001  # the preset resizes in float32 and rounds once


def test_normalise_equals_torchvision_bit_for_bit() -> None:
    batch = torch.stack([noise(20, 20), 255 - noise(20, 20)])
    preset = ImageClassification(crop_size=20, resize_size=20)
    preprocessing = Preprocessing.from_torchvision(preset)
    assert torch.equal(preprocessing.normalise(batch), preset(batch))
    assert preprocessing.normalise(batch).dtype == torch.float32


def test_normalising_after_a_network_was_exported_with_it_is_the_same() -> None:
    class Normalised(torch.nn.Module):
        preprocessing = Preprocessing(resize_size=20, crop_size=20, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.preprocessing.normalise(pixels)

    batch = noise(20, 20)[None]
    exported = torch.export.export(Normalised(), (batch,)).module()
    eager = Normalised.preprocessing.normalise(batch)
    assert type(eager) is torch.Tensor
    assert torch.equal(eager, F.normalize(batch.float() / 255, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    assert torch.equal(exported(batch), eager)


@pytest.mark.parametrize(("height", "width"), [(1, 900), (900, 1), (1, 1)])
def test_an_image_of_one_pixels_width_works(height: int, width: int) -> None:
    image = noise(height, width)
    cropped = Preprocessing(resize_size=32, crop_size=28).apply(image)
    assert torch.equal(cropped, F.center_crop(F.resize(image, [32]), [28]))


def test_an_extreme_aspect_ratio_is_refused() -> None:
    with pytest.raises(ImageError) as caught:
        Preprocessing(resize_size=256, crop_size=224).apply(noise(1, 100_000))
    assert (caught.value.stage, caught.value.error) == ("preprocess", "aspect_ratio")
    assert "100000×1" in caught.value.message


@pytest.mark.parametrize(
    "weights", [ResNet50_Weights.IMAGENET1K_V2, EfficientNet_V2_S_Weights.DEFAULT, ViT_B_16_Weights.DEFAULT]
)
def test_torchvisions_presets_are_taken_over(weights: ResNet50_Weights) -> None:
    preset = weights.transforms()
    preprocessing = Preprocessing.from_torchvision(preset)
    assert [preprocessing.resize_size] == preset.resize_size
    assert [preprocessing.crop_size] == preset.crop_size
    assert preprocessing.interpolation == preset.interpolation.value
    assert [*preprocessing.mean, *preprocessing.std] == [*preset.mean, *preset.std]


@pytest.mark.parametrize(
    "preset",
    [
        SemanticSegmentation(resize_size=520),
        ImageClassification(crop_size=9, interpolation=InterpolationMode.LANCZOS),
        SimpleNamespace(resize_size=[256, 256], crop_size=[224]),
    ],
)
def test_other_presets_are_refused(preset: object) -> None:
    with pytest.raises(ConfigError, match="ImageClassification"):
        Preprocessing.from_torchvision(preset)


def test_the_digest_tells_settings_apart_and_nothing_else() -> None:
    first = Preprocessing(resize_size=256, crop_size=224)
    assert first.digest == Preprocessing.model_validate_json(first.model_dump_json()).digest
    assert first.digest == "b164c43161d0104971fab5a6ea7b37bf2cdb22641daa3671bae9972200d07538"
    changed = [{"resize_size": 232}, {"crop_size": 225}, {"interpolation": "bicubic"}, {"antialias": False}]
    changed += [{"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)}]
    digests = {first.model_copy(update=change).digest for change in changed}
    assert len(digests | {first.digest}) == 7


@pytest.mark.parametrize("fields", [{"resize_size": 1}, {"std": (0.1, 0.0, 0.1)}, {"size": 3}])
def test_impossible_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Preprocessing.model_validate({"resize_size": 256, "crop_size": 224, **fields})


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(33, 48), (200, 150), (20, 21)])
def test_resizing_in_float_as_gpus_do_comes_within_a_level_where_nothing_is_clipped(interpolation, size):
    preprocessing = Preprocessing(resize_size=24, crop_size=24, interpolation=interpolation)
    image = noise(*size) // 2 + 64
    in_float = preprocessing._interpolate_in_float(image[None], preprocessing.resized_size(*size))[0]
    assert in_float.dtype == torch.uint8
    difference = (in_float.int() - preprocessing.resize(image).int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.3
