"""Networks in 8-bit integers: quantised before they are compiled, fitted to images, measured on others."""

import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from pipeline.data.transforms import Preprocessing
from pipeline.errors import BundleError
from pipeline.models import compiler, int8
from pipeline.models.bundle import Bundle
from pipeline.models.catalog import Network
from pipeline.models.compiled import Target
from tests.worlds import make_bundle

CPU = torch.device("cpu")
needs_avx2 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="this CPU has no AVX2")


class Block(nn.Module):
    """A residual block as He et al.'s are written: one ReLU, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.relu(images + self.second(self.relu(self.first(images))))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval()


@needs_avx2
def test_what_is_quantised_is_near_what_it_was_and_not_the_same(block):
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        ours, theirs = int8.quantised(block, [images, images.flip(3)])(images), block(images)
    difference = float((ours - theirs).abs().mean() / theirs.abs().mean())
    assert 0 < difference < 0.05


@needs_avx2
def test_every_convolution_becomes_one_of_integers(block):
    with torch.no_grad():
        graph = int8.quantised(block, [torch.randn(2, 3, 8, 8)]).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("dequantize_per_channel" in name for name in called) == 2  # the weights
    assert sum(".quantize_per_tensor" in name for name in called) >= 2  # what goes into them


@needs_avx2
@pytest.mark.parametrize(("has_vnni", "largest"), [(True, 128), (False, 64)])
def test_weights_have_seven_bits_where_sums_of_two_products_have_sixteen(block, monkeypatch, has_vnni, largest):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    with torch.no_grad():
        converted = int8.quantised(block, [torch.randn(2, 3, 8, 8)])
    weights = [buffer for buffer in converted.buffers() if buffer.dtype == torch.int8]
    assert len(weights) == 2
    assert largest - 1 <= max(int(weight.int().abs().max()) for weight in weights) <= largest


def test_a_cpu_without_its_instructions_is_told(block, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    with pytest.raises(BundleError, match="expected an x86 CPU with AVX2"):
        int8.quantised(block, [torch.zeros(1, 3, 8, 8)])


def test_a_missing_torchao_is_told(block, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(BundleError, match=r"int8 needs the package torchao to compile .*install it"):
        int8.quantised(block, [torch.zeros(1, 3, 8, 8)])


def test_without_images_there_are_no_ranges(tmp_path):
    uri = make_bundle(tmp_path)
    target = compiler.target_here(Bundle.load(uri), CPU, "int8", batch_size=4, num_threads=1)
    with pytest.raises(BundleError, match="at least 32 images to measure ranges on and try it with, got 0"):
        compiler.ensure(uri, target)


@pytest.mark.slow
@needs_avx2
def test_it_is_compiled_and_agrees_on_images_that_it_was_not_fitted_to(tmp_path):
    uri = make_bundle(tmp_path)
    target = compiler.target_here(Bundle.load(uri), CPU, "int8", batch_size=4, num_threads=1)
    record = compiler.ensure(uri, target, lambda: compiler.draw_samples(32, 35))
    assert record.agreement.num_images == 17
    assert 0.99 < record.agreement.cosine < 1
    program, pixels = compiler.load(uri, record), compiler.draw_samples(32, 4)
    with torch.inference_mode():
        logits, embeddings = program(pixels)
        alone, _ = program(pixels[:1])
    assert (logits.dtype, embeddings.dtype, len(alone)) == (torch.float32, torch.float32, 1)
    torch.testing.assert_close(alone, logits[:1])


@pytest.mark.slow
@needs_avx2
def test_sums_of_the_largest_products_are_right():
    convolution = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    nn.init.ones_(convolution.weight)  # as large as they get in integers, like the white image they are put on
    classifier = OrderedDict(convolution=convolution, relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    network = Network(nn.Sequential(classifier | {"head": nn.Linear(16, 2)}), "head").eval()
    preprocessing = Preprocessing(resize_size=32, crop_size=32, mean=(0, 0, 0), std=(1, 1, 1))
    target = Target(
        bundle_digest="0" * 64,
        device="cpu",
        device_kind={},
        precision="int8",
        batch_size=2,
        crop_size=32,
        num_threads=1,
    )
    white = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    program = compiler._open(compiler.compile_network(network, preprocessing, target, white), target)
    with torch.inference_mode():
        (_, embeddings), (_, expected) = program(white), network(preprocessing.normalise(white))
    torch.testing.assert_close(embeddings, expected, rtol=0.02, atol=0)


def test_ranges_are_of_images_alone_however_many_there_are():
    pixels = torch.arange(1, 6, dtype=torch.uint8).reshape(5, 1, 1, 1)
    assert compiler._repeated(pixels, 4).flatten().tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert compiler._repeated(pixels, 5).flatten().tolist() == [1, 2, 3, 4, 5]
