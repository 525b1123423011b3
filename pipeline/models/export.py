"""A bundle's network for other runtimes: PyTorch's ExportedProgram and ONNX, checked against the network they are of.

    <bundle>/exports/model.pt2     torch.export.load
    <bundle>/exports/model.onnx    ONNX Runtime and others; needs the packages onnxscript and onnxruntime

Input: images float32 N×3×S×S, prepared and normalised as the bundle says, S its crop size, any N. Outputs: logits and
embedding, as the network's `forward`.
"""

import io
import tempfile
import warnings
from pathlib import Path
from typing import Literal, get_args

import torch

from pipeline.errors import BundleError, ConfigError
from pipeline.models.catalog import Network

ExportFormat = Literal["torch_export", "onnx"]
EXPORT_FILES: dict[ExportFormat, str] = {"torch_export": "model.pt2", "onnx": "model.onnx"}
assert set(EXPORT_FILES) == set(get_args(ExportFormat))

_TOLERANCE = 1e-4  # of the largest output: kernels may sum in another order
_CHECKED_BATCHES = (1, 3)


def export(network: Network, crop_size: int, wanted: ExportFormat) -> bytes:
    """The network, on the CPU and in eval mode, as a file of the `wanted` format.

    Raises BundleError where what was exported answers otherwise than the network, or cannot be exported; ConfigError
    where a package is missing.
    """
    example = torch.zeros(2, 3, crop_size, crop_size)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecations
            program = torch.export.export(network, (example,), dynamic_shapes=dynamic)
            data = _to_pt2(program) if wanted == "torch_export" else _to_onnx(program)
    except ImportError as error:
        raise ConfigError(f"export: {wanted} needs a package that is not installed ({error}); install it") from error
    except Exception as error:  # the exporters have no base of their own
        raise BundleError(f"export: the network cannot be exported as {wanted}: {error}") from error
    for size in _CHECKED_BATCHES:
        _refuse_difference(network, data, torch.randn(size, *example.shape[1:]), wanted)
    return data


def _to_pt2(program: torch.export.ExportedProgram) -> bytes:
    data = io.BytesIO()
    torch.export.save(program, data)
    return data.getvalue()


def _to_onnx(program: torch.export.ExportedProgram) -> bytes:
    with tempfile.TemporaryDirectory(prefix="onnx-") as folder:
        path = Path(folder, "model.onnx")
        exported = torch.onnx.export(
            program, input_names=["images"], output_names=["logits", "embedding"], verbose=False
        )
        assert exported is not None
        exported.save(path, external_data=False)
        return path.read_bytes()


def _refuse_difference(network: Network, data: bytes, images: torch.Tensor, wanted: ExportFormat) -> None:
    with torch.no_grad():
        expected = network(images)
        got = _run_pt2(data, images) if wanted == "torch_export" else _run_onnx(data, images)
    for name, here, there in zip(("logits", "embedding"), expected, got, strict=True):
        difference = ((here - there).abs().max() / here.abs().max()).item()
        if not difference <= _TOLERANCE:
            raise BundleError(
                f"export: expected {wanted} to give the network's {name} within {_TOLERANCE:g} of the largest, got "
                f"{difference:g} for {len(images)} images"
            )


def _run_pt2(data: bytes, images: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.export.load(io.BytesIO(data)).module()(images))


def _run_onnx(data: bytes, images: torch.Tensor) -> list[torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]
