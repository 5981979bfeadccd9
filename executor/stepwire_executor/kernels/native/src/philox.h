// Position-keyed Gumbel noise; the definition stands in sample/noise.py.
#pragma once

#include "vec.h"

namespace stepwire {

constexpr int Q = W / 2;  // 64-bit lanes, one Philox counter each

// The key and the counter's upper words, which a row's tokens share.
struct NoiseKey {
  uint32_t seed_low, seed_high, position, stream;
};

inline vq multiply_low_words(vq a, vq b) {
#ifdef STEPWIRE_AVX512
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#else
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#endif
}

// Words of Philox4x32-10 with counters (quad, position, stream, 0). Only the low half of each
// 64-bit lane counts; the high halves carry leftovers that the multiplication ignores.
inline void philox(vq quads, const NoiseKey& key, vq words[4]) {
  const vq zero = {};
  const vq m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  vq x0 = quads, x1 = zero + key.position, x2 = zero + key.stream, x3 = zero;
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const vq p0 = multiply_low_words(x0, m0), p1 = multiply_low_words(x2, m1);
    x0 = (p1 >> 32) ^ x1 ^ k0;
    x1 = p1;
    x2 = (p0 >> 32) ^ x3 ^ k1;
    x3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = x0;
  words[1] = x1;
  words[2] = x2;
  words[3] = x3;
}

// -log(-log(u)) with u = ((bits >> 8) + 1/2) / 2^24. Near 1 float32 cannot hold u; 1 - u it can,
// so the upper half works on that and no precision is lost.
inline vf gumbel(vu bits) {
  const vu n = bits >> 8;
  const vu mirrored = 0xffffff - n;
  vf f, e;
  split((to_float((vi)n) + 0.5f) * 0x1p-24f, f, e);
  const vf rest = (to_float((vi)mirrored) + 0.5f) * 0x1p-24f;  // 1 - u, exact below 1/2
  const vf far = 1.0f - 2.0f * rest;                           // 2u - 1, exact
  const vi is_upper = n >= 0x800000u;
  const vi is_near = rest <= 0.29f;
  f = is_upper ? (is_near ? -rest : far) : f;
  e = is_upper ? (is_near ? vf{} : splat(-1.0f)) : e;
  const vf exponential = -log_parts(f, e);
  split(exponential, f, e);
  return -log_parts(f, e);
}

// Bits of the 2 W tokens that start at token id 4 * quad.
inline void noise_bits(uint32_t quad, const NoiseKey& key, vu bits[2]) {
  vq lane;
  for (int i = 0; i < Q; ++i) lane[i] = i;
  vq words[4];
  philox(lane + quad, key, words);
  const vq low = (words[0] & 0xffffffffu) | (words[1] << 32);
  const vq high = (words[2] & 0xffffffffu) | (words[3] << 32);
#ifdef STEPWIRE_AVX512
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  bits[0] = (vu)_mm512_permutex2var_epi64((__m512i)low, first, (__m512i)high);
  bits[1] = (vu)_mm512_permutex2var_epi64((__m512i)low, second, (__m512i)high);
#else
  const __m256i a = _mm256_unpacklo_epi64((__m256i)low, (__m256i)high);
  const __m256i b = _mm256_unpackhi_epi64((__m256i)low, (__m256i)high);
  bits[0] = (vu)_mm256_permute2x128_si256(a, b, 0x20);
  bits[1] = (vu)_mm256_permute2x128_si256(a, b, 0x31);
#endif
}

// Bits of Q tokens anywhere.
inline void noise_bits_at(const uint32_t token_ids[Q], const NoiseKey& key, uint32_t bits[Q]) {
  vq quads;
  for (int i = 0; i < Q; ++i) quads[i] = token_ids[i] / 4;
  vq words[4];
  philox(quads, key, words);
  uint64_t lanes[4][Q];
  for (int i = 0; i < 4; ++i) store_as(lanes[i], words[i]);
  for (int i = 0; i < Q; ++i) bits[i] = static_cast<uint32_t>(lanes[token_ids[i] % 4][i]);
}

}  // namespace stepwire
