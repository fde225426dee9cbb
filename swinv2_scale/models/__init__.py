"""Swin V2, and the operations that it is made of."""
