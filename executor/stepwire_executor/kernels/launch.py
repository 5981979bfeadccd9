"""What every launch of a Triton kernel needs: the device's configuration and its grid's sizes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TypeVar

import torch

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What activations and weights may be."""
TRITON_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
}
"""Names in signatures that are compiled ahead of time."""
DEFAULT_CAPABILITY = 0
"""Key of the configuration for a device that no table names."""

Config = TypeVar("Config")


@functools.cache
def capability(device: torch.device) -> int:
    """Return the compute capability as major * 10 + minor; 0 on a CPU (the interpreter)."""
    if device.type != "cuda":
        return DEFAULT_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many a device has; 0 on a CPU (the interpreter)."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def configuration(table: Mapping[int, Config], capability: int) -> Config:
    """Return the entry of a capability, or the default."""
    return table.get(capability, table[DEFAULT_CAPABILITY])


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n, which must be positive."""
    return 1 << (n - 1).bit_length()
