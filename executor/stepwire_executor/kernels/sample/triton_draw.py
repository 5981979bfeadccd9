"""The draw among all tokens: of rows without limits, and of rows whose limits were searched."""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_executor.kernels.sample.triton_noise import gumbel_noise, noise_bits
from stepwire_executor.kernels.sample.triton_scores import NO_TOKEN, SEARCH, load_scores


@triton.jit
def draw_kernel(
    logits_ptr,  # [num_rows, vocab_size] float32
    inverse_temperature_ptr,  # [num_rows] float64
    min_p_ptr,  # [num_rows] float32
    seed_ptr,  # [num_rows] int64
    position_ptr,  # [num_rows] int64
    stream_ptr,  # [num_rows] int64
    token_id_ptr,  # [num_rows] int64, the likeliest
    row_largest_ptr,  # [num_rows] float32
    route_ptr,  # [num_rows] int32
    limit_key_ptr,  # [num_rows] int32
    last_tie_ptr,  # [num_rows] int32
    best_ptr,  # [num_rows, num_chunks] float32, out
    best_token_id_ptr,  # [num_rows, num_chunks] int32, out
    logits_stride,
    vocab_size,
    num_chunks,
    BLOCK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(route_ptr + row) >= SEARCH:
        ids = chunk * BLOCK + tl.arange(0, BLOCK)
        scores, keys = load_scores(
            logits_ptr + row * logits_stride,
            ids,
            vocab_size,
            tl.load(row_largest_ptr + row),
            tl.load(inverse_temperature_ptr + row),
        )
        limit_key, last_tie = tl.load(limit_key_ptr + row), tl.load(last_tie_ptr + row)
        is_kept = (keys < limit_key) | ((keys == limit_key) & (ids <= last_tie))
        is_kept &= tl.exp(scores) >= tl.load(min_p_ptr + row)
        is_kept |= ids == tl.load(token_id_ptr + row)
        best = tl.full((), float("-inf"), tl.float32)
        token_id = tl.full((), NO_TOKEN, tl.int32)
        if tl.max(is_kept.to(tl.int32), axis=0) > 0:
            bits = noise_bits(
                chunk * BLOCK,
                tl.load(seed_ptr + row),
                tl.load(position_ptr + row),
                tl.load(stream_ptr + row),
                BLOCK,
            )
            noisy = tl.where(is_kept, scores + gumbel_noise(bits), float("-inf"))
            best = tl.max(noisy, axis=0)
            token_id = tl.min(tl.where(noisy == best, ids, NO_TOKEN), axis=0)
        tl.store(best_ptr + row * num_chunks + chunk, best)
        tl.store(best_token_id_ptr + row * num_chunks + chunk, token_id)


@triton.jit
def pick_kernel(
    route_ptr,  # [num_rows] int32
    best_ptr,  # [num_rows, num_chunks] float32
    best_token_id_ptr,  # [num_rows, num_chunks] int32
    token_id_ptr,  # [num_rows] int64, out where a row is drawn from all tokens
    num_chunks,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(route_ptr + row) >= SEARCH:
        chunks = tl.arange(0, BLOCK_CHUNKS)
        mask = chunks < num_chunks
        scores = tl.load(best_ptr + row * num_chunks + chunks, mask=mask, other=float("-inf"))
        ids = tl.load(best_token_id_ptr + row * num_chunks + chunks, mask=mask, other=NO_TOKEN)
        best = tl.max(scores, axis=0)
        token_id = tl.min(tl.where(scores == best, ids, NO_TOKEN), axis=0)
        tl.store(token_id_ptr + row, token_id.to(tl.int64))
