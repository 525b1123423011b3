"""What the ends of epochs cost a training worker that reads packed shards: its batches alone, taken as they come.

    python -m benchmarks.epoch_ends --images ../shared/data/imagenet-sample-700.tar [--store s3://bucket/prefix]
        [--copies 10] [--epochs 4]

Prints the images/s of all epochs but the first, and the longest wait for a batch at an epoch's beginning beside the
usual one. The packed set is left at `--store`, and taken from there the next time.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.training_speed import packed_run, unpack
from pipeline import storage
from pipeline.data.training_set import TrainingSet
from pipeline.training.feed import batches_of, make_loader
from pipeline.training.run import TrainingRun
from pipeline.training.worker import Worker


def main() -> None:
    arguments = _parse()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        unpack(root, arguments.images, arguments.copies)
        packed = arguments.store or str(root / "packed")
        run = packed_run(root, packed, epochs=arguments.epochs, batch_size=arguments.batch, augment={"size": 176})
        waits = _waits(run, arguments.threads)
    per_epoch = run.steps_per_epoch
    firsts = [max(waits[epoch * per_epoch : epoch * per_epoch + 3]) for epoch in range(1, arguments.epochs)]
    result = {
        "images_per_s": round(run.num_images * (arguments.epochs - 1) / sum(waits[per_epoch:]), 1),
        "usual_wait_s": round(statistics.median(waits), 3),
        "longest_wait_at_a_beginning_s": round(statistics.median(firsts), 3),
        "threads": arguments.threads,
    }
    print(json.dumps(result))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="tar of nXXXXXXXX_name.JPEG")
    parser.add_argument("--store", help="URI to pack to; unset: a local folder")
    parser.add_argument("--copies", type=int, default=10, help="of each image, to fill an epoch")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="that decode")
    return parser.parse_args()


def _waits(run: TrainingRun, num_threads: int) -> list[float]:
    """Seconds that each batch of the run is waited for, none of which is used."""
    images, worker = TrainingSet.open(run.config.train), Worker(num_threads=num_threads)
    waits, last = [], time.perf_counter()
    for _ in storage.run_ahead(batches_of(run, worker, make_loader(run, worker, images), 0), 3):
        waits.append(time.perf_counter() - last)
        last = time.perf_counter()
    return waits


if __name__ == "__main__":
    main()
