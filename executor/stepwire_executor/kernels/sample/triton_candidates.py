"""Rows whose limits can keep few tokens: those tokens, copied together, and the draw among them.

Candidates lie in the order of their ids, and weights are added as integers, in units of 2^-44, so
that no order of adding shows in a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_executor.kernels.sample.triton_noise import gumbel_noise, noise_bits_of
from stepwire_executor.kernels.sample.triton_scores import (
    CANDIDATES,
    NO_TOKEN,
    SEARCH,
    is_limited_by_rank,
    keys_of,
    load_scores,
)

_UNITS = tl.constexpr(float(2**44))
"""Units of mass in a weight of 1: 2^19 of those fit into an int64."""


@triton.jit
def append_candidates(
    id_ptr, score_ptr, num_candidates, ids, scores, is_candidate, CAPACITY: tl.constexpr
):
    """Store the candidates among some tokens behind those before; return how many they are now.

    Those past CAPACITY are counted alone.
    """
    counts = is_candidate.to(tl.int32)
    places = num_candidates + tl.cumsum(counts, axis=0) - 1
    is_stored = is_candidate & (places < CAPACITY)
    tl.store(id_ptr + places, ids, mask=is_stored)
    tl.store(score_ptr + places, scores, mask=is_stored)
    return num_candidates + tl.sum(counts, axis=0)


@triton.jit
def load_candidates(id_ptr, score_ptr, num_candidates, CAPACITY: tl.constexpr):
    """Return ids, scores and keys, [CAPACITY]: NO_TOKEN, -inf and NO_TOKEN past the candidates."""
    places = tl.arange(0, CAPACITY)
    is_candidate = places < num_candidates
    # Loaded whole, 16 bytes a thread; what lies past the candidates was never written.
    ids = tl.where(is_candidate, tl.load(id_ptr + places), NO_TOKEN)
    scores = tl.where(is_candidate, tl.load(score_ptr + places), float("-inf"))
    return ids, scores, tl.where(is_candidate, keys_of(scores), NO_TOKEN)


@triton.jit
def units_of(weights):
    """Return weights, at most 1, as integers, int64."""
    return (weights * _UNITS).to(tl.int64)


@triton.jit
def least_key(keys, amounts, target):
    """Return the least key up to which amounts, integers, add up to target, or else the last."""
    low = tl.full((), -1, tl.int32)
    high = tl.max(tl.where(keys < NO_TOKEN, keys, 0), axis=0)
    while high - low > 1:
        middle = low + (high - low) // 2
        is_enough = tl.sum(tl.where(keys <= middle, amounts, 0), axis=0) >= target
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, middle)
    return high


@triton.jit
def last_tie_of(ids, keys, amounts, limit_key, target, CAPACITY: tl.constexpr):
    """Return the id up to which tokens at limit_key are kept, the least that reaches target.

    ids are in order; tokens at limit_key have one amount, or 0 where they are out already.
    """
    missing = target - tl.sum(tl.where(keys < limit_key, amounts, 0), axis=0)
    is_tie = (keys == limit_key) & (amounts > 0)
    amount = tl.max(tl.where(is_tie, amounts, 0), axis=0)
    # At least one stays; and all do if they weigh nothing.
    num_ties = (missing + amount - 1) // tl.maximum(amount, 1)
    num_ties = tl.where(amount > 0, tl.minimum(tl.maximum(num_ties, 1), CAPACITY), CAPACITY)
    is_tie = tl.where(amount > 0, is_tie, keys == limit_key)
    is_first = is_tie & (tl.cumsum(is_tie.to(tl.int32), axis=0) <= num_ties)
    return tl.max(tl.where(is_first, ids, -1), axis=0)


@triton.jit
def gather_kernel(
    logits_ptr,  # [num_rows, vocab_size] float32
    inverse_temperature_ptr,  # [num_rows] float64
    row_largest_ptr,  # [num_rows] float32
    bound_key_ptr,  # [num_rows] int32
    num_listed_ptr,  # [num_rows] int32
    listed_ptr,  # [num_rows, MAX_LISTED] int32
    route_ptr,  # [num_rows] int32, in and out: SEARCH if there are more than CAPACITY
    num_candidates_ptr,  # [num_rows] int32, out
    candidate_id_ptr,  # [num_rows, CAPACITY] int32, out
    candidate_score_ptr,  # [num_rows, CAPACITY] float32, out
    logits_stride,
    vocab_size,
    GROUP: tl.constexpr,
    MAX_LISTED: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(route_ptr + row) == CANDIDATES:
        inverse_temperature = tl.load(inverse_temperature_ptr + row)
        largest = tl.load(row_largest_ptr + row)
        bound_key = tl.load(bound_key_ptr + row)
        num_listed = tl.load(num_listed_ptr + row)
        num_candidates = tl.full((), 0, tl.int32)
        for start in range(0, num_listed, BLOCK // GROUP):
            members = tl.arange(0, BLOCK)
            entries = start + members // GROUP
            groups = tl.load(
                listed_ptr + row * MAX_LISTED + entries, mask=entries < num_listed, other=-1
            )
            ids = tl.where(groups >= 0, groups * GROUP + members % GROUP, vocab_size)
            scores, keys = load_scores(
                logits_ptr + row * logits_stride, ids, vocab_size, largest, inverse_temperature
            )
            num_candidates = append_candidates(
                candidate_id_ptr + row * CAPACITY, candidate_score_ptr + row * CAPACITY,
                num_candidates, ids, scores, keys <= bound_key, CAPACITY,
            )  # fmt: skip
        tl.store(num_candidates_ptr + row, num_candidates)
        if num_candidates > CAPACITY:
            tl.store(route_ptr + row, SEARCH)


@triton.jit
def _choose_among(
    row, num_candidates, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
    mass_ptr, id_ptr, score_ptr, route_ptr, token_id_ptr, vocab_size, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Apply a row's limits to its candidates, at most CAPACITY, and draw; see choose_kernel."""
    ids, scores, keys = load_candidates(id_ptr, score_ptr, num_candidates, CAPACITY)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    is_kept = keys < NO_TOKEN
    if is_limited_by_rank(top_k, vocab_size) & (num_candidates > top_k):
        ones = is_kept.to(tl.int32)
        limit_key = least_key(keys, ones, top_k)
        last_tie = last_tie_of(ids, keys, ones, limit_key, top_k, CAPACITY)
        is_kept = (keys < limit_key) | ((keys == limit_key) & (ids <= last_tie))
    weights = tl.exp(scores)
    is_kept &= weights >= tl.load(min_p_ptr + row)
    is_enough = tl.full((), 1, tl.int1)
    if top_p < 1.0:
        amounts = tl.where(is_kept, units_of(weights), 0)
        kept_mass = tl.sum(amounts, axis=0)
        row_mass = tl.load(mass_ptr + row).to(tl.float64) * _UNITS
        whole_mass = tl.where(row_mass > 0.0, row_mass, kept_mass.to(tl.float64))
        target = tl.ceil(top_p.to(tl.float64) * whole_mass).to(tl.int64)
        is_enough = kept_mass >= target
        limit_key = least_key(keys, amounts, target)
        last_tie = last_tie_of(ids, keys, amounts, limit_key, target, CAPACITY)
        is_kept &= (keys < limit_key) | ((keys == limit_key) & (ids <= last_tie))
    if is_enough:
        is_kept |= ids == tl.load(token_id_ptr + row)
        bits = noise_bits_of(
            ids,
            tl.load(seed_ptr + row),
            tl.load(position_ptr + row),
            tl.load(stream_ptr + row),
        )
        noisy = tl.where(is_kept, scores + gumbel_noise(bits), float("-inf"))
        best = tl.max(noisy, axis=0)
        token_id = tl.min(tl.where(noisy == best, ids, NO_TOKEN), axis=0)
        tl.store(token_id_ptr + row, token_id.to(tl.int64))
    else:
        tl.store(route_ptr + row, SEARCH)


@triton.jit
def choose_kernel(
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] float32
    min_p_ptr,  # [num_rows] float32
    seed_ptr,  # [num_rows] int64
    position_ptr,  # [num_rows] int64
    stream_ptr,  # [num_rows] int64
    mass_ptr,  # [num_rows] float32
    num_candidates_ptr,  # [num_rows] int32
    candidate_id_ptr,  # [num_rows, CAPACITY] int32
    candidate_score_ptr,  # [num_rows, CAPACITY] float32
    route_ptr,  # [num_rows] int32, in and out: SEARCH if the candidates' mass falls short
    token_id_ptr,  # [num_rows] int64, in: the likeliest; out: the drawn
    vocab_size,
    FEW: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(route_ptr + row) == CANDIDATES:
        num_candidates = tl.load(num_candidates_ptr + row)
        id_ptr = candidate_id_ptr + row * CAPACITY
        score_ptr = candidate_score_ptr + row * CAPACITY
        # Usually they are some tens: 1 a thread takes a fraction of 8 a thread's instructions.
        if num_candidates <= FEW:
            _choose_among(
                row, num_candidates, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
                stream_ptr, mass_ptr, id_ptr, score_ptr, route_ptr, token_id_ptr, vocab_size, FEW,
            )  # fmt: skip
        else:
            _choose_among(
                row, num_candidates, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
                stream_ptr, mass_ptr, id_ptr, score_ptr, route_ptr, token_id_ptr, vocab_size,
                CAPACITY,
            )  # fmt: skip
