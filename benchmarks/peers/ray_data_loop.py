"""Stock Ray Data classification of a local image folder: the baseline that a Ray user writes first.

    python benchmarks/peers/ray_data_loop.py IMAGE_DIR OUTPUT_DIR [ARCHITECTURE]

float32, torchvision's own eval transform, batch 100, one actor, `write_parquet`. Prints one JSON line: images, seconds
to the end of the first batch and to the end of the output, images/s between the two.
"""

from stopwatch import fresh_mark, note_batch, tell

# isort: split
import io
import sys
from pathlib import Path
from typing import Any

import ray
import torch
from PIL import Image
from torchvision.models import get_model
from torchvision.transforms._presets import ImageClassification

transform = ImageClassification(crop_size=224)


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
    return {"path": row["path"], "image": transform(image).numpy()}


class Classifier:
    def __init__(self, architecture: str, mark: Path) -> None:
        torch.manual_seed(0)
        self.model = get_model(architecture).eval()
        self.mark = mark

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(batch["image"].copy()))
        labels = logits.argmax(1).numpy()
        note_batch(self.mark, len(labels))
        return {"path": batch["path"], "label": labels}


def main(source: str, output: str, architecture: str = "resnet18") -> None:
    mark = fresh_mark(output)
    ray.init("local", log_to_driver=False, include_dashboard=False)
    (
        ray.data.read_binary_files(source, include_paths=True)
        .map(preprocess)
        .map_batches(
            Classifier,
            fn_constructor_args=(architecture, mark),
            batch_size=100,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .write_parquet(output)
    )
    tell("ray_data_loop", architecture, sum(1 for path in Path(source).iterdir() if path.is_file()), mark)


if __name__ == "__main__":
    main(*sys.argv[1:])
