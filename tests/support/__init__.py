"""Real processes, real shards: what several tests start from."""
