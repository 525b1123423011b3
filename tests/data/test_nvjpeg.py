"""Everything about decoding on a GPU but the GPU: its operator is stood in for by the CPU's."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import images, nvjpeg
from pipeline.data.transforms import Preprocessing
from pipeline.errors import RunError
from tests.jpegs import ALL, MAX_PIXELS, PLAIN, encoded

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(resize_size=16, crop_size=16)


def plain(data, **options):
    return nvjpeg.plain_jpeg(data, **{"max_pixels": MAX_PIXELS, **options})


def decode_on_cpu(data):
    return images.decode(data, max_pixels=MAX_PIXELS)


def test_whole_undamaged_jpegs_of_gray_or_ycbcr_are_what_nvjpeg_is_for():
    assert {name for name, data in ALL.items() if plain(data)} == set(PLAIN)
    assert plain(PLAIN["jpeg"], shrink_to=10) is None
    assert plain(PLAIN["jpeg"], max_pixels=40 * 30 - 1) is None
    assert plain(PLAIN["rotated"]) == nvjpeg.PlainJpeg(PLAIN["rotated"], 40 * 30, 6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from(list(PLAIN.values())), max_size=12), st.booleans())
def test_images_come_out_as_they_would_one_by_one_whatever_holds_their_bytes(nvjpeg_on_cpu, group, are_views):
    found = nvjpeg.decode([plain(data)._replace(data=memoryview(data) if are_views else data) for data in group], CPU)
    assert len(found) == len(group)
    assert all(torch.equal(image, decode_on_cpu(data)) for image, data in zip(found, group, strict=True))


def test_an_image_that_the_gpu_refuses_is_found_among_its_neighbours(nvjpeg_on_cpu, caplog):
    nvjpeg_on_cpu.damaged = PLAIN["grayscale"]
    found = nvjpeg.decode([plain(PLAIN[name]) for name in ("jpeg", "rotated", "grayscale", "jpeg")], CPU)
    assert [image is None for image in found] == [False, False, True, False]
    assert "an image is decoded on the CPU, for nvJPEG refuses it: nvjpegDecodeBatched failed: 2" in caplog.text


def test_torchvisions_operator_is_the_one_that_is_called():
    schema = torch.ops.image.decode_jpegs_cuda.default._schema
    assert [str(argument.type) for argument in schema.arguments] == ["List[Tensor]", "int", "Device"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_node_on_which_nvjpeg_does_not_work_says_so_before_any_image_is_taken():
    with pytest.raises(RunError, match=r"nvJPEG does not work on this node: .*; set compute.decode to cpu"):
        nvjpeg.require(torch.device("cuda"), [])


def test_a_node_on_which_images_cannot_be_resized_as_on_others_says_so_too(nvjpeg_on_cpu, monkeypatch):
    def fails(self, images):
        raise RuntimeError("Failed to find C compiler.\nMore")

    nvjpeg.require(CPU, [PREPROCESSING])
    monkeypatch.setattr(Preprocessing, "apply_to_all", fails)
    with pytest.raises(
        RunError, match=r"cannot be resized .*: Failed to find C compiler\.; .* set compute.decode to cpu"
    ):
        nvjpeg.require(CPU, [PREPROCESSING])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_pixels_come_near_those_of_a_cpu_and_are_the_same_every_time():
    gpu = torch.device("cuda")
    nvjpeg.require(gpu, [PREPROCESSING])
    group = [encoded("JPEG", size=(200 + 3 * number, 150)) for number in range(200)] + list(PLAIN.values())
    first, again = (nvjpeg.decode([plain(data) for data in group], gpu) for _ in range(2))
    assert first[0].is_cuda
    for one, same, data in zip(first, again, group, strict=True):
        assert torch.equal(one, same)
        assert (one.cpu().int() - decode_on_cpu(data).int()).abs().max() <= 8


def test_parts_of_a_group_have_no_more_pixels_than_fit(monkeypatch, nvjpeg_on_cpu):
    monkeypatch.setattr(nvjpeg, "_MOST_PIXELS_AT_ONCE", 2 * 40 * 30)
    calls = []
    decode = nvjpeg._decode_jpegs
    monkeypatch.setattr(nvjpeg, "_decode_jpegs", lambda part, device: calls.append(len(part)) or decode(part, device))
    assert len(nvjpeg.decode([plain(PLAIN["jpeg"])] * 5, CPU)) == 5
    assert calls == [2, 2, 1]
