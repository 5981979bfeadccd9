"""Host memory in pages of 2 MiB, where the system has them."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor


def zeroed_bytes(num_bytes: int) -> Tensor:
    """Return [num_bytes] uint8, zero and page-aligned; takes memory as it is written.

    What is read from end to end is read faster so: over pages of 4 KiB a core stops at each for
    its translation, and its prefetcher does not look past it. The first write of a page zeroes all
    of it, and may wait for memory to be compacted, so this is for what is filled at start. Raises
    MemoryError.
    """
    try:
        # Private: huge pages of shared memory are a setting of their own, mostly off.
        memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError from None
    with contextlib.suppress(AttributeError, OSError):  # not every system has such pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes)
