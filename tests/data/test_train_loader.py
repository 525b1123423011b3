"""A worker's batches: every image once an epoch, the same for any number of workers, and from any step on."""

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.cached_loader import CachedLoader
from pipeline.data.decoders import Caution
from pipeline.data.readers import ReadLimits
from pipeline.data.train_loader import TrainBatch, TrainLoader
from pipeline.data.training_set import TrainingSet
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ConfigError, ImageError
from pipeline.training.augment import NUM_DRAWS, Geometry, crop_padded
from pipeline.training.config import AugmentConfig
from tests.manifests import uris_of
from tests.training_worlds import make_loose_and_packed_sets, make_sets, make_square_sets, pack_set
from tests.worlds import list_images

NUM_IMAGES = 41
SIZE = 8
PADDING = 2
KINDS = ["loose", "packed", "cached"]
Loader = TrainLoader | CachedLoader


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sets")
    make_loose_and_packed_sets(folder, num_images=NUM_IMAGES)
    return folder


def make_loader(manifest: Path, **fields) -> TrainLoader:
    config = AugmentConfig(crop="pad", size=SIZE, padding=PADDING)
    defaults = {
        "images": TrainingSet.open(str(manifest)),
        "limits": ReadLimits(),
        "geometry": Geometry(config, Preprocessing(resize_size=SIZE, crop_size=SIZE)).apply,
        "num_draws": NUM_DRAWS,
        "seed": 3,
        "batch_size": 9,
        "num_lanes": 4,
        "shuffle_window": 5,
        "num_threads": 2,
    }
    return TrainLoader(**{**defaults, **fields})


def cached(loader: TrainLoader) -> CachedLoader:
    def crop(pixels, size, draws):
        return crop_padded(pixels, PADDING, size, draws)

    return CachedLoader(loader, torch.device("cpu"), crop, largest=SIZE + 2)


def loader_of(root: Path, kind: str, **fields) -> Loader:
    if kind == "cached":
        return cached(make_loader(root / "packed", **fields))
    return make_loader(root / {"loose": "train"}.get(kind, kind), **fields)


def read(
    loader: Loader,
    epoch: int = 0,
    first: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_steps: int | None = None,
    size_at: Callable[[int], int] = lambda step: SIZE,
) -> list[TrainBatch]:
    start = epoch * loader.steps.per_epoch + first
    steps = range(start, (epoch + 1) * loader.steps.per_epoch if num_steps is None else start + num_steps)
    return list(loader.batches(steps, rank=rank, world_size=world_size, size_at=size_at))


def images_in(parts: list[TrainBatch]) -> dict[str, tuple]:
    """What the network is given of every image of these parts of one step, by uri."""
    return {
        uri: (pixels.tolist(), int(label), float(weight), tuple(draws.tolist()))
        for part in parts
        for uri, pixels, label, weight, draws in zip(
            part.uris, part.pixels, part.labels, part.weights, part.draws, strict=True
        )
    }


def assert_same(left: list[TrainBatch], right: list[TrainBatch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.step, one.num_global, one.uris) == (other.step, other.num_global, other.uris)
        for name in ("pixels", "labels", "weights", "draws"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@st.composite
def runs(draw) -> tuple[dict[str, int], list[int], list[int]]:
    """A loader's fields, where a run of three epochs was cut, and the number of ranks of each piece."""
    fields = {
        "batch_size": draw(st.integers(3, 20)),
        "num_lanes": draw(st.integers(4, 11)),
        "shuffle_window": draw(st.integers(1, 30)),
        "seed": draw(st.integers(0, 9)),
    }
    num_steps = 3 * -(-NUM_IMAGES // fields["batch_size"])
    cuts = sorted(draw(st.sets(st.integers(1, num_steps - 1), min_size=1, max_size=3)))
    world_sizes = draw(st.lists(st.integers(1, 4), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    return fields, [0, *cuts, num_steps], world_sizes


def uris_by_epoch(loader: Loader, bounds: list[int], world_sizes: list[int]) -> dict[int, list[str]]:
    """The uris that all ranks were given, where the steps between two bounds had one world size."""
    seen: dict[int, list[str]] = defaultdict(list)
    for (start, end), world_size in zip(pairwise(bounds), world_sizes, strict=True):
        for rank in range(world_size):
            for part in read(loader, first=start, rank=rank, world_size=world_size, num_steps=end - start):
                seen[part.step // loader.steps.per_epoch] += part.uris
    return seen


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(run=runs())
def test_every_epoch_has_every_image_once_whatever_becomes_of_the_ranks(root, kind, run):
    fields, bounds, world_sizes = run
    loader = loader_of(root, kind, **fields)
    everything = Counter(uris_of(loader_of(root, "loose").images.manifest))
    assert everything.total() == len(everything) == NUM_IMAGES
    seen = uris_by_epoch(loader, bounds, world_sizes)
    assert [Counter(seen[epoch]) for epoch in range(3)] == [everything] * 3
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_same_images_whatever_the_number_of_ranks(root, kind):
    loader = loader_of(root, kind)
    alone = [images_in([part]) for part in read(loader, epoch=1)]
    for world_size in (2, 3, 4):
        ranks = [read(loader, epoch=1, rank=rank, world_size=world_size) for rank in range(world_size)]
        steps = [list(parts) for parts in zip(*ranks, strict=True)]
        assert [images_in(parts) for parts in steps] == alone
        assert all({part.num_global for part in parts} == {sum(len(p.uris) for p in parts)} for parts in steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
def test_a_run_entered_at_any_step_goes_on_as_if_read_from_its_start(root, kind, rank, world_size):
    loader = loader_of(root, kind)
    num_steps = 2 * loader.steps.per_epoch + 2
    whole = read(loader, rank=rank, world_size=world_size, num_steps=num_steps)
    assert [part.step for part in whole] == list(range(num_steps))
    for first in range(num_steps + 1):
        rest = read(loader, first=first, rank=rank, world_size=world_size, num_steps=num_steps - first)
        assert_same(rest, whole[first:])


def test_packed_images_are_the_loose_ones(root):
    loose, packed = (make_loader(root / name, shuffle_window=None) for name in ("train", "packed"))
    assert packed.images.is_packed
    assert not loose.images.is_packed
    assert_same(read(packed), read(loose))


def test_batches_have_the_types_they_promise(root):
    for part in read(make_loader(root / "train")):
        num_images = len(part.uris)
        assert (part.pixels.shape, part.pixels.dtype) == ((num_images, 3, SIZE, SIZE), torch.uint8)
        assert (part.labels.shape, part.labels.dtype) == ((num_images,), torch.int64)
        assert (part.weights.tolist(), part.weights.dtype) == ([1.0] * num_images, torch.float32)
        assert (part.draws.shape, part.draws.dtype) == ((num_images, NUM_DRAWS), torch.float64)


def test_labels_are_those_of_the_images(root):
    loader = make_loader(root / "packed")
    labels = {uri: label for part in read(loader) for uri, label in zip(part.uris, part.labels.tolist(), strict=True)}
    assert all(f"/class{label}/" in uri for uri, label in labels.items())
    assert set(labels.values()) == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_has_an_empty_part_where_a_step_has_fewer_images_than_ranks(root, kind):
    loader = loader_of(root, kind, batch_size=2)
    ranks = [read(loader, rank=rank, world_size=4) for rank in range(4)]
    assert [len(parts) for parts in ranks] == [loader.steps.per_epoch] * 4
    empty = [part for parts in ranks for part in parts if not part.uris]
    assert len(empty) >= 2 * loader.steps.per_epoch
    for part in empty:
        assert part.pixels.shape == (0, 3, SIZE, SIZE)
        assert part.draws.shape == (0, NUM_DRAWS)
        assert (len(part.labels), len(part.weights)) == (0, 0)
        assert 1 <= part.num_global <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_that_of_the_step(root, kind):
    parts = read(loader_of(root, kind), first=1, size_at=lambda step: 5 + step)
    assert [part.pixels.shape[2:] for part in parts] == [(5 + step, 5 + step) for step in range(1, 5)]


@pytest.mark.parametrize("manifest", ["train", "packed"])
def test_a_cached_set_gives_the_batches_of_an_uncached_one(root, manifest):
    loader = make_loader(root / manifest, shuffle_window=None)
    for epoch, first, rank, world_size in [(0, 0, 0, 1), (1, 2, 1, 2), (2, 0, 3, 4)]:
        place = {"rank": rank, "world_size": world_size, "size_at": lambda step: SIZE + step % 3}
        assert_same(read(cached(loader), epoch, first, **place), read(loader, epoch, first, **place))


def test_a_cache_of_images_of_several_sizes_is_refused(tmp_path):
    make_sets(tmp_path, num_train=6, num_evaluation=6)
    with pytest.raises(ConfigError, match=r"data\.cache: expected images of one size, got \d sizes; use cache none"):
        cached(make_loader(tmp_path / "train"))


@pytest.mark.parametrize("manifest", ["train", "packed"])
def test_whole_images_come_in_the_order_of_the_manifest(root, manifest):
    loader = make_loader(root / manifest)
    assert [image.uri for image in loader.whole_images()] == uris_of(loader.images.manifest)


# --- images that cannot be used --------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path) -> tuple[Path, list[str]]:
    """A root with the manifests `intact` and, three files later, `train` and `packed`; the uris of those three."""
    make_square_sets(tmp_path, num_images=20, side=10)
    (tmp_path / "train").rename(tmp_path / "intact")
    uris = uris_of(TrainingSet.open(str(tmp_path / "intact")).manifest)[3:18:7]
    for uri, content in zip(uris, [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n"], strict=True):
        storage.write(uri, content)
    list_images(tmp_path / "train-images", tmp_path / "train", shard_size=7)
    pack_set(tmp_path / "train", tmp_path / "packed")
    return tmp_path, uris


def assert_only_these_are_black(loader: Loader, places: list[list[str]], uris: list[str]) -> None:
    parts = read(loader)
    assert [part.uris for part in parts] == places
    for part in parts:
        is_broken = torch.tensor([uri in uris for uri in part.uris])
        assert torch.equal(part.weights, (~is_broken).float())
        assert torch.equal(part.pixels.flatten(1).amax(1) == 0, is_broken)
    assert sorted(loader.errors) == sorted(uris)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_is_black_without_weight_and_keeps_its_place(broken, kind):
    root, uris = broken
    places = [part.uris for part in read(make_loader(root / "intact", shuffle_window=None))]
    loader = loader_of(root, kind, shuffle_window=None)
    assert_only_these_are_black(loader, places, uris)
    assert {error.stage for error in loader.errors.values()} == {"decode"}


def test_an_image_that_changed_since_it_was_listed_is_broken_too(broken):
    root, uris = broken
    places = [part.uris for part in read(loader_of(root, "loose"))]
    loader = make_loader(root / "intact")
    assert_only_these_are_black(loader, places, uris)
    assert {(error.stage, error.error) for error in loader.errors.values()} == {("fetch", "changed")}


def test_a_packed_shard_that_is_gone_takes_its_own_images_only(tmp_path):
    make_square_sets(tmp_path, num_images=20, side=10)
    pack_set(tmp_path / "train", tmp_path / "packed")
    loader = make_loader(tmp_path / "packed")
    places, shard = [part.uris for part in read(loader)], loader.images.shards[1]
    storage.delete(shard.source)
    assert_only_these_are_black(loader, places, loader.images.manifest.images(shard)["uri"].to_pylist())
    assert {(error.stage, error.error) for error in loader.errors.values()} == {("fetch", "not_found")}


def test_images_outside_the_allowed_roots_are_not_read(root):
    loader = make_loader(root / "train", limits=ReadLimits(allowed_roots=["s3://"]))
    assert not any(part.weights.any() for part in read(loader))
    assert {error.error for error in loader.errors.values()} == {"not_allowed"}
    assert len(loader.errors) == NUM_IMAGES


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_known_to_kill_its_decoder_keeps_its_place_and_is_not_decoded(root, kind):
    usual = read(loader_of(root, kind))
    place, crashed = 5, ImageError("decode", "crashed", "the decoder died of SIGSEGV")
    loader = loader_of(root, kind, caution=Caution(known={usual[0].uris[place]: crashed}))
    batches = read(loader)
    assert loader.errors == {usual[0].uris[place]: crashed}
    assert (batches[0].weights[place], batches[0].pixels[place].max()) == (0, 0)
    usual[0].weights[place], usual[0].pixels[place] = 0, 0
    assert_same(batches, usual)
