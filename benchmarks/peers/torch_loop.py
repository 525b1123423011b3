"""Plain PyTorch classification of a local image folder: what one does on one machine without an engine.

    python benchmarks/peers/torch_loop.py IMAGE_DIR OUTPUT_DIR [ARCHITECTURE]

float32, torchvision's own eval transform, DataLoader with two workers, batch 100. Prints one JSON line: images,
seconds to the end of the first batch and to the end of the output, images/s between the two.
"""

from stopwatch import fresh_mark, note_batch, tell

# isort: split
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model
from torchvision.transforms._presets import ImageClassification


class Folder(Dataset[tuple[torch.Tensor, str]]):
    def __init__(self, source: str) -> None:
        self.paths = sorted(str(path) for path in Path(source).iterdir() if path.is_file())
        self.transform = ImageClassification(crop_size=224)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return self.transform(Image.open(self.paths[index]).convert("RGB")), self.paths[index]


def main(source: str, output: str, architecture: str = "resnet18") -> None:
    mark = fresh_mark(output)
    torch.manual_seed(0)
    model = get_model(architecture).eval()
    paths: list[str] = []
    labels: list[int] = []
    with torch.inference_mode():
        for images, batch_paths in DataLoader(Folder(source), batch_size=100, num_workers=2):
            labels += model(images).argmax(1).tolist()
            paths += batch_paths
            note_batch(mark, len(batch_paths))
    Path(output).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"path": paths, "label": labels}), Path(output) / "predictions.parquet")
    tell("torch_loop", architecture, len(paths), mark)


if __name__ == "__main__":
    main(*sys.argv[1:])
