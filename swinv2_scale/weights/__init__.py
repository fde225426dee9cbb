"""Weights in everybody's format, as named tensors; nothing here knows a model class."""
