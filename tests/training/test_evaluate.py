"""Evaluation: each image once for any number of ranks, the answers of `predict`, and the papers' protocols."""

import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2.functional import five_crop

from jobs.demo_images import CLASSES, draw
from pipeline import storage
from pipeline.data.images import decode
from pipeline.data.manifest import Manifest, write_manifest
from pipeline.data.packed import PackedSource
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError, ManifestError, RunError, StorageError
from pipeline.models.bundle import load_network
from pipeline.models.catalog import build
from pipeline.tables import open_table
from pipeline.training import evaluate as module
from pipeline.training.evaluate import Setup, check_labels, evaluate, parts_of
from pipeline.training.protocol import Protocol
from tests.confusions import matrix_of, traced_peak
from tests.manifests import Rows, fresh, some_rows
from tests.ranks import Meeting
from tests.worlds import list_images, make_world, run_without_ray

PREPROCESSING = Preprocessing(resize_size=32, crop_size=32)
SETUP = Setup(preprocessing=PREPROCESSING, batch_size=4, keep_hardest=100)
CROPPING = replace(SETUP, preprocessing=Preprocessing(resize_size=40, crop_size=32))


def on_ranks(world_size: int, work) -> list:
    """`work(rank=, world_size=, gather=)` on as many threads, as ranks; what each returned or raised."""
    meeting = Meeting(world_size)

    def on_rank(rank: int):
        try:
            return work(rank=rank, world_size=world_size, gather=partial(meeting.gather, rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(on_rank, range(world_size)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


@pytest.fixture(scope="module")
def manifest(world):
    return Manifest.open(str(world / "manifest"))


@pytest.fixture(scope="module")
def alone(world, manifest):
    """What one process finds."""
    return evaluate(network_of(world), manifest, SETUP)


def network_of(world) -> torch.nn.Module:
    return load_network(storage.join(str(world / "registry"), "tiny", "1")).to(memory_format=torch.channels_last)


def drawn(root, shapes: list[tuple[int, int]]) -> Manifest:
    """Lossless images of these widths and heights, one of each class after the other."""
    for index, size in enumerate(shapes):
        path = root / "images" / CLASSES[index % len(CLASSES)] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path.parent.name, random.Random(index)).resize(size).save(path)
    return list_images(root / "images", root / "manifest", shard_size=5)


def rows_of(manifest: Manifest) -> list[dict]:
    return [row for shard in manifest.shards() for row in manifest.images(shard).to_pylist()]


def judged(outcome) -> dict[str, tuple[int, float, float]]:
    return {hard.uri: (hard.predicted_id, hard.score, hard.loss) for hard in outcome.hardest}


def by_hand(network, label_id: int, views) -> tuple[int, float, float]:
    """Answer, score and loss of one image from the mean softmax over its views, uint8 3×H×W each."""
    with torch.inference_mode():
        scores = [network(PREPROCESSING.normalise(view[None]))[0].double().softmax(1)[0] for view in views]
    mean = torch.stack(scores).mean(0)
    return int(mean.argmax()), float(mean.max()), -math.log(mean[label_id])


def assert_judged_by(setup: Setup, network, manifest: Manifest, views_of) -> None:
    answers = judged(evaluate(network, manifest, setup))
    rows = rows_of(manifest)
    assert len(answers) == len(rows)
    for row in rows:
        image = decode(storage.read(row["uri"]), max_pixels=10**6)
        predicted_id, score, loss = by_hand(network, row["label"], views_of(image))
        assert answers[row["uri"]][0] == predicted_id
        assert answers[row["uri"]][1:] == pytest.approx((score, loss), rel=1e-4)


# --- once, for any number of ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 31])
def test_counts_are_the_same_for_any_number_of_ranks(world, manifest, alone, world_size):
    outcomes = on_ranks(world_size, lambda **ranks: evaluate(network_of(world), manifest, SETUP, **ranks))
    assert (alone.counts.num_images, alone.counts.num_errors) == (27, 3)
    for outcome in outcomes:
        assert outcome.counts.pairs == alone.counts.pairs
        assert (outcome.counts.num_errors, outcome.counts.top5) == (3, alone.counts.top5)
        assert outcome.counts.loss == pytest.approx(alone.counts.loss)
    seen = Counter(image.uri for outcome in outcomes for image in [*outcome.errors, *outcome.hardest])
    assert seen == Counter(row["uri"] for row in rows_of(manifest))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 50))
def test_parts_hold_every_image_once_and_no_rank_two_more_than_another(num_images, shard_size, world_size):
    manifest = write_manifest(fresh(), Rows(some_rows(num_images, "1")), shard_size=shard_size)
    shares = [
        [uri for part in parts_of(manifest, rank, world_size) for uri in part.images(manifest)["uri"].to_pylist()]
        for rank in range(world_size)
    ]
    assert [uri for share in shares for uri in share] == [row["uri"] for row in rows_of(manifest)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_packed_shards_are_cut_between_ranks_too(world, manifest, alone, tmp_path):
    rows = [row for row in rows_of(manifest) if row["label"] < 2]
    columns = {
        "uri": [row["uri"] for row in rows],
        "bytes": [storage.read(row["uri"]) for row in rows],
        "label": pa.array([row["label"] for row in rows], pa.int32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "packed.parquet")
    packed = write_manifest(str(tmp_path / "manifest"), PackedSource(str(tmp_path / "packed.parquet")), shard_size=1)
    assert packed.num_shards == 1
    outcomes = on_ranks(3, lambda **ranks: evaluate(network_of(world), packed, SETUP, **ranks))
    assert all(0 < len(outcome.hardest) + len(outcome.errors) < len(rows) for outcome in outcomes)
    matrices = [matrix_of(outcome.counts.confusion) for outcome in (alone, *outcomes)]
    assert all(matrix[:2] == matrices[0][:2] for matrix in matrices)
    assert all(outcome.counts.num_images + outcome.counts.num_errors == len(rows) for outcome in outcomes)


def test_broken_images_are_counted_and_listed_once(world, alone):
    run = run_without_ray(world, run_id="errors")
    listed = open_table(storage.join(run.output_uri, "errors"), "errors").to_table().to_pylist()
    assert len(alone.errors) == alone.counts.num_errors == 3
    fields = ("uri", "etag", "stage", "error", "message")
    assert [[getattr(error, name) for name in fields] for error in alone.errors] == [
        [row[name] for name in fields] for row in listed
    ]


def test_progress_counts_every_image(world, manifest):
    heard: list[int] = []
    evaluate(network_of(world), manifest, SETUP, on_progress=heard.append)
    assert heard == [8, 16, 24, 30]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_one_crop_answers_what_predict_answers(world, manifest, alone):
    run = run_without_ray(world, run_id="same", compute={"batch_size": 4})
    predicted = open_table(storage.join(run.output_uri, "predictions"), "same").to_table().to_pylist()
    answers = {uri: answer[:2] for uri, answer in judged(alone).items()}
    assert {row["uri"]: (row["label_id"], row["score"]) for row in predicted} == answers
    truth = {row["uri"]: row["label"] for row in rows_of(manifest)}
    assert alone.counts.top1 == sum(row["label_id"] == truth[row["uri"]] for row in predicted)
    assert alone.counts.top5 == sum(truth[row["uri"]] in row["topk_label_ids"] for row in predicted)
    assert alone.counts.pairs == Counter(6 * truth[row["uri"]] + row["label_id"] for row in predicted)


def test_the_loss_is_the_mean_cross_entropy(world, tmp_path):
    manifest = drawn(tmp_path, [(40, 30), (33, 50), (32, 32)])
    network = network_of(world)
    rows = rows_of(manifest)
    images = [PREPROCESSING.apply(decode(storage.read(row["uri"]), max_pixels=10**6)) for row in rows]
    with torch.inference_mode():
        logits = network(PREPROCESSING.normalise(torch.stack(images)))[0]
    expected = F.cross_entropy(logits, torch.tensor([row["label"] for row in rows]))
    assert evaluate(network, manifest, SETUP).counts.loss == pytest.approx(expected.item(), rel=1e-5)


def test_flip_averages_the_scores_of_image_and_mirror_image(world, tmp_path):
    def views(image):
        crop = PREPROCESSING.apply(image)
        return [crop, crop.flip(2)]

    setup = replace(SETUP, protocol=Protocol(flip=True))
    assert_judged_by(setup, network_of(world), drawn(tmp_path, [(50, 40), (40, 50), (60, 60)]), views)


def test_ten_crop_averages_torchvisions_five_crops_and_their_mirror_images(world, tmp_path):
    def views(image):
        resized = Preprocessing(resize_size=40, crop_size=40 * max(image.shape[1:]) // min(image.shape[1:]))
        height, width = resized.resized_size(*image.shape[1:])
        padded = resized.apply(image)
        top, left = (round((side - own) / 2) for side, own in zip(padded.shape[1:], (height, width), strict=True))
        crops = five_crop(padded[:, top : top + height, left : left + width], [32, 32])
        return [view for crop in crops for view in (crop, crop.flip(2))]

    setup = replace(CROPPING, protocol=Protocol(views="ten_crop"))
    assert_judged_by(setup, network_of(world), drawn(tmp_path, [(80, 40), (40, 60), (44, 44), (40, 40)]), views)


def test_ten_crops_of_one_colour_answer_as_one_crop(world, tmp_path):
    for index, size in enumerate([(90, 50), (50, 90), (60, 60)]):
        path = tmp_path / "images" / CLASSES[index] / "plain.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", size, (200, 90 * index, 30)).save(path)
    manifest = list_images(tmp_path / "images", tmp_path / "manifest", shard_size=3)
    one = judged(evaluate(network_of(world), manifest, CROPPING))
    ten = judged(evaluate(network_of(world), manifest, replace(CROPPING, protocol=Protocol(views="ten_crop"))))
    assert len(one) == 3
    for uri, answer in one.items():
        assert ten[uri] == pytest.approx(answer, rel=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_multi_scale_averages_whole_images_of_any_shape_over_the_scales(world, tmp_path, flip):
    scales = [24, 32, 50]

    def views(image):
        height, width = image.shape[1:]
        whole = []
        for scale in scales:
            size = (int(scale * height / width), scale) if width <= height else (scale, int(scale * width / height))
            whole.append(F.interpolate(image[None], size, mode="bilinear", antialias=True)[0])
        return [*whole, *(view.flip(2) for view in whole)] if flip else whole

    setup = replace(SETUP, protocol=Protocol(views="multi_scale", scales=scales, flip=flip))
    shapes = [(60, 40), (40, 60), (60, 40), (45, 45), (33, 80), (60, 40)]
    assert_judged_by(setup, network_of(world), drawn(tmp_path, shapes), views)


def test_an_image_too_narrow_to_take_whole_is_an_error(world, tmp_path):
    manifest = drawn(tmp_path, [(40, 40), (17, 1), (16, 1)])
    outcome = evaluate(network_of(world), manifest, replace(SETUP, protocol=Protocol(views="multi_scale", scales=[8])))
    assert [(error.stage, error.error) for error in outcome.errors] == [("preprocess", "aspect_ratio")]
    assert "got 17×1" in outcome.errors[0].message
    assert outcome.counts.num_images == 2


def test_the_hardest_images_have_the_highest_losses(world, manifest, alone):
    everything = alone.hardest
    hardest = evaluate(network_of(world), manifest, replace(SETUP, keep_hardest=4)).hardest
    assert len(everything) == 27
    assert hardest == sorted(everything, key=lambda hard: -hard.loss)[:4]
    assert evaluate(network_of(world), manifest, replace(SETUP, keep_hardest=0)).hardest == []


def test_bfloat16_changes_scores_a_little(world, manifest, alone):
    exact = judged(alone)
    rounded = judged(evaluate(network_of(world), manifest, replace(SETUP, precision=torch.bfloat16)))
    differences = [abs(exact[uri][2] - rounded[uri][2]) for uri in exact]
    assert 0 < max(differences) < 0.2


def test_every_module_has_its_own_mode_back_and_no_statistic_moves(world, manifest):
    network = network_of(world).train()
    network.trunk.bn1.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [part.training for part in network.modules()]
    evaluate(network, manifest, SETUP)
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# --- bad input -------------------------------------------------------------------------------------------------------


def refuse_to_read(*_args, **_options):
    raise AssertionError("an image was read")


def test_unlabelled_images_and_labels_outside_stop_every_rank_before_an_image_is_read(monkeypatch):
    labels = [None, "0", "9", "1", "1", "1", "1", None, "1"]
    rows = [(f"s3://bucket/{index}.jpg", 1, "e", label) for index, label in enumerate(labels)]
    manifest = write_manifest(fresh(), Rows(rows, label_kind="ids"), shard_size=2)
    monkeypatch.setattr(module, "read_shard", refuse_to_read)
    raised = on_ranks(3, lambda **ranks: evaluate(build("cifar_resnet8", 6), manifest, SETUP, **ranks))
    assert [type(error) for error in raised] == [ManifestError] * 3
    expected = r"from 0 to 5 for each of the 9 images in .*, found 2 without one and 1 with one outside; make a"
    for error in raised:
        with pytest.raises(ManifestError, match=expected):
            raise error
    with pytest.raises(ManifestError, match="found 2 without one and 0 with one outside"):
        check_labels(manifest, 10)


def test_a_failing_store_stops_the_evaluation(world, manifest, monkeypatch):
    outage = ImageError("fetch", "storage_error", "the store failed on 's3://bucket/a.jpg'")
    monkeypatch.setattr(module, "read_shard", lambda *args, **options: iter([outage] * 8))
    network = network_of(world).train()
    with pytest.raises(StorageError, match=r"the store failed on 's3://bucket/a.jpg'; .* run it again later"):
        evaluate(network, manifest, SETUP)
    assert network.training


def test_a_vanished_folder_is_no_result(world, manifest, monkeypatch):
    gone = ImageError("fetch", "not_found", "found none")
    monkeypatch.setattr(module, "read_shard", lambda shard, images, **options: iter([gone] * len(images)))
    with pytest.raises(RunError, match=r"none of its 30 could be used \(rank 0: {'fetch/not_found': 30}\)"):
        evaluate(network_of(world), manifest, SETUP)


def test_a_set_of_which_too_much_is_unusable_has_no_figures(world, manifest):
    evaluate(network_of(world), manifest, replace(SETUP, max_error_rate=0.1))
    with pytest.raises(RunError, match=r"at most 9% of the 30 images .* to be unusable \(max_error_rate, .*\), 3 are"):
        evaluate(network_of(world), manifest, replace(SETUP, max_error_rate=0.09))


def test_an_image_that_the_network_answers_with_nan_is_an_error_and_not_a_wrong_answer(world, tmp_path):
    manifest = drawn(tmp_path, [(40, 40)] * 6)
    network = network_of(world)

    def spoil_the_first(_module, _inputs, output):
        logits = output[0].clone()
        logits[0] = math.nan
        return logits, output[1]

    network.register_forward_hook(spoil_the_first)
    outcome = evaluate(network, manifest, SETUP)  # shards of 5 and 1 in batches of 4: three of them
    assert (outcome.counts.num_images, outcome.counts.num_errors) == (3, 3)
    assert {(error.stage, error.error) for error in outcome.errors} == {("predict", "not_finite")}
    assert math.isfinite(outcome.counts.loss)
    assert len(outcome.hardest) == 3


def test_with_fewer_than_five_classes_all_are_among_the_best_five(tmp_path):
    manifest = write_two_classes(tmp_path)
    counts = evaluate(build("cifar_resnet8", 2), manifest, SETUP).counts
    assert (counts.top5_accuracy, counts.confusion.by_truth().tolist()) == (1.0, [2, 1])


def test_of_twenty_thousand_classes_only_what_was_answered_takes_memory(manifest):
    network = build("cifar_resnet8", 20_000)
    peak = traced_peak(lambda: evaluate(network, manifest, SETUP))
    assert peak < 100e6  # a matrix of the classes is 3,200e6


def write_two_classes(root) -> Manifest:
    for index, name in enumerate(["circle", "cross", "circle"]):
        path = root / "images" / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(name, random.Random(index)).save(path)
    return list_images(root / "images", root / "manifest", shard_size=2)
