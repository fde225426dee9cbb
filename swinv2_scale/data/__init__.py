"""Shards, their order, and reading them."""
