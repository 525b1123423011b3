"""Decoders that images may crash or hold for ever: one watches its own process, one risks a child's."""

import json
import logging
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from pipeline.data import images
from pipeline.errors import ImageError, RunError

DECODED_WITHIN_S = 120.0
_CLOSED = "the isolated decoder was closed while an image was decoded"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caution:
    """How images that may kill their decoder are met: each is decoded `isolated`, while one is under suspicion; those
    found to do so are `known`, by uri, and not decoded again.
    """

    isolated: bool = False
    known: Mapping[str, ImageError] = field(default_factory=dict)


NO_CAUTION = Caution()


def is_deadly(error: ImageError) -> bool:
    """Whether it tells of an image that has crashed its decoder or held it too long."""
    return error.stage == "decode" and error.error in ("crashed", "timed_out")


def guarded_decoder(*, isolated: bool) -> "WatchedDecoder | IsolatedDecoder":
    """The one for images that are under suspicion, `isolated`, or the faster one for all others."""
    return IsolatedDecoder() if isolated else WatchedDecoder()


class WatchedDecoder:
    """Decodes as `images.decode` does, in any number of threads, and ends its process where an image takes too long.

    A decoder that is at work cannot be stopped otherwise: a JPEG of a megabyte can hold so many scans that it takes an
    hour. Whoever started the process tries again, with an `IsolatedDecoder`. A context manager.
    """

    def __init__(self, *, timeout_s: float = DECODED_WITHIN_S) -> None:
        self._timeout_s = timeout_s
        self._begun: dict[int, float] = {}  # by thread: when the image it is at was begun
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="watch-decoding", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def decode(self, data: bytes, *, max_pixels: int, shrink_to: int | None = None) -> torch.Tensor:
        """The same pixels and refusals as `images.decode`."""
        thread = threading.get_ident()
        self._begun[thread] = time.monotonic()
        try:
            return images.decode(data, max_pixels=max_pixels, shrink_to=shrink_to)
        finally:
            del self._begun[thread]

    def _watch(self) -> None:
        while not self._ended.wait(self._timeout_s / 10):
            now = time.monotonic()
            if any(now - begun > self._timeout_s for begun in list(self._begun.values())):
                logger.warning("an image takes more than %g s to decode: its process ends", self._timeout_s)
                time.sleep(1)  # for the warning to arrive
                os.kill(os.getpid(), signal.SIGKILL)


class IsolatedDecoder:
    """Decodes one image at a time in a child process, which a crash, a hang or the OOM killer may take.

    A context manager; one thread decodes at a time. The child serves image after image (it takes as long to start as
    torch takes to import) and is replaced after its death; it ends with its parent, however that ends.
    """

    def __init__(self, *, timeout_s: float = DECODED_WITHIN_S) -> None:
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._at_work = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, data: bytes, *, max_pixels: int, shrink_to: int | None = None) -> torch.Tensor:
        """The same pixels and refusals as `images.decode`, and two more of these: `crashed` and `timed_out`.

        Raises RunError where no child can be started, or the decoder is closed, which is not this image's fault.
        """
        options = {"max_pixels": max_pixels, "shrink_to": shrink_to}
        with self._at_work:
            try:
                reply, pixels = self._ask(options, data)
            except _KilledError:  # perhaps for want of memory that others took: twice is the image's fault
                reply, pixels = self._ask(options, data)
        if "error" in reply:
            raise ImageError("decode", reply["error"], reply["message"])
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(reply["shape"]).permute(2, 0, 1)

    def close(self) -> None:
        """End the child, if there is one, also while another thread waits for it."""
        self._is_closed = True
        if (child := self._child) is not None:
            child.kill()
        with self._at_work:
            self._end()

    def _ask(self, options: dict[str, int | None], data: bytes) -> tuple[dict[str, Any], bytes]:
        if self._child is None and not self._is_closed:
            self._start()
        if self._is_closed:  # perhaps since it was started
            raise RunError(_CLOSED)
        try:
            self._connection.send_bytes(json.dumps(options).encode())
            self._connection.send_bytes(data)
            return json.loads(self._connection.recv_bytes()), self._connection.recv_bytes()
        except (EOFError, OSError):
            if self._is_closed:
                raise RunError(_CLOSED) from None
            raise self._bury() from None
        except BaseException:  # interrupted half-way: the child's answer must not be taken for the next image's
            self._end()
            raise

    def _end(self) -> None:
        if self._child is not None:
            self._connection.close()
            self._child.kill()  # between two images it holds nothing
            self._child.wait()
            self._child = None

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.connection.Pipe()
        paths = [os.environ.get("PYTHONPATH", ""), *map(os.path.abspath, sys.path)]
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(self._timeout_s)]
        try:
            self._child = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # a job's own stdout ends in its summary
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C is for the parent to act on
            )
        except OSError as error:
            raise RunError(f"the isolated decoder did not start: {error}") from error
        finally:
            theirs.close()
        try:
            self._connection.recv_bytes()
        except (EOFError, OSError):
            message = self._bury().message
            raise RunError(f"the isolated decoder did not start: {message}; its stderr says why") from None

    def _bury(self) -> ImageError:
        assert self._child is not None
        code = self._child.wait()
        self._end()
        if code == -signal.SIGALRM:
            return ImageError("decode", "timed_out", f"expected an image within {self._timeout_s:g} s, got none")
        kind = _KilledError if code == -signal.SIGKILL else ImageError
        cause = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return kind("decode", "crashed", f"the decoder {cause}")


class _KilledError(ImageError):
    """The child did not die by itself."""


def _serve(connection: "multiprocessing.connection.Connection", timeout_s: float) -> None:
    """Answer requests until the parent is gone. The kernel's alarm ends a hang, even one that holds the interpreter."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # Linux only: of all processes here, the OOM killer shall take this one
        Path("/proc/self/oom_score_adj").write_text("1000")
    connection.send_bytes(b"ready")
    while True:
        options = json.loads(connection.recv_bytes())
        data = connection.recv_bytes()
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        reply: dict[str, object]
        try:
            pixels = images.decode(data, **options).permute(1, 2, 0).contiguous()
            reply, payload = {"shape": pixels.shape}, pixels.view(-1).numpy().tobytes()
        except ImageError as error:
            reply, payload = {"error": error.error, "message": error.message}, b""
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(reply).encode())
        connection.send_bytes(payload)


if __name__ == "__main__":
    with suppress(EOFError, OSError):  # the parent closed its end or died
        _serve(multiprocessing.connection.Connection(int(sys.argv[1])), float(sys.argv[2]))
