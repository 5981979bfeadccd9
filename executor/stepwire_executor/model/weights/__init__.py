"""Checkpoints as sources of tensors, one module a file format."""
