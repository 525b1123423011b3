"""Crops against torchvision and against arithmetic; batches against their halves; mixing against its own targets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pipeline.data.transforms import Preprocessing
from pipeline.errors import ConfigError, ImageError
from pipeline.training import augment
from pipeline.training.augment import NUM_DRAWS, BatchAugment, Geometry, crop_padded, size_at
from pipeline.training.config import AugmentConfig

PREPROCESSING = Preprocessing(resize_size=40, crop_size=32)
EVERYTHING = {"policy": "trivial_augment", "random_erasing": 0.5}
DRAWS = st.lists(st.floats(0, 1, exclude_max=True), min_size=NUM_DRAWS, max_size=NUM_DRAWS).map(np.array)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def coordinates(height: int, width: int) -> Tensor:
    """An image whose red is its column and whose green is its row, so that a crop tells where it was cut."""
    rows, columns = torch.arange(height)[:, None].expand(-1, width), torch.arange(width)[None].expand(height, -1)
    return torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)


def random_draws(num_images: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((num_images, NUM_DRAWS)))


def geometry(**fields: object) -> Geometry:
    return Geometry(AugmentConfig.model_validate(fields), PREPROCESSING)


def batch_augment(num_classes: int = 10, **fields: object) -> BatchAugment:
    return BatchAugment(AugmentConfig.model_validate(fields), PREPROCESSING, num_classes)


# Geometry


@pytest.mark.parametrize("crop", ["random_resized", "pad", "scale", "center"])
def test_every_crop_depends_on_image_and_draws_alone(crop: str):
    first, second = random_draws(2).numpy()
    image = noise(3, 60, 90)
    cut = geometry(crop=crop)
    once = cut.apply(image, 32, first)
    cut.apply(image, 32, second)
    channels_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert once.shape == (3, 32, 32)
    assert once.dtype == torch.uint8
    assert torch.equal(once, cut.apply(image, 32, first))
    assert torch.equal(once, geometry(crop=crop).apply(channels_last, 32, first))
    assert torch.equal(once, cut.apply(image, 32, second)) == (crop == "center")


@pytest.mark.parametrize("crop", ["random_resized", "pad", "scale", "center"])
@given(height=st.integers(1, 70), width=st.integers(1, 70), size=st.integers(5, 40), draws=DRAWS)
@settings(deadline=None, max_examples=60)
def test_every_crop_of_every_image_is_a_square_of_the_size(
    crop: str, height: int, width: int, size: int, draws: np.ndarray
):
    assert geometry(crop=crop).apply(noise(3, height, width), size, draws).shape == (3, size, size)


@pytest.mark.parametrize(("height", "width"), [(64, 48), (20, 30), (33, 33)])
def test_a_random_resized_crop_of_the_whole_image_is_torchvisions_resize(height: int, width: int):
    ratio = (width / height, width / height)
    cut = geometry(crop="random_resized", scale=(1, 1), ratio=ratio)
    image = noise(3, height, width)
    assert torch.equal(cut.apply(image, 32, random_draws(1).numpy()[0]), F.resize(image, [32, 32], antialias=True))


@pytest.mark.parametrize(("height", "width", "box"), [(90, 10, (38, 0, 13, 10)), (9, 100, (0, 44, 9, 12))])
def test_where_no_random_box_fits_the_central_one_is_taken(height: int, width: int, box: tuple[int, int, int, int]):
    cut = geometry(crop="random_resized", scale=(1, 1))
    image = noise(3, height, width)
    expected = F.resized_crop(image, *box, [16, 16], antialias=True)
    assert torch.equal(cut.apply(image, 16, random_draws(1).numpy()[0]), expected)


def test_random_resized_crops_are_distributed_as_torchvisions():
    image = coordinates(120, 160)
    cut = geometry(crop="random_resized", scale=(0.1, 0.5), ratio=(0.5, 2))
    ours = []
    for draws in random_draws(1500).numpy():
        crop = cut.apply(image, 64, draws)[:2].float()
        left, right, top, bottom = crop[0, 0, 0], crop[0, 0, -1], crop[1, 0, 0], crop[1, -1, 0]
        ours.append([left, top, right - left, bottom - top])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        boxes = [v2.RandomResizedCrop(64, (0.1, 0.5), (0.5, 2)).make_params([image]) for _ in range(1500)]
    theirs = torch.tensor([[box["left"], box["top"], box["width"] - 1, box["height"] - 1] for box in boxes]).float()
    mean, std = torch.tensor(ours).mean(0), torch.tensor(ours).std(0)
    assert torch.allclose(mean, theirs.mean(0), rtol=0.05, atol=2)
    assert torch.allclose(std, theirs.std(0), rtol=0.08, atol=1)


@given(height=st.integers(20, 40), width=st.integers(20, 40), padding=st.integers(0, 8), draws=DRAWS)
@settings(deadline=None, max_examples=60)
def test_pad_cuts_from_an_image_with_zeros_around_it(height: int, width: int, padding: int, draws: np.ndarray):
    image = noise(3, height, width)
    crop = geometry(crop="pad", padding=padding).apply(image, 20, draws)
    around = torch.zeros(3, height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
    around[:, padding : padding + height, padding : padding + width] = image
    windows = around.unfold(1, 20, 1).unfold(2, 20, 1)  # 3, tops, lefts, 20, 20
    top = int(draws[augment.CROP_Y] * windows.shape[1])
    left = int(draws[augment.CROP_X] * windows.shape[2])
    assert torch.equal(crop, windows[:, top, left])


def test_pad_reaches_every_place_equally_often():
    cut = geometry(crop="pad", padding=2)
    image = noise(3, 8, 8) | 1  # no zeros but the padding's
    tops = [int((cut.apply(image, 8, draws)[0] != 0).any(1).int().argmax()) for draws in random_draws(900).numpy()]
    assert np.bincount(tops, minlength=3)[1:] == pytest.approx([180, 180], abs=45)  # one row lacks, two rows lack


def test_pad_enlarges_an_image_that_is_too_small():
    image = noise(3, 10, 15)
    crop = geometry(crop="pad", padding=0).apply(image, 20, np.zeros(NUM_DRAWS))
    assert torch.equal(crop, F.resize(image, [20], antialias=True)[:, :, :20])


def test_pad_refuses_to_enlarge_a_line():
    with pytest.raises(ImageError, match="100000×1"):
        geometry(crop="pad").apply(noise(3, 1, 100_000), 224, np.zeros(NUM_DRAWS))


@given(
    height=st.integers(8, 20), width=st.integers(8, 20), padding=st.integers(0, 5), size=st.integers(6, 8), seed=DRAWS
)
@settings(deadline=None, max_examples=60)
def test_crop_padded_is_the_pad_crop_bit_for_bit(height: int, width: int, padding: int, size: int, seed: np.ndarray):
    pixels = noise(5, 3, height, width)
    draws = torch.cat([random_draws(4), torch.from_numpy(seed)[None]])
    cut = geometry(crop="pad", padding=padding)
    one_by_one = [cut.apply(image, size, row) for image, row in zip(pixels, draws.numpy(), strict=True)]
    assert torch.equal(crop_padded(pixels, padding, size, draws), torch.stack(one_by_one))


def test_crop_padded_says_what_to_do_about_images_that_are_too_small():
    with pytest.raises(ConfigError, match=r"augment.size, progressive: expected at most 40 .*, got 48; .* data.cache"):
        crop_padded(noise(2, 3, 32, 32), 4, 48, random_draws(2))


@pytest.mark.parametrize("size", [32, 64])
def test_scale_keeps_the_part_that_a_crop_of_the_resized_image_would(size: int):
    image = coordinates(200, 240)
    draws = np.full(NUM_DRAWS, 0.5)
    cut = geometry(crop="scale", sides=(320, 320))  # 224 of 320 are 140 of 200
    crop = cut.apply(image, size, draws).float()
    columns, rows = crop[0, 0], crop[1, :, 0]
    assert (columns[0] + columns[-1]) / 2 == pytest.approx(50 + 69.5, abs=1)
    assert (rows[0] + rows[-1]) / 2 == pytest.approx(30 + 69.5, abs=1)
    assert columns[-1] - columns[0] == pytest.approx(140 * (size - 1) / size, abs=1.5)


def test_scale_covers_its_sides():
    image = coordinates(240, 240)
    cut = geometry(crop="scale", sides=(224, 448))
    widths = []
    for draws in random_draws(400).numpy():
        crop = cut.apply(image, 48, draws)[0, 0].float()
        widths.append(float(crop[-1] - crop[0]) * 48 / 47)
    assert min(widths) == pytest.approx(120, abs=3)
    assert max(widths) == pytest.approx(240, abs=3)
    assert np.mean([240 * 224 / width for width in widths]) == pytest.approx(336, rel=0.04)


def test_center_is_the_crop_of_the_evaluation_at_any_size():
    image = noise(3, 70, 50)
    draws = random_draws(1).numpy()[0]
    cut = geometry(crop="center")
    assert torch.equal(cut.apply(image, 32, draws), PREPROCESSING.apply(image))
    larger = Preprocessing(resize_size=60, crop_size=48)
    assert torch.equal(cut.apply(image, 48, draws), larger.apply(image))


@pytest.mark.parametrize(
    ("field", "pair"), [("sides", (200, 300)), ("sides", (400, 300)), ("scale", (0.5, 1.5)), ("ratio", (0.0, 1.0))]
)
def test_ranges_that_are_none_are_refused(field: str, pair: tuple[float, float]):
    with pytest.raises(ConfigError, match=rf"augment.{field}: expected the smaller first"):
        geometry(**{field: pair})


def test_padding_that_a_crop_could_get_lost_in_is_refused():
    with pytest.raises(ConfigError, match=r"augment.padding: expected less than the size, 16, got 16"):
        geometry(crop="pad", padding=16, size=32, progressive=[(0.0, 16), (0.5, 32)])


@pytest.mark.parametrize(("progress", "size"), [(0, 128), (0.29, 128), (0.3, 160), (0.8, 192), (1, 192)])
def test_the_size_grows_with_the_progress(progress: float, size: int):
    assert size_at(AugmentConfig(size=128, progressive=[(0.3, 160), (0.8, 192)]), progress) == size


def test_without_progressive_resizing_the_size_stays():
    assert size_at(AugmentConfig(size=176), 0.99) == 176


# Batches


@pytest.mark.parametrize("policy", ["none", "trivial_augment", "rand_augment"])
def test_a_batch_in_two_halves_is_the_batch(policy: str):
    pixels, labels, draws = noise(12, 3, 24, 24), torch.arange(12) % 10, random_draws(12)
    whole = batch_augment(policy=policy, random_erasing=0.5)
    images, targets = whole(pixels, labels, draws, 0)
    parts = [whole(pixels[part], labels[part], draws[part], 7) for part in (slice(0, 5), slice(5, 12))]
    assert torch.equal(images, torch.cat([part for part, _ in parts]))
    assert torch.equal(targets, labels)
    assert targets.dtype == torch.int64
    assert images.dtype == torch.float32


def test_without_chances_a_batch_is_normalised_only():
    pixels, draws = noise(4, 3, 16, 16), random_draws(4)
    images, _ = batch_augment(horizontal_flip=0)(pixels, torch.zeros(4, dtype=torch.int64), draws, 0)
    assert torch.equal(images, PREPROCESSING.normalise(pixels))


def test_an_image_is_flipped_where_its_draw_is_below_the_chance():
    pixels, draws = noise(4, 3, 16, 16), random_draws(4)
    draws[:, augment.FLIP] = torch.tensor([0.0, 0.29, 0.3, 0.9])
    images, _ = batch_augment(horizontal_flip=0.3)(pixels, torch.zeros(4, dtype=torch.int64), draws, 0)
    expected = PREPROCESSING.normalise(torch.cat([pixels[:2].flip(-1), pixels[2:]]))
    assert torch.equal(images, expected)


@pytest.mark.parametrize(
    ("fields", "theirs"),
    [
        ({"policy": "trivial_augment"}, v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)),
        (
            {"policy": "rand_augment", "rand_num_ops": 3, "rand_magnitude": 5},
            v2.RandAugment(3, 5, interpolation=v2.InterpolationMode.BILINEAR),
        ),
    ],
)
def test_a_policy_is_torchvisions_with_a_seed_per_image(fields: dict[str, object], theirs: torch.nn.Module):
    pixels, draws = noise(8, 3, 32, 32), random_draws(8)
    images, _ = batch_augment(horizontal_flip=0, **fields)(pixels, torch.zeros(8, dtype=torch.int64), draws, 0)
    with torch.random.fork_rng():
        for pixel, image, draw in zip(pixels, images, draws[:, augment.POLICY].tolist(), strict=True):
            torch.manual_seed(int(draw * 2**32))
            assert torch.equal(image, PREPROCESSING.normalise(theirs(pixel)[None])[0])
    changed = (images != PREPROCESSING.normalise(pixels)).flatten(1).any(1)
    assert changed.sum() > 4


def test_erasing_sets_one_rectangle_of_the_images_drawn_to_the_mean_colour():
    pixels = torch.full((400, 3, 32, 32), 255, dtype=torch.uint8)
    draws = random_draws(400)
    augmented = batch_augment(horizontal_flip=0, random_erasing=0.25)
    images, _ = augmented(pixels, torch.zeros(400, dtype=torch.int64), draws, 0)
    is_erased = (images == 0).flatten(1).any(1)
    assert torch.equal(is_erased, draws[:, augment.ERASE] < 0.25)
    shares = []
    for image in images[is_erased]:
        rows, columns = (image[0] == 0).any(1), (image[0] == 0).any(0)
        assert torch.equal(image == 0, (rows[:, None] & columns).expand(3, -1, -1))
        assert 0.2 < columns.sum() / rows.sum() < 5
        shares.append(float(rows.sum() * columns.sum()) / 32**2)
    assert min(shares) < 0.05
    assert max(shares) > 0.28
    assert all(0.01 < share < 0.36 for share in shares)
    assert torch.equal(images[~is_erased], PREPROCESSING.normalise(pixels)[~is_erased])


def test_mixup_mixes_pixels_as_it_mixes_labels():
    pixels = torch.stack([torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (0, 80, 160, 240)])
    labels = torch.arange(4)
    images, targets = batch_augment(mixup=0.8, num_classes=4)(pixels, labels, random_draws(4), 3)
    assert targets.shape == (4, 4)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert ((targets > 0.01).sum(1) == 2).all()
    expected = torch.einsum("nk,kchw->nchw", targets, PREPROCESSING.normalise(pixels))
    assert torch.allclose(images, expected, atol=1e-5)


def test_cutmix_gives_each_class_the_share_of_its_pixels():
    pixels = torch.stack([torch.full((3, 16, 16), level, dtype=torch.uint8) for level in (0, 80, 160, 240)])
    labels = torch.arange(4)
    images, targets = batch_augment(cutmix=1.0, num_classes=4)(pixels, labels, random_draws(4), 5)
    for label, original in enumerate(PREPROCESSING.normalise(pixels)):
        share = (images == original[:, :1, :1]).all(1).float().mean((1, 2))
        assert torch.allclose(targets[:, label], share, atol=1e-6)
    assert ((targets > 0).sum(1) == 2).all()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_an_image_that_could_not_be_had_is_mixed_with_none(kind: str):
    pixels, labels = noise(5, 3, 16, 16), torch.arange(5)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    images, targets = batch_augment(**{kind: 1.0}, horizontal_flip=0, num_classes=5)(
        pixels, labels, random_draws(5), 3, weights
    )
    mixed, mixed_targets = batch_augment(**{kind: 1.0}, horizontal_flip=0, num_classes=5)(
        pixels, labels, random_draws(5), 3
    )
    whole = torch.tensor([False, False, True, True, False])
    assert torch.equal(images[whole], PREPROCESSING.normalise(pixels)[whole])
    assert torch.equal(targets[whole], torch.eye(5)[whole])
    assert torch.equal(images[~whole], mixed[~whole])
    assert torch.equal(targets[~whole], mixed_targets[~whole])
    assert not torch.equal(mixed[whole], images[whole])


def test_mixing_depends_on_its_seed_alone_and_takes_both_kinds():
    pixels, labels, draws = noise(6, 3, 16, 16), torch.arange(6), random_draws(6)
    mixing = batch_augment(mixup=1.0, cutmix=1.0, horizontal_flip=0)
    plain = PREPROCESSING.normalise(pixels)
    is_cut = []
    for seed in range(30):
        images, targets = mixing(pixels, labels, draws, seed)
        again = mixing(pixels, labels, draws, seed)
        assert torch.equal(images, again[0])
        assert torch.equal(targets, again[1])
        is_cut.append(bool(((images == plain) | (images == plain.roll(1, 0))).all()))
    assert 5 < sum(is_cut) < 25


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    pixels, labels = noise(4, 3, 16, 16), torch.arange(4)
    batch_augment(**EVERYTHING, mixup=1.0, cutmix=1.0)(pixels, labels, random_draws(4), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_without_images_passes():
    augmented = batch_augment(**EVERYTHING, mixup=1.0)
    images, targets = augmented(noise(0, 3, 16, 16), torch.zeros(0, dtype=torch.int64), random_draws(0), 0)
    assert images.shape == (0, 3, 16, 16)
    assert len(targets) == 0
