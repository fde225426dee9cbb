"""Shards looked at: verified, counted, drawn, unpacked."""
