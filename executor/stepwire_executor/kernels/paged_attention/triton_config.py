"""Launch configurations of the Triton attention kernels, by device.

Nothing is tuned at run time. Tiles of keys have one size for decode and prefill, and each row of
scores belongs to one warp (or both kernels share their shape), so that both reduce a row in the
same order: that is what makes a row's bits independent of how its prompt was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepwire_executor.kv_cache import FP8_DTYPE

SPLIT_TOKENS = 512
"""Tokens of context a split, which starts at a multiple of it in every sequence."""

MAX_DECODE_QUERY = 8
"""Most query tokens of a sequence that the decode kernel takes: a token and seven drafts."""

COMBINE_WARPS = 4
"""Warps of the program that joins the splits of one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """Shape of one program."""

    block_m: int
    """Packed rows: query tokens times the query heads of one KV head."""
    block_n: int
    """Tokens of context a tile; divides SPLIT_TOKENS."""
    num_warps: int
    num_stages: int
    """Tiles in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Shapes of both kernels on one device."""

    decode: TileConfig
    prefill: TileConfig
    decode_programs_per_multiprocessor: int = 2
    """Persistent programs; one more would not fit into shared memory."""


def _config(
    *, block_m: tuple[int, int], block_n: int, num_warps: tuple[int, int], num_stages: int
) -> AttentionConfig:
    decode, prefill = (
        TileConfig(block_m=m, block_n=block_n, num_warps=warps, num_stages=num_stages)
        for m, warps in zip(block_m, num_warps, strict=True)
    )
    return AttentionConfig(decode=decode, prefill=prefill)


# 64 rows are what wgmma takes at least: a decode batch leaves most of them empty, but reads
# memory while it multiplies, and computes a row with the very instructions of prefill.
# Tiles of 64 tokens at head_dim 128 spill 4 to 250 bytes a thread on sm_90, more elsewhere.
_SMALL = _config(block_m=(64, 64), block_n=32, num_warps=(8, 8), num_stages=2)
_DEFAULT = {
    # 256 threads read 64 tokens of 64 bytes 16 bytes at a time, but 32 tokens only 8.
    64: _config(block_m=(64, 64), block_n=64, num_warps=(8, 8), num_stages=2),
    128: _SMALL,
    256: _SMALL,
}
_BY_CAPABILITY = {
    (9, 0): {
        64: _config(block_m=(64, 128), block_n=64, num_warps=(4, 8), num_stages=3),
        128: _config(block_m=(64, 128), block_n=32, num_warps=(4, 8), num_stages=4),
        256: _SMALL,
    },
}
# Products of float32 are exact ("ieee") and run outside the tensor cores.
_FLOAT32 = {
    128: _config(block_m=(32, 32), block_n=32, num_warps=(4, 4), num_stages=2),
    256: _config(block_m=(16, 16), block_n=16, num_warps=(4, 4), num_stages=2),
}


def choose_config(
    capability: tuple[int, int], *, head_dim: int, dot_dtype: torch.dtype
) -> AttentionConfig:
    """Return the shapes for a compute capability, falling back to those of the default.

    Raises ValueError where head_dim is above 256.
    """
    is_float32 = dot_dtype == torch.float32
    table = _FLOAT32 if is_float32 else _BY_CAPABILITY.get(capability, _DEFAULT)
    for limit, config in sorted(table.items()):
        if head_dim <= limit:
            return config
    raise ValueError(f"head_dim must be at most 256, not {head_dim}")


def choose_dot_dtype(query_dtype: torch.dtype, page_dtype: torch.dtype) -> torch.dtype:
    """Return the type that both operands of a product are brought to.

    e4m3 becomes float16, one packed conversion; bfloat16 would take three. Types that hold each
    other's values only in part meet in float32.
    """
    if query_dtype == torch.float32:
        return torch.float32
    if page_dtype == FP8_DTYPE:
        return torch.float16
    return page_dtype if page_dtype == query_dtype else torch.float32
