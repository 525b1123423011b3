"""Networks compiled ahead of time: once, and used only where they agree."""

import gc
import io
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
from pipeline.models.compiled import Agreement
from tests.compiling import target_of


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


def test_an_altered_package_is_not_loaded(bundle_uri, packages):
    record = compiler.ensure(bundle_uri, target_of(bundle_uri))
    storage.write(compiled.package_uri(bundle_uri, record), b"another")
    with pytest.raises(BundleError, match="was altered"):
        compiler.load(bundle_uri, record)


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
