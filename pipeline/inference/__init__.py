"""One pass of trained networks over a manifest: planned, run on Ray Data, committed shard by shard, proven whole."""
