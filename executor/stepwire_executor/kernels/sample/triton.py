"""Greedy and Gumbel-max sampling in Triton, without a sort and without visiting the host.

Four launches: the largest logit of each stretch of each row; each row's limits; the best noisy
score of each stretch; the best of each row. Stretches start at absolute token ids, and limits are
found by one program a row, so that a row's token does not depend on the other rows.

Limits are searched in the order of keys: the bits of (largest - logit) / temperature, which as
integers rise as tokens become less likely. The top-k limit is the least key up to which k tokens
lie, the top-p limit the least key up to which the mass reaches top_p; of tokens that tie at the
limit those of smaller ids stay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepwire_executor.kernels.compile_case import CompileCase
from stepwire_executor.kernels.interface import SampleOutput, SamplingBatch
from stepwire_executor.kernels.launch import ceil_div, next_power_of_two

_BLOCK = 4096
"""Tokens a stretch."""
_NUM_WARPS = 8
_BLOCK_SEARCH = 1024
"""Tokens that the search for a limit looks at together."""
_NUM_PIVOTS = 16
"""Candidates for a limit that one pass over a row compares its tokens with."""
_SEARCH_WARPS = 16
_NO_LIMIT = tl.constexpr(0x7F800001)
"""Above the key of every token, -inf's 0x7F800000 included."""


@triton.jit
def _scores(row_ptr, ids, vocab_size, largest, temperature):
    """Return (logit - largest) / temperature and its key; past the vocabulary no key counts."""
    mask = ids < vocab_size
    x = tl.load(row_ptr + ids, mask=mask, other=float("-inf"))
    scores = tl.div_rn(x - largest, tl.zeros_like(x) + temperature)
    keys = tl.abs(scores).to(tl.int32, bitcast=True)
    return scores, tl.where(mask, keys, 0x7FFFFFFF)


@triton.jit
def noise_bits(first_id, seed, position, stream, BLOCK: tl.constexpr):
    """Return the random words, [BLOCK] uint32, of tokens from first_id, a multiple of 4, on.

    Philox4x32-10 as `sample/noise.py` defines it: one evaluation for four neighbouring tokens.
    """
    x0 = (first_id // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zeros = tl.zeros_like(x0)
    x1 = zeros + position.to(tl.uint32)
    x2 = zeros + stream.to(tl.uint32)
    x3 = zeros
    k0 = zeros + seed.to(tl.uint32)
    k1 = zeros + (seed >> 32).to(tl.uint32)
    m0 = tl.full(x0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(x0.shape, 0xCD9E8D57, tl.uint32)
    w0 = tl.full(x0.shape, 0x9E3779B9, tl.uint32)
    w1 = tl.full(x0.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(x0, m0), tl.mul(x0, m0, sanitize_overflow=False)
        high1, low1 = tl.umulhi(x2, m1), tl.mul(x2, m1, sanitize_overflow=False)
        x0 = high1 ^ x1 ^ k0
        x1 = low1
        x2 = high0 ^ x3 ^ k1
        x3 = low0
        k0 = tl.add(k0, w0, sanitize_overflow=False)
        k1 = tl.add(k1, w1, sanitize_overflow=False)
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def gumbel_noise(bits):
    """Return -log(-log(u)) for u = ((bits >> 8) + 0.5) / 2^24, to float32's accuracy."""
    steps = (bits >> 8).to(tl.int32)
    is_low = steps < 0x800000
    u = (steps.to(tl.float32) + 0.5) * 5.9604644775390625e-08
    # Near 1 float32 cannot hold u, but it holds v = 1 - u, and -log(1 - v) = 2 atanh(v / (2 - v)).
    v = ((0xFFFFFF - steps).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    z = v / (2.0 - v)
    z2 = z * z
    series = 1.0 / 17 * z2 + 1.0 / 15
    series = series * z2 + 1.0 / 13
    series = series * z2 + 1.0 / 11
    series = series * z2 + 1.0 / 9
    series = series * z2 + 1.0 / 7
    series = series * z2 + 1.0 / 5
    series = series * z2 + 1.0 / 3
    series = series * z2 + 1.0
    exponential = tl.where(is_low, -tl.log(tl.where(is_low, u, 0.5)), 2.0 * z * series)
    return -tl.log(exponential)


@triton.jit
def largest_logit_kernel(
    logits_ptr,  # [num_rows, vocab_size] float32
    largest_ptr,  # [num_rows, num_chunks] float32, +inf where a NaN is
    chunk_token_id_ptr,  # [num_rows, num_chunks] int32, the smallest of the largest's
    logits_stride,
    vocab_size,
    num_chunks,
    BLOCK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    x = tl.where(x == x, x, float("inf"))
    largest = tl.max(x, axis=0)
    tl.store(largest_ptr + row * num_chunks + chunk, largest)
    token_id = tl.min(tl.where(x == largest, ids, vocab_size), axis=0)
    tl.store(chunk_token_id_ptr + row * num_chunks + chunk, token_id)


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
            scores, keys = _scores(row_ptr, ids, vocab_size, largest, temperature)
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
        scores, keys = _scores(row_ptr, ids, vocab_size, largest, temperature)
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
        _, keys = _scores(row_ptr, ids, vocab_size, largest, temperature)
        is_tie = (keys == limit_key).to(tl.int32)
        place = seen + tl.cumsum(is_tie, axis=0)
        is_kept = (is_tie > 0) & (place <= num_ties)
        last = tl.maximum(last, tl.max(tl.where(is_kept, ids, -1), axis=0))
        seen += tl.sum(is_tie, axis=0)
    return last


@triton.jit
def limits_kernel(
    logits_ptr,  # [num_rows, vocab_size] float32
    largest_ptr,  # [num_rows, num_chunks] float32
    chunk_token_id_ptr,  # [num_rows, num_chunks] int32
    temperature_ptr,  # [num_rows] float32
    top_k_ptr,  # [num_rows] int32
    top_p_ptr,  # [num_rows] float32
    min_p_ptr,  # [num_rows] float32
    token_id_ptr,  # [num_rows] int64, out: the likeliest
    is_finite_ptr,  # [num_rows] uint8, out
    row_largest_ptr,  # [num_rows] float32, out
    limit_key_ptr,  # [num_rows] int32, out: no token beyond it is drawn
    last_tie_ptr,  # [num_rows] int32, out: nor one at it of a larger id
    logits_stride,
    vocab_size,
    num_chunks,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    mask = chunks < num_chunks
    maxima = tl.load(largest_ptr + row * num_chunks + chunks, mask=mask, other=float("-inf"))
    token_ids = tl.load(chunk_token_id_ptr + row * num_chunks + chunks, mask=mask, other=0)
    largest = tl.max(maxima, axis=0)
    token_id = tl.min(tl.where(mask & (maxima == largest), token_ids, vocab_size), axis=0)
    is_finite = (largest > float("-inf")) & (largest < float("inf"))
    tl.store(token_id_ptr + row, tl.where(is_finite, token_id, 0).to(tl.int64))
    tl.store(is_finite_ptr + row, is_finite.to(tl.uint8))
    tl.store(row_largest_ptr + row, largest)

    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    limit_key = tl.full((), _NO_LIMIT, tl.int32)
    last_tie = tl.full((), -1, tl.int32)
    num_ties = tl.full((), 0, tl.int32)
    if is_finite & (temperature > 0.0):
        row_ptr = logits_ptr + row * logits_stride
        if (top_k > 0) & (top_k < vocab_size):
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
        if limit_key < _NO_LIMIT:
            last_tie = _last_tie(
                row_ptr, vocab_size, largest, temperature, limit_key, num_ties, BLOCK
            )
    tl.store(limit_key_ptr + row, limit_key)
    tl.store(last_tie_ptr + row, last_tie)


@triton.jit
def draw_kernel(
    logits_ptr,  # [num_rows, vocab_size] float32
    temperature_ptr,  # [num_rows] float32
    min_p_ptr,  # [num_rows] float32
    seed_ptr,  # [num_rows] int64
    position_ptr,  # [num_rows] int64
    stream_ptr,  # [num_rows] int64
    likeliest_ptr,  # [num_rows] int64
    is_finite_ptr,  # [num_rows] uint8
    row_largest_ptr,  # [num_rows] float32
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
    temperature = tl.load(temperature_ptr + row)
    is_finite = tl.load(is_finite_ptr + row)
    if (temperature > 0.0) & (is_finite > 0):
        ids = chunk * BLOCK + tl.arange(0, BLOCK)
        scores, keys = _scores(
            logits_ptr + row * logits_stride,
            ids,
            vocab_size,
            tl.load(row_largest_ptr + row),
            temperature,
        )
        limit_key, last_tie = tl.load(limit_key_ptr + row), tl.load(last_tie_ptr + row)
        is_kept = (keys < limit_key) | ((keys == limit_key) & (ids <= last_tie))
        is_kept &= tl.exp(scores) >= tl.load(min_p_ptr + row)
        is_kept |= ids == tl.load(likeliest_ptr + row)
        bits = noise_bits(
            chunk * BLOCK,
            tl.load(seed_ptr + row),
            tl.load(position_ptr + row),
            tl.load(stream_ptr + row),
            BLOCK,
        )
        noisy = tl.where(is_kept, scores + gumbel_noise(bits), float("-inf"))
        best = tl.max(noisy, axis=0)
        token_id = tl.min(tl.where(noisy == best, ids, vocab_size), axis=0)
        tl.store(best_ptr + row * num_chunks + chunk, best)
        tl.store(best_token_id_ptr + row * num_chunks + chunk, token_id)


@triton.jit
def pick_kernel(
    temperature_ptr,  # [num_rows] float32
    is_finite_ptr,  # [num_rows] uint8
    best_ptr,  # [num_rows, num_chunks] float32
    best_token_id_ptr,  # [num_rows, num_chunks] int32
    token_id_ptr,  # [num_rows] int64, out where a row is drawn
    num_chunks,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    is_finite = tl.load(is_finite_ptr + row)
    if (temperature > 0.0) & (is_finite > 0):
        chunks = tl.arange(0, BLOCK_CHUNKS)
        mask = chunks < num_chunks
        scores = tl.load(best_ptr + row * num_chunks + chunks, mask=mask, other=float("-inf"))
        ids = tl.load(best_token_id_ptr + row * num_chunks + chunks, mask=mask, other=0)
        best = tl.max(scores, axis=0)
        token_id = tl.min(tl.where(mask & (scores == best), ids, 0x7FFFFFFF), axis=0)
        tl.store(token_id_ptr + row, token_id.to(tl.int64))


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """Choose a token a row by greedy or Gumbel-max sampling; see `interface.Sample`."""
    num_rows, vocab_size = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or vocab_size == 0:
        raise ValueError(
            "logits must be float32 with unit stride in a vocabulary that is not empty"
        )
    for parameter, dtype in (
        (batch.temperature, torch.float32),
        (batch.top_k, torch.int32),
        (batch.top_p, torch.float32),
        (batch.min_p, torch.float32),
        (batch.seeds, torch.int64),
        (batch.positions, torch.int64),
        (batch.streams, torch.int64),
    ):
        if (
            parameter.dtype != dtype
            or parameter.shape != (num_rows,)
            or not parameter.is_contiguous()
        ):
            raise ValueError(
                f"a sampling parameter is {parameter.dtype} {tuple(parameter.shape)}, "
                f"expected contiguous {dtype} [{num_rows}]"
            )
    token_ids, is_finite = _choose(logits, batch)
    return SampleOutput(token_ids=token_ids, is_finite=is_finite)


def _choose(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Return each row's token id, [num_rows] int64, and whether it could be chosen, bool."""
    num_rows, vocab_size = logits.shape
    num_chunks = ceil_div(vocab_size, _BLOCK)
    device = logits.device

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    token_ids, is_finite = empty(num_rows, dtype=torch.int64), empty(num_rows, dtype=torch.uint8)
    if num_rows == 0:
        return token_ids, is_finite.view(torch.bool)
    chunk_scores = empty(num_rows, num_chunks, dtype=torch.float32)
    chunk_ids = empty(num_rows, num_chunks, dtype=torch.int32)
    row_largest = empty(num_rows, dtype=torch.float32)
    limit_keys, last_ties = (empty(num_rows, dtype=torch.int32) for _ in range(2))
    block_chunks = next_power_of_two(num_chunks)
    stretches, rows = (num_rows, num_chunks), (num_rows,)
    largest_logit_kernel[stretches](
        logits, chunk_scores, chunk_ids, logits.stride(0), vocab_size, num_chunks,
        BLOCK=_BLOCK, num_warps=_NUM_WARPS,
    )  # fmt: skip
    limits_kernel[rows](
        logits, chunk_scores, chunk_ids, batch.temperature, batch.top_k, batch.top_p, batch.min_p,
        token_ids, is_finite, row_largest, limit_keys, last_ties,
        logits.stride(0), vocab_size, num_chunks,
        BLOCK_CHUNKS=block_chunks, BLOCK=_BLOCK_SEARCH, NUM_PIVOTS=_NUM_PIVOTS,
        num_warps=_SEARCH_WARPS,
    )  # fmt: skip
    draw_kernel[stretches](
        logits, batch.temperature, batch.min_p, batch.seeds, batch.positions, batch.streams,
        token_ids, is_finite, row_largest, limit_keys, last_ties, chunk_scores, chunk_ids,
        logits.stride(0), vocab_size, num_chunks,
        BLOCK=_BLOCK, num_warps=_NUM_WARPS,
    )  # fmt: skip
    pick_kernel[rows](
        batch.temperature, is_finite, chunk_scores, chunk_ids, token_ids, num_chunks,
        BLOCK_CHUNKS=block_chunks, num_warps=1,
    )  # fmt: skip
    return token_ids, is_finite.view(torch.bool)


_ARGUMENTS = {
    "logits_ptr": "*fp32",
    "largest_ptr": "*fp32",
    "chunk_token_id_ptr": "*i32",
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "seed_ptr": "*i64",
    "position_ptr": "*i64",
    "stream_ptr": "*i64",
    "likeliest_ptr": "*i64",
    "is_finite_ptr": "*u8",
    "row_largest_ptr": "*fp32",
    "limit_key_ptr": "*i32",
    "last_tie_ptr": "*i32",
    "best_ptr": "*fp32",
    "best_token_id_ptr": "*i32",
    "token_id_ptr": "*i64",
    "logits_stride": "i32",
    "vocab_size": "i32",
    "num_chunks": "i32",
}
"""Types of the kernels' arguments by name."""


def _case(
    name: str,
    kernel: triton.JITFunction,
    num_warps: int,
    constexprs: dict[str, int],
    *expect: str,
) -> CompileCase:
    return CompileCase(
        name=f"sample {name}",
        kernel=kernel,
        signature=_ARGUMENTS,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=3,
        divisible_by_16=frozenset({"logits_stride", "vocab_size"}),
        expect=frozenset(expect),
    )


_BLOCK_CHUNKS = next_power_of_two(ceil_div(131_072, _BLOCK))
COMPILE_CASES = (
    _case(
        "largest_logit",
        largest_logit_kernel,
        _NUM_WARPS,
        {"BLOCK": _BLOCK},
        "vector_loads",
    ),
    _case(
        "limits",
        limits_kernel,
        _SEARCH_WARPS,
        {"BLOCK_CHUNKS": _BLOCK_CHUNKS, "BLOCK": _BLOCK_SEARCH, "NUM_PIVOTS": _NUM_PIVOTS},
    ),
    _case("draw", draw_kernel, _NUM_WARPS, {"BLOCK": _BLOCK}, "vector_loads"),
    _case("pick", pick_kernel, 1, {"BLOCK_CHUNKS": _BLOCK_CHUNKS}),
)
"""Configurations that are compiled ahead of time."""
