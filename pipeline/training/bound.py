"""What bounds a training: its data, its steps, or the loop that launches a GPU's work.

A GPU works behind the loop's back: while the loop waits for data it may still have work, and a GPU that is never behind
when the loop asks for its results waits for the loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MOST_IDLE = 0.05  # of the time; below that the data keeps up
_LEAST_LAG = 0.1  # of a step; a GPU that sets the pace is nearly a step behind, or several


@dataclass(frozen=True, slots=True)
class Pace:
    """How a run's steps went, in all its attempts; evaluations and starts are no steps."""

    train_s: float
    images_per_s: float
    data_wait_share: float
    data_idle_share: float
    device_lag: float

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Pace":
        """From the state of a logbook; of no steps where it is of an earlier version."""
        sums = state.get("pace", {})
        seconds = sums.get("train_s", 0.0)
        means = (sums.get(name, 0.0) / (seconds or 1.0) for name in ("images", "wait_s", "idle_s", "lag_s"))
        return cls(seconds, *means)

    def verdict(self, *, on_gpu: bool) -> str | None:
        """What bound it, in a sentence; None where no step is known."""
        if not self.train_s:
            return None
        return verdict(self.images_per_s, self.data_idle_share, self.device_lag, on_gpu=on_gpu)


def idle_share(wait_s: float, lag_s: float, elapsed_s: float, num_steps: int) -> float:
    """The share of the time that the device was idle for want of data.

    The loop waited `wait_s` in `num_steps` steps, after which the device was `lag_s` behind it. So long it had work in
    each of the waits but the first, which began with nothing left to do.
    """
    return max(wait_s - (num_steps - 1) * lag_s, 0.0) / elapsed_s


def verdict(images_per_s: float, data_idle_share: float, device_lag: float, *, on_gpu: bool) -> str:
    """In a sentence: what binds, and what would raise the rate.

    `data_idle_share` is `idle_share`; `device_lag` how many steps' time the device took, once the loop asked for its
    results, to have them (on CPUs next to none).
    """
    if data_idle_share >= _MOST_IDLE:
        raised = images_per_s / max(1 - data_idle_share, 1e-3)
        return (
            f"data-bound: {data_idle_share:.1%} of the time devices stood idle for data; pack the images (jobs.pack, "
            f"reencode.shorter_side), give a worker more CPUs or set data.cache, which would raise {images_per_s:,.0f} "
            f"to {raised:,.0f} images/s"
        )
    if on_gpu and device_lag < _LEAST_LAG:
        return (
            "launch-bound: the GPU has done a step as soon as it is launched, and stood idle for data only "
            f"{data_idle_share:.1%} of the time; compute.compile, a larger batch_size, or more "
            f"data.decode_processes with fewer threads beside the loop, would raise {images_per_s:,.0f} images/s"
        )
    return (
        f"compute-bound: {data_idle_share:.1%} of the time devices stood idle for data; more or faster ones would "
        f"raise {images_per_s:,.0f} images/s"
    )
