"""One tar and its index, without a manifest."""

from __future__ import annotations

from pathlib import Path

from swinv2_scale.data.shards.indexing import scan_shard
from swinv2_scale.data.shards.manifest import INDEX_SUFFIX, ShardEntry


def index_shard(path: Path) -> ShardEntry:
    """Write the index beside the tar; DataError if it is damaged."""
    with path.open("rb") as stream:
        scan = scan_shard(stream, str(path), path.name)
    path.with_name(path.name + INDEX_SUFFIX).write_bytes(scan.index)
    return scan.entry
