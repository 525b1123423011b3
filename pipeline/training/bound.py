"""What bounds a training: its data, its steps, or the loop that launches a GPU's work.

A GPU works behind the loop's back. How many steps it is behind when the loop asks for its results tells how much of the
time that the loop waited for data was idle for the GPU too, and whether there is any work it is still to do: a GPU that
is never behind waits for the loop.
"""

_MOST_IDLE = 0.05  # of the time; below that the data keeps up
_LEAST_LAG = 0.1  # of a step; a GPU that sets the pace is nearly a step behind, or several


def verdict(images_per_s: float, data_wait_share: float, device_lag: float, *, on_gpu: bool) -> str:
    """In a sentence: what binds, and what would raise the rate.

    `data_wait_share` is the share of the time that the loop waited for batches; `device_lag` how many steps' time the
    device took, once the loop asked for its results, to have them (on CPUs next to none).
    """
    idle_share = max(data_wait_share - device_lag, 0.0)
    if idle_share >= _MOST_IDLE:
        raised = images_per_s / max(1 - idle_share, 1e-3)
        return (
            f"data-bound: {idle_share:.1%} of the time went into waiting for data; pack the images (jobs.pack, "
            f"reencode.shorter_side), give a worker more CPUs or set data.cache, which would raise {images_per_s:,.0f} "
            f"to {raised:,.0f} images/s"
        )
    if on_gpu and device_lag < _LEAST_LAG:
        return (
            f"launch-bound: the GPU has done a step as soon as it is launched, and only {idle_share:.1%} of the time "
            "went into waiting for data; compute.compile, a larger batch_size, or more data.decode_processes, whose "
            f"threads take the interpreter from the loop, would raise {images_per_s:,.0f} images/s"
        )
    return (
        f"compute-bound: {idle_share:.1%} of the time went into waiting for data; more or faster devices would raise "
        f"{images_per_s:,.0f} images/s"
    )
