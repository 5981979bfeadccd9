"""Paged storage of keys and values."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_DTYPE = torch.bfloat16
"""Of the scale that a quantised vector brings: as float32's, its exponent has 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticScales:
    """What the fp8 keys and values of one layer are divided by, all of them, as calibrated."""

    key: float
    """Positive and finite, a float32."""
    value: float
    """As key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPages:
    """Pages of one layer.

    A quantised element stands for key[b, h, o, d] * key_scale[b, h, o], or for
    key[b, h, o, d] * static_key_scale: quantised pages have the one or the other, for keys as for
    values, and unquantised pages have neither. Keys with scales of their own are mixed, as their
    queries are (`kernels.interface.RopeAndWriteKV`). A scale of NaN marks a vector that was not
    finite.
    """

    key: Tensor
    """[num_blocks, num_kv_heads, block_size, head_dim], float32, bfloat16, float16 or e4m3."""
    value: Tensor
    """As key."""
    key_scale: Tensor | None = None
    """[num_blocks, num_kv_heads, block_size] bfloat16."""
    value_scale: Tensor | None = None
    """As key_scale."""
    key_offset: Tensor | None = None
    """[num_kv_heads, head_dim] float32, what is taken from each key before it is mixed; only where
    keys have scales of their own. All of a query's scores fall by the same number, which softmax
    does not see, so nothing adds it back; a softcap would see it."""
    static_key_scale: float | None = None
    """Of every key of the layer; positive and finite."""
    static_value_scale: float | None = None
    """As static_key_scale."""

    @property
    def block_size(self) -> int:
        """Tokens a page."""
        return self.key.shape[2]


def bytes_per_block(
    *,
    num_layers: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    has_static_scales: bool = False,
) -> int:
    """Bytes of one block over all layers, scales included; static ones take none."""
    has_scales = dtype == FP8_DTYPE and not has_static_scales
    per_vector = head_dim * dtype.itemsize + (SCALE_DTYPE.itemsize if has_scales else 0)
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
        static_scales: Sequence[StaticScales] | None = None,
        key_offsets: Sequence[Tensor] | None = None,
    ) -> None:
        """Allocate zeroed pages; dtype float8_e4m3fn brings a bfloat16 scale a token and head.

        static_scales: one a layer, in place of those; only fp8 pages have any. On CPU a page takes
        memory when it is first written. key_offsets: as KVPages.key_offset, one a layer; only fp8
        pages without static scales have any. Raises MemoryError, or RuntimeError on other
        devices, where the pages cannot be had.
        """
        if static_scales is not None and (dtype != FP8_DTYPE or len(static_scales) != num_layers):
            raise ValueError("static scales go with float8_e4m3fn pages, one pair a layer")
        has_scales = dtype == FP8_DTYPE and static_scales is None
        if key_offsets is not None and (not has_scales or len(key_offsets) != num_layers):
            raise ValueError("key offsets go with a scale a token and head, one tensor a layer")
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
            has_static_scales=static_scales is not None,
        )

        def scales() -> Tensor | None:
            if not has_scales:
                return None
            return _zeros(shape[:3], SCALE_DTYPE, device)

        layers: Sequence[StaticScales | None] = static_scales or [None] * num_layers
        offsets: Sequence[Tensor | None] = key_offsets or [None] * num_layers
        self.layers = tuple(
            KVPages(
                key=_zeros(shape, dtype, device),
                value=_zeros(shape, dtype, device),
                key_scale=scales(),
                value_scale=scales(),
                key_offset=offset,
                static_key_scale=None if static is None else static.key,
                static_value_scale=None if static is None else static.value,
            )
            for static, offset in zip(layers, offsets, strict=True)
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
