"""The jobs: config in, one call into the library, one JSON summary out.

Standard output's last line is the summary; everything else goes to standard error. Exit codes: 0 done; 1 failed or
stopped; 2 bad config or input; 3 finished but not reconciled.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from pipeline.config import JobConfig, load
from pipeline.errors import PipelineError

Config = TypeVar("Config", bound=JobConfig)


class Stopped(BaseException):
    """SIGTERM or SIGINT came."""


def run_job(config_type: type[Config], main: Callable[[Config], dict[str, Any]]) -> NoReturn:
    """Run `main` on the command line's config, print its summary, exit with the contract's code."""
    _handle_signals()
    try:
        config = load(config_type, sys.argv[1:])
        with _stdout_kept_for_the_summary():
            summary = main(config)
        code = 0
    except PipelineError as error:
        summary = {"status": "failed", "error": type(error).__name__, "message": str(error), **error.details}
        code = error.exit_code
    except Stopped as stop:
        summary = {"status": "stopped", "message": f"{stop}; {what_stays(config_type)}"}
        code = 1
    except Exception as error:
        traceback.print_exc()
        summary = {"status": "failed", "error": type(error).__name__, "message": str(error)}
        code = 1
    if code:
        print(f"{summary.get('error', summary['status'])}: {summary['message']}", file=sys.stderr)
    print(json.dumps(summary), flush=True)
    sys.exit(code)


def what_stays(config_type: type[JobConfig]) -> str:
    """Of a job of this config that is stopped, and how to go on, in words."""
    if not config_type.resumes:
        return "nothing is kept of it, run the same command to begin anew"
    resume = config_type.model_fields.get("resume")
    again = " with --resume auto" if resume is not None and resume.default is False else ""
    return f"what is done stays, run the same command{again} to go on"


def _handle_signals() -> None:
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)


def _stop(signal_number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: let the cleaning up finish
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Stopped(f"stopped by {signal.Signals(signal_number).name}")


@contextlib.contextmanager
def _stdout_kept_for_the_summary() -> Iterator[None]:
    """Send what libraries and their child processes print to standard error meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
