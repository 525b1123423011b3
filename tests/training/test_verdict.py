"""The verdict on a bundle: what a rank judges, and the three files that tell of it."""

import json
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.data.decoders import WatchedDecoder
from pipeline.data.manifest import Manifest
from pipeline.data.readers import ReadLimits
from pipeline.errors import ConfigError
from pipeline.models.bundle import Architecture, Bundle
from pipeline.tables import schemas
from pipeline.training import evaluate
from pipeline.training.counts import from_entries
from pipeline.training.evaluate import Setup
from pipeline.training.protocol import Protocol
from pipeline.training.verdict import Verdict, judge_bundle, refuse_scales
from pipeline.training.worker import Worker
from tests.confusions import matrix_of
from tests.worlds import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


@pytest.fixture(scope="module")
def verdict(world) -> Verdict:
    bundle_uri = storage.normalise(str(world / "registry/tiny/1"))
    bundle, manifest = Bundle.load(bundle_uri), Manifest.open(str(world / "manifest"))
    setup = Setup(preprocessing=bundle.preprocessing, batch_size=8, keep_hardest=4)
    outcome, precision = judge_bundle(bundle_uri, manifest.uri, setup, "float32", Worker())
    return Verdict(bundle, bundle_uri, manifest, setup.protocol, precision, outcome)


@pytest.fixture(scope="module")
def output(verdict, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    verdict.write(storage.normalise(str(folder)), "batch_size: 8\n", {"workers": "3"}, ReadLimits())
    return folder


class Shown(HTMLParser):
    """The text of a page, and how many pictures it carries."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.num_jpegs = "", 0
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.num_jpegs += tag == "img" and str(dict(attrs)["src"]).startswith("data:image/jpeg")


def test_a_rank_tells_how_far_it_is(world):
    told: list[dict] = []
    bundle_uri = storage.normalise(str(world / "registry/tiny/1"))
    setup = Setup(preprocessing=Bundle.load(bundle_uri).preprocessing)
    judge_bundle(bundle_uri, str(world / "manifest"), setup, "float32", Worker(observe=told.append))
    assert told == [{"rank": 0, "images": images} for images in (8, 16, 24, 30)]


@pytest.mark.parametrize("begins_again", [False, True])
def test_where_workers_begin_again_images_are_decoded_isolated(world, monkeypatch, begins_again):
    isolations: list[bool] = []

    def guarded(*, isolated: bool) -> WatchedDecoder:
        isolations.append(isolated)
        return WatchedDecoder()

    monkeypatch.setattr(evaluate, "guarded_decoder", guarded)
    bundle_uri = storage.normalise(str(world / "registry/tiny/1"))
    setup = Setup(preprocessing=Bundle.load(bundle_uri).preprocessing)
    worker = Worker(begin=lambda step: begins_again and step == 0)
    judge_bundle(bundle_uri, str(world / "manifest"), setup, "float32", worker)
    assert isolations == [begins_again]


@pytest.mark.parametrize("name", ["vit_b_32", "maxvit_t"])
def test_whole_images_are_not_for_networks_of_one_input_size(verdict, name):
    bundle = verdict.bundle.model_copy(update={"architecture": Architecture(name=name)})
    refuse_scales(bundle, Protocol())
    expected = r"takes images of 224 by 336 pixels, got \w+Error: .*; protocol\.views: .* use one_crop or ten_crop"
    with pytest.raises(ConfigError, match=expected):
        refuse_scales(bundle, Protocol(views="multi_scale"))


def test_scales_that_shrink_to_nothing_are_refused(verdict):
    bundle = verdict.bundle.model_copy(update={"architecture": Architecture(name="alexnet")})
    refuse_scales(bundle, Protocol(views="multi_scale", scales=[64, 224]))
    with pytest.raises(ConfigError, match="takes images of 16 by 24 pixels"):
        refuse_scales(bundle, Protocol(views="multi_scale", scales=[224, 16]))


@pytest.mark.parametrize("name", ["cifar_resnet8", "swin_t", "regnet_y_400mf"])
def test_whole_images_are_for_networks_of_any_input_size(verdict, name):
    refuse_scales(
        verdict.bundle.model_copy(update={"architecture": Architecture(name=name)}), Protocol(views="multi_scale")
    )


def test_bfloat16_is_asked_for_by_name(world, verdict):
    setup = Setup(preprocessing=verdict.bundle.preprocessing, keep_hardest=4)
    rounded, precision = judge_bundle(verdict.bundle_uri, verdict.manifest.uri, setup, "bfloat16", Worker())
    assert precision == "bfloat16"
    assert rounded.counts.loss != verdict.outcome.counts.loss
    assert rounded.counts.loss == pytest.approx(verdict.outcome.counts.loss, rel=0.05)


@pytest.mark.parametrize(("peers", "computed_in"), [("bfloat16", "bfloat16"), ("float32", "float32")])
def test_ranks_that_auto_finds_different_precisions_for_all_compute_in_float32(
    verdict, monkeypatch, peers, computed_in
):
    class OneOfTwo(Worker):
        def gather(self, value):
            return [value, peers] if isinstance(value, str) else [value]

    monkeypatch.setattr("pipeline.training.worker.float_precision", lambda asked, device: "bfloat16")
    setup = Setup(preprocessing=verdict.bundle.preprocessing, keep_hardest=4)
    outcome, precision = judge_bundle(verdict.bundle_uri, verdict.manifest.uri, setup, "auto", OneOfTwo())
    assert precision == computed_in
    assert (outcome.counts.loss == pytest.approx(verdict.outcome.counts.loss, rel=1e-5)) == (precision == "float32")


def test_the_json_has_every_figure(verdict, output):
    told = json.loads((output / "evaluation.json").read_text())
    confusion = from_entries(told["confusion"], len(verdict.bundle.classes))
    assert matrix_of(confusion) == matrix_of(verdict.outcome.counts.confusion)
    assert (told["num_images"], told["num_errors"], told["top1"]) == (27, 3, confusion.right().sum())
    assert told["top1_error"] == (27 - told["top1"]) / 27
    assert told["top5_error"] == (27 - told["top5"]) / 27
    assert [row["class"] for row in told["classes"]] == verdict.bundle.classes
    assert [row["num_images"] for row in told["classes"]] == confusion.by_truth().tolist()
    assert sum(row["top1"] for row in told["classes"]) == told["top1"]
    assert told["protocol"] == "1-crop 32 of 32, bilinear"
    assert (told["bundle"], told["bundle_digest"]) == ("tiny/1", verdict.bundle.digest)
    assert told["manifest_digest"] == verdict.manifest.digest
    assert sum(told["errors_by_kind"].values()) == 3


def test_the_errors_table_lists_what_was_not_judged(verdict, output):
    table = pq.read_table(output / "errors.parquet")
    assert table.schema.equals(schemas.schema("errors"))
    assert table.schema.metadata[b"bundle_digest"].decode() == verdict.bundle.digest
    assert len(verdict.outcome.errors) == 3
    assert table.to_pylist() == [asdict(failed) for failed in verdict.outcome.errors]


def test_the_report_shows_figures_and_hardest_images_and_no_curves(verdict, output):
    shown = Shown((output / "report.html").read_text())
    counts = verdict.outcome.counts
    assert f"{100 * counts.top1_accuracy:.1f} % top-1 on 27 images" in shown.text
    assert f"{counts.top1_error:.2%}" in shown.text
    assert "1-crop 32 of 32, bilinear" in shown.text
    assert "Confusion matrix" in shown.text
    assert "batch_size: 8" in shown.text
    assert "Curves" not in shown.text
    assert shown.num_jpegs == 4


def test_without_errors_the_table_has_no_rows(verdict, tmp_path):
    flawless = replace(verdict, outcome=replace(verdict.outcome, errors=[]), protocol=Protocol(flip=True))
    flawless.write(storage.normalise(str(tmp_path)), "", {}, ReadLimits())
    assert pq.read_table(tmp_path / "errors.parquet").num_rows == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"].endswith("with mirror image")
