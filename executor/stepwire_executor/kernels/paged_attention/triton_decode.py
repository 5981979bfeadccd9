"""Triton kernel for sequences with few query tokens: decode and draft verification.

Work is (sequence, block of packed rows, split of the context, KV head). Splits have a fixed
length and start at absolute positions, so that neither the batch nor the device has a say in a
row's result. A fixed number of persistent programs reads the list of work from the lengths on
the device: the same launch serves every step of a captured graph. After Flash-Decoding (Dao et
al. 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_executor.kernels.paged_attention.triton_tile import (
    add_values,
    count_rows,
    finish_rows,
    first_key,
    hide_unseen,
    load_blocks,
    load_query,
    score_tile,
    unpack_rows,
    weigh_scores,
)


@triton.jit
def load_decode_lengths(
    cu_seqlens_q_ptr, seq_lens_ptr, num_seqs, BLOCK_SEQS: tl.constexpr, MAX_QUERY: tl.constexpr
):
    """Query and context lengths of all sequences: [BLOCK_SEQS], query 0 for those of prefill."""
    seqs = tl.arange(0, BLOCK_SEQS)
    is_used = seqs < num_seqs
    start = tl.load(cu_seqlens_q_ptr + seqs, mask=is_used, other=0)
    stop = tl.load(cu_seqlens_q_ptr + seqs + 1, mask=is_used, other=0)
    seq_lens = tl.load(seq_lens_ptr + seqs, mask=is_used, other=0)
    query_lens = stop - start
    return tl.where(query_lens <= MAX_QUERY, query_lens, 0), seq_lens


@triton.jit
def find_splits(query_len, seq_len, window, HAS_WINDOW: tl.constexpr, SPLIT_TOKENS: tl.constexpr):
    """First split that a sequence's queries see, and the number of splits from there on."""
    first = first_key(seq_len - query_len, window, HAS_WINDOW) // SPLIT_TOKENS
    # One at least, so that even a row without context is written.
    return first, tl.maximum((seq_len + SPLIT_TOKENS - 1) // SPLIT_TOKENS - first, 1)


# Sizes that change from step to step must not each be compiled for.
@triton.jit(do_not_specialize=["table_stride", "num_seqs", "max_splits", "num_tokens", "window"])
def decode_attention_kernel(
    query_ptr,
    out_ptr,
    split_weighted_ptr,
    split_state_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    block_table_ptr,
    table_stride,
    num_seqs,
    max_splits,
    num_tokens,
    query_token_stride,
    query_head_stride,
    score_scale,
    softcap,
    window,
    value_factor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_QUERY: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    RESCALES_QUERY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Attend the queries of sequences with 1 to MAX_QUERY of them.

    A sequence of one split is written to out; others leave unnormalised rows in
    split_weighted, [num_rows, num_heads, max_splits, HEAD_DIM] float32, and (maximum, total) in
    split_state, [num_rows, num_heads, max_splits, 2] float32, where rows count the query tokens
    of these sequences. Rows past the last sequence's, up to num_tokens, become zero.
    """
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    LOG2E: tl.constexpr = 1.4426950408889634
    seqs = tl.arange(0, BLOCK_SEQS)
    query_lens, seq_lens = load_decode_lengths(
        cu_seqlens_q_ptr, seq_lens_ptr, num_seqs, BLOCK_SEQS, MAX_QUERY
    )
    _, num_splits = find_splits(query_lens, seq_lens, window, HAS_WINDOW, SPLIT_TOKENS)
    work = tl.where(query_lens > 0, num_splits * count_rows(query_lens, GROUP, BLOCK_M), 0)
    cu_work = tl.cumsum(work, axis=0)
    dims = tl.arange(0, BLOCK_D)

    for item in range(tl.program_id(0), tl.sum(work, axis=0) * NUM_KV_HEADS, tl.num_programs(0)):
        kv_head = item % NUM_KV_HEADS
        place = item // NUM_KV_HEADS
        seq = tl.sum((cu_work <= place).to(tl.int32), axis=0)
        is_before = seqs < seq
        place = place - tl.sum(tl.where(is_before, work, 0), axis=0)
        row_start = tl.sum(tl.where(is_before, query_lens, 0), axis=0)
        query_start = tl.load(cu_seqlens_q_ptr + seq)
        query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - query_start
        seq_len = tl.load(seq_lens_ptr + seq)
        table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride
        first_split, seq_splits = find_splits(query_len, seq_len, window, HAS_WINDOW, SPLIT_TOKENS)
        split = place % seq_splits

        first_row = (place // seq_splits) * BLOCK_M
        tokens, heads = unpack_rows(first_row, kv_head, GROUP, BLOCK_M)
        is_used = tokens < query_len
        last = seq_len - query_len + tokens
        query, query_scale = load_query(
            query_ptr,
            query_token_stride,
            query_head_stride,
            query_start + tokens,
            heads,
            dims,
            is_used,
            HEAD_DIM,
            DOT_DTYPE,
            RESCALES_QUERY,
        )
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        row_factor = query_scale * score_scale
        if HAS_SOFTCAP:
            cap_scale = row_factor * (2.0 / softcap)
            row_factor = tl.full([BLOCK_M], 1.0, tl.float32) * (softcap * LOG2E)
        else:
            cap_scale = row_factor
        begin = (first_split + split) * SPLIT_TOKENS
        end = tl.minimum(begin + SPLIT_TOKENS, seq_len)
        seen = first_key(seq_len - query_len, window, HAS_WINDOW)
        begin = tl.maximum(begin, seen // BLOCK_N * BLOCK_N)
        # Every row sees all of the tiles from here ...
        full_begin = first_key(seq_len - 1, window, HAS_WINDOW)
        # ... to here.
        full_end = seq_len - query_len + 1
        blocks = load_blocks(table_ptr, begin, seq_len, BLOCK_SIZE, BLOCK_N)
        for start in range(begin, end, BLOCK_N):
            next_blocks = load_blocks(table_ptr, start + BLOCK_N, seq_len, BLOCK_SIZE, BLOCK_N)
            scores = score_tile(
                query,
                blocks,
                start,
                kv_head,
                key_ptr,
                key_scale_ptr,
                dims,
                cap_scale,
                NUM_KV_HEADS,
                BLOCK_SIZE,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                IS_SCALED,
                HAS_SOFTCAP,
            )
            if start + BLOCK_N > full_end or (HAS_WINDOW and start < full_begin):
                scores = hide_unseen(scores, start, last, window, HAS_WINDOW, BLOCK_N)
            weights, maximum, decay = weigh_scores(scores, row_factor, maximum)
            total = tl.fma(total, decay, tl.sum(weights, axis=1))
            weighted = add_values(
                weights,
                weighted * decay[:, None],
                blocks,
                start,
                seq_len,
                kv_head,
                value_ptr,
                value_scale_ptr,
                dims,
                NUM_KV_HEADS,
                BLOCK_SIZE,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                DOT_DTYPE,
                IS_SCALED,
            )
            blocks = next_blocks

        # As in prefill, for the same reason: a zero that the compiler does not know to be one.
        zero = tl.load(cu_seqlens_q_ptr, volatile=True)
        tokens, heads = unpack_rows(first_row + zero, kv_head, GROUP, BLOCK_M)
        is_used = tokens < query_len
        is_stored = is_used[:, None] & (dims < HEAD_DIM)[None, :]
        if seq_splits == 1:
            rows = ((query_start + tokens).to(tl.int64) * NUM_HEADS + heads) * HEAD_DIM
            result = finish_rows(total, weighted, value_factor)
            tl.store(
                out_ptr + rows[:, None] + dims[None, :],
                result.to(out_ptr.dtype.element_ty),
                mask=is_stored,
            )
        else:
            rows = (row_start + tokens).to(tl.int64) * NUM_HEADS + heads
            rows = rows * max_splits + split
            tl.store(
                split_weighted_ptr + rows[:, None] * HEAD_DIM + dims[None, :],
                weighted,
                mask=is_stored,
            )
            tl.store(split_state_ptr + rows * 2, maximum, mask=is_used)
            tl.store(split_state_ptr + rows * 2 + 1, total, mask=is_used)

    num_rows = tl.load(cu_seqlens_q_ptr + num_seqs)
    zeros = tl.zeros([BLOCK_D], tl.float32).to(out_ptr.dtype.element_ty)
    for row in range(num_rows + tl.program_id(0), num_tokens, tl.num_programs(0)):
        for head in range(NUM_HEADS):
            start = (tl.cast(row, tl.int64) * NUM_HEADS + head) * HEAD_DIM
            tl.store(out_ptr + start + dims, zeros, mask=dims < HEAD_DIM)
