"""Paged storage of keys and values."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_DTYPE = torch.bfloat16
"""Of the scale that a quantised vector brings: as float32's, its exponent has 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPages:
    """Pages of one layer.

    A quantised element stands for key[b, h, o, d] * key_scale[b, h, o]; a scale of NaN marks a
    vector that was not finite. Unquantised pages have no scales.
    """

    key: Tensor
    """[num_blocks, num_kv_heads, block_size, head_dim], float32, bfloat16, float16 or e4m3."""
    value: Tensor
    """As key."""
    key_scale: Tensor | None = None
    """[num_blocks, num_kv_heads, block_size] bfloat16."""
    value_scale: Tensor | None = None
    """As key_scale."""

    @property
    def block_size(self) -> int:
        """Tokens a page."""
        return self.key.shape[2]


def bytes_per_block(
    *, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of one block over all layers, scales included."""
    per_vector = head_dim * dtype.itemsize + (SCALE_DTYPE.itemsize if dtype == FP8_DTYPE else 0)
    return 2 * num_layers * num_kv_heads * block_size * per_vector


class KVCache:
    """The pages of all layers."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate zeroed pages; dtype float8_e4m3fn brings a bfloat16 scale a token and head.

        On CPU a page takes memory when it is first written. Raises MemoryError, or
        RuntimeError on other devices, where the pages cannot be had.
        """
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.num_bytes = num_blocks * bytes_per_block(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            head_dim=head_dim,
            dtype=dtype,
        )

        def scales() -> Tensor | None:
            if dtype != FP8_DTYPE:
                return None
            return _zeros(shape[:3], SCALE_DTYPE, device)

        self.layers = tuple(
            KVPages(
                key=_zeros(shape, dtype, device),
                value=_zeros(shape, dtype, device),
                key_scale=scales(),
                value_scale=scales(),
            )
            for _ in range(num_layers)
        )

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages in every layer; sources, targets: [num_copies] int64 block ids."""
        for pages in self.layers:
            for tensor in (pages.key, pages.value, pages.key_scale, pages.value_scale):
                if tensor is not None:
                    tensor[targets] = tensor[sources]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros, which on CPU would write every page: seconds for a pool of gigabytes.

    Anonymous memory is zero, page-aligned and committed on first use.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_elements = math.prod(shape)
    try:
        memory = mmap.mmap(-1, max(1, num_elements * dtype.itemsize))
    except OSError:
        raise MemoryError from None
    return torch.frombuffer(memory, dtype=dtype, count=num_elements).view(shape)
