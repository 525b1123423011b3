"""Everything about decoding on a GPU but the GPU: its operator is stood in for by the CPU's."""

import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import images, nvjpeg
from pipeline.data.loader import LoadLog, load_batches, load_batches_on_gpu
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError, RunError

CPU = torch.device("cpu")
MAX_PIXELS = 100_000
PREPROCESSING = Preprocessing(resize_size=16, crop_size=16)


def encoded(
    format: str, mode: str = "RGB", *, orientation: int = 1, size: tuple[int, int] = (40, 30), **options: object
) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.linear_gradient("L").resize(size).convert(mode).save(file, format, exif=exif, **options)
    return file.getvalue()


PLAIN = {
    "jpeg": encoded("JPEG"),
    "grayscale": encoded("JPEG", "L"),
    "rotated": encoded("JPEG", orientation=6),
}
OTHERS = {
    "cmyk": encoded("JPEG", "CMYK"),
    "not YCbCr": encoded("JPEG", keep_rgb=True),
    "png": encoded("PNG"),
    "large": encoded("JPEG", size=(400, 300)),
    "truncated": encoded("JPEG")[:-20],
    "headless": b"\xff\xd8\xff",
    "text": b"not an image",
    "empty": b"",
}
ALL = {**PLAIN, **OTHERS}


class Operator:
    """In the place of torchvision's; refuses a call that `damaged` is among."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.damaged: bytes | None = None

    def __call__(self, tensors: list[torch.Tensor], mode: int, device: torch.device) -> list[torch.Tensor]:
        data = [bytes(tensor.numpy()) for tensor in tensors]
        self.seen += data
        if self.damaged in data:
            raise RuntimeError("nvjpegDecodeBatched failed: 2")
        return [torch.ops.image.decode_jpeg(tensor, mode) for tensor in tensors]


@pytest.fixture
def operator(monkeypatch):
    operator = Operator()
    monkeypatch.setattr(torch.ops.image, "decode_jpegs_cuda", operator)
    return operator


def decode_group(group):
    return nvjpeg.decode_group(group, device=CPU, num_threads=2, max_pixels=MAX_PIXELS)


def decode_alone(data):
    try:
        return images.decode(data, max_pixels=MAX_PIXELS)
    except ImageError as error:
        return error


def is_same(one, other):
    if isinstance(one, ImageError) or isinstance(other, ImageError):
        return repr(one) == repr(other)
    return torch.equal(one, other)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from(list(ALL)), max_size=12))
def test_a_group_comes_out_as_its_images_would_one_by_one(operator, names):
    group = [ALL[name] for name in names]
    found = decode_group(group)
    assert len(found) == len(group)
    assert all(is_same(one, decode_alone(data)) for one, data in zip(found, group, strict=True))


def test_the_gpu_is_given_whole_undamaged_jpegs_alone(operator):
    decode_group(list(ALL.values()))
    assert operator.seen == list(PLAIN.values())
    operator.seen.clear()
    nvjpeg.decode_group([PLAIN["jpeg"]], device=CPU, num_threads=1, max_pixels=MAX_PIXELS, shrink_to=10)
    assert operator.seen == []


def test_an_image_that_the_gpu_refuses_is_decoded_on_the_cpu_and_its_neighbours_are_not(operator, monkeypatch):
    operator.damaged = PLAIN["grayscale"]
    on_cpu = []
    monkeypatch.setattr(nvjpeg, "_decode_or_refuse", lambda data, **_: on_cpu.append(data) or decode_alone(data))
    group = [PLAIN["jpeg"], PLAIN["rotated"], PLAIN["grayscale"], PLAIN["jpeg"]]
    found = decode_group(group)
    assert on_cpu == [PLAIN["grayscale"]]
    assert all(is_same(one, decode_alone(data)) for one, data in zip(found, group, strict=True))


def test_torchvisions_operator_is_the_one_that_is_called():
    schema = torch.ops.image.decode_jpegs_cuda.default._schema
    assert [str(argument.type) for argument in schema.arguments] == ["List[Tensor]", "int", "Device"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_node_on_which_nvjpeg_does_not_work_says_so_before_any_image_is_taken():
    with pytest.raises(RunError, match=r"nvJPEG does not work on this node: .*; set compute.decode to cpu"):
        nvjpeg.require(torch.device("cuda"), [])


def test_a_node_on_which_images_cannot_be_resized_as_on_others_says_so_too(operator, monkeypatch):
    def fails(self, images):
        raise RuntimeError("Failed to find C compiler.\nMore")

    nvjpeg.require(CPU, [PREPROCESSING])
    monkeypatch.setattr(Preprocessing, "apply_to_all", fails)
    with pytest.raises(
        RunError, match=r"cannot be resized .*: Failed to find C compiler\.; .* set compute.decode to cpu"
    ):
        nvjpeg.require(CPU, [PREPROCESSING])


def test_a_gpu_that_fails_for_good_stops_the_work_and_makes_no_error_rows(operator, monkeypatch):
    def settle(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(nvjpeg, "_settle", settle)
    operator.damaged = PLAIN["jpeg"]
    log = LoadLog()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(
            load_batches_on_gpu(
                [PLAIN["jpeg"]], decode_group, [PREPROCESSING.apply_to_all], batch_size=1, device=CPU, log=log
            )
        )
    assert log.errors == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_pixels_come_near_those_of_a_cpu_and_are_the_same_every_time():
    gpu = torch.device("cuda")
    nvjpeg.require(gpu, [PREPROCESSING])
    group = [encoded("JPEG", size=(200 + 3 * number, 150)) for number in range(200)] + list(ALL.values())
    options = {"device": gpu, "num_threads": 2, "max_pixels": MAX_PIXELS}
    first, again = nvjpeg.decode_group(group, **options), nvjpeg.decode_group(group, **options)
    assert first[0].is_cuda
    for one, same, data in zip(first, again, group, strict=True):
        assert is_same(one, same)
        if isinstance(one, torch.Tensor):
            assert (one.cpu().int() - decode_alone(data).int()).abs().max() <= 8


def test_parts_of_a_group_have_no_more_pixels_than_fit(monkeypatch, operator):
    monkeypatch.setattr(nvjpeg, "_MOST_PIXELS_AT_ONCE", 2 * 40 * 30)
    calls = []
    monkeypatch.setattr(
        nvjpeg,
        "_decode_jpegs",
        lambda part, device: (
            calls.append(len(part)) or operator([images.as_tensor(data) for data in part], images.RGB, device)
        ),
    )
    assert len(decode_group([PLAIN["jpeg"]] * 5)) == 5
    assert calls == [2, 2, 1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from([*ALL, "lost"]), max_size=150), st.integers(1, 20))
def test_batches_and_errors_are_those_of_decoding_on_cpus(operator, names, batch_size):
    lost = ImageError("fetch", "not_found", "it is gone")
    items = [lost if name == "lost" else ALL[name] for name in names]
    ours, theirs = LoadLog(), LoadLog()
    preprocessings = [PREPROCESSING, Preprocessing(resize_size=20, crop_size=8)]
    views, group_views = [each.apply for each in preprocessings], [each.apply_to_all for each in preprocessings]
    found = load_batches_on_gpu(items, decode_group, group_views, batch_size=batch_size, device=CPU, log=ours)

    def decode(data):
        return images.decode(data, max_pixels=MAX_PIXELS)

    wanted = load_batches(items, decode, views, batch_size=batch_size, num_threads=1, log=theirs)
    for one, other in zip(found, wanted, strict=True):
        assert one.rows == other.rows
        assert all(torch.equal(*pair) for pair in zip(one.pixels, other.pixels, strict=True))
    assert {row: repr(error) for row, error in ours.errors.items()} == {
        row: repr(error) for row, error in theirs.errors.items()
    }


def test_what_a_view_raises_is_the_images_error_only_where_a_cpu_says_so_too(operator, caplog):
    calls = []

    def fails_once(images):
        calls.append(images)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return PREPROCESSING.apply_to_all(images)

    def fails(images):
        raise RuntimeError("too small")

    log = LoadLog()
    group = {"device": CPU, "batch_size": 4, "log": log}
    [batch] = load_batches_on_gpu([PLAIN["jpeg"]], decode_group, [fails_once], **group)
    assert (batch.rows, log.errors) == ([0], {})
    assert "preprocessed on the CPU, for on the GPU it failed: CUDA out of memory" in caplog.text
    assert list(load_batches_on_gpu([PLAIN["jpeg"]], decode_group, [fails], **group)) == []
    assert (log.errors[0].stage, log.errors[0].error) == ("preprocess", "failed")


def test_a_group_that_lacked_memory_for_a_moment_is_viewed_one_by_one(operator):
    sizes = []

    def fails_together(images):
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return PREPROCESSING.apply_to_all(images)

    log = LoadLog()
    group = [PLAIN["jpeg"], PLAIN["rotated"]]
    [batch] = load_batches_on_gpu(group, decode_group, [fails_together], batch_size=4, device=CPU, log=log)
    assert (batch.rows, log.errors, sizes) == ([0, 1], {}, [2, 1, 1])


def test_an_image_that_no_view_takes_costs_its_group_nothing(operator):
    long = encoded("JPEG", size=(3000, 2))
    log = LoadLog()
    refusing = Preprocessing(resize_size=500, crop_size=16)
    group = [PLAIN["jpeg"], long, PLAIN["rotated"]]
    [batch] = load_batches_on_gpu(group, decode_group, [refusing.apply_to_all], batch_size=4, device=CPU, log=log)
    assert batch.rows == [0, 2]
    assert log.errors[1].error == "aspect_ratio"
