"""Rotary position embedding fused with the write of keys and values into their pages."""

from stepwire_executor.kernels.rope_and_write_kv.reference import MIN_AMAX

__all__ = ["MIN_AMAX"]
