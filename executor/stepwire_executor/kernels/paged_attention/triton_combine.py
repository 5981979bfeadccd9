"""Triton kernel that joins the splits of each decoded row, in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_executor.kernels.paged_attention.triton_decode import (
    find_splits,
    load_decode_lengths,
)
from stepwire_executor.kernels.paged_attention.triton_tile import finish_rows, join_splits


# Sizes that change from step to step must not each be compiled for.
@triton.jit(do_not_specialize=["num_seqs", "max_splits", "window"])
def combine_splits_kernel(
    out_ptr,
    split_weighted_ptr,
    split_state_ptr,
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    num_seqs,
    max_splits,
    window,
    value_factor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_QUERY: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Write out's row of one decoded token and head: program (row, head).

    The buffers are those of decode_attention_kernel, which wrote rows of one split itself.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    query_lens, _ = load_decode_lengths(
        cu_seqlens_q_ptr, seq_lens_ptr, num_seqs, BLOCK_SEQS, MAX_QUERY
    )
    cu_rows = tl.cumsum(query_lens, axis=0)
    if row >= tl.sum(query_lens, axis=0):
        return
    seq = tl.sum((cu_rows <= row).to(tl.int32), axis=0)
    row_start = tl.sum(tl.where(tl.arange(0, BLOCK_SEQS) < seq, query_lens, 0), axis=0)
    query_start = tl.load(cu_seqlens_q_ptr + seq)
    query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + seq)
    _, num_splits = find_splits(query_len, seq_len, window, HAS_WINDOW, SPLIT_TOKENS)
    if num_splits == 1:
        return

    dims = tl.arange(0, BLOCK_D)
    is_used = (dims < HEAD_DIM)[None, :]
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([1, BLOCK_D], tl.float32)
    base = (row.to(tl.int64) * NUM_HEADS + head) * max_splits
    lane = tl.arange(0, 1)
    for split in tl.range(0, num_splits, num_stages=STAGES):
        place = base + split + lane
        split_weighted = tl.load(
            split_weighted_ptr + place[:, None] * HEAD_DIM + dims[None, :], mask=is_used, other=0.0
        )
        maximum, total, weighted = join_splits(
            maximum,
            total,
            weighted,
            tl.load(split_state_ptr + place * 2),
            tl.load(split_state_ptr + place * 2 + 1),
            split_weighted,
        )
    result = finish_rows(total, weighted, value_factor)
    token = (query_start + row - row_start).to(tl.int64)
    target = (token * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(out_ptr + target[None, :], result.to(out_ptr.dtype.element_ty), mask=is_used)
