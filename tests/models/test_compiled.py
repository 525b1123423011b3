"""Networks compiled ahead of time: found only where they fit, used only where they agree."""

import json
import threading
import time

import pytest
import torch

from pipeline import storage
from pipeline.errors import BundleError
from pipeline.models import compiled
from pipeline.models.bundle import Bundle, load_network
from pipeline.models.compiled import Agreement, Target
from pipeline.models.precision import AgreementLimits
from tests.worlds import make_bundle

CPU = torch.device("cpu")
LIMITS = AgreementLimits()


@pytest.fixture
def bundle_uri(tmp_path):
    return make_bundle(tmp_path)


def target_of(uri: str, **fields) -> Target:
    options = {"precision": "float32", "batch_size": 4, "num_threads": 1, **fields}
    return Target.here(Bundle.load(uri), CPU, **options)


@pytest.fixture
def asked(monkeypatch):
    """The targets that a compiler was asked for which takes a moment and makes nothing."""
    targets = []

    def compile_network(network, preprocessing, target):
        targets.append(target)
        time.sleep(0.2)
        return b"package"

    monkeypatch.setattr(compiled, "compile_network", compile_network)
    monkeypatch.setattr(compiled, "_open", lambda package, target: None)
    monkeypatch.setattr(compiled, "measure_agreement", lambda *_: Agreement(num_images=8, top1=1, cosine=1))
    return targets


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"batch_size": 5}, {"num_threads": 2}])
def test_what_was_compiled_for_another_target_is_never_found(bundle_uri, asked, change):
    compiled.ensure(bundle_uri, target_of(bundle_uri), None, LIMITS)
    assert compiled.find(bundle_uri, target_of(bundle_uri)) is not None
    assert compiled.find(bundle_uri, target_of(bundle_uri, **change)) is None


@pytest.mark.parametrize(
    "other", [{"software": {"torch": "1"}}, {"device_kind": {"cpu_name": "another"}}, {"bundle_digest": "0" * 64}]
)
def test_neither_is_what_other_software_hardware_or_weights_left(bundle_uri, asked, other):
    here = target_of(bundle_uri)
    compiled.ensure(bundle_uri, here.model_copy(update=other), None, LIMITS)
    assert compiled.find(bundle_uri, here) is None


def test_a_bundle_is_compiled_once_however_many_ask_at_once(bundle_uri, asked):
    target, found = target_of(bundle_uri), []
    threads = [
        threading.Thread(target=lambda: found.append(compiled.ensure(bundle_uri, target, None, LIMITS)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
    assert [record.refused for record in found] == [None] * 3
    names = {info.uri.rpartition(".")[2] for info in storage.list_objects(storage.join(bundle_uri, "compiled"))}
    assert names == {"json", "pt2"}


def test_a_claim_whose_owner_died_is_taken_over(bundle_uri, asked):
    target = target_of(bundle_uri)
    storage.write(storage.join(bundle_uri, "compiled", f"{target.key}.claim"), str(time.time() - 10_000).encode())
    assert compiled.ensure(bundle_uri, target, None, LIMITS).refused is None


def test_what_agrees_too_little_is_refused_once_and_for_all(bundle_uri, asked, monkeypatch):
    monkeypatch.setattr(compiled, "measure_agreement", lambda *_: Agreement(num_images=8, top1=0.5, cosine=1))
    target = target_of(bundle_uri)
    refusals = {compiled.ensure(bundle_uri, target, None, LIMITS).refused for _ in range(2)}
    assert len(asked) == len(refusals) == 1
    assert "top-1 agreement with float32 of at least 0.9" in str(refusals)
    assert not storage.exists(compiled.package_uri(bundle_uri, target))


def test_a_compiler_that_fails_leaves_a_record_of_why(bundle_uri, monkeypatch):
    def fail(*_):
        raise RuntimeError("no C++ compiler\nand a traceback")

    monkeypatch.setattr(compiled, "compile_network", fail)
    assert compiled.ensure(bundle_uri, target_of(bundle_uri), None, LIMITS).refused == "RuntimeError: no C++ compiler"


def test_an_altered_package_is_not_loaded(bundle_uri, asked):
    target = target_of(bundle_uri)
    record = compiled.ensure(bundle_uri, target, None, LIMITS)
    storage.write(compiled.package_uri(bundle_uri, target), b"another")
    with pytest.raises(BundleError, match="was altered"):
        compiled.load(bundle_uri, record)


def test_a_damaged_record_is_named(bundle_uri):
    target = target_of(bundle_uri)
    storage.write(storage.join(bundle_uri, "compiled", f"{target.key}.json"), json.dumps({"target": 1}).encode())
    with pytest.raises(BundleError, match=r"json is damaged: target"):
        compiled.find(bundle_uri, target)


def test_drawn_samples_are_the_same_everywhere_and_unlike_each_other():
    samples = compiled.draw_samples(32, 6)
    assert torch.equal(samples, compiled.draw_samples(32, 6))
    assert len({int(sample.int().sum()) for sample in samples}) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_a_compiled_network_answers_as_the_eager_one_for_any_number_of_images(bundle_uri, precision, tolerance):
    record = compiled.ensure(bundle_uri, target_of(bundle_uri, precision=precision), None, LIMITS)
    assert record.refused is None
    assert record.agreement is not None
    assert record.agreement.cosine > 0.999
    program, bundle, network = compiled.load(bundle_uri, record), Bundle.load(bundle_uri), load_network(bundle_uri)
    pixels = compiled.draw_samples(32, 4)
    with torch.inference_mode():
        expected = network(bundle.preprocessing.normalise(pixels))
        for num_images in (4, 1):
            for ours, theirs in zip(program(pixels[:num_images]), expected, strict=True):
                scale = float(theirs.abs().max())
                torch.testing.assert_close(ours, theirs[:num_images], rtol=0, atol=tolerance * scale)
