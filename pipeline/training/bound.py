"""What bounds a training: its data or its steps, from the share of the time that the loop waited for batches."""

_MOST_WAIT = 0.05  # of the time; below that the data keeps up


def verdict(images_per_s: float, data_wait_share: float) -> str:
    """In a sentence: what binds, and what the rate would be if it did not."""
    if data_wait_share < _MOST_WAIT:
        return (
            f"compute-bound: {data_wait_share:.1%} of the time went into waiting for data; more or faster devices "
            f"would raise {images_per_s:,.0f} images/s"
        )
    raised = images_per_s / max(1 - data_wait_share, 1e-3)
    return (
        f"data-bound: {data_wait_share:.1%} of the time went into waiting for data; pack the images (jobs.pack, "
        f"reencode.shorter_side), give a worker more CPUs or set data.cache, which would raise {images_per_s:,.0f} to "
        f"{raised:,.0f} images/s"
    )
