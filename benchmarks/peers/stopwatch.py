"""A peer's times, told on one JSON line: import it before what takes seconds to import, for that is when it starts.

The model may run in another process than the one that tells, so the end of the first batch is left in a file.
"""

import json
import time
from pathlib import Path

START = time.time()


def note_batch(mark: Path, num_images: int) -> None:
    """A batch is done; of the first one the time and the number of images are kept in `mark`."""
    if not mark.exists():
        mark.write_text(json.dumps([time.time(), num_images]))


def tell(name: str, architecture: str, num_images: int, mark: Path) -> None:
    """The output is written: print seconds from the start, and images/s after the first batch."""
    end = time.time()
    first_batch_end, num_in_first_batch = json.loads(mark.read_text())
    figures = {
        "peer": name,
        "architecture": architecture,
        "images": num_images,
        "start_up_s": round(first_batch_end - START, 2),
        "total_s": round(end - START, 2),
        "images_per_s": round((num_images - num_in_first_batch) / (end - first_batch_end), 2),
    }
    print(json.dumps(figures), flush=True)


def fresh_mark(output: str) -> Path:
    """Where the first batch of this run is noted, beside its output."""
    mark = Path(f"{output}.first_batch")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    return mark
