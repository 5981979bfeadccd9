"""Rotary position embedding, e4m3 quantisation and the write into KV pages in one Triton kernel.

One program turns or stores a group of heads of one token: query heads first, then key heads,
then value heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.compile_case import CompileCase
from stepwire_executor.kernels.launch import (
    COMPUTE_DTYPES,
    TRITON_TYPES,
    ceil_div,
    next_power_of_two,
)
from stepwire_executor.kernels.native.pages import check_pages
from stepwire_executor.kernels.rope_and_write_kv.reference import (
    KEY_SCALE_FACTORS,
    MIN_AMAX,
    mixing_size,
)
from stepwire_executor.kv_cache import FP8_DTYPE, FP8_MAX, KVPages

_BLOCK_HEADS = 8
_NUM_WARPS = 4


@triton.jit
def _encode_e4m3(x):
    """Return the e4m3 codes of float32 x as int32: nearest, ties to even, saturating at 448.

    In integers, so that every device and the interpreter, whose own conversion cuts digits off,
    give the same bits.
    """
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    # 20 of float32's 23 fraction bits go; the exponent's bias falls from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # Below 2^-6 codes count steps of 2^-9, the last place of numbers from 2^14 on.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    code = tl.where(x == x, code, 0x7F)
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def _mix(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOG_SIZE: tl.constexpr):
    """Multiply stretches of 2^LOG_SIZE of x's columns, [ROWS, COLUMNS], by the Hadamard matrix.

    Each round takes sums and differences of neighbours and moves them to the two halves of the
    stretch, so that after LOG_SIZE rounds every element is back in its place.
    """
    SIZE: tl.constexpr = 1 << LOG_SIZE
    for _ in tl.static_range(LOG_SIZE):
        pairs = tl.reshape(x, [ROWS, COLUMNS // SIZE, SIZE // 2, 2])
        even, odd = tl.split(pairs)
        pairs = tl.join(even + odd, even - odd)
        x = tl.reshape(tl.permute(pairs, [0, 1, 3, 2]), [ROWS, COLUMNS])
    return x


@triton.jit
def _largest_bits(x):
    """Return the bits of the largest magnitude of each row as int32; NaN counts as the largest.

    As integers, magnitudes have the order of their values, whatever a device's max makes of NaN.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _rounding_error(x, scale):
    """Return each row's squared error when x is rounded to e4m3 multiples of scale, [rows]."""
    magnitude = tl.abs(x) / scale[:, None]
    bits = magnitude.to(tl.int32, bitcast=True)
    # As _encode_e4m3, kept as float32.
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) << 20
    rounded = rounded.to(tl.float32, bitcast=True)
    rounded = tl.where(magnitude < 0.015625, (magnitude + 16384.0) - 16384.0, rounded)
    error = (tl.minimum(rounded, 448.0) - magnitude) * scale[:, None]
    return tl.sum(error * error, axis=1)


@triton.jit
def _scale_bits(amax_bits, factor, AMAX_FLOOR: tl.constexpr, FP8_LIMIT: tl.constexpr):
    """Return the bits of factor * amax / 448 as bfloat16, rounded up; of NaN where not finite."""
    amax = tl.maximum(amax_bits.to(tl.float32, bitcast=True), AMAX_FLOOR)
    scale = tl.div_rn(amax, tl.full(amax.shape, FP8_LIMIT, tl.float32)) * factor
    bits = (scale.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    return tl.where(amax_bits < 0x7F800000, bits, 0x7FC0)


@triton.jit
def _store_part(pages_ptr, offsets, x, scale, mask, IS_FP8: tl.constexpr):
    """Store [BLOCK_HEADS, columns] of float32, divided by scale, [BLOCK_HEADS], where fp8."""
    if IS_FP8:
        codes = _encode_e4m3(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
        # An infinity that saturated would pass for a number.
        codes = tl.where(tl.abs(x) < float("inf"), codes, 0x7F)
        tl.store(pages_ptr + offsets, codes.to(tl.uint8), mask=mask)
    else:
        tl.store(pages_ptr + offsets, x.to(pages_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_and_write_kv_kernel(
    query_ptr,  # [num_tokens, num_heads, head_dim]; turned in place
    key_ptr,  # [num_tokens, num_kv_heads, head_dim]
    value_ptr,  # as key_ptr
    cos_sin_ptr,  # [max_positions, rotary_dim] float32, contiguous
    position_ptr,  # [num_tokens] int64
    slot_ptr,  # [num_tokens] int64; outside the pages: nothing is stored
    key_pages_ptr,  # [num_blocks, num_kv_heads, block_size, head_dim], contiguous; e4m3 as uint8
    value_pages_ptr,  # as key_pages_ptr
    key_scale_ptr,  # [num_blocks, num_kv_heads, block_size] int16, bfloat16's bits, or None
    value_scale_ptr,  # as key_scale_ptr
    key_offset_ptr,  # [num_kv_heads, head_dim] float32, contiguous, or None
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    max_positions,
    num_slots,
    num_heads,
    num_kv_heads,
    block_size,
    static_key_scale,  # float32, of e4m3 pages without scales
    static_value_scale,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    LOG_MIXED: tl.constexpr,
    MIXES_HALVES: tl.constexpr,
    MIXING_FACTOR: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    KEY_SCALE_FACTORS: tl.constexpr,
):
    HALF: tl.constexpr = ROTARY_DIM // 2
    REST: tl.constexpr = HEAD_DIM - ROTARY_DIM
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    query_groups = tl.cdiv(num_heads, BLOCK_HEADS)
    kv_groups = tl.cdiv(num_kv_heads, BLOCK_HEADS)
    is_query = group < query_groups
    is_value = group >= query_groups + kv_groups

    # Which of the three this program works on; the pointers have one type.
    source_ptr = query_ptr + token * query_token_stride
    head_stride = query_head_stride
    count = num_heads
    first_head = group * BLOCK_HEADS
    if is_value:
        source_ptr = value_ptr + token * value_token_stride
        head_stride = value_head_stride
        count = num_kv_heads
        first_head = (group - query_groups - kv_groups) * BLOCK_HEADS
    elif not is_query:
        source_ptr = key_ptr + token * key_token_stride
        head_stride = key_head_stride
        count = num_kv_heads
        first_head = (group - query_groups) * BLOCK_HEADS

    heads = first_head + tl.arange(0, BLOCK_HEADS)
    head_mask = heads < count
    column = tl.arange(0, BLOCK_HALF)
    mask = head_mask[:, None] & (column < HALF)[None, :]
    ptrs = source_ptr + heads[:, None] * head_stride + column[None, :]
    first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    if not is_value:
        position = tl.load(position_ptr + token)
        # Outside the table the angles are position 0's, not another allocation's bytes.
        position = tl.where((position >= 0) & (position < max_positions), position, 0)
        angle_ptrs = cos_sin_ptr + position * ROTARY_DIM + column
        cos = tl.load(angle_ptrs, mask=column < HALF, other=0.0)[None, :]
        sin = tl.load(angle_ptrs + HALF, mask=column < HALF, other=0.0)[None, :]
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
        if key_offset_ptr is not None:  # noqa: SIM102 # known to the compiler, unlike the next
            if not is_query:
                offset_ptrs = key_offset_ptr + heads[:, None] * HEAD_DIM + column[None, :]
                first -= tl.load(offset_ptrs, mask=mask, other=0.0)
                second -= tl.load(offset_ptrs + HALF, mask=mask, other=0.0)
        if MIXING_FACTOR < 1.0:
            first = _mix(first, BLOCK_HEADS, BLOCK_HALF, LOG_MIXED)
            second = _mix(second, BLOCK_HEADS, BLOCK_HALF, LOG_MIXED)
            if MIXES_HALVES:
                turned = first + second
                second = (first - second) * MIXING_FACTOR
                first = turned * MIXING_FACTOR
            else:
                first = first * MIXING_FACTOR
                second = second * MIXING_FACTOR

    if is_query:
        tl.store(ptrs, first.to(query_ptr.dtype.element_ty), mask=mask)
        tl.store(ptrs + HALF, second.to(query_ptr.dtype.element_ty), mask=mask)
        # Elements past the rotary ones stay as they are unless they are mixed.
        if REST > 0 and MIXING_FACTOR < 1.0:
            rest_column = tl.arange(0, BLOCK_REST)
            rest_mask = head_mask[:, None] & (rest_column < REST)[None, :]
            rest_ptrs = source_ptr + heads[:, None] * head_stride
            rest_ptrs += ROTARY_DIM + rest_column[None, :]
            rest = tl.load(rest_ptrs, mask=rest_mask, other=0.0).to(tl.float32)
            rest = _mix(rest, BLOCK_HEADS, BLOCK_REST, LOG_MIXED) * MIXING_FACTOR
            tl.store(rest_ptrs, rest.to(query_ptr.dtype.element_ty), mask=rest_mask)
    else:
        slot = tl.load(slot_ptr + token)
        if (slot >= 0) & (slot < num_slots):
            block, offset = slot // block_size, slot % block_size
            vectors = (block * num_kv_heads + heads) * block_size + offset  # int64
            pages_ptr = key_pages_ptr
            if is_value:
                pages_ptr = value_pages_ptr
            static_scale = static_key_scale
            if is_value:
                static_scale = static_value_scale
            scale = tl.full((BLOCK_HEADS,), 1.0, dtype=tl.float32) * static_scale
            if HAS_SCALES:
                amax = tl.maximum(_largest_bits(first), _largest_bits(second))
            if REST > 0:
                rest_column = tl.arange(0, BLOCK_REST)
                rest_mask = head_mask[:, None] & (rest_column < REST)[None, :]
                rest_ptrs = source_ptr + heads[:, None] * head_stride
                rest_ptrs += ROTARY_DIM + rest_column[None, :]
                rest = tl.load(rest_ptrs, mask=rest_mask, other=0.0).to(tl.float32)
                if key_offset_ptr is not None:  # noqa: SIM102 # as above
                    if not is_value:
                        offset_ptrs = key_offset_ptr + heads[:, None] * HEAD_DIM + ROTARY_DIM
                        offset_ptrs += rest_column[None, :]
                        rest -= tl.load(offset_ptrs, mask=rest_mask, other=0.0)
                if MIXING_FACTOR < 1.0:
                    mixed = _mix(rest, BLOCK_HEADS, BLOCK_REST, LOG_MIXED) * MIXING_FACTOR
                    rest = tl.where(is_value, rest, mixed)
                if HAS_SCALES:
                    amax = tl.maximum(amax, _largest_bits(rest))
            if HAS_SCALES:
                scale_bits = _scale_bits(amax, 1.0, AMAX_FLOOR, FP8_LIMIT)
                scale = (scale_bits << 16).to(tl.float32, bitcast=True)
                if not is_value:
                    best_error = _rounding_error(first, scale) + _rounding_error(second, scale)
                    if REST > 0:
                        best_error += _rounding_error(rest, scale)
                    for i in tl.static_range(1, len(KEY_SCALE_FACTORS)):
                        bits = _scale_bits(amax, KEY_SCALE_FACTORS[i], AMAX_FLOOR, FP8_LIMIT)
                        trial = (bits << 16).to(tl.float32, bitcast=True)
                        error = _rounding_error(first, trial) + _rounding_error(second, trial)
                        if REST > 0:
                            error += _rounding_error(rest, trial)
                        is_better = error < best_error
                        best_error = tl.where(is_better, error, best_error)
                        scale_bits = tl.where(is_better, bits, scale_bits)
                    scale = (scale_bits << 16).to(tl.float32, bitcast=True)
                scales_ptr = key_scale_ptr
                if is_value:
                    scales_ptr = value_scale_ptr
                tl.store(scales_ptr + vectors, scale_bits.to(tl.int16), mask=head_mask)
            offsets = vectors[:, None] * HEAD_DIM + column[None, :]
            _store_part(pages_ptr, offsets, first, scale, mask, IS_FP8)
            _store_part(pages_ptr, offsets + HALF, second, scale, mask, IS_FP8)
            if REST > 0:
                offsets = vectors[:, None] * HEAD_DIM + ROTARY_DIM + rest_column[None, :]
                _store_part(pages_ptr, offsets, rest, scale, rest_mask, IS_FP8)


def rope_and_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    pages: KVPages,
    batch: StepBatch,
) -> None:
    """Rotate query in place, store rotated key and value; see `interface.RopeAndWriteKV`.

    A slot outside the pages stores nothing and a position outside cos_sin counts as 0: a device
    cannot raise, and neither may touch other memory.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_blocks, num_kv_heads, block_size, _ = pages.key.shape
    check_pages(pages, head_dim)
    dtype = query.dtype
    if dtype not in COMPUTE_DTYPES or key.dtype != dtype or value.dtype != dtype:
        raise ValueError(
            f"query, key and value are {dtype}, {key.dtype} and {value.dtype}; they must "
            "share float32, bfloat16 or float16"
        )
    if key.shape != (num_tokens, num_kv_heads, head_dim) or value.shape != key.shape:
        raise ValueError(
            f"key and value have shapes {tuple(key.shape)} and {tuple(value.shape)}, "
            f"expected {(num_tokens, num_kv_heads, head_dim)}"
        )
    if query.stride(2) != 1 or key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("query, key and value must have unit stride in head_dim")
    rotary_dim = cos_sin.shape[1]
    if (
        cos_sin.dtype != torch.float32
        or not cos_sin.is_contiguous()
        or rotary_dim % 2
        or not 0 < rotary_dim <= head_dim
    ):
        raise ValueError(
            "cos_sin must be contiguous float32 [max_positions, rotary_dim] with an even "
            f"rotary_dim of at most {head_dim}, not {cos_sin.dtype} {tuple(cos_sin.shape)}"
        )
    for index in (batch.positions, batch.slot_mapping):
        if index.dtype != torch.int64 or index.shape != (num_tokens,) or not index.is_contiguous():
            raise ValueError("positions and slot_mapping must be contiguous int64, one a token")
    if num_tokens == 0:
        return
    is_fp8 = pages.key.dtype == FP8_DTYPE
    num_groups = ceil_div(num_heads, _BLOCK_HEADS) + 2 * ceil_div(num_kv_heads, _BLOCK_HEADS)
    rope_and_write_kv_kernel[(num_tokens, num_groups)](
        query,
        key,
        value,
        cos_sin,
        batch.positions,
        batch.slot_mapping,
        pages.key.view(torch.uint8) if is_fp8 else pages.key,
        pages.value.view(torch.uint8) if is_fp8 else pages.value,
        None if pages.key_scale is None else pages.key_scale.view(torch.int16),
        None if pages.value_scale is None else pages.value_scale.view(torch.int16),
        pages.key_offset,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cos_sin.shape[0],
        num_blocks * block_size,
        num_heads,
        num_kv_heads,
        block_size,
        pages.static_key_scale or 1.0,
        pages.static_value_scale or 1.0,
        **_constexprs(head_dim, rotary_dim, pages.key.dtype, pages.key_scale is not None),
        num_warps=_NUM_WARPS,
        num_stages=1,
    )


def _constexprs(
    head_dim: int, rotary_dim: int, page_dtype: torch.dtype, has_scales: bool
) -> dict[str, object]:
    size = mixing_size(head_dim, rotary_dim) if has_scales else 1
    mixes_halves = size > 1 and size == head_dim
    return {
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim,
        "BLOCK_HEADS": _BLOCK_HEADS,
        "BLOCK_HALF": next_power_of_two(rotary_dim // 2),
        "BLOCK_REST": next_power_of_two(max(1, head_dim - rotary_dim)),
        "IS_FP8": page_dtype == FP8_DTYPE,
        "HAS_SCALES": has_scales,
        "LOG_MIXED": (size // 2 if mixes_halves else size).bit_length() - 1,
        "MIXES_HALVES": mixes_halves,
        "MIXING_FACTOR": size**-0.5,
        "FP8_LIMIT": FP8_MAX,
        "AMAX_FLOOR": MIN_AMAX,
        "KEY_SCALE_FACTORS": KEY_SCALE_FACTORS,
    }


def _case(
    dtype: torch.dtype,
    page_dtype: torch.dtype,
    head_dim: int,
    rotary_dim: int,
    *,
    is_static: bool = False,
) -> CompileCase:
    is_fp8 = page_dtype == FP8_DTYPE
    has_scales = is_fp8 and not is_static
    kind = "*" + TRITON_TYPES[dtype]
    page_kind = "*u8" if is_fp8 else "*" + TRITON_TYPES[page_dtype]
    integers = (
        "query_token_stride", "query_head_stride", "key_token_stride", "key_head_stride",
        "value_token_stride", "value_head_stride", "max_positions", "num_slots", "num_heads",
        "num_kv_heads", "block_size",
    )  # fmt: skip
    constexprs = _constexprs(head_dim, rotary_dim, page_dtype, has_scales)
    if not has_scales:
        constexprs |= {"key_scale_ptr": None, "value_scale_ptr": None, "key_offset_ptr": None}
    return CompileCase(
        name=f"rope_and_write_kv {kind[1:]} to {TRITON_TYPES[page_dtype]} {head_dim}/{rotary_dim}"
        + (" static" if is_static else ""),
        kernel=rope_and_write_kv_kernel,
        signature={
            "query_ptr": kind,
            "key_ptr": kind,
            "value_ptr": kind,
            "cos_sin_ptr": "*fp32",
            "position_ptr": "*i64",
            "slot_ptr": "*i64",
            "key_pages_ptr": page_kind,
            "value_pages_ptr": page_kind,
            "key_scale_ptr": "*i16",
            "value_scale_ptr": "*i16",
            "key_offset_ptr": "*fp32",
            "static_key_scale": "fp32",
            "static_value_scale": "fp32",
        }
        | dict.fromkeys(integers, "i32"),
        constexprs=constexprs,
        num_warps=_NUM_WARPS,
        num_stages=1,
        divisible_by_16=frozenset(integers[:6]) | {"block_size", "num_slots"},
    )


COMPILE_CASES = (
    _case(torch.bfloat16, FP8_DTYPE, 128, 128, is_static=True),
    *(
        _case(dtype, page_dtype, head_dim, rotary_dim)
        for dtype, page_dtype, head_dim, rotary_dim in (
            (torch.bfloat16, torch.bfloat16, 128, 128),
            (torch.bfloat16, FP8_DTYPE, 128, 128),
            (torch.bfloat16, torch.bfloat16, 64, 64),
            (torch.bfloat16, FP8_DTYPE, 64, 64),
            (torch.float16, torch.float16, 128, 128),
            (torch.float16, FP8_DTYPE, 256, 256),
            (torch.float32, torch.float32, 64, 64),
            (torch.float32, FP8_DTYPE, 80, 32),
            (torch.bfloat16, torch.bfloat16, 96, 96),
        )
    ),
)
"""Configurations that are compiled ahead of time."""
