"""The Gumbel noise of `sample/noise.py` in Triton: the same words, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _philox4x32(x0, seed, position, stream):
    """Return the four words of Philox4x32-10 for the counters (x0, position, stream, 0)."""
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
    return x0, x1, x2, x3


@triton.jit
def noise_bits(first_id, seed, position, stream, BLOCK: tl.constexpr):
    """Return the random words, [BLOCK] uint32, of tokens from first_id, a multiple of 4, on.

    One evaluation of Philox serves four neighbouring tokens.
    """
    quads = (first_id // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    x0, x1, x2, x3 = _philox4x32(quads, seed, position, stream)
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def noise_bits_of(ids, seed, position, stream):
    """Return the random words, uint32, of tokens anywhere: ids is int32 and not negative."""
    x0, x1, x2, x3 = _philox4x32((ids // 4).to(tl.uint32), seed, position, stream)
    word = ids % 4
    return tl.where(word < 2, tl.where(word == 0, x0, x1), tl.where(word == 2, x2, x3))


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
