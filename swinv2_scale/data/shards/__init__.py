"""Tars, their indexes and manifests: written, indexed, read."""
