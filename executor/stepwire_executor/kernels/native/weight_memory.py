"""Memory for packed weights, side by side in pages of 2 MiB where the system has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepwire_executor.huge_pages import zeroed_bytes

_REGION_BYTES = 16 << 20
_LINE = 64
"""Bytes of a cache line, which tensors begin at."""


class WeightMemory:
    """Tensors one behind the other, in the order in which a step reads them.

    A step reads every weight once, and one after the other. A weight alone is mostly smaller than
    a page of 2 MiB, hence the regions.
    """

    def __init__(self) -> None:
        """Take no memory yet."""
        self._region = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor of any content; its region lives as long as any in it."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > self._region.nbytes:
            self._region, self._used = zeroed_bytes(max(size, _REGION_BYTES)), 0
        start, self._used = self._used, self._used + -(-size // _LINE) * _LINE
        return self._region[start : start + size].view(dtype).view(tuple(shape))
