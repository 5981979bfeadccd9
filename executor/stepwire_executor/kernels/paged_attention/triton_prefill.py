"""Triton kernel for prompts: many query tokens of a sequence, over its pages.

A program takes one block of packed rows (query tokens times the query heads of a KV head) and
one KV head. It joins the splits of the context where the decode kernel would have, so that a
prompt's rows do not depend on how the prompt was cut.
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
    join_splits,
    load_blocks,
    load_query,
    score_tile,
    unpack_rows,
    weigh_scores,
)


# Sizes that change from step to step must not each be compiled for.
@triton.jit(do_not_specialize=["table_stride", "num_seqs", "window"])
def prefill_attention_kernel(
    query_ptr,
    out_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    block_table_ptr,
    table_stride,
    num_seqs,
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
    MAX_DECODE_QUERY: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    RESCALES_QUERY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Attend the queries of sequences with more than MAX_DECODE_QUERY of them.

    Program (block of rows over all sequences, KV head); programs past the last block return.
    """
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    LOG2E: tl.constexpr = 1.4426950408889634
    seqs = tl.arange(0, BLOCK_SEQS)
    is_seq = seqs < num_seqs
    query_lens = tl.load(cu_seqlens_q_ptr + seqs + 1, mask=is_seq, other=0)
    query_lens -= tl.load(cu_seqlens_q_ptr + seqs, mask=is_seq, other=0)
    work = tl.where(query_lens > MAX_DECODE_QUERY, count_rows(query_lens, GROUP, BLOCK_M), 0)
    # The last blocks see the most context: they start first.
    place = tl.sum(work, axis=0) - 1 - tl.program_id(0)
    if place < 0:
        return
    kv_head = tl.program_id(1)
    seq = tl.sum((tl.cumsum(work, axis=0) <= place).to(tl.int32), axis=0)
    row_block = place - tl.sum(tl.where(seqs < seq, work, 0), axis=0)
    query_start = tl.load(cu_seqlens_q_ptr + seq)
    query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + seq)
    table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride

    tokens, heads = unpack_rows(row_block * BLOCK_M, kv_head, GROUP, BLOCK_M)
    is_used = tokens < query_len
    before = seq_len - query_len
    last = before + tokens
    first_position = before + row_block * BLOCK_M // GROUP
    last_position = before + ((row_block + 1) * BLOCK_M - 1) // GROUP
    last_position = tl.minimum(last_position, seq_len - 1)
    dims = tl.arange(0, BLOCK_D)
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
    all_maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    all_total = tl.zeros([BLOCK_M], tl.float32)
    all_weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    row_factor = query_scale * score_scale
    if HAS_SOFTCAP:
        cap_scale = row_factor * (2.0 / softcap)
        row_factor = tl.full([BLOCK_M], 1.0, tl.float32) * (softcap * LOG2E)
    else:
        cap_scale = row_factor
    begin = first_key(first_position, window, HAS_WINDOW) // BLOCK_N * BLOCK_N
    # Every row sees all of the tiles from here ...
    full_begin = first_key(last_position, window, HAS_WINDOW)
    # ... to here.
    full_end = first_position + 1
    blocks = load_blocks(table_ptr, begin, seq_len, BLOCK_SIZE, BLOCK_N)
    for start in range(begin, last_position + 1, BLOCK_N):
        next_blocks = load_blocks(table_ptr, start + BLOCK_N, seq_len, BLOCK_SIZE, BLOCK_N)
        starts_split = start % SPLIT_TOKENS == 0
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
        old_maximum = maximum
        maximum = tl.where(starts_split, float("-inf"), maximum)
        weights, maximum, decay = weigh_scores(scores, row_factor, maximum)
        # In one branch with the decay, which needs the scores: the compiler would else move the
        # join before the scores' product, which could then not run beside the last tile's.
        if starts_split:
            all_maximum, all_total, all_weighted = join_splits(
                all_maximum, all_total, all_weighted, old_maximum, total, weighted
            )
            total = tl.zeros([BLOCK_M], tl.float32)
            weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        else:
            weighted = weighted * decay[:, None]
        total = tl.fma(total, decay, tl.sum(weights, axis=1))
        weighted = add_values(
            weights,
            weighted,
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

    all_maximum, all_total, all_weighted = join_splits(
        all_maximum, all_total, all_weighted, maximum, total, weighted
    )
    # Read again, so that the compiler computes the rows' addresses here: it would else hold them
    # in registers throughout the loop, which has none to spare. The first entry is always 0.
    zero = tl.load(cu_seqlens_q_ptr, volatile=True)
    query_start = tl.load(cu_seqlens_q_ptr + seq + zero)
    query_len = tl.load(cu_seqlens_q_ptr + seq + zero + 1) - query_start
    tokens, heads = unpack_rows(row_block * BLOCK_M + zero, kv_head, GROUP, BLOCK_M)
    is_used = tokens < query_len
    rows = ((query_start + tokens).to(tl.int64) * NUM_HEADS + heads) * HEAD_DIM
    result = finish_rows(all_total, all_weighted, value_factor)
    tl.store(
        out_ptr + rows[:, None] + dims[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=is_used[:, None] & (dims < HEAD_DIM)[None, :],
    )
