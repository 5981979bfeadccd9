"""The one read of all logits: the largest of each group of tokens; and a bound from those alone.

A group is GROUP tokens whose ids follow each other. The k-th likeliest token is at least as likely
as the k-th of the groups' likeliest, so that only tokens up to its key are candidates under top-k.
With the sum of each group's weights the mass beyond a key has an upper bound too: groups whose
likeliest lies beyond the key count whole, of others each token but the likeliest counts its
weight or the key's, whichever is less. So top-p has candidates as well. Bounds may be loose, and
never leave out a token that a limit keeps and that could be drawn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_executor.kernels.sample.triton_scores import (
    CANDIDATES,
    NEVER_DRAWN,
    NO_TOKEN,
    SEARCH,
    SETTLED,
    WHOLE,
    is_limited_by_rank,
    keys_of,
    scores_of,
)

_COARSE = tl.constexpr(1 << 12)
"""Keys to which a bound is searched, or 1 part in 2048 of a score."""


@triton.jit
def _needs_mass(top_k, top_p, min_p, vocab_size):
    """Return whether top-p is the only limit: others make candidates without the mass of all."""
    return (top_p < 1.0) & (min_p <= 0.0) & (is_limited_by_rank(top_k, vocab_size) == 0)


@triton.jit
def groups_kernel(
    logits_ptr,  # [num_rows, vocab_size] float32
    temperature_ptr,  # [num_rows] float32
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] float32
    min_p_ptr,  # [num_rows] float32
    group_largest_ptr,  # [num_rows, num_groups] float32, out, +inf where a NaN is
    group_mass_ptr,  # [num_rows, num_groups] float32, out where needed: the likeliest weighs 1
    logits_stride,
    vocab_size,
    num_groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = chunk * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    mask = groups < num_groups
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    x = tl.where(x == x, x, float("inf"))
    largest = tl.max(x, axis=1)
    tl.store(group_largest_ptr + row * num_groups + groups, largest, mask=mask)
    temperature = tl.load(temperature_ptr + row)
    needs_mass = _needs_mass(
        tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), vocab_size
    )
    if (temperature > 0.0) & needs_mass:
        origin = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
        mass = tl.sum(tl.exp((x - origin[:, None]) / temperature), axis=1)
        tl.store(group_mass_ptr + row * num_groups + groups, mass, mask=mask)


@triton.jit
def _rank_bound(keys, top_k):
    """Return a key up to which top_k of keys lie, or NEVER_DRAWN."""
    low, high = tl.full((), -1, tl.int32), tl.full((), NEVER_DRAWN, tl.int32)
    while high - low > _COARSE:
        middle = low + (high - low) // 2
        is_enough = tl.sum((keys <= middle).to(tl.int32), axis=0) >= top_k
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, middle)
    return high


@triton.jit
def _mass_bound(keys, weights, masses, allowed, GROUP: tl.constexpr):
    """Return a key beyond which all tokens together weigh at most allowed, or NEVER_DRAWN.

    weights: those of the groups' likeliest; masses: of whole groups.
    """
    low, high = tl.full((), -1, tl.int32), tl.full((), NEVER_DRAWN, tl.int32)
    rivals = tl.maximum(masses - weights, 0.0)
    while high - low > _COARSE:
        middle = low + (high - low) // 2
        most = (GROUP - 1) * tl.exp(-(middle.to(tl.float32, bitcast=True)))
        beyond = tl.sum(tl.where(keys <= middle, tl.minimum(rivals, most), masses), axis=0)
        is_enough = beyond <= allowed
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, middle)
    return high


@triton.jit
def bound_kernel(
    logits_ptr,  # [num_rows, vocab_size] float32
    group_largest_ptr,  # [num_rows, num_groups] float32
    group_mass_ptr,  # [num_rows, num_groups] float32
    temperature_ptr,  # [num_rows] float32
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] float32
    min_p_ptr,  # [num_rows] float32
    token_id_ptr,  # [num_rows] int64, out: the likeliest
    is_finite_ptr,  # [num_rows] uint8, out
    row_largest_ptr,  # [num_rows] float32, out
    inverse_temperature_ptr,  # [num_rows] float64, out where tokens are drawn
    route_ptr,  # [num_rows] int32, out
    bound_key_ptr,  # [num_rows] int32, out: tokens up to it are candidates
    mass_ptr,  # [num_rows] float32, out: of all tokens, 0 where that of the candidates will do
    num_listed_ptr,  # [num_rows] int32, out
    listed_ptr,  # [num_rows, MAX_LISTED] int32, out: groups that hold candidates, in order
    limit_key_ptr,  # [num_rows] int32, out: the key that no drawn token exceeds
    last_tie_ptr,  # [num_rows] int32, out: above every id
    logits_stride,
    vocab_size,
    num_groups,
    GROUP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    MAX_LISTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK_GROUPS)
    mask = groups < num_groups
    maxima = tl.load(group_largest_ptr + row * num_groups + groups, mask=mask, other=float("-inf"))
    largest = tl.max(maxima, axis=0)
    is_finite = tl.abs(largest) < float("inf")
    first_group = tl.min(tl.where(maxima == largest, groups, num_groups - 1), axis=0)
    ids = first_group * GROUP + tl.arange(0, GROUP)
    x = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    token_id = tl.min(tl.where(x == largest, ids, NO_TOKEN), axis=0)
    tl.store(token_id_ptr + row, tl.where(is_finite, token_id, 0).to(tl.int64))
    tl.store(is_finite_ptr + row, is_finite.to(tl.uint8))
    tl.store(row_largest_ptr + row, largest)
    tl.store(limit_key_ptr + row, NEVER_DRAWN)
    tl.store(last_tie_ptr + row, NO_TOKEN)

    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    has_top_k = is_limited_by_rank(top_k, vocab_size)
    route = tl.full((), SETTLED, tl.int32)
    if is_finite & (temperature > 0.0):
        route = tl.full((), WHOLE, tl.int32)
        inverse_temperature = 1.0 / temperature.to(tl.float64)
        tl.store(inverse_temperature_ptr + row, inverse_temperature)
        if has_top_k | (top_p < 1.0) | (min_p > 0.0):
            scores = scores_of(maxima, largest, inverse_temperature)
            keys = tl.where(mask, keys_of(scores), NO_TOKEN)
            bound_key = tl.full((), NEVER_DRAWN, tl.int32)
            mass = tl.full((), 0.0, tl.float32)
            if has_top_k:
                bound_key = _rank_bound(keys, top_k)
            if _needs_mass(top_k, top_p, min_p, vocab_size):
                masses = tl.load(group_mass_ptr + row * num_groups + groups, mask=mask, other=0.0)
                weights = tl.exp(scores)
                masses *= weights
                mass = tl.sum(masses, axis=0)
                # Less than 1 - top_p, for the sums' rounding; what still falls short is searched.
                allowed = (1.0 - top_p) * mass * 0.99
                bound_key = _mass_bound(keys, weights, masses, allowed, GROUP)
                mass = tl.where(bound_key < NEVER_DRAWN, mass, 0.0)
            if min_p > 0.0:
                # A little further than the logarithm; candidates are compared with min_p itself.
                furthest = tl.maximum(-tl.log(min_p) * 1.0001 + 0.0001, 0.0)
                bound_key = tl.minimum(bound_key, furthest.to(tl.int32, bitcast=True))
            is_listed = keys <= bound_key
            places = tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
            num_listed = tl.sum(is_listed.to(tl.int32), axis=0)
            tl.store(
                listed_ptr + row * MAX_LISTED + places,
                groups,
                mask=is_listed & (places < MAX_LISTED),
            )
            tl.store(num_listed_ptr + row, num_listed)
            tl.store(bound_key_ptr + row, bound_key)
            tl.store(mass_ptr + row, mass)
            route = tl.where(num_listed <= MAX_LISTED, CANDIDATES, SEARCH)
    tl.store(route_ptr + row, route)
