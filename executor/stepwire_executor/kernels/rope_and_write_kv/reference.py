"""Rotary position embedding and the write into KV pages, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.dtypes import accumulation_dtype
from stepwire_executor.kv_cache import FP8_DTYPE, FP8_MAX, SCALE_DTYPE, KVPages

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
    query.copy_(rotate(query, angles))
    rotated = rotate(key, angles)
    is_stored = batch.slot_mapping >= 0
    slots = batch.slot_mapping[is_stored]
    blocks, offsets = slots // pages.block_size, slots % pages.block_size
    _write(pages.key, pages.key_scale, pages.static_key_scale, blocks, offsets, rotated[is_stored])
    _write(
        pages.value, pages.value_scale, pages.static_value_scale, blocks, offsets, value[is_stored]
    )
