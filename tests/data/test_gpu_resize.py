"""The kernel beside torch's, run by Triton's interpreter where there is no GPU."""

import importlib
import importlib.util

import pytest
import torch

from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError

pytest.importorskip("triton", reason="comes with torch's builds for GPUs")

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def gpu_resize():
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.reload(importlib.import_module("pipeline.data.gpu_resize"))


def noise(height, width, *, seed=0):
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return pixels.cuda() if HAS_GPU else pixels


def as_torch_does(preprocessing, image):
    """In float32 and rounded once, as on a GPU."""
    size = preprocessing.resized_size(*image.shape[1:])
    return preprocessing.crop(preprocessing._interpolate_in_float(image[None], size)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter divides where a GPU would look away
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_size", [13, 24], ids=["cropped", "padded"])
def test_images_of_any_size_and_memory_order_come_out_as_torch_makes_them(gpu_resize, interpolation, crop_size):
    preprocessing = Preprocessing(resize_size=16, crop_size=crop_size, interpolation=interpolation)
    images = [noise(23, 31), noise(16, 16), noise(9, 21), noise(70, 33), noise(17, 12).transpose(1, 2)]
    images.append(noise(3, 40).permute(2, 1, 0)[:3])
    found = preprocessing._apply_in_one_kernel(images)
    wanted = torch.stack([as_torch_does(preprocessing, image) for image in images])
    assert found.is_contiguous(memory_format=torch.channels_last)
    differences = (found.int() - wanted.int()).abs()
    assert differences.max() <= 1
    assert (differences > 0).float().mean() < 0.01


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_others_an_image_is_resized_with_changes_none_of_its_pixels(gpu_resize):
    preprocessing = Preprocessing(resize_size=12, crop_size=10)
    images = [noise(20 + 3 * number, 31, seed=number) for number in range(3)]
    together = preprocessing._apply_in_one_kernel(images)
    alone = [preprocessing._apply_in_one_kernel([image])[0] for image in images]
    assert torch.equal(together, torch.stack(alone))


def test_an_image_too_narrow_to_resize_is_refused(gpu_resize):
    with pytest.raises(ImageError, match="expected a resized image"):
        Preprocessing(resize_size=500, crop_size=16)._apply_in_one_kernel([noise(1, 3000)])


@pytest.mark.parametrize("is_bicubic", [False, True])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(gpu_resize, monkeypatch, is_bicubic):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = importlib.util.spec_from_file_location("gpu_resize_for_gpus", gpu_resize.__file__)
    for_gpus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(for_gpus)
    arguments = {"table": "*i64", "crops": "*u8", "size": "i32", "num_columns": "i32"}
    constants = {"is_bicubic": is_bicubic, "BLOCK": 256}
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(for_gpus._resize_and_crop, signature, {(4 + n,): v for n, v in enumerate(constants.values())})
    compiled = compile(source, target=GPUTarget("cuda", 80, 32), options=gpu_resize._OPTIONS)
    assert compiled.asm["cubin"]


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_on_a_gpu_images_are_resized_by_the_kernel(gpu_resize):
    preprocessing = Preprocessing(resize_size=256, crop_size=224)
    images = [noise(375, 500), noise(600, 411, seed=1)]
    assert torch.equal(preprocessing.apply_to_all(images), preprocessing._apply_in_one_kernel(images))
