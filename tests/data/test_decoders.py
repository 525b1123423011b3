"""The watched and the isolated decoder against images that crash and hang decoders."""

import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pipeline.data.decoders import IsolatedDecoder, WatchedDecoder
from pipeline.data.images import decode
from pipeline.errors import ImageError, RunError
from tests.jpegs import MAX_PIXELS, OTHERS, PLAIN, encoded

# --- the watched decoder -------------------------------------------------------------------------------------------


def test_a_watched_decoder_gives_the_same_pixels_and_refusals() -> None:
    with WatchedDecoder() as decoder:
        data = PLAIN["jpeg"]
        assert torch.equal(decoder.decode(data, max_pixels=MAX_PIXELS), decode(data, max_pixels=MAX_PIXELS))
        with pytest.raises(ImageError) as caught:
            decoder.decode(b"", max_pixels=MAX_PIXELS)
    assert caught.value.error == "empty"


def test_an_image_that_takes_too_long_ends_its_process_and_the_time_between_images_does_not() -> None:
    script = (
        "import time; from pipeline.data import decoders, images\n"
        "images.decode = lambda data, **options: time.sleep(len(data) / 10)\n"
        "with decoders.WatchedDecoder(timeout_s=1) as decoder:\n"
        "    decoder.decode(b'x', max_pixels=1); time.sleep(3); print('between', flush=True)\n"
        "    decoder.decode(b'x' * 6000, max_pixels=1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"between\n")


# --- the isolated decoder ------------------------------------------------------------------------------------------

HOSTILE_PLUGIN = """
import ctypes, os, signal
from PIL import Image, ImageFile, PpmImagePlugin

class Hostile(ImageFile.ImageFile):
    format = "PPM"

    def _open(self):
        kind = self.fp.read(4)
        if kind == b"HANG":
            ctypes.PyDLL(None).sleep(600)  # keeps the interpreter locked
        if kind == b"KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == b"ONCE":
            os.rmdir(self.fp.read())  # fails the second time
            os.kill(os.getpid(), signal.SIGKILL)
        ctypes.string_at(0)

Image.register_open("PPM", Hostile, lambda prefix: prefix.startswith((b"HANG", b"CRASH", b"KILL", b"ONCE")))
"""


@pytest.fixture
def hostile_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOSTILE_PLUGIN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "error::RuntimeWarning")  # what a bomb's warning is


def isolated_refusal(decoder: IsolatedDecoder, data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decoder.decode(data, max_pixels=MAX_PIXELS)
    return caught.value


@pytest.mark.usefixtures("hostile_plugin")
def test_a_decoder_that_is_closed_at_work_blames_no_image() -> None:
    with ThreadPoolExecutor(1) as pool, IsolatedDecoder() as decoder:
        decoder.decode(PLAIN["jpeg"], max_pixels=MAX_PIXELS)
        at_work = pool.submit(decoder.decode, b"HANG", max_pixels=MAX_PIXELS)
        time.sleep(0.5)
        decoder.close()
        with pytest.raises(RunError, match="closed"):
            at_work.result(10)
        with pytest.raises(RunError, match="closed"):
            decoder.decode(PLAIN["jpeg"], max_pixels=MAX_PIXELS)


@pytest.mark.usefixtures("hostile_plugin")
def test_a_decoder_crash_takes_the_child_alone() -> None:
    warns_in_pillow = bytearray(encoded("BMP"))
    struct.pack_into("<ii", warns_in_pillow, 18, 10_000, 10_000)  # width, height
    with IsolatedDecoder() as decoder:
        for data in (PLAIN["jpeg"], PLAIN["rotated"], OTHERS["png"]):
            assert torch.equal(decoder.decode(data, max_pixels=MAX_PIXELS), decode(data, max_pixels=MAX_PIXELS))
        assert isolated_refusal(decoder, b"").error == "empty"
        assert isolated_refusal(decoder, bytes(warns_in_pillow)).error == "too_many_pixels"
        crash = isolated_refusal(decoder, b"CRASH")
        assert (crash.stage, crash.error, crash.message) == ("decode", "crashed", "the decoder died of SIGSEGV")


@pytest.mark.usefixtures("hostile_plugin")
def test_a_child_that_was_killed_may_have_been_in_the_way_of_others_once(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    with IsolatedDecoder() as decoder:
        assert isolated_refusal(decoder, b"ONCE" + str(tmp_path / "first").encode()).error != "crashed"
        killed = isolated_refusal(decoder, b"KILL")
        assert (killed.error, killed.message) == ("crashed", "the decoder died of SIGKILL")


@pytest.mark.slow
@pytest.mark.usefixtures("hostile_plugin")
def test_a_hang_is_cut_short_and_the_child_replaced() -> None:
    with IsolatedDecoder(timeout_s=0.5) as decoder:
        hang = isolated_refusal(decoder, b"HANG")
        assert hang.error == "timed_out"
        assert "0.5 s" in hang.message
        assert decoder.decode(OTHERS["cmyk"], max_pixels=MAX_PIXELS).shape == (3, 30, 40)
        assert isolated_refusal(decoder, b"CRASH").error == "crashed"
        assert decoder.decode(OTHERS["cmyk"], max_pixels=MAX_PIXELS).shape == (3, 30, 40)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent(number: signal.Signals) -> None:
    script = (
        "import time; from pipeline.data.decoders import IsolatedDecoder\n"
        "decoder = IsolatedDecoder(); decoder._start(); print('started', flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"started\n"
    parent.send_signal(number)
    parent.communicate(timeout=60)  # the child holds the other end of stderr: it closes with the child


@pytest.mark.parametrize(
    ("executable", "why"), [(shutil.which("false"), "exit code 1"), ("/no/python", "No such file")]
)
def test_a_child_that_cannot_start_is_not_the_images_fault(
    executable: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with IsolatedDecoder() as decoder, pytest.raises(RunError, match=why):
        decoder.decode(PLAIN["jpeg"], max_pixels=MAX_PIXELS)
