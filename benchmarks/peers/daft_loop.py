"""Stock Daft classification of a local image folder, on its native runner.

    python benchmarks/peers/daft_loop.py IMAGE_DIR OUTPUT_DIR [ARCHITECTURE]

float32, torchvision's own eval transform, batch 100, one model instance. Prints one JSON line: images, seconds to the
end of the first batch and to the end of the output, images/s between the two. Needs daft, torch, torchvision, Pillow.
"""

from stopwatch import fresh_mark, note_batch, tell

# isort: split
import sys
from pathlib import Path

import daft
import numpy as np
import torch
from PIL import Image
from torchvision.models import get_model
from torchvision.transforms._presets import ImageClassification

PIXELS = daft.DataType.tensor(daft.DataType.float32(), shape=(3, 224, 224))
transform = ImageClassification(crop_size=224)


def preprocess(pixels: np.ndarray) -> np.ndarray:
    return transform(Image.fromarray(pixels)).numpy()


@daft.cls(max_concurrency=1)
class Classifier:
    def __init__(self, architecture: str, mark: str) -> None:
        torch.manual_seed(0)
        self.model = get_model(architecture).eval()
        self.mark = Path(mark)

    @daft.method.batch(return_dtype=daft.DataType.int64(), batch_size=100)
    def label(self, images: daft.Series) -> list[int]:
        arrays = images.to_pylist()
        if not arrays:
            return []
        with torch.inference_mode():
            batch = torch.stack([torch.from_numpy(array) for array in arrays])
            labels: list[int] = self.model(batch).argmax(1).tolist()
        note_batch(self.mark, len(labels))
        return labels


def main(source: str, output: str, architecture: str = "resnet18") -> None:
    mark = fresh_mark(output)
    frame = daft.from_glob_path(f"{source}/*")
    decoded = frame["path"].download().decode_image(mode=daft.ImageMode.RGB)
    frame = frame.with_column("image", decoded.apply(preprocess, return_dtype=PIXELS))
    frame = frame.with_column("label", Classifier(architecture, str(mark)).label(frame["image"]))
    frame.select("path", "label").write_parquet(output)
    tell("daft_loop", architecture, sum(1 for path in Path(source).iterdir() if path.is_file()), mark)


if __name__ == "__main__":
    main(*sys.argv[1:])
