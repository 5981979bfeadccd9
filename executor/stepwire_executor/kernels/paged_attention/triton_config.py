"""Launch configurations of the Triton attention kernels, by device.

Nothing is tuned at run time. Tiles of keys have one size for decode and prefill, and each row of
scores belongs to one warp (or both kernels share their shape), so that both reduce a row in the
same order: that is what makes a row's bits independent of how its prompt was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepwire_executor.kernels.launch import ceil_div, next_power_of_two
from stepwire_executor.kv_cache import FP8_DTYPE

MIN_SPLIT_TOKENS = 512
"""Fewest tokens of context a split, which starts at a multiple of its length."""

MAX_SPLITS = 64
"""Splits of a sequence as long as the block table is wide: they take scratch in proportion."""

MAX_DECODE_QUERY = 8
"""Most query tokens of a sequence that the decode kernel takes: a token and seven drafts."""

COMBINE_STAGES = 6
"""Splits in flight in the program, of one warp, that joins those of one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """Shape of one program."""

    block_m: int
    """Packed rows: query tokens times the query heads of one KV head."""
    block_n: int
    """Tokens of context a tile; divides MIN_SPLIT_TOKENS."""
    num_warps: int
    num_stages: int
    """Tiles in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Shapes of both kernels on one device."""

    decode: TileConfig
    prefill: TileConfig
    decode_programs_per_multiprocessor: int = 2
    """Persistent programs; what registers and shared memory hold at once."""


def _config(
    *,
    block_m: tuple[int, int],
    block_n: int,
    num_warps: tuple[int, int],
    num_stages: tuple[int, int],
    programs: int = 2,
) -> AttentionConfig:
    decode, prefill = (
        TileConfig(block_m=m, block_n=block_n, num_warps=warps, num_stages=stages)
        for m, warps, stages in zip(block_m, num_warps, num_stages, strict=True)
    )
    return AttentionConfig(
        decode=decode, prefill=prefill, decode_programs_per_multiprocessor=programs
    )


# Chosen from the compiler's output, not yet measured: docs/adr/0006 has the counts and the model.
# 64 rows are what wgmma takes at least: a decode batch leaves most of them empty, but reads
# memory while it multiplies, and computes a row with the very instructions of prefill.
_WIDE = _config(block_m=(64, 64), block_n=32, num_warps=(8, 8), num_stages=(2, 2), programs=1)
_DEFAULT = {
    64: _config(block_m=(64, 64), block_n=64, num_warps=(8, 8), num_stages=(2, 2)),
    128: _config(block_m=(64, 64), block_n=64, num_warps=(8, 8), num_stages=(2, 2)),
    256: _WIDE,
}
_HOPPER = {
    64: _config(block_m=(64, 128), block_n=64, num_warps=(4, 8), num_stages=(3, 3), programs=3),
    128: _config(block_m=(64, 128), block_n=64, num_warps=(4, 8), num_stages=(3, 3)),
    256: _WIDE,
}
_HOPPER_FP8 = {
    **_HOPPER,
    64: _config(block_m=(64, 128), block_n=64, num_warps=(4, 8), num_stages=(4, 2)),
    # Tiles of half the bytes: one more in flight. A third stage of prefill spills 8 bytes.
    128: _config(block_m=(64, 128), block_n=64, num_warps=(4, 8), num_stages=(4, 2)),
}
# Products of float32 are exact ("ieee") and run outside the tensor cores.
_FLOAT32 = {
    128: _config(block_m=(32, 32), block_n=32, num_warps=(4, 4), num_stages=(2, 2)),
    256: _config(block_m=(16, 16), block_n=16, num_warps=(4, 4), num_stages=(2, 2)),
}


def choose_config(
    capability: int, *, head_dim: int, dot_dtype: torch.dtype, page_dtype: torch.dtype
) -> AttentionConfig:
    """Return the shapes for a compute capability (major * 10 + minor), or the default's.

    Raises ValueError where head_dim is above 256.
    """
    if dot_dtype == torch.float32:
        table = _FLOAT32
    elif capability != 90:
        table = _DEFAULT
    else:
        table = _HOPPER_FP8 if page_dtype == FP8_DTYPE else _HOPPER
    for limit, config in sorted(table.items()):
        if head_dim <= limit:
            return config
    raise ValueError(f"head_dim must be at most 256, not {head_dim}")


def choose_split_tokens(max_context: int) -> int:
    """Return the tokens a split, for block tables that hold max_context tokens a sequence.

    A power of two, so that no table has more than MAX_SPLITS. A row's bits depend on it: steps
    whose rows are to agree need block tables of one width.
    """
    return max(MIN_SPLIT_TOKENS, next_power_of_two(max(1, ceil_div(max_context, MAX_SPLITS))))


def choose_dot_dtype(
    query_dtype: torch.dtype, page_dtype: torch.dtype, *, head_dim: int
) -> torch.dtype:
    """Return the type that both operands of a product are brought to.

    e4m3 becomes float16, one packed conversion; bfloat16 takes three. A bfloat16 query that is
    converted is kept in registers, though, of which head_dim above 128 leaves none. Types that
    hold each other's values only in part meet in float32.
    """
    if query_dtype == torch.float32:
        return torch.float32
    if page_dtype == FP8_DTYPE:
        return query_dtype if head_dim > 128 else torch.float16
    return page_dtype if page_dtype == query_dtype else torch.float32
