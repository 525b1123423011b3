"""Batches from a GPU that decodes, without the GPU: nvJPEG's operator is stood in for by the CPU's."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import images, nvjpeg
from pipeline.data.gpu_loader import GpuDecoder, _BusyClock, prepare
from pipeline.data.loader import LoadLog, load_batches
from pipeline.data.nvjpeg import PlainJpeg
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError, RunError
from tests.jpegs import ALL, MAX_PIXELS, OTHERS, PLAIN, encoded

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(resize_size=16, crop_size=16)
OPTIONS = {"max_pixels": MAX_PIXELS, "shrink_to": None}
LOST = ImageError("fetch", "not_found", "it is gone")


def load_on_gpu(items, preprocessings=(PREPROCESSING,), *, batch_size=4, device=CPU):
    """The batches, and the log."""
    log = LoadLog()
    decoder = GpuDecoder(device, preprocessings, OPTIONS)
    prepared = prepare(items, preprocessings, OPTIONS, num_threads=2, log=log)
    return list(decoder.batches(prepared, batch_size=batch_size, log=log)), log


def load_on_cpu(items, preprocessings=(PREPROCESSING,), *, batch_size=4):
    log = LoadLog()
    views = [each.apply for each in preprocessings]

    def decode(data):
        return images.decode(data, **OPTIONS)

    return list(load_batches(items, decode, views, batch_size=batch_size, num_threads=1, log=log)), log


def assert_same(one, other):
    (batches, log), (others, other_log) = one, other
    assert [batch.rows for batch in batches] == [batch.rows for batch in others]
    for batch, its_other in zip(batches, others, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch.pixels, its_other.pixels, strict=True))
    assert {row: repr(error) for row, error in log.errors.items()} == {
        row: repr(error) for row, error in other_log.errors.items()
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from([*ALL, "lost"]), max_size=200), st.integers(1, 150))
def test_batches_and_errors_are_those_of_decoding_on_cpus(nvjpeg_on_cpu, names, batch_size):
    items = [LOST if name == "lost" else ALL[name] for name in names]
    preprocessings = [PREPROCESSING, Preprocessing(resize_size=20, crop_size=8)]
    assert_same(
        load_on_gpu(items, preprocessings, batch_size=batch_size),
        load_on_cpu(items, preprocessings, batch_size=batch_size),
    )


def load_two_at_once(decoder, shards, **options):
    """The batches and logs of shards that two threads have one decoder decode; on a GPU each thread in a stream."""

    def load(items):
        log = LoadLog()
        prepared = prepare(items, [PREPROCESSING], OPTIONS, num_threads=1, log=log)
        stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        with torch.cuda.stream(stream):
            return list(decoder.batches(prepared, log=log, **options)), log

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(load, shards))


def test_two_shards_at_once_are_decoded_as_one_after_the_other_and_their_seconds_are_not_more(nvjpeg_on_cpu):
    shards = [[*ALL.values()] * 20, [PLAIN["jpeg"]] * 300, [LOST, PLAIN["rotated"]] * 90]
    decoder, start = GpuDecoder(CPU, [PREPROCESSING], OPTIONS), time.perf_counter()
    found = load_two_at_once(decoder, shards, batch_size=50)
    took_s = time.perf_counter() - start
    for one, items in zip(found, shards, strict=True):
        assert_same(one, load_on_cpu(items, batch_size=50))
    assert 0 < sum(log.decode_s for _, log in found) <= took_s


def test_the_clock_runs_once_however_many_are_at_work_and_not_while_none_is(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = _BusyClock()

    def at(second, what):
        now[0] = second
        return what()

    at(1, clock.start)
    at(2, clock.start)
    assert at(5, clock.stop) == 4
    assert at(7, clock.stop) == 2
    at(10, clock.start)
    assert at(11, clock.stop) == 1


def test_what_nvjpeg_is_not_for_is_decoded_while_it_is_prepared():
    names, log = [*PLAIN, *OTHERS], LoadLog()
    prepared = list(prepare([ALL[name] for name in names], [PREPROCESSING], OPTIONS, num_threads=1, log=log))
    kinds = {name: type(item) for name, item in zip(names, prepared, strict=True)}
    assert {name for name, kind in kinds.items() if kind is PlainJpeg} == set(PLAIN)
    assert {name for name, kind in kinds.items() if kind is list} == {"cmyk", "not YCbCr", "png"}
    assert (log.fetch_s > 0, log.decode_s) == (True, 0)


def test_preparing_takes_the_decoder_it_is_given():
    def decode(data, *, max_pixels, shrink_to):
        raise ImageError("decode", "crashed", "the decoder died")

    [plain, other] = prepare(
        [PLAIN["jpeg"], OTHERS["png"]], [PREPROCESSING], OPTIONS, num_threads=1, log=LoadLog(), decode=decode
    )
    assert isinstance(plain, PlainJpeg)
    assert (other.error, other.message) == ("crashed", "the decoder died")


def test_a_decoder_that_cannot_be_started_is_no_images_fault():
    def decode(data, *, max_pixels, shrink_to):
        raise RunError("the isolated decoder did not start")

    with pytest.raises(RunError, match="did not start"):
        list(prepare([OTHERS["png"]], [PREPROCESSING], OPTIONS, num_threads=1, log=LoadLog(), decode=decode))


def test_an_image_that_the_gpu_refuses_is_decoded_on_the_cpu_and_its_neighbours_are_not(nvjpeg_on_cpu, monkeypatch):
    nvjpeg_on_cpu.damaged = PLAIN["grayscale"]
    on_cpu = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda data, **options: on_cpu.append(data) or decode(data, **options))
    group = [PLAIN["jpeg"], PLAIN["rotated"], PLAIN["grayscale"], PLAIN["jpeg"]]
    found = load_on_gpu(group)
    assert on_cpu == [PLAIN["grayscale"]]
    assert_same(found, load_on_cpu(group))


def test_a_gpu_that_fails_for_good_stops_the_work_and_makes_no_error_rows(nvjpeg_on_cpu, monkeypatch):
    def settle(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    log, decoder = LoadLog(), GpuDecoder(CPU, [PREPROCESSING], OPTIONS)
    monkeypatch.setattr(nvjpeg, "_settle", settle)
    nvjpeg_on_cpu.damaged = PLAIN["jpeg"]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(decoder.batches([PlainJpeg(PLAIN["jpeg"], 1200, 1)], batch_size=1, log=log))
    assert log.errors == {}


def fail_where(monkeypatch, is_failing, message):
    """Let `apply_to_all` fail on the calls that `is_failing` says of: it is told their number and how many images."""
    calls = []
    apply = Preprocessing.apply_to_all

    def apply_or_fail(self, decoded):
        calls.append(len(decoded))
        if is_failing(len(calls), len(decoded)):
            raise torch.OutOfMemoryError(message)
        return apply(self, decoded)

    monkeypatch.setattr(Preprocessing, "apply_to_all", apply_or_fail)
    return calls


def test_an_image_that_fails_on_the_gpu_alone_is_preprocessed_on_the_cpu(nvjpeg_on_cpu, monkeypatch, caplog):
    monkeypatch.setattr(nvjpeg, "require", lambda *args: None)
    fail_where(monkeypatch, lambda number, size: True, "CUDA out of memory")
    group = [PLAIN["jpeg"], PLAIN["rotated"]]
    assert_same(load_on_gpu(group), load_on_cpu(group))
    assert "preprocessed on the CPU, for on the GPU it failed: CUDA out of memory" in caplog.text


def test_a_group_that_lacked_memory_for_a_moment_is_viewed_one_by_one(nvjpeg_on_cpu, monkeypatch, caplog):
    monkeypatch.setattr(nvjpeg, "require", lambda *args: None)
    sizes = fail_where(monkeypatch, lambda number, size: size > 1, "CUDA out of memory")
    group = [PLAIN["jpeg"], PLAIN["rotated"]]
    assert_same(load_on_gpu(group), load_on_cpu(group))
    assert (sizes, caplog.text) == ([2, 1, 1], "")


def test_an_image_that_no_view_takes_costs_its_group_nothing(nvjpeg_on_cpu):
    group = [PLAIN["jpeg"], encoded("JPEG", size=(3000, 2)), PLAIN["rotated"]]
    refusing = [Preprocessing(resize_size=500, crop_size=16)]
    found = load_on_gpu(group, refusing)
    assert_same(found, load_on_cpu(group, refusing))
    assert {row: error.error for row, error in found[1].errors.items()} == {1: "aspect_ratio"}


def test_a_process_whose_gpu_cannot_decode_says_so_before_any_image_is_taken(monkeypatch):
    def refuse(device, preprocessings):
        raise RunError("nvJPEG does not work on this node")

    monkeypatch.setattr(nvjpeg, "require", refuse)
    with pytest.raises(RunError, match="nvJPEG does not work"):
        GpuDecoder(CPU, [PREPROCESSING], OPTIONS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_are_the_same_every_time_and_near_those_of_a_cpu():
    gpu = torch.device("cuda")
    items = [encoded("JPEG", size=(200 + 3 * number, 150)) for number in range(300)] + [*ALL.values(), LOST]
    first, again = (load_on_gpu(items, batch_size=100, device=gpu) for _ in range(2))
    assert_same(first, again)
    for batch, other in zip(first[0], load_on_cpu(items, batch_size=100)[0], strict=True):
        assert batch.pixels[0].is_cuda
        assert batch.rows == other.rows
        assert (batch.pixels[0].cpu().int() - other.pixels[0].int()).abs().max() <= 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_two_shards_at_once_have_the_pixels_of_one_after_the_other():
    gpu = torch.device("cuda")
    decoder = GpuDecoder(gpu, [PREPROCESSING], OPTIONS)
    shards = [
        [encoded("JPEG", size=(100 + 2 * number, 150 - shard)) for number in range(100)] * 5 for shard in range(4)
    ]
    for _ in range(3):
        for one, items in zip(load_two_at_once(decoder, shards, batch_size=128), shards, strict=True):
            assert_same(one, load_on_gpu(items, batch_size=128, device=gpu))
