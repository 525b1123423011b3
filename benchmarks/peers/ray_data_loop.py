"""Stock Ray Data classification of a local image folder: the baseline that a Ray user writes first.

    python benchmarks/peers/ray_data_loop.py IMAGE_DIR OUTPUT_DIR [ARCHITECTURE]

float32, torchvision's own eval transform, batch 100, one actor, `write_parquet`; where there is a GPU the actor's, in
batches of 256. Prints one JSON line: images, seconds to the end of the first batch and to the end of the output,
images/s between the two.
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
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = get_model(architecture).eval().to(self.device)
        self.mark = mark

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(batch["image"].copy()).to(self.device))
        labels = logits.argmax(1).cpu().numpy()
        note_batch(self.mark, len(labels))
        return {"path": batch["path"], "label": labels}


def main(source: str, output: str, architecture: str = "resnet18") -> None:
    mark = fresh_mark(output)
    ray.init("local", log_to_driver=False, include_dashboard=False)
    has_gpu = "GPU" in ray.cluster_resources()
    (
        ray.data.read_binary_files(source, include_paths=True)
        .map(preprocess)
        .map_batches(
            Classifier,
            fn_constructor_args=(architecture, mark),
            batch_size=256 if has_gpu else 100,
            num_gpus=1 if has_gpu else None,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .write_parquet(output)
    )
    tell("ray_data_loop", architecture, sum(1 for path in Path(source).iterdir() if path.is_file()), mark)


if __name__ == "__main__":
    main(*sys.argv[1:])
