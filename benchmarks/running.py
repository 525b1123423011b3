"""Commands as their users run them, timed from outside: what they print, and when they print it."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

_REPORTS_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has ended: the seconds it took, and the lines of its two streams with the seconds they came at."""

    seconds: float
    stdout: list[tuple[float, str]]
    stderr: list[tuple[float, str]]

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        found: dict[str, Any] = json.loads(self.stdout[-1][1])
        return found


@dataclass(frozen=True, slots=True)
class Predicted:
    """A run of jobs.predict, in seconds from the command: first shard begun, first receipt, all committed, ended."""

    begun_s: float
    first_receipt_s: float
    committed_s: float
    ended_s: float
    summary: dict[str, Any]


def run_command(command: Sequence[str]) -> Ran:
    """Run a command to its end. Raises RuntimeError with the end of its standard error where it fails."""
    print(f"$ {' '.join(command)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    streams = (process.stdout, process.stderr)
    lines: tuple[list[tuple[float, str]], ...] = ([], [])
    readers = [threading.Thread(target=_note_lines, args=(*pair, start)) for pair in zip(streams, lines, strict=True)]
    for reader in readers:
        reader.start()
    process.wait()
    seconds = time.monotonic() - start
    for reader in readers:
        reader.join()
    if process.returncode:
        last = "\n".join(line for _, line in [*lines[1], *lines[0]][-20:])
        raise RuntimeError(f"{command[:4]} exited with {process.returncode}:\n{last}")
    return Ran(seconds, *lines)


def run_job(job: str, *flags: str) -> Ran:
    """`python -m jobs.<job> <flags>`."""
    return run_command([sys.executable, "-m", f"jobs.{job}", *flags])


def predict(*flags: str) -> Predicted:
    """`python -m jobs.predict <flags>`, compiled, timed by its progress lines; every image must be predicted.

    A receipt tells the seconds its shard took, so the first shard was begun so long before its receipt came. The last
    progress line is written when every commit is.
    """
    always = ("--compute.compile", "always", "--progress_interval_s", str(_REPORTS_EVERY_S))
    ran = run_job("predict", *flags, *always)
    assert ran.summary["num_predicted"] == ran.summary["num_images"], ran.summary
    progress = [(at, json.loads(line)["progress"]) for at, line in ran.stderr if line.startswith('{"progress"')]
    first_receipt_s, first = next((at, told) for at, told in progress if told["images"])
    num_shards = max(1, round(first["images"] * ran.summary["num_shards"] / ran.summary["num_images"]))
    begun_s = first_receipt_s - sum(first["seconds_by_stage"][part] for part in ("total", "write")) / num_shards
    return Predicted(begun_s, first_receipt_s, progress[-1][0], ran.seconds, ran.summary)


def _note_lines(stream: IO[str], lines: list[tuple[float, str]], start: float) -> None:
    lines.extend((time.monotonic() - start, line.rstrip("\n")) for line in stream)
