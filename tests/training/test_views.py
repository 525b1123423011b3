"""Views of an image have the shapes and the pixels that the protocols say, and share batches by shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import five_crop

from pipeline.data.loader import Batch
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ConfigError, ImageError
from pipeline.training.protocol import Protocol
from pipeline.training.views import make_views, of_equal_shapes

PREPROCESSING = Preprocessing(resize_size=40, crop_size=32, interpolation="bicubic")


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_one_crop_is_that_of_the_preprocessing():
    (view,) = make_views(Protocol(), PREPROCESSING)
    assert torch.equal(view(noise(50, 60)), PREPROCESSING.apply(noise(50, 60)))


@pytest.mark.parametrize("size", [(50, 60), (60, 50), (40, 40), (41, 77)])
def test_ten_crop_takes_torchvisions_five_crops_of_the_resized_image(size):
    (view,) = make_views(Protocol(views="ten_crop"), PREPROCESSING)
    crops = five_crop(PREPROCESSING.resize(noise(*size)), [32, 32])
    assert torch.equal(view(noise(*size)), torch.stack(list(crops)))


def test_multi_scale_takes_the_whole_image_at_each_scale():
    views = make_views(Protocol(views="multi_scale", scales=[24, 64]), PREPROCESSING)
    seen = [view(noise(50, 100)) for view in views]
    assert [tuple(pixels.shape) for pixels in seen] == [(3, 24, 48), (3, 64, 128)]
    resized = Preprocessing(resize_size=24, crop_size=1, interpolation="bicubic").resize(noise(50, 100))
    assert torch.equal(seen[0], resized)


def test_multi_scale_refuses_an_image_too_narrow_to_take_whole():
    (view,) = make_views(Protocol(views="multi_scale", scales=[8]), PREPROCESSING)
    assert view(noise(1, 16)).shape == (3, 8, 128)
    with pytest.raises(ImageError, match="at most 16 short ones for multi_scale, got 17×1") as caught:
        view(noise(1, 17))
    assert (caught.value.stage, caught.value.error) == ("preprocess", "aspect_ratio")


def test_ten_crops_that_do_not_fit_are_refused_before_an_image_is_seen():
    with pytest.raises(ConfigError, match="use one_crop"):
        make_views(Protocol(views="ten_crop"), Preprocessing(resize_size=28, crop_size=32))


@settings(deadline=None)
@given(st.lists(st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 3)]), max_size=40), st.integers(1, 24))
def test_images_of_equal_shape_share_batches_of_bounded_size(shapes, max_pixels):
    singles = [Batch([row], [torch.full((1, 3, *shape), row)]) for row, shape in enumerate(shapes)]
    batches = list(of_equal_shapes(singles, max_pixels))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(shapes)))
    for batch in batches:
        assert [tuple(image.shape[1:]) for image in batch.pixels[0]] == [shapes[row] for row in batch.rows]
        assert batch.pixels[0][:, 0, 0, 0].tolist() == batch.rows
        assert len(batch.rows) == 1 or batch.pixels[0][:, 0].numel() <= max_pixels
