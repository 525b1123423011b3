"""The Parquet tables a run writes: their schemas, how a shard's files are written, how they are read back."""

from pipeline.tables.reading import open_table

__all__ = ["open_table"]
