"""Strict, typed configuration. Nothing here imports torch."""
