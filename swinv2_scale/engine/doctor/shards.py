"""Whether this node can read the shards of a configuration: manifests whole, a sample of every so many shards."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from swinv2_scale import dist
from swinv2_scale.config.run import RunConfig, ShardPattern, patterns_of
from swinv2_scale.data.remote.files import RemoteFiles, is_remote
from swinv2_scale.data.remote.pipe import PIPE_PREFIX, pipe_command
from swinv2_scale.data.shards.reader import ShardReader
from swinv2_scale.data.shards.shard_set import ShardSet, read_shard_set
from swinv2_scale.data.sources.embedded import EMBEDDED, EMBEDDED_PREFIX
from swinv2_scale.engine.doctor.findings import Finding, of_error, problem, size
from swinv2_scale.errors import DataError, ScaleError

#: Shards that a node reads from, spread evenly; each node starts with another one.
_LOCAL, _REMOTE = 64, 8
_LONGEST_S = 8.0


def look_at_shards(config: RunConfig) -> list[Finding]:
    """By one process of each node; the digest of a data set's manifests is a fact that all must share."""
    remote = RemoteFiles(config.data.remote, num_readers=dist.local_world_size() * (config.data.num_workers + 1))
    findings = []
    for use, pattern in (("training", config.data.train), ("validation", config.data.validation)):
        if pattern is None:
            continue
        check = f"{use} data"
        try:
            findings.append(_look_at(config, remote, pattern, check))
        except (ScaleError, OSError) as error:
            findings.append(of_error(check, error))
    return findings


def _look_at(config: RunConfig, remote: RemoteFiles, pattern: ShardPattern, check: str) -> Finding:
    patterns = []
    for part in patterns_of(pattern):
        if part.startswith(PIPE_PREFIX):
            pipe_command(part, config.data.remote.allowed_commands)
        if part.startswith(EMBEDDED_PREFIX):
            short = part.removeprefix(EMBEDDED_PREFIX)
            if short not in EMBEDDED:
                raise DataError(f"no embedded data set {short!r}", f"there are: {', '.join(EMBEDDED)}")
            folder = Path(config.data.shards_dir) / short
            if not folder.exists():
                return Finding(check, f"{part} comes with the package; the job writes it to {folder}")
            part = str(folder / "*.tar")
        patterns.append(part)
    shards = read_shard_set(patterns, remote, config.data.index_dir)
    if check.startswith("training") and shards.num_samples < config.data.global_batch_size:
        found = f"{shards.num_samples} samples, fewer than data.global_batch_size {config.data.global_batch_size}"
        return problem(check, found, "add shards or make the global batch smaller")
    return replace(_read_some(shards, remote, check), facts={"the digest of its manifests": shards.digest[:12]})


def _read_some(shards: ShardSet, remote: RemoteFiles, check: str) -> Finding:
    """The first sample of some shards, as training reads it: index, byte range, checksum."""
    readable = [number for number in range(len(shards.locations)) if shards.sizes[number]]
    readable = [number for number in readable if not shards.locations[number].startswith(PIPE_PREFIX)]
    most = _REMOTE if any(map(is_remote, shards.locations)) else _LOCAL
    stride = max(-(-len(readable) // most), 1)
    node = dist.rank() // dist.local_world_size()
    reader, num_read, begun = ShardReader(shards, remote), 0, time.monotonic()
    try:
        for number in readable[node % stride :: stride]:
            reader.read(number, 0)
            num_read += 1
            if time.monotonic() - begun > _LONGEST_S:
                break
    except ScaleError as error:
        return problem(check, error.message, error.next_step or "copy the shards again")
    finally:
        reader.close()
    seconds = time.monotonic() - begun
    text = f"{shards.num_samples:,} samples in {len(shards.locations):,} shards ({size(shards.num_bytes)})"
    if not readable:
        return Finding(check, f"{text}; its commands are run by the job, not here")
    each = f"{1000 * seconds / max(num_read, 1):.1f} ms each"
    return Finding(check, f"{text}; every node read one sample of {num_read} shards, {each}", amount=-seconds)
