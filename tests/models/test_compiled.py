"""Networks compiled ahead of time: found only where they fit, used only where they agree."""

import gc
import io
import json
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.errors import BundleError
from pipeline.models import compiled, compiler
from pipeline.models.bundle import Bundle, load_network
from pipeline.models.compiled import Agreement, Target
from pipeline.models.precision import AgreementLimits
from tests.worlds import make_bundle

CPU = torch.device("cpu")


@pytest.fixture
def bundle_uri(tmp_path):
    return make_bundle(tmp_path)


def target_of(uri: str, **fields) -> Target:
    options = {"precision": "float32", "batch_size": 4, "num_threads": 1, **fields}
    return compiler.target_here(Bundle.load(uri), CPU, **options)


@pytest.fixture
def packages(monkeypatch):
    """What a compiler makes that makes nothing: a new package each time it is asked."""
    made = []

    def compile_network(network, preprocessing, target, pixels):
        made.append(f"package {len(made)}".encode())
        return made[-1]

    monkeypatch.setattr(compiler, "compile_network", compile_network)
    monkeypatch.setattr(compiler, "_open", lambda package, target: None)
    monkeypatch.setattr(compiler, "measure_agreement", lambda *_: Agreement.of(8, 8, 8.0))
    return made


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


def test_of_several_on_a_machine_one_compiles_and_the_others_wait_for_it(bundle_uri, packages, monkeypatch):
    def compile_slowly(*arguments):
        time.sleep(0.2)
        return compile_network(*arguments)

    compile_network = compiler.compile_network
    monkeypatch.setattr(compiler, "compile_network", compile_slowly)
    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(lambda _: compiler.ensure(bundle_uri, target_of(bundle_uri)), range(4)))
    assert len(packages) == 1
    assert records == [records[0]] * 4


def test_of_several_who_compile_at_once_the_first_to_end_is_right(bundle_uri, packages, monkeypatch):
    target, done = target_of(bundle_uri), []

    def compile_behind_anothers_back(*arguments):
        if not done:
            done.append(None)
            done.append(compiler.ensure(bundle_uri, target))
        return compile_network(*arguments)

    compile_network = compiler.compile_network
    monkeypatch.setattr(compiler, "compile_network", compile_behind_anothers_back)
    monkeypatch.setattr(compiler, "alone_on_this_machine", nullcontext)  # of another machine
    assert compiler.ensure(bundle_uri, target) == done[1]
    assert len(packages) == 2
    compiler.load(bundle_uri, done[1])


def test_what_is_compiled_already_is_not_compiled_again(bundle_uri, packages):
    records = [compiler.ensure(bundle_uri, target_of(bundle_uri)) for _ in range(3)]
    assert records[0] == records[1] == records[2]
    assert len(packages) == 1


def test_an_agreement_on_drawn_pictures_is_measured_anew_on_real_ones(bundle_uri, packages, monkeypatch):
    target = target_of(bundle_uri)
    drawn = compiler.ensure(bundle_uri, target)
    real = torch.zeros(5, 3, target.crop_size, target.crop_size, dtype=torch.uint8)
    assert drawn.is_drawn
    assert not compiler.ensure(bundle_uri, target_of(bundle_uri, batch_size=5), lambda: real).is_drawn
    monkeypatch.setattr(compiler, "measure_agreement", lambda *given: Agreement.of(len(given[-1]), 3, 4.5))
    measured = compiler.measure_anew(bundle_uri, drawn, lambda: real)
    assert (measured.agreement.num_images, measured.agreement.top1, measured.is_drawn) == (5, 0.6, False)
    assert measured.package_digest == drawn.package_digest
    assert compiled.find(bundle_uri, target) == compiler.ensure(bundle_uri, target) == measured


def test_a_compiler_that_fails_says_why_and_leaves_nothing(bundle_uri, monkeypatch):
    def fail(*_):
        raise RuntimeError("no C++ compiler\nand a traceback")

    monkeypatch.setattr(compiler, "compile_network", fail)
    with pytest.raises(BundleError, match=r"does not compile here: RuntimeError: no C\+\+ compiler$"):
        compiler.ensure(bundle_uri, target_of(bundle_uri))
    assert list(storage.list_objects(storage.join(bundle_uri, "compiled"))) == []


def test_a_registry_that_takes_no_writes_is_told(bundle_uri, packages):
    storage.write(storage.join(bundle_uri, "compiled"), b"a file where a folder should be")
    with pytest.raises(BundleError, match=r"run jobs\.compile as one who may write"):
        compiler.ensure(bundle_uri, target_of(bundle_uri))


def test_the_limits_are_those_of_who_uses_it():
    agreement = Agreement.of(num_images=8, num_same=7, sum_of_cosines=7.99)
    assert agreement.fault(AgreementLimits(min_top1=0.8, min_cosine=0.99)) is None
    assert "top-1 agreement with float32 of at least 0.9" in str(agreement.fault(AgreementLimits(min_cosine=0.99)))
    assert "a cosine of 0.9999" in str(agreement.fault(AgreementLimits(min_top1=0.8, min_cosine=0.9999)))


def test_embeddings_that_are_no_numbers_agree_with_nothing():
    agreement = Agreement.of(num_images=8, num_same=8, sum_of_cosines=float("nan"))
    assert agreement == Agreement.model_validate_json(agreement.model_dump_json())
    assert agreement.fault(AgreementLimits(min_cosine=0)) is not None


def test_an_altered_package_is_not_loaded(bundle_uri, packages):
    record = compiler.ensure(bundle_uri, target_of(bundle_uri))
    storage.write(compiled.package_uri(bundle_uri, record), b"another")
    with pytest.raises(BundleError, match="was altered"):
        compiler.load(bundle_uri, record)


def test_a_damaged_record_is_named(bundle_uri):
    target = target_of(bundle_uri)
    storage.write(compiled.record_uri(bundle_uri, target), json.dumps({"target": 1}).encode())
    with pytest.raises(BundleError, match=r"json is damaged: target"):
        compiled.find(bundle_uri, target)


def test_drawn_samples_are_the_same_everywhere_and_unlike_each_other():
    samples = compiler.draw_samples(32, 6)
    assert torch.equal(samples, compiler.draw_samples(32, 6))
    assert len({int(sample.int().sum()) for sample in samples}) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_a_compiled_network_answers_as_the_eager_one_for_any_number_of_images(bundle_uri, precision, tolerance):
    record = compiler.ensure(bundle_uri, target_of(bundle_uri, precision=precision))
    assert record.agreement.cosine > 0.999
    program, bundle, network = compiler.load(bundle_uri, record), Bundle.load(bundle_uri), load_network(bundle_uri)
    pixels = compiler.draw_samples(32, 4)
    with torch.inference_mode():
        expected = network(bundle.preprocessing.normalise(pixels))
        for num_images in (4, 1):
            for ours, theirs in zip(program(pixels[:num_images]), expected, strict=True):
                scale = float(theirs.abs().max())
                torch.testing.assert_close(ours, theirs[:num_images], rtol=0, atol=tolerance * scale)


class LoaderOfFiles:
    """Torch 2.11's: of a folder it says what it says of any file that is no archive."""

    def __init__(self, path: str, *_: object) -> None:
        if not zipfile.is_zipfile(path):
            raise RuntimeError("Failed to initialize zip archive: failed finding central directory")

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [inputs[0].float().mean((2, 3)), inputs[0].float()]


def test_a_package_opens_where_the_loader_takes_no_folder_and_other_refusals_are_told(bundle_uri, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as package:
        package.writestr("data/model.so", b"native code")
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", LoaderOfFiles)
    program = compiler._open(archive.getvalue(), target_of(bundle_uri))
    assert program(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))[0].shape == (2, 3)

    def refuse(*_: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", refuse)
    with pytest.raises(RuntimeError, match="no kernel image"):
        compiler._open(archive.getvalue(), target_of(bundle_uri))


def test_a_gpus_kernels_are_there_for_as_long_as_the_program_and_no_longer(bundle_uri, monkeypatch):
    folders: list[Path] = []

    class LoaderOfKernels:
        """A GPU's: the library is mapped at once, a kernel is read from its file when it is first called."""

        def __init__(self, folder: str, *_: object) -> None:
            folders.append(Path(folder, "data"))
            assert (folders[0] / "model.so").exists()

        def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            assert (folders[0] / "kernel.cubin").read_bytes() == b"kernel"
            return [inputs[0].float().mean((2, 3)), inputs[0].float()]

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", LoaderOfKernels)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as package:
        package.writestr("data/model.so", b"native code")
        package.writestr("data/kernel.cubin", b"kernel")
    program = compiler._open(archive.getvalue(), target_of(bundle_uri).model_copy(update={"device": "cuda"}))
    assert program(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))[0].shape == (2, 3)
    assert [path.name for path in folders[0].iterdir()] == ["kernel.cubin"]
    del program
    gc.collect()
    assert not folders[0].exists()
