"""One shard from bytes to table files, without Ray."""

import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import storage
from pipeline.data import nvjpeg
from pipeline.data.gpu_loader import GpuDecoder
from pipeline.data.images import decode
from pipeline.data.loader import Batch, LoadLog
from pipeline.data.manifest import Shard
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError, StorageError
from pipeline.inference.commit import Receipt, read_receipts
from pipeline.inference.predictor import Predictor, distinct_preprocessings
from pipeline.inference.shard import decode_batches, fetch_shard, load_shard, predict_shard
from pipeline.models.bundle import Bundle, load_network
from pipeline.tables import open_table
from tests.manifests import uris_of
from tests.worlds import make_bundle, plan_of, run_without_ray


def table(run, name: str) -> list[dict]:
    whole = open_table(storage.join(run.output_uri, name), run.run_id).to_table()
    return whole.drop_columns(["run_id"]).to_pylist()


def test_every_image_is_in_exactly_one_of_predictions_and_errors_in_manifest_order(world):
    run = run_without_ray(world, run_id="order")
    predicted = [row["uri"] for row in table(run, "predictions")]
    failed = [row["uri"] for row in table(run, "errors")]
    listed = uris_of(plan_of(world, run_id="order").manifest)
    assert len(failed) == 3
    assert predicted == [uri for uri in listed if uri not in failed]
    assert failed == [uri for uri in listed if uri not in predicted]


def test_predictions_are_what_the_network_says_of_the_image(world):
    run = run_without_ray(world, run_id="truth", tables={"names": ["predictions", "embeddings"], "top_k": 2})
    network = load_network(run.models[0].uri)
    preprocessing = Preprocessing(resize_size=32, crop_size=32)
    for row, embedded in zip(table(run, "predictions"), table(run, "embeddings"), strict=True):
        pixels = preprocessing.apply(decode(storage.read(row["uri"]), max_pixels=10**6))
        with torch.inference_mode():
            logits, embedding = network(preprocessing.normalise(pixels[None]))
        scores, label_ids = logits.softmax(1)[0].topk(2)
        assert (row["uri"], row["label_id"]) == (embedded["uri"], label_ids[0])
        assert row["topk_label_ids"] == label_ids.tolist()
        np.testing.assert_allclose(row["topk_scores"], scores, rtol=1e-4)
        np.testing.assert_allclose(embedded["embedding"], embedding[0], rtol=1e-3, atol=1e-5)


def test_several_models_share_a_pass_and_stand_side_by_side(world):
    both = run_without_ray(world, run_id="both", bundles=["tiny", "other"])
    alone = run_without_ray(world, run_id="alone", bundles=["other"])
    rows = table(both, "predictions")
    assert [row["model"] for row in rows] == ["tiny/1", "other/1"] * (len(rows) // 2)
    assert [row["uri"] for row in rows[::2]] == [row["uri"] for row in rows[1::2]]
    assert [row["score"] for row in rows[1::2]] == [row["score"] for row in table(alone, "predictions")]


def test_embeddings_have_the_type_and_length_asked_for(world):
    options = {"names": ["embeddings"], "embedding_type": "float16", "l2_normalise": True}
    run = run_without_ray(world, run_id="unit", tables=options)
    dataset = open_table(storage.join(run.output_uri, "embeddings"), "unit")
    assert str(dataset.schema.field("embedding").type.value_type) == "halffloat"
    norms = [np.linalg.norm(np.array(row["embedding"], np.float32)) for row in dataset.to_table().to_pylist()]
    np.testing.assert_allclose(norms, 1, atol=2e-3)
    assert not (world / "tables" / "predictions" / "run_id=unit").exists()


def test_writing_a_shard_twice_writes_the_same_bytes(world):
    first = run_without_ray(world, run_id="twice")
    files = {path: path.read_bytes() for path in world.glob("tables/*/run_id=twice/*.parquet")}
    for commit in world.glob("tables/_runs/twice/commits/*.json"):
        commit.unlink()
    assert run_without_ray(world, run_id="twice") == first
    assert files
    assert all(path.read_bytes() == data for path, data in files.items())


def test_lineage_names_bundles_preprocessing_manifest_and_software(world):
    run = run_without_ray(world, run_id="lineage")
    metadata = open_table(storage.join(run.output_uri, "predictions"), "lineage").schema.metadata
    assert set(metadata) >= {b"manifest_digest", b"models", b"preprocessing", b"embedding_size", b"software"}
    assert run.models[0].digest in metadata[b"models"].decode()


@pytest.mark.parametrize(("decode", "has_triton"), [("cpu", False), ("gpu", True)])
def test_lineage_names_what_resizes_on_gpus_where_it_does(world, monkeypatch, decode, has_triton):
    monkeypatch.setattr(nvjpeg, "require", lambda *args: None)
    plan = plan_of(world)
    predictor = Predictor(plan.run.model_copy(update={"decode": decode}), plan.manifest)
    assert ("triton" in json.loads(predictor.software)) == has_triton


@pytest.mark.parametrize(("reduced_decode", "shrink_to"), [(None, None), (2, 64), (4, 128)])
def test_large_jpegs_are_reduced_as_far_as_the_config_says(world, reduced_decode, shrink_to):
    run = plan_of(world, run_id=f"reduced-{reduced_decode}", images={"reduced_decode": reduced_decode}).run
    file = io.BytesIO()
    Image.effect_noise((400, 300), 60).convert("RGB").save(file, "JPEG")
    preprocessing = Preprocessing(resize_size=32, crop_size=32)
    options = {"num_threads": 1, "isolated": False, "log": LoadLog()}
    [batch] = decode_batches(run, [file.getvalue()], [preprocessing], **options)
    decoded = decode(file.getvalue(), max_pixels=10**6, shrink_to=shrink_to)
    assert decoded.shape[1] == {None: 300, 64: 75, 128: 150}[shrink_to]
    assert torch.equal(batch.pixels[0][0], preprocessing.apply(decoded))


@pytest.mark.parametrize("has_gpu", [True, False])
def test_isolated_decoding_leaves_a_gpu_its_jpegs_and_has_a_child_for_the_rest(world, nvjpeg_on_cpu, has_gpu):
    plan = plan_of(world)
    run, shard = plan.run, next(plan.pending_shards())
    preprocessings = distinct_preprocessings([Bundle.load(run.models[0].uri)])
    decoder = GpuDecoder(torch.device("cpu"), preprocessings, run.images.decode_options(preprocessings))
    encoded = [data for data in fetch_shard(run, plan.manifest, shard) if isinstance(data, bytes)]
    plain = [data for data in encoded if nvjpeg.plain_jpeg(data, max_pixels=10**8)]
    nvjpeg_on_cpu.seen.clear()
    found = {}
    for isolated in (False, True):
        log = LoadLog()
        options = {"num_threads": 1, "isolated": isolated, "log": log, "decoder": decoder if has_gpu else None}
        batches = list(load_shard(run, plan.manifest, shard, preprocessings, **options))
        found[isolated] = (torch.cat([batch.pixels[0] for batch in batches]), repr(sorted(log.errors.items())))
    assert torch.equal(found[False][0], found[True][0])
    assert found[False][1] == found[True][1]
    assert sorted(nvjpeg_on_cpu.seen) == sorted(2 * plain if has_gpu else [])


def test_a_network_that_answers_nan_makes_error_rows(world, monkeypatch):
    plan = plan_of(world, run_id="nan")
    predictor = Predictor(plan.run, plan.manifest)
    nan = torch.full((plan.run.batch_size, 8), float("nan"))
    monkeypatch.setattr(predictor, "_programs", [lambda pixels: (nan[: len(pixels)], nan[: len(pixels)])])
    shard = next(plan.pending_shards())
    batch = Batch(list(range(shard.num_images)), [torch.zeros(shard.num_images, 3, 32, 32, dtype=torch.uint8)])
    receipt = predict_shard(plan.run, plan.manifest, shard, [batch], predictor, log=LoadLog())
    assert (receipt.num_predicted, receipt.errors) == (0, {"predict/not_finite": shard.num_images})


def test_a_failing_store_stops_the_run_instead_of_filling_the_errors_table(world, monkeypatch):
    outage = ImageError("fetch", "storage_error", "503 Slow Down")
    monkeypatch.setattr("pipeline.inference.config.read_shard", lambda *args, **options: iter([outage] * 8))
    plan = plan_of(world, images={"max_storage_errors": 7})
    shard = next(plan.pending_shards())
    options = {"num_threads": 1, "isolated": False, "log": LoadLog()}
    with pytest.raises(StorageError, match=r"at most 7 images lost to a failing store.*503 Slow Down"):
        list(load_shard(plan.run, plan.manifest, shard, [], **options))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("not_found", "Is the folder mounted"),
        ("access_denied", "Is the key valid"),
        ("changed", "written anew after their manifest"),
        ("not_allowed", r"Do images\.allowed_roots name where they lie"),
    ],
)
def test_a_shard_that_is_lost_whole_stops_the_run_unless_that_is_accepted(world, monkeypatch, kind, told):
    gone = ImageError("fetch", kind, "it is not as the manifest says")
    monkeypatch.setattr("pipeline.inference.config.read_shard", lambda *args, **options: iter([gone] * 8))
    refusing, accepting = plan_of(world), plan_of(world, images={"accept_lost_shards": True})
    shard = next(refusing.pending_shards())
    with pytest.raises(StorageError, match=rf"none of its 8 images can be fetched.*{told}"):
        list(load_shard(refusing.run, refusing.manifest, shard, [], num_threads=1, isolated=False, log=LoadLog()))
    log = LoadLog()
    assert list(load_shard(accepting.run, accepting.manifest, shard, [], num_threads=1, isolated=False, log=log)) == []
    assert len(log.errors) == 8


@pytest.fixture
def threads_put_back() -> Iterator[None]:
    """Torch has as many threads afterwards as before."""
    kept = torch.get_num_threads()
    yield
    torch.set_num_threads(kept)


def test_the_last_bits_of_a_deep_net_depend_on_the_recorded_threads_alone(world, threads_put_back):
    make_bundle(world / "registry", name="deep", architecture="resnet18")
    first = run_without_ray(world, run_id="threads-1", bundles=["deep"])
    torch.set_num_threads(1)
    again = run_without_ray(world, run_id="threads-2", bundles=["deep"])
    assert table(first, "predictions") == table(again, "predictions")


def test_two_shards_at_once_give_the_bytes_and_take_the_turns_of_one_after_the_other(world, threads_put_back):
    make_bundle(world / "registry", name="wide", architecture="resnet18")
    run_without_ray(world, run_id="one-by-one", bundles=["wide"])
    plan = plan_of(world, run_id="one-by-one", bundles=["wide"])
    predictor = Predictor(plan.run, plan.manifest)

    def work(shard: Shard) -> Receipt:
        log = LoadLog()
        options = {"num_threads": 2, "isolated": False, "log": log}
        batches = load_shard(plan.run, plan.manifest, shard, predictor.preprocessings, **options)
        return predict_shard(plan.run, plan.manifest, shard, batches, predictor, log=log)

    start = time.perf_counter()
    torch.set_num_threads(1)  # a new thread's too, until told otherwise
    with ThreadPoolExecutor(2) as threads:
        receipts = list(threads.map(work, plan.manifest.shards()))
    took_s = time.perf_counter() - start
    committed = read_receipts(plan.run.uri, {receipt.shard_id for receipt in receipts})
    assert [receipt.files for receipt in receipts] == [receipt.files for receipt in committed]
    assert 0 < sum(receipt.seconds["total"] for receipt in receipts) <= took_s + 0.01
