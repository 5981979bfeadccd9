// Attention over bf16 pages for bf16 queries where the CPU multiplies pairs of bf16.
//
// Scores are dot products of the queries and keys as they are, weights are rounded to bf16 before
// they meet the values; sums are float32. A pair of tokens is a pair at absolute positions, and a
// token that a row does not see is masked in it, so a row's arithmetic depends on its position
// only, as it does in attention_tile.h.
#pragma once

#include "attention_tile.h"

#if defined(STEPWIRE_AVX512) && defined(__AVX512BF16__)
#define STEPWIRE_ATTENTION_DOT 1

namespace stepwire {
namespace {

struct Dot {
  using Row = uint32_t;  // of a query: pairs of bf16
  using Query = bf16;

  static int64_t dim(const Call& call) { return (call.head_dim + 2 * W - 1) / (2 * W) * (2 * W); }
  static int64_t row_size(const Call& call) { return dim(call) / 2; }
  // Scores are of unscaled queries.
  static float score_factor(const Call& call) { return call.scale; }

  struct Tile {
    uint32_t* keys;    // [dim / 2][TILE], pairs of elements
    uint32_t* values;  // [TILE / 2][dim], pairs of tokens
  };
  static int64_t tile_floats(int64_t dim) { return TILE * dim; }
  static Tile tile(float* memory, int64_t dim) {
    auto* words = reinterpret_cast<uint32_t*>(memory);
    return {words, words + TILE * dim / 2};
  }

  static void load_query(const Call& call, const bf16* from, uint32_t* to) {
    for (int64_t d = 0; d < call.head_dim; d += 2 * W)
      store_as(to + d / 2, load_row(from + d, call.head_dim - d));
  }

  // The first n of 32 elements, zeros behind them.
  static vu load_row(const bf16* from, int64_t n) {
    if (n >= 2 * W) return load_as<vu>(from);
    return (vu)_mm512_maskz_loadu_epi16((1u << n) - 1, from);
  }

  static vf multiply(vu a, vu b, vf acc) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }

  // Pairs of elements [d, d + 32) of 16 tokens, of which `count` exist: a lane is a token.
  static void load_keys(const Call& call, const int64_t* vectors, int64_t count, int64_t d,
                        vf pairs[W]) {
    const auto* keys = static_cast<const bf16*>(call.key_pages) + d;
    const int64_t width = call.head_dim - d;
    if (count >= W && width >= 2 * W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) pairs[i] = load_as<vf>(keys + vectors[i] * call.head_dim);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        pairs[i] = i < count ? (vf)load_row(keys + vectors[i] * call.head_dim, width) : vf{};
    }
    transpose(pairs);
  }

  // Elements [d, d + 32) of two tokens side by side; null is a token that is not seen.
  static void load_values(const bf16* even, const bf16* odd, int64_t width, vu out[2]) {
    const __m512i a = even ? (__m512i)load_row(even, width) : __m512i{};
    const __m512i b = odd ? (__m512i)load_row(odd, width) : __m512i{};
    const __m512i first = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
        35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    out[0] = (vu)_mm512_permutex2var_epi16(a, first, b);
    out[1] = (vu)_mm512_permutex2var_epi16(a, second, b);
  }

  static void load_tile(const Call& call, const Task& task, int64_t start, const Tile& tile) {
    int64_t vectors[TILE];
    const int64_t count = find_vectors(call, task, start, vectors), width = dim(call);
    const auto* values = static_cast<const bf16*>(call.value_pages);
    for (int64_t t = 0; t < count; t += W)
      for (int64_t d = 0; d < call.head_dim; d += 2 * W) {
        vf pairs[W];
        load_keys(call, vectors + t, count - t, d, pairs);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store_as(tile.keys + (d / 2 + i) * TILE + t, pairs[i]);
      }
    for (int64_t t = 0; t < count; t += 2)
      for (int64_t d = 0; d < call.head_dim; d += 2 * W) {
        const bf16* even = values + vectors[t] * call.head_dim + d;
        const bf16* odd = t + 1 < count ? values + vectors[t + 1] * call.head_dim + d : nullptr;
        vu pair[2];
        load_values(even, odd, call.head_dim - d, pair);
        store_as(tile.values + t / 2 * width + d, pair[0]);
        store_as(tile.values + t / 2 * width + d + W, pair[1]);
      }
  }

  template <int ROWS, int VECTORS>
  static void score_vectors(const Call& call, const uint32_t* query, const Tile& tile,
                            float* scores) {
    vf acc[ROWS][VECTORS] = {};
    const int64_t pairs = row_size(call);
    for (int64_t d = 0; d < pairs; ++d) {
      vu keys[VECTORS];
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) keys[i] = load_as<vu>(tile.keys + d * TILE + i * W);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const vu pair = splat(query[r * pairs + d]);
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) acc[r][i] = multiply(keys[i], pair, acc[r][i]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < VECTORS; ++i) store(scores + r * TILE + i * W, acc[r][i]);
  }

  // Scores of the first `count` tokens of a tile.
  template <int ROWS>
  static void score(const Call& call, const uint32_t* query, const Tile& tile, int64_t count,
                    float* scores) {
    static_assert(TILE == 4 * W, "as many cases as vectors");
    switch ((count + W - 1) / W) {
      case 1: return score_vectors<ROWS, 1>(call, query, tile, scores);
      case 2: return score_vectors<ROWS, 2>(call, query, tile, scores);
      case 3: return score_vectors<ROWS, 3>(call, query, tile, scores);
      default: return score_vectors<ROWS, 4>(call, query, tile, scores);
    }
  }

  // Weights of tokens [low, high) as pairs of bf16, zeros beside them.
  static void round_weights(const float* weights, int64_t low, int64_t high, uint32_t* pairs) {
    for (int64_t t = low / (2 * W) * (2 * W); t < high; t += 2 * W)
      store_as(pairs + t / 2, (vu)_mm512_cvtne2ps_pbh((__m512)load(weights + t + W),
                                                      (__m512)load(weights + t)));
  }

  // weighted = weighted * shrink + weights @ values for ROWS heads and 16 * VECTORS elements, of
  // pairs that get(pair, values) brings.
  template <int ROWS, int VECTORS, class Get>
  static void accumulate(const uint32_t* weights, const float* shrink, int64_t low, int64_t high,
                         int64_t dim, float* weighted, Get get) {
    vf acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < VECTORS; ++i) acc[r][i] = load(weighted + r * dim + i * W) * shrink[r];
    for (int64_t pair = low / 2; pair < (high + 1) / 2; ++pair) {
      vu values[VECTORS];
      get(pair, values);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const vu weight = splat(weights[r * (TILE / 2) + pair]);
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) acc[r][i] = multiply(values[i], weight, acc[r][i]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < VECTORS; ++i) store(weighted + r * dim + i * W, acc[r][i]);
  }

  template <int ROWS, int VECTORS>
  static void accumulate_tile(const uint32_t* weights, const float* shrink, int64_t low,
                              int64_t high, const uint32_t* values, int64_t dim, float* weighted) {
    accumulate<ROWS, VECTORS>(
        weights, shrink, low, high, dim, weighted, [&](int64_t pair, vu out[VECTORS]) {
          // What is not seen may be NaN, and NaN times 0 is not 0.
          uint32_t seen = 0xffffffff;
          if (2 * pair < low) seen &= 0xffff0000;
          if (2 * pair + 1 >= high) seen &= 0x0000ffff;
#pragma GCC unroll 4
          for (int i = 0; i < VECTORS; ++i)
            out[i] = load_as<vu>(values + pair * dim + i * W) & seen;
        });
  }

  template <int ROWS, int VECTORS>
  static void accumulate_pages(const Call& call, const int64_t* vectors, int64_t d,
                               const uint32_t* weights, const float* shrink, int64_t low,
                               int64_t high, float* weighted) {
    const auto* pages = static_cast<const bf16*>(call.value_pages) + d;
    const int64_t size = call.head_dim;
    accumulate<ROWS, VECTORS>(
        weights, shrink, low, high, dim(call), weighted, [&](int64_t pair, vu out[VECTORS]) {
          const int64_t t = 2 * pair;
          const bf16* even = t >= low ? pages + vectors[t] * size : nullptr;
          const bf16* odd = t + 1 < high ? pages + vectors[t + 1] * size : nullptr;
#pragma GCC unroll 2
          for (int i = 0; i < VECTORS; i += 2)
            load_values(even ? even + i * W : nullptr, odd ? odd + i * W : nullptr,
                        size - d - i * W, out + i);
        });
  }

  // ROWS heads of one query token meet one tile, of which they see tokens [low, high).
  template <int ROWS>
  static void attend_tile(const Call& call, const uint32_t* query, const Tile& tile, int64_t low,
                          int64_t high, const Partial& part, int64_t row) {
    const int64_t width = dim(call);
    alignas(64) float scores[ROWS * TILE];
    alignas(64) uint32_t weights[ROWS * TILE / 2];
    float shrink[ROWS];
    score<ROWS>(call, query + row * row_size(call), tile, high, scores);
    weigh<ROWS>(call, low, high, scores, part, row, shrink, weights);
    float* weighted = part.weighted + row * width;
    int64_t d = 0;
    for (; d + 4 * W <= width; d += 4 * W)
      accumulate_tile<ROWS, 4>(weights, shrink, low, high, tile.values + d, width, weighted + d);
    for (; d < width; d += 2 * W)
      accumulate_tile<ROWS, 2>(weights, shrink, low, high, tile.values + d, width, weighted + d);
  }

  // The same straight from the pages: what is read by one token only is not laid out first.
  template <int ROWS>
  static void attend_pages(const Call& call, const uint32_t* query, const int64_t* vectors,
                           int64_t low, int64_t high, const Partial& part, int64_t row) {
    const int64_t width = dim(call), pairs = row_size(call);
    alignas(64) float scores[ROWS * TILE];
    alignas(64) uint32_t weights[ROWS * TILE / 2];
    float shrink[ROWS];
    query += row * pairs;
    for (int64_t t = 0; t < high; t += W) {
      vf acc[ROWS] = {};
      for (int64_t d = 0; d < call.head_dim; d += 2 * W) {
        vf keys[W];
        load_keys(call, vectors + t, high - t, d, keys);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r)
            acc[r] = multiply((vu)keys[i], splat(query[r * pairs + d / 2 + i]), acc[r]);
      }
      for (int r = 0; r < ROWS; ++r) store(scores + r * TILE + t, acc[r]);
    }
    weigh<ROWS>(call, low, high, scores, part, row, shrink, weights);
    float* weighted = part.weighted + row * width;
    int64_t d = 0;
    for (; d + 4 * W <= width; d += 4 * W)
      accumulate_pages<ROWS, 4>(call, vectors, d, weights, shrink, low, high, weighted + d);
    for (; d < width; d += 2 * W)
      accumulate_pages<ROWS, 2>(call, vectors, d, weights, shrink, low, high, weighted + d);
  }

  template <int ROWS>
  static void weigh(const Call& call, int64_t low, int64_t high, float* scores,
                    const Partial& part, int64_t row, float* shrink, uint32_t* weights) {
    for (int r = 0; r < ROWS; ++r) {
      shrink[r] = softmax_tile(call, low, high, scores + r * TILE, part.maximum[row + r],
                               part.total[row + r], score_factor(call));
      round_weights(scores + r * TILE, low, high, weights + r * (TILE / 2));
    }
  }
};

}  // namespace
}  // namespace stepwire

#endif
