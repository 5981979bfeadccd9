"""What the Triton attention kernels share: one tile of context, and the join of two splits.

Decode and prefill give a row the same bits because both run these functions over tiles at the
same absolute positions. Where a compiler may or may not contract a product and a sum, the
product-sum is written as `fma`, so that masked and unmasked tiles round alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

VALUE_GAIN = tl.constexpr(256.0)
"""Keeps float16 weights times a value scale normal: the scale of values around 1 is 0.002.

Overflow then starts at values around 114,000 in magnitude, underflow of a weight of 1e-4 at 1.
"""


@triton.jit
def count_rows(length, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Number of blocks that length query tokens pack into."""
    return (length * GROUP + BLOCK_M - 1) // BLOCK_M


@triton.jit
def first_key(first_position, window, HAS_WINDOW: tl.constexpr):
    """First position that a query at first_position sees."""
    if HAS_WINDOW:
        return tl.maximum(first_position - window + 1, 0)
    return first_position * 0


@triton.jit
def load_query(
    query_ptr,
    token_stride,
    head_stride,
    rows,
    heads,
    dims,
    is_used,
    HEAD_DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    RESCALES_QUERY: tl.constexpr,
):
    """Load packed query rows: [BLOCK_M, BLOCK_D] in DOT_DTYPE and a power of two a row.

    A bfloat16 row goes to float16 divided by the power of two below its largest element, which
    neither overflows nor rounds what matters; scores are multiplied by it again.
    """
    query = tl.load(
        query_ptr
        + rows.to(tl.int64)[:, None] * token_stride
        + heads[:, None] * head_stride
        + dims[None, :],
        mask=is_used[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    if RESCALES_QUERY:
        wide = query.to(tl.float32)
        largest = tl.max(tl.abs(wide), axis=1).to(tl.int32, bitcast=True)
        exponent = tl.minimum(tl.maximum(largest >> 23, 64), 253)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        return (wide * inverse[:, None]).to(DOT_DTYPE), scale
    return query.to(DOT_DTYPE), tl.full([query.shape[0]], 1.0, tl.float32)


@triton.jit
def load_scales(scale_ptr, slots, is_stored):
    """Scales of slots as float32, 0 where nothing is stored; scale_ptr holds bfloat16's bits."""
    bits = tl.load(scale_ptr + slots, mask=is_stored, other=0).to(tl.int32)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def attend_tile(
    query,
    query_scale,
    maximum,
    total,
    weighted,
    start,
    last,
    seq_len,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    table_ptr,
    kv_head,
    score_scale,
    softcap,
    window,
    dims,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SCALED: tl.constexpr,
    RESCALES_QUERY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Take positions start to start + BLOCK_N into the online softmax of every row.

    last: [BLOCK_M], position of each row's own token. score_scale includes log2(e). A tile that
    is not IS_MASKED must be visible to every row. Milakov & Gimelshein 2018; Dao et al. 2022.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    offsets = tl.arange(0, BLOCK_N)
    positions = start + offsets
    is_stored = positions < seq_len
    if BLOCK_SIZE % BLOCK_N == 0:
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        slots = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + (start % BLOCK_SIZE + offsets)
    else:
        if IS_MASKED:
            block = tl.load(table_ptr + positions // BLOCK_SIZE, mask=is_stored, other=0)
        else:
            block = tl.load(table_ptr + positions // BLOCK_SIZE)
        page = (block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE
        slots = page + positions % BLOCK_SIZE
    elements = slots[:, None] * HEAD_DIM + dims[None, :]

    # Slots past the sequence's end may hold NaN, which a weight of zero would not silence.
    if IS_MASKED:
        is_loaded = is_stored[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(key_ptr + elements, mask=is_loaded, other=0.0)
        value = tl.load(value_ptr + elements, mask=is_loaded, other=0.0)
    elif BLOCK_D == HEAD_DIM:
        key = tl.load(key_ptr + elements)
        value = tl.load(value_ptr + elements)
    else:
        is_loaded = (dims < HEAD_DIM)[None, :]
        key = tl.load(key_ptr + elements, mask=is_loaded, other=0.0)
        value = tl.load(value_ptr + elements, mask=is_loaded, other=0.0)

    scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
    if RESCALES_QUERY:
        scores = scores * query_scale[:, None]
    factor = tl.full([1, BLOCK_N], 1.0, tl.float32) * score_scale
    if IS_SCALED:
        key_scale = load_scales(key_scale_ptr, slots, is_stored)
        factor = factor * key_scale[None, :]
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)); score_scale's log2(e) makes exp an exp2.
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (factor * (2.0 / softcap))))
        factor = tl.full([1, BLOCK_N], LOG2E, tl.float32) * softcap
    factor = tl.broadcast_to(factor, scores.shape)
    bent = scores * factor
    if IS_MASKED:
        is_visible = positions[None, :] <= last[:, None]
        if HAS_WINDOW:
            is_visible = is_visible & (positions[None, :] > last[:, None] - window)
        bent = tl.where(is_visible, bent, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(bent, axis=1))
    # A row that has seen nothing yet keeps -inf; exp2(-inf - -inf) would be NaN.
    pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(tl.fma(scores, factor, tl.broadcast_to(-pivot[:, None], scores.shape)))
    if IS_MASKED:
        weights = tl.where(is_visible, weights, 0.0)
    decay = tl.exp2(maximum - pivot)
    total = tl.fma(total, decay, tl.sum(weights, axis=1))
    weighted = weighted * decay[:, None]
    if IS_SCALED:
        value_scale = load_scales(value_scale_ptr, slots, is_stored)
        weights = weights * (value_scale * VALUE_GAIN)[None, :]
    weighted = tl.dot(
        weights.to(query.dtype), value.to(query.dtype), weighted, input_precision="ieee"
    )
    return new_maximum, total, weighted


@triton.jit
def join_splits(maximum, total, weighted, split_maximum, split_total, split_weighted):
    """Add a split's rows to those of the splits before it; weighted: [rows, BLOCK_D].

    Joining the first split to nothing (-inf, 0, 0) leaves its bits as they are, and so does
    joining a split of which a row saw nothing.
    """
    new_maximum = tl.maximum(maximum, split_maximum)
    pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    decay = tl.exp2(maximum - pivot)
    split_decay = tl.exp2(split_maximum - pivot)
    total = tl.fma(split_total, split_decay, total * decay)
    weighted = tl.fma(
        split_weighted,
        tl.broadcast_to(split_decay[:, None], weighted.shape),
        weighted * decay[:, None],
    )
    return new_maximum, total, weighted


@triton.jit
def finish_rows(total, weighted, value_factor):
    """Normalise rows: [rows, BLOCK_D] float32; zero where a row saw nothing.

    value_factor: what a value's element is to be multiplied by: 1 / VALUE_GAIN where scales a
    token went into the weights, the static scale, or 1.
    """
    return weighted * value_factor / tl.where(total == 0.0, 1.0, total)[:, None]
