"""What is exported answers as the network does."""

import io

import pytest
import torch

from pipeline.errors import BundleError
from pipeline.models import export as exporting
from pipeline.models.catalog import build
from pipeline.models.export import export


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build("cifar_resnet8", 10).eval()


def test_an_exported_program_answers_as_the_network_for_any_number_of_images(network):
    program = torch.export.load(io.BytesIO(export(network, 32, "torch_export"))).module()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        for here, there in zip(network(images), program(images), strict=True):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_onnx_file_answers_as_the_network_for_any_number_of_images(network):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(export(network, 32, "onnx"))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        for here, there in zip(
            network(images), session.run(["logits", "embedding"], {"images": images.numpy()}), strict=True
        ):
            torch.testing.assert_close(here, torch.from_numpy(there), rtol=1e-4, atol=1e-5)


def test_an_export_that_answers_otherwise_is_refused(network, monkeypatch):
    monkeypatch.setattr(exporting, "_run_pt2", lambda data, images: [output + 1 for output in network(images)])
    with pytest.raises(BundleError, match="expected torch_export to give the network's logits within"):
        export(network, 32, "torch_export")
