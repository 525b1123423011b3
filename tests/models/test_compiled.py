"""Compiled networks beside their bundle: found only where they fit."""

import json

import pytest
import torch

from pipeline import storage
from pipeline.errors import BundleError
from pipeline.models import compiled, compiler
from pipeline.models.bundle import Bundle
from pipeline.models.compiled import Agreement
from pipeline.models.precision import AgreementLimits
from tests.compiling import target_of


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"batch_size": 5}, {"num_threads": 2}])
def test_what_was_compiled_for_another_target_is_never_found(bundle_uri, packages, change):
    compiler.ensure(bundle_uri, target_of(bundle_uri))
    assert compiled.find(bundle_uri, target_of(bundle_uri)) is not None
    assert compiled.find(bundle_uri, target_of(bundle_uri, **change)) is None


@pytest.mark.parametrize(
    "other", [{"software": {"torch": "1"}}, {"device_kind": {"cpu_name": "another"}}, {"bundle_digest": "0" * 64}]
)
def test_neither_is_what_other_software_hardware_or_weights_left(bundle_uri, packages, other):
    here = target_of(bundle_uri)
    compiler.ensure(bundle_uri, here.model_copy(update=other))
    assert compiled.find(bundle_uri, here) is None


def test_what_was_compiled_for_a_gpu_is_not_found_on_a_host_of_another_kind(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    kinds = []
    for has in ("AVX512", "AVX2"):
        monkeypatch.setattr(compiler, "_kind_of_cpu", lambda has=has: {"has": has})
        kinds.append(compiler._kind_of(torch.device("cuda")))
    assert kinds[0] != kinds[1]
    assert kinds[0] == {**kinds[1], "host": {"has": "AVX512"}}


def test_a_run_knows_for_how_many_threads_its_bundle_was_compiled(bundle_uri, packages):
    digest = Bundle.load(bundle_uri).digest

    def threads(device="cpu", precision="auto", batch_size=4):
        return compiled.recorded_threads(bundle_uri, digest, device, precision, batch_size=batch_size)

    assert threads() == set()
    compiler.ensure(bundle_uri, target_of(bundle_uri))
    assert threads() == threads(precision="float32") == {1}
    assert threads(batch_size=5) == threads("cuda") == threads(precision="int8") == set()


def test_what_was_compiled_in_integers_is_not_what_auto_looks_for(bundle_uri, packages):
    digest = Bundle.load(bundle_uri).digest
    target = target_of(bundle_uri, precision="int8")
    compiler.ensure(bundle_uri, target, lambda: compiler.draw_samples(target.crop_size, 32))
    assert compiled.recorded_threads(bundle_uri, digest, "cpu", "int8", batch_size=4) == {1}
    assert compiled.recorded_threads(bundle_uri, digest, "cpu", "auto", batch_size=4) == set()


def test_a_record_of_other_software_that_knows_more_is_no_record_here(bundle_uri, packages):
    record = compiler.ensure(bundle_uri, target_of(bundle_uri))
    storage.write(storage.join(bundle_uri, "compiled", "newer.json"), b'{"target": {"something": "new"}}')
    assert list(compiled.records(bundle_uri)) == [record]


def test_the_limits_are_those_of_who_uses_it():
    agreement = Agreement.of(num_images=8, num_same=7, sum_of_cosines=7.99)
    assert agreement.fault(AgreementLimits(min_top1=0.8, min_cosine=0.99)) is None
    assert "top-1 agreement with float32 of at least 0.9" in str(agreement.fault(AgreementLimits(min_cosine=0.99)))
    assert "a cosine of 0.9999" in str(agreement.fault(AgreementLimits(min_top1=0.8, min_cosine=0.9999)))


def test_embeddings_that_are_no_numbers_agree_with_nothing():
    agreement = Agreement.of(num_images=8, num_same=8, sum_of_cosines=float("nan"))
    assert agreement == Agreement.model_validate_json(agreement.model_dump_json())
    assert agreement.fault(AgreementLimits(min_cosine=0)) is not None


def test_a_damaged_record_is_named(bundle_uri):
    target = target_of(bundle_uri)
    storage.write(compiled.record_uri(bundle_uri, target), json.dumps({"target": 1}).encode())
    with pytest.raises(BundleError, match=r"json is damaged: target"):
        compiled.find(bundle_uri, target)
