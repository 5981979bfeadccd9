"""Limits of rows that too many tokens are candidates of, found among all tokens.

The top-k limit is the least key up to which k tokens lie, the top-p limit the least key up to
which the mass reaches top_p; of tokens that tie at the limit those of smaller ids stay. One
program a row searches both: it narrows a range of keys, five pivots a pass over the row, until
the range's tokens can be copied together, and ends among those. Launched once for each limit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_executor.kernels.sample.triton_candidates import (
    append_candidates,
    last_tie_of,
    least_key,
    load_candidates,
    units_of,
)
from stepwire_executor.kernels.sample.triton_scores import (
    NO_TOKEN,
    SEARCH,
    is_limited_by_rank,
    load_scores,
)


@triton.jit
def _weight_at(key):
    """Return the weight of tokens of a key."""
    return tl.exp(-(key.to(tl.float32, bitcast=True)))


@triton.jit
def _pass(
    row_ptr, vocab_size, largest, inverse_temperature, min_weight, low, p0, p1, p2, p3, p4,
    IS_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the sums up to each of five keys, and the least key above low."""
    sum0 = tl.zeros((BLOCK,), dtype=tl.float32)
    sum1, sum2, sum3, sum4 = sum0, sum0, sum0, sum0
    nearest = tl.full((BLOCK,), NO_TOKEN, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        scores, keys = load_scores(row_ptr, ids, vocab_size, largest, inverse_temperature)
        if IS_MASS:
            weights = tl.exp(scores)
            amounts = tl.where(weights >= min_weight, weights, 0.0)
        else:
            amounts = tl.full((BLOCK,), 1.0, tl.float32)
        sum0 += tl.where(keys <= p0, amounts, 0.0)
        sum1 += tl.where(keys <= p1, amounts, 0.0)
        sum2 += tl.where(keys <= p2, amounts, 0.0)
        sum3 += tl.where(keys <= p3, amounts, 0.0)
        sum4 += tl.where(keys <= p4, amounts, 0.0)
        nearest = tl.minimum(nearest, tl.where(keys > low, keys, NO_TOKEN))
    return (
        tl.sum(sum0, axis=0),
        tl.sum(sum1, axis=0),
        tl.sum(sum2, axis=0),
        tl.sum(sum3, axis=0),
        tl.sum(sum4, axis=0),
        tl.min(nearest, axis=0),
    )


@triton.jit
def _narrow(low, high, sum_low, sum_high, pivot, sum_to, target):
    """Return the range of keys (low, high], and the sums up to both, after one pivot."""
    is_reached = sum_to.to(tl.float64) >= target
    high_moves = is_reached & (pivot < high)
    low_moves = (is_reached == 0) & (pivot > low)
    return (
        tl.where(low_moves, pivot, low),
        tl.where(high_moves, pivot, high),
        tl.where(low_moves, sum_to, sum_low),
        tl.where(high_moves, sum_to, sum_high),
    )


@triton.jit
def _copy_range(
    row_ptr, vocab_size, largest, inverse_temperature, min_weight, low, high, id_ptr, score_ptr,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the tokens of keys in (low, high] and at least min_weight; return their number."""
    num_candidates = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        scores, keys = load_scores(row_ptr, ids, vocab_size, largest, inverse_temperature)
        is_candidate = (keys > low) & (keys <= high) & (tl.exp(scores) >= min_weight)
        num_candidates = append_candidates(
            id_ptr, score_ptr, num_candidates, ids, scores, is_candidate, CAPACITY
        )
    # Other threads of the program read what this one wrote.
    tl.debug_barrier()
    return num_candidates


@triton.jit
def _search(
    row_ptr,
    vocab_size,
    largest,
    inverse_temperature,
    min_weight,
    end_key,
    sum_all,
    target,
    id_ptr,
    score_ptr,
    IS_MASS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the least key up to which tokens add up to target, and the last id kept at it.

    Tokens count 1 each, or with IS_MASS their weights that are at least min_weight; all of them
    sum_all, a float32. target is a float64. end_key where those before it do not add up.
    id_ptr, score_ptr: [CAPACITY] of scratch.
    """
    # The sum up to low is below target; that up to high reaches it, or no token beyond counts.
    low, high = tl.full((), -1, tl.int32), end_key.to(tl.int32)
    sum_low, sum_high = tl.full((), 0.0, tl.float32), sum_all
    last_tie = tl.full((), -1, tl.int32)
    room = tl.full((), 1.0 * CAPACITY, tl.float32)
    num_passes = tl.full((), 0, tl.int32)
    is_even = tl.full((), 1, tl.int1)
    is_found = tl.full((), 0, tl.int1)
    while is_found == 0:
        amount = _weight_at(high) if IS_MASS else 1.0
        if sum_high - sum_low <= room * amount:
            num_candidates = _copy_range(
                row_ptr, vocab_size, largest, inverse_temperature, min_weight, low, high,
                id_ptr, score_ptr, CAPACITY, BLOCK,
            )  # fmt: skip
            if num_candidates <= CAPACITY:
                ids, scores, keys = load_candidates(id_ptr, score_ptr, num_candidates, CAPACITY)
                missing = target - sum_low.to(tl.float64)
                if IS_MASS:
                    amounts = units_of(tl.exp(scores))
                    units = units_of(missing)
                else:
                    amounts = (keys < NO_TOKEN).to(tl.int32)
                    units = missing.to(tl.int32)
                units = tl.maximum(units, 1)
                high = least_key(keys, amounts, units)
                last_tie = last_tie_of(ids, keys, amounts, high, units, CAPACITY)
                is_found = tl.full((), 1, tl.int1)
            # The sums are rounded, so there may be more: then only passes are left.
            room = tl.full((), -1.0, tl.float32)
        elif high - low == 1:
            # Those that weigh nothing never add up: then all stay.
            num_ties = tl.ceil((target - sum_low) / tl.maximum(amount, 1e-30))
            num_ties = tl.minimum(tl.maximum(num_ties, 1.0), 2147483520.0).to(tl.int32)
            last_tie = _tie_among_all(
                row_ptr, vocab_size, largest, inverse_temperature, high, num_ties, BLOCK
            )
            is_found = tl.full((), 1, tl.int1)
        else:
            # One pivot at the least key that is left. The others are the scores 2, 6, 12 and 20 at
            # first, then lie around where a straight line reaches target, or evenly where the
            # last pass took away less than three quarters.
            span = high - low
            share = (target.to(tl.float32) - sum_low) / tl.maximum(sum_high - sum_low, 1e-30)
            share = tl.minimum(tl.maximum(share, 0.0), 1.0)
            middle = low + (span.to(tl.float32) * share).to(tl.int32)
            p1 = tl.where(is_even, low + span // 5, middle - span // 8)
            p2 = tl.where(is_even, low + span // 5 * 2, middle - span // 256)
            p3 = tl.where(is_even, low + span // 5 * 3, middle + span // 256)
            p4 = tl.where(is_even, low + span // 5 * 4, middle + span // 8)
            if num_passes == 0:
                p1 = tl.full((), 0x40000000, tl.int32)
                p2 = tl.full((), 0x40C00000, tl.int32)
                p3 = tl.full((), 0x41400000, tl.int32)
                p4 = tl.full((), 0x41A00000, tl.int32)
            p0 = low + 1
            p1 = tl.minimum(tl.maximum(p1, low + 1), high - 1)
            p2 = tl.minimum(tl.maximum(p2, low + 1), high - 1)
            p3 = tl.minimum(tl.maximum(p3, low + 1), high - 1)
            p4 = tl.minimum(tl.maximum(p4, low + 1), high - 1)
            to0, to1, to2, to3, to4, nearest = _pass(
                row_ptr, vocab_size, largest, inverse_temperature, min_weight, low,
                p0, p1, p2, p3, p4, IS_MASS, BLOCK,
            )  # fmt: skip
            low, high, sum_low, sum_high = _narrow(low, high, sum_low, sum_high, p0, to0, target)
            low, high, sum_low, sum_high = _narrow(low, high, sum_low, sum_high, p1, to1, target)
            low, high, sum_low, sum_high = _narrow(low, high, sum_low, sum_high, p2, to2, target)
            low, high, sum_low, sum_high = _narrow(low, high, sum_low, sum_high, p3, to3, target)
            low, high, sum_low, sum_high = _narrow(low, high, sum_low, sum_high, p4, to4, target)
            low = tl.maximum(low, tl.minimum(nearest, high) - 1)
            is_even = (num_passes > 0) & (high - low > span // 4)
            num_passes += 1
    return high, last_tie


@triton.jit
def _kept_mass(
    row_ptr, vocab_size, largest, inverse_temperature, min_weight, limit_key, last_tie,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the mass of tokens within a limit that weigh at least min_weight."""
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        scores, keys = load_scores(row_ptr, ids, vocab_size, largest, inverse_temperature)
        is_kept = (keys < limit_key) | ((keys == limit_key) & (ids <= last_tie))
        weights = tl.exp(scores)
        sums += tl.where(is_kept & (weights >= min_weight), weights, 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _tie_among_all(
    row_ptr, vocab_size, largest, inverse_temperature, limit_key, num_ties, BLOCK: tl.constexpr
):
    """Return the id of the num_ties-th token whose key is limit_key, or of the last."""
    seen = tl.full((), 0, tl.int32)
    last = tl.full((), -1, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        _, keys = load_scores(row_ptr, ids, vocab_size, largest, inverse_temperature)
        is_tie = (keys == limit_key).to(tl.int32)
        place = seen + tl.cumsum(is_tie, axis=0)
        is_kept = (is_tie > 0) & (place <= num_ties)
        last = tl.maximum(last, tl.max(tl.where(is_kept, ids, -1), axis=0))
        seen += tl.sum(is_tie, axis=0)
    return last


@triton.jit
def search_kernel(
    logits_ptr,  # [num_rows, vocab_size] float32
    inverse_temperature_ptr,  # [num_rows] float64
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] float32
    min_p_ptr,  # [num_rows] float32
    row_largest_ptr,  # [num_rows] float32
    mass_ptr,  # [num_rows] float32, of all tokens, or 0
    route_ptr,  # [num_rows] int32
    candidate_id_ptr,  # [num_rows, CAPACITY] int32, scratch
    candidate_score_ptr,  # [num_rows, CAPACITY] float32, scratch
    limit_key_ptr,  # [num_rows] int32, in and out: no token beyond it is drawn
    last_tie_ptr,  # [num_rows] int32, in and out: nor one at it of a larger id
    logits_stride,
    vocab_size,
    IS_MASS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Search the top-k limit, or with IS_MASS after it the top-p limit."""
    row = tl.program_id(0).to(tl.int64)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    is_asked = top_p < 1.0 if IS_MASS else is_limited_by_rank(top_k, vocab_size)
    if (tl.load(route_ptr + row) == SEARCH) & is_asked:
        inverse_temperature = tl.load(inverse_temperature_ptr + row)
        largest = tl.load(row_largest_ptr + row)
        row_ptr = logits_ptr + row * logits_stride
        id_ptr = candidate_id_ptr + row * CAPACITY
        score_ptr = candidate_score_ptr + row * CAPACITY
        limit_key, last_tie = tl.load(limit_key_ptr + row), tl.load(last_tie_ptr + row)
        if IS_MASS:
            min_p = tl.load(min_p_ptr + row)
            mass = tl.load(mass_ptr + row)
            if mass == 0.0:
                mass = _kept_mass(
                    row_ptr, vocab_size, largest, inverse_temperature, min_p,
                    limit_key, last_tie, BLOCK,
                )  # fmt: skip
            key, tie = _search(
                row_ptr, vocab_size, largest, inverse_temperature, min_p, limit_key,
                mass, top_p.to(tl.float64) * mass.to(tl.float64),
                id_ptr, score_ptr, True, CAPACITY, BLOCK,
            )  # fmt: skip
            tie = tl.where(key == limit_key, tl.minimum(last_tie, tie), tie)
        else:
            key, tie = _search(
                row_ptr, vocab_size, largest, inverse_temperature, 0.0, limit_key,
                tl.full((), 0.0, tl.float32) + vocab_size, top_k.to(tl.float64),
                id_ptr, score_ptr, False, CAPACITY, BLOCK,
            )  # fmt: skip
        tl.store(limit_key_ptr + row, key)
        tl.store(last_tie_ptr + row, tie)
