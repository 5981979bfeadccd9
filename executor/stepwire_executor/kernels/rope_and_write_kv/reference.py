"""Rotary position embedding and the write into KV pages, in torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.dtypes import accumulation_dtype
from stepwire_executor.kv_cache import FP8_DTYPE, FP8_MAX, SCALE_DTYPE, KVPages

KEY_SCALE_FACTORS = (1.0, 2**0.25, 2**0.5, 2**0.75)
"""Multiples of the least scale that are tried for a key: e4m3's steps double each octave, so that
some place within one suits a vector best."""
MIN_AMAX = 1e-12
"""Floor of a vector's largest magnitude, so that an all-zero vector's scale is a normal float."""


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + rotary_dim / 2) of each head; elements past rotary_dim stay.

    x: [num_tokens, heads, head_dim]; cos_sin: [num_tokens, rotary_dim], cosines then sines.
    Returns a new tensor in the accumulation dtype. Su et al. 2021, in the half-split order.
    """
    wide = x.to(accumulation_dtype(x))
    half = cos_sin.shape[-1] // 2
    cos, sin = torch.split(cos_sin.to(wide.dtype).unsqueeze(1), half, dim=-1)
    first, second = wide[..., :half], wide[..., half : 2 * half]
    return torch.cat(
        (first * cos - second * sin, second * cos + first * sin, wide[..., 2 * half :]), dim=-1
    )


def mixing_size(head_dim: int, rotary_dim: int) -> int:
    """Return how many elements of a head `mix` blends, a power of two.

    All of a head where their number is one and all of them turn; else what divides both the
    halves that are rotated and the elements behind them, so that no block crosses parts.
    """
    if rotary_dim == head_dim and head_dim & (head_dim - 1) == 0:
        return head_dim
    part = math.gcd(rotary_dim // 2, head_dim - rotary_dim)
    return part & -part


def mix(x: Tensor, size: int) -> Tensor:
    """Multiply each stretch of size elements by the Hadamard matrix over sqrt(size).

    x: [..., head_dim] float32 or float64. Orthogonal: applied to queries and keys alike it leaves
    their products as they are, but spreads over all elements of a key what would be a few large
    ones, whose rounding to e4m3 the same elements of the query would magnify. Shah et al. 2024
    (FlashAttention-3), section 3.3, without the random signs.
    """
    mixed = x.reshape(-1, size)
    stride = 1
    while stride < size:
        first, second = mixed.reshape(-1, 2, stride).unbind(dim=1)
        mixed = torch.stack((first + second, first - second), dim=1)
        stride *= 2
    return mixed.reshape(x.shape) / math.sqrt(size)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode vectors as e4m3 with one scale each.

    x: [..., head_dim]. Returns codes of x's shape and bfloat16 scales [...], rounded up, so that
    no element exceeds 448 of them. Where x holds NaN or infinity the scale is NaN.
    """
    wide = x.float()
    amax = wide.abs().amax(dim=-1)
    scale = round_up(amax.clamp(min=MIN_AMAX) / FP8_MAX)
    scale = scale.masked_fill(~amax.isfinite(), torch.nan)
    return encode(wide, scale.float().unsqueeze(-1)), scale


def quantise_key(x: Tensor) -> tuple[Tensor, Tensor]:
    """As quantise, by the one of KEY_SCALE_FACTORS whose squared error is least; ties by order."""
    wide = x.float()
    amax = wide.abs().amax(dim=-1)
    best_codes, best_scale = quantise(wide)
    best_error = _squared_error(wide, best_codes, best_scale)
    for factor in KEY_SCALE_FACTORS[1:]:
        scale = round_up(amax.clamp(min=MIN_AMAX) / FP8_MAX * factor)
        codes = encode(wide, scale.float().unsqueeze(-1))
        error = _squared_error(wide, codes, scale)
        is_better = error < best_error  # never where the vector is not finite
        best_scale = torch.where(is_better, scale, best_scale)
        best_codes = torch.where(
            is_better.unsqueeze(-1), codes.view(torch.uint8), best_codes.view(torch.uint8)
        ).view(FP8_DTYPE)
        best_error = torch.where(is_better, error, best_error)
    return best_codes, best_scale


def _squared_error(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Sum over a vector in units of the scale, times the scale squared."""
    wide_scale = scale.float().unsqueeze(-1)
    return ((codes.float() - x / wide_scale).square().sum(dim=-1)) * scale.float().square()


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """Return the e4m3 codes of x / scale, saturating at 448; NaN where x is not finite."""
    codes = (x / scale).clamp(-FP8_MAX, FP8_MAX)
    # An infinity that saturated would pass for a number.
    return codes.masked_fill(~x.isfinite(), torch.nan).to(FP8_DTYPE)


def round_up(x: Tensor) -> Tensor:
    """Return the smallest bfloat16 that is not below each positive finite float32 of x."""
    bits = (x.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF
    return bits.view(torch.float32).to(SCALE_DTYPE)


def _write(
    pages: Tensor,
    scales: Tensor | None,
    static_scale: float | None,
    blocks: Tensor,
    offsets: Tensor,
    x: Tensor,
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    if scales is not None:
        codes, scale = quantise(x)
        scales[blocks, :, offsets] = scale
    elif static_scale is not None:
        # A tensor divides; torch multiplies by a number's reciprocal on some devices.
        codes = encode(x.float(), torch.full((1,), static_scale, device=x.device))
    else:
        pages[blocks, :, offsets] = x.to(pages.dtype)
        return
    pages.view(torch.uint8)[blocks, :, offsets] = codes.view(torch.uint8)


def rope_and_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    pages: KVPages,
    batch: StepBatch,
) -> None:
    """Rotate query in place, store rotated key and value; see `interface.RopeAndWriteKV`."""
    if cos_sin.shape[-1] % 2 or cos_sin.shape[-1] > query.shape[-1]:
        raise ValueError(
            f"rotary_dim {cos_sin.shape[-1]} must be even and at most {query.shape[-1]}"
        )
    angles = cos_sin[batch.positions]
    turned, rotated = rotate(query, angles), rotate(key, angles)
    if pages.key_scale is not None:
        if pages.key_offset is not None:
            rotated = rotated - pages.key_offset
        size = mixing_size(query.shape[-1], cos_sin.shape[-1])
        turned, rotated = mix(turned, size), mix(rotated, size)
    query.copy_(turned)
    is_stored = batch.slot_mapping >= 0
    slots = batch.slot_mapping[is_stored]
    blocks, offsets = slots // pages.block_size, slots % pages.block_size
    _write(
        pages.key,
        pages.key_scale,
        pages.static_key_scale,
        blocks,
        offsets,
        rotated[is_stored],
        quantise_key,
    )
    _write(
        pages.value,
        pages.value_scale,
        pages.static_value_scale,
        blocks,
        offsets,
        value[is_stored],
        quantise,
    )
