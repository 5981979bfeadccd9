"""What the native kernels ask of KV pages."""

from __future__ import annotations

import math

import torch

from stepwire_executor.kernels.native.library import DTYPE_CODES
from stepwire_executor.kv_cache import FP8_DTYPE, SCALE_DTYPE, KVPages


def check_pages(pages: KVPages, head_dim: int, *, has_softcap: bool = False) -> None:
    """Raise ValueError unless the kernels can address pages of head_dim."""
    key, value = pages.key, pages.value
    if key.shape != value.shape or key.dtype != value.dtype or key.shape[3] != head_dim:
        raise ValueError(
            f"pages are {key.dtype} {tuple(key.shape)} and {value.dtype} {tuple(value.shape)}, "
            f"expected equal ones of head_dim {head_dim}"
        )
    if key.dtype not in DTYPE_CODES or not key.is_contiguous() or not value.is_contiguous():
        raise ValueError(
            f"pages must be contiguous float32, bfloat16, float16 or e4m3: {key.dtype}"
        )
    offset = pages.key_offset
    if offset is not None and has_softcap:
        raise ValueError("a softcap sees what key_offset takes from scores: use pages without it")
    if offset is not None and (
        pages.key_scale is None
        or offset.shape != (key.shape[1], head_dim)
        or offset.dtype != torch.float32
        or not offset.is_contiguous()
    ):
        raise ValueError(
            "key_offset must be contiguous float32 [num_kv_heads, head_dim] and goes with a scale "
            "a token"
        )
    for scale, static_scale in (
        (pages.key_scale, pages.static_key_scale),
        (pages.value_scale, pages.static_value_scale),
    ):
        num_kinds = (scale is not None) + (static_scale is not None)
        if num_kinds != (key.dtype == FP8_DTYPE):
            raise ValueError("e4m3 pages, and only they, have scales: a token's or static ones")
        if (scale is None) != (pages.key_scale is None):
            raise ValueError("keys and values must have scales of the same kind")
        if static_scale is not None and not 0 < static_scale < math.inf:
            raise ValueError(f"static scales must be positive and finite, not {static_scale}")
        if scale is not None and (
            scale.shape != key.shape[:3] or scale.dtype != SCALE_DTYPE or not scale.is_contiguous()
        ):
            raise ValueError("scales must be contiguous bfloat16 [num_blocks, num_kv_heads, size]")
