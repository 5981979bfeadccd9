"""What the Triton attention kernels share: one tile of context, and the join of two splits.

Decode and prefill give a row the same bits because both run these functions over tiles at the
same absolute positions. Where a compiler may or may not contract a product and a sum, the
product-sum is written as `fma`, so that masked and unmasked tiles round alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

VALUE_GAIN = tl.constexpr(4.0)
"""Factor of values in float16: their scales are normal numbers down to a largest value of 0.007.

Overflow then starts at values of 16,376 in magnitude. Keys go without: theirs starts at 65,504,
and a scale too small for float16 is wrong by 1e-5 of a key's unit at most.
"""


@triton.jit
def count_rows(length, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Number of blocks that length query tokens pack into."""
    return (length * GROUP + BLOCK_M - 1) // BLOCK_M


@triton.jit
def unpack_rows(first, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query token, within its sequence, and head of packed rows first to first + BLOCK_M."""
    packed = first + tl.arange(0, BLOCK_M)
    return packed // GROUP, kv_head * GROUP + packed % GROUP


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
def load_blocks(table_ptr, start, seq_len, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Block ids of the tile at start, int32: one where a page holds whole tiles, or [BLOCK_N].

    Past the sequence's end they repeat its last block, which is always there to be read.
    """
    last = tl.maximum(seq_len - 1, 0) // BLOCK_SIZE
    if BLOCK_SIZE % BLOCK_N == 0:
        place = tl.minimum(start // BLOCK_SIZE, last)
    else:
        place = tl.minimum((start + tl.arange(0, BLOCK_N)) // BLOCK_SIZE, last)
    return tl.load(table_ptr + place)


@triton.jit
def find_slots(
    blocks,
    start,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where a tile's tokens are, counted in vectors of HEAD_DIM: int64 base and [BLOCK_N] offsets.

    Where a page holds whole tiles, the base is one number and the offsets are always the same.
    """
    offsets = tl.arange(0, BLOCK_N)
    base = (blocks.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE
    if BLOCK_SIZE % BLOCK_N == 0:
        base += start % BLOCK_SIZE
    else:
        offsets = (start + offsets) % BLOCK_SIZE
    return base, offsets


@triton.jit
def load_scales(scale_ptr, base, offsets, BLOCK_SIZE: tl.constexpr):
    """Scales of a tile's slots, [BLOCK_N] float32; scale_ptr holds the bits of bfloat16.

    Read as the 4 bytes that hold a pair: the compiler copies nothing smaller ahead of its use.
    """
    if BLOCK_SIZE % 2 == 0:
        pairs = scale_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        bits = tl.load(pairs + base // 2 + offsets // 2)
        bits = tl.where(offsets % 2 == 0, bits << 16, bits & -65536)
    else:
        bits = tl.load(scale_ptr + base + offsets).to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def score_tile(
    query,
    blocks,
    start,
    kv_head,
    key_ptr,
    key_scale_ptr,
    dims,
    cap_scale,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SCALED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Scores of every row against a tile: [BLOCK_M, BLOCK_N], to be multiplied by a row's factor.

    Slots past the sequence's end are read and may yield NaN, which the mask replaces.
    """
    base, offsets = find_slots(blocks, start, kv_head, NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N)
    elements = offsets.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    if BLOCK_SIZE % BLOCK_N == 0:
        pointers = key_ptr + base * HEAD_DIM + elements
    else:
        pointers = key_ptr + (base * HEAD_DIM)[:, None] + elements
    if BLOCK_D == HEAD_DIM:
        key = tl.load(pointers)
    else:
        key = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    key = key.to(query.dtype)
    if IS_SCALED:
        scales = load_scales(key_scale_ptr, base, offsets, BLOCK_SIZE)
        key = key * scales.to(query.dtype)[:, None]
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)); score_scale's log2(e) makes exp an exp2.
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * cap_scale[:, None]))
    return scores


@triton.jit
def weigh_scores(scores, row_factor, maximum):
    """Online softmax of a tile: weights [BLOCK_M, BLOCK_N], new maximum and the decay of the old.

    Milakov & Gimelshein 2018; Dao et al. 2022.
    """
    # Factors are positive, so that the largest product is that of the largest score.
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * row_factor)
    # A row that has seen nothing yet keeps -inf; exp2(-inf - -inf) would be NaN.
    pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(
        tl.fma(
            scores,
            tl.broadcast_to(row_factor[:, None], scores.shape),
            tl.broadcast_to(-pivot[:, None], scores.shape),
        )
    )
    return weights, new_maximum, tl.exp2(maximum - pivot)


@triton.jit
def add_values(
    weights,
    weighted,
    blocks,
    start,
    seq_len,
    kv_head,
    value_ptr,
    value_scale_ptr,
    dims,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    IS_SCALED: tl.constexpr,
):
    """Add a tile's values by their weights to weighted."""
    base, offsets = find_slots(blocks, start, kv_head, NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N)
    elements = offsets.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    if BLOCK_SIZE % BLOCK_N == 0:
        pointers = value_ptr + base * HEAD_DIM + elements
    else:
        pointers = value_ptr + (base * HEAD_DIM)[:, None] + elements
    # Slots past the sequence's end may hold NaN, which a weight of zero would not silence.
    is_stored = start + tl.arange(0, BLOCK_N) < seq_len
    if IS_SCALED:
        if BLOCK_D == HEAD_DIM:
            value = tl.load(pointers)
        else:
            value = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        scales = load_scales(value_scale_ptr, base, offsets, BLOCK_SIZE)
        value = value.to(DOT_DTYPE) * (scales * VALUE_GAIN).to(DOT_DTYPE)[:, None]
        if start + BLOCK_N > seq_len:
            value = tl.where(is_stored[:, None], value, 0.0)
    else:
        value = tl.load(pointers, mask=is_stored[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        value = value.to(DOT_DTYPE)
    return tl.dot(weights.to(DOT_DTYPE), value, weighted, input_precision="ieee")


@triton.jit
def hide_unseen(scores, start, last, window, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """-inf in place of the scores of positions that a row, at position last, does not see."""
    positions = start + tl.arange(0, BLOCK_N)
    is_visible = positions[None, :] <= last[:, None]
    if HAS_WINDOW:
        is_visible = is_visible & (positions[None, :] > last[:, None] - window)
    return tl.where(is_visible, scores, float("-inf"))


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

    value_factor: what a value's element is to be multiplied by: 1 / VALUE_GAIN where values were
    multiplied by their tokens' scales, the static scale, or 1.
    """
    return weighted * value_factor / tl.where(total == 0.0, 1.0, total)[:, None]
