"""Limits of rows that too many tokens are candidates of, found among all tokens.

The top-k limit is the least key up to which k tokens lie, the top-p limit the least key up to
which the mass reaches top_p; of tokens that tie at the limit those of smaller ids stay. One
program a row searches both, a range of keys divided at _NUM_PIVOTS a pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_executor.kernels.sample.triton_scores import (
    NO_LIMIT,
    SEARCH,
    is_limited_by_rank,
    load_scores,
)


@triton.jit
def _search(
    row_ptr,
    vocab_size,
    largest,
    temperature,
    min_weight,
    end_key,
    target,
    IS_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    """Return the least key up to which tokens add up to target, and the sum before that key.

    Tokens count 1 each, or with IS_MASS their weights that are at least min_weight. end_key
    where those before it do not add up.
    """
    low, high = tl.full((), -1, tl.int32), end_key.to(tl.int32)
    before = tl.full((), 0.0, tl.float32)
    index = tl.arange(0, NUM_PIVOTS)
    step = tl.full((), 0, tl.int32)
    # The sum up to low is below target, that up to high reaches it.
    while high - low > 1:
        # Evenly over keys, or at first over scores, among which logits lie more evenly. Scores
        # below -32 are never drawn; only the sums need them.
        even = low + ((high - low).to(tl.int64) * (index + 1) // (NUM_PIVOTS + 1)).to(tl.int32)
        first = tl.maximum(low, 0).to(tl.float32, bitcast=True)
        last = tl.minimum(high, 0x42000000).to(tl.float32, bitcast=True)
        by_score = first + (last - first) * ((index + 1).to(tl.float32) / NUM_PIVOTS)
        is_by_score = (step < 3) & (low < 0x42000000)
        pivots = tl.where(is_by_score, by_score.to(tl.int32, bitcast=True), even)
        pivots = tl.minimum(tl.maximum(pivots, low + 1), high - 1)
        # The least key above low is next in line, once a pass has found it.
        pivots = tl.where(index == 0, low + 1, pivots)

        sums = tl.zeros((BLOCK, NUM_PIVOTS), dtype=tl.float32)
        nearest = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            scores, keys = load_scores(row_ptr, ids, vocab_size, largest, temperature)
            if IS_MASS:
                weights = tl.exp(scores)
                amounts = tl.where(weights >= min_weight, weights, 0.0)
            else:
                amounts = tl.full((BLOCK,), 1.0, tl.float32)
            sums += tl.where(keys[:, None] <= pivots[None, :], amounts[:, None], 0.0)
            nearest = tl.minimum(nearest, tl.where(keys > low, keys, 0x7FFFFFFF))
        sum_to = tl.sum(sums, axis=0)
        is_reached = sum_to.to(tl.float64) >= target
        new_low = tl.max(tl.where(is_reached, low, pivots), axis=0)
        high = tl.min(tl.where(is_reached, pivots, high), axis=0)
        before = tl.maximum(before, tl.max(tl.where(is_reached, 0.0, sum_to), axis=0))
        low = tl.maximum(new_low, tl.minimum(tl.min(nearest, axis=0), high) - 1)
        step += 1
    return high, before


@triton.jit
def _mass_before(
    row_ptr, vocab_size, largest, temperature, min_weight, end_key, BLOCK: tl.constexpr
):
    """Return the sum of the weights that are at least min_weight, of tokens before end_key."""
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        scores, keys = load_scores(row_ptr, ids, vocab_size, largest, temperature)
        weights = tl.exp(scores)
        sums += tl.where((keys < end_key) & (weights >= min_weight), weights, 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _last_tie(row_ptr, vocab_size, largest, temperature, limit_key, num_ties, BLOCK: tl.constexpr):
    """Return the id of the num_ties-th token whose key is limit_key, or of the last."""
    seen = tl.full((), 0, tl.int32)
    last = tl.full((), -1, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        _, keys = load_scores(row_ptr, ids, vocab_size, largest, temperature)
        is_tie = (keys == limit_key).to(tl.int32)
        place = seen + tl.cumsum(is_tie, axis=0)
        is_kept = (is_tie > 0) & (place <= num_ties)
        last = tl.maximum(last, tl.max(tl.where(is_kept, ids, -1), axis=0))
        seen += tl.sum(is_tie, axis=0)
    return last


@triton.jit
def search_kernel(
    logits_ptr,  # [num_rows, vocab_size] float32
    temperature_ptr,  # [num_rows] float32
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] float32
    min_p_ptr,  # [num_rows] float32
    row_largest_ptr,  # [num_rows] float32
    route_ptr,  # [num_rows] int32
    limit_key_ptr,  # [num_rows] int32, out: no token beyond it is drawn
    last_tie_ptr,  # [num_rows] int32, out: nor one at it of a larger id
    logits_stride,
    vocab_size,
    BLOCK: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(route_ptr + row) == SEARCH:
        temperature = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        largest = tl.load(row_largest_ptr + row)
        row_ptr = logits_ptr + row * logits_stride
        limit_key = tl.full((), NO_LIMIT, tl.int32)
        last_tie = tl.full((), -1, tl.int32)
        num_ties = tl.full((), 0, tl.int32)
        if is_limited_by_rank(top_k, vocab_size):
            limit_key, num_before = _search(
                row_ptr, vocab_size, largest, temperature, 0.0, limit_key,
                top_k.to(tl.float64), False, BLOCK, NUM_PIVOTS,
            )  # fmt: skip
            num_ties = top_k - num_before.to(tl.int32)
        if top_p < 1.0:
            mass = _mass_before(row_ptr, vocab_size, largest, temperature, min_p, limit_key, BLOCK)
            # Those that tie at the top-k limit count as many times as they stay.
            limit_weight = tl.exp(-(tl.minimum(limit_key, 0x7F800000).to(tl.float32, bitcast=True)))
            limit_weight = tl.where(limit_weight >= min_p, limit_weight, 0.0)
            mass += num_ties.to(tl.float32) * limit_weight
            target = top_p.to(tl.float64) * mass.to(tl.float64)
            key, before = _search(
                row_ptr, vocab_size, largest, temperature, min_p, limit_key,
                target, True, BLOCK, NUM_PIVOTS,
            )  # fmt: skip
            weight = tl.exp(-(tl.minimum(key, 0x7F800000).to(tl.float32, bitcast=True)))
            missing = (target - before.to(tl.float64)) / weight.to(tl.float64)
            # A weight of 0 makes this infinite: then every tie stays.
            missing = tl.minimum(tl.maximum(tl.ceil(missing), 1.0), 2147483520.0).to(tl.int32)
            num_ties = tl.where(key == limit_key, tl.minimum(num_ties, missing), missing)
            limit_key = key
        if limit_key < NO_LIMIT:
            last_tie = _last_tie(
                row_ptr, vocab_size, largest, temperature, limit_key, num_ties, BLOCK
            )
        tl.store(limit_key_ptr + row, limit_key)
        tl.store(last_tie_ptr + row, last_tie)
