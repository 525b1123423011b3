"""Reading the images of manifests, for tests: loose, and packed in Parquet and tar."""

import io
import tarfile
from collections.abc import Sequence
from random import Random
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.manifest import Manifest, write_manifest
from pipeline.data.packed import PackedSource, WebDatasetSource
from pipeline.data.readers import read_shard
from pipeline.data.sources import Source
from pipeline.data.spool import Selection
from pipeline.errors import ImageError

EVERYWHERE = [f"{scheme}://" for scheme in storage.SCHEMES]
MAX_BYTES = 1 << 20
CONTENTS = {f"{number:02d}.jpg": Random(number).randbytes(700 * number) for number in range(20)}


def manifest_of(
    source: Source, shard_size: int = 100, limit: int | None = None, sample: float | None = None
) -> Manifest:
    selection = Selection(limit=limit, sample=sample)
    return write_manifest(f"memory://{uuid4().hex}", source, shard_size=shard_size, selection=selection)


def read_all(manifest: Manifest, allowed_roots: Sequence[str] = EVERYWHERE) -> list[tuple[str, bytes | ImageError]]:
    found = []
    for shard in manifest.shards():
        images = manifest.images(shard)
        contents = read_shard(shard, images, allowed_roots=allowed_roots, max_bytes=MAX_BYTES)
        found += list(zip(images["uri"].to_pylist(), contents, strict=True))
    return found


def kinds(found: list[tuple[str, bytes | ImageError]]) -> list[str]:
    return [content.error if isinstance(content, ImageError) else "ok" for _, content in found]


def messages(found: list[tuple[str, bytes | ImageError]]) -> list[str]:
    return [content.message for _, content in found if isinstance(content, ImageError)]


def pack_parquet(root: str) -> Source:
    table = pa.table(
        {"uri": list(CONTENTS), "bytes": list(CONTENTS.values()), "size": [len(c) for c in CONTENTS.values()]}
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=8)
    storage.write(f"{root}/packed.parquet", file.getvalue())
    return PackedSource(f"{root}/packed.parquet")


def pack_tar(root: str) -> Source:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, (name, content) in enumerate(CONTENTS.items()):
            for member, data in ((f"{'long/' * 30 * (number % 2)}{name}", content), (name.replace("jpg", "cls"), b"1")):
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    storage.write(f"{root}/packed.tar", file.getvalue())
    return WebDatasetSource(f"{root}/packed.tar")
