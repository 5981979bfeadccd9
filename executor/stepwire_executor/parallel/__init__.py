"""Tensor parallelism: what part of a model a rank holds, and how ranks add and join tensors."""
