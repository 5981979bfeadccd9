// Attention over bf16 pages for bf16 queries where the CPU multiplies pairs of bf16.
//
// Scores are dot products of the queries and keys as they are; weights are rounded to bf16 before
// they are summed and meet the values; sums are float32. A split is one softmax: all its scores,
// then their maximum, then the weights. A pair of tokens is a pair at absolute positions, and what
// a row does not see is masked in it, so a row's arithmetic depends on its position only, as it
// does in attention_tile.h.
#pragma once

#include "attention_tile.h"

#if defined(STEPWIRE_AVX512) && defined(__AVX512BF16__)
#define STEPWIRE_ATTENTION_DOT 1

namespace stepwire {
namespace {

struct Dot {
  using Row = uint32_t;  // of a query: pairs of bf16
  using Query = bf16;

  // A split, laid out for many rows.
  struct Tile {
    uint32_t* keys;    // [SPLIT / TILE][dim / 2][TILE], pairs of elements
    uint32_t* values;  // [SPLIT / 2][dim], pairs of tokens
  };
  static constexpr int AHEAD = 32;  // tokens that are asked for before they are read
  static constexpr int PAIR_TOKENS = 2 * W;  // whose weights are rounded together

  // Tokens whose keys are read next.
  struct Upcoming {
    const int64_t* offsets;
    int64_t count;
  };

  static int64_t dim(const Call& call) { return (call.head_dim + 2 * W - 1) / (2 * W) * (2 * W); }
  static int64_t row_size(const Call& call) { return dim(call) / 2; }
  static int64_t tile_floats(int64_t dim) { return SPLIT * dim; }
  static Tile tile(float* memory, int64_t dim) {
    auto* words = reinterpret_cast<uint32_t*>(memory);
    return {words, words + SPLIT * dim / 2};
  }

  // What a score's distance from the maximum is multiplied with, for a power of two.
  static float exponent_factor(const Call& call) {
    constexpr float LOG2_E = 1.44269504088896341f;
    return call.softcap != 0.0f ? LOG2_E : call.scale * LOG2_E;
  }
  static float decay(const Call& call, float distance) {
    return power_of_two(splat(distance * exponent_factor(call)))[0];
  }

  // 2^x to a relative error of 3e-6, a 700th of what rounding to bf16 makes; exactly 1 at 0.
  static vf power_of_two(vf x) {
    const vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf p = splat(0.009582852944731712f);
    p = fma(p, r, splat(0.055906426161527634f));
    p = fma(p, r, splat(0.24024099111557007f));
    p = fma(p, r, splat(0.6931241750717163f));
    p = fma(p, r, splat(1.0f));
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)(x - r));
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

  // Into the second level: what is asked for of the first one waits in its few miss buffers, and
  // the loads behind it with it (1.6 times slower where nothing is cached).
  static void prefetch(const bf16* vector, int64_t size) {
    for (int64_t d = 0; d < size; d += 2 * W) _mm_prefetch(vector + d, _MM_HINT_T1);
  }
  // Of up to 16 tokens.
  static void prefetch(const void* pages, const int64_t* offsets, int64_t count, int64_t size) {
    for (int64_t t = 0; t < std::min<int64_t>(W, count); ++t)
      prefetch(static_cast<const bf16*>(pages) + offsets[t], size);
  }

  // Pairs of elements [d, d + 32) of 16 tokens, of which `count` exist: a lane is a token.
  static void load_keys(const Call& call, const int64_t* offsets, int64_t count, int64_t d,
                        vf pairs[W]) {
    const auto* keys = static_cast<const bf16*>(call.key_pages) + d;
    const int64_t width = call.head_dim - d;
    if (count >= W && width >= 2 * W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) pairs[i] = load_as<vf>(keys + offsets[i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        pairs[i] = i < count ? (vf)load_row(keys + offsets[i], width) : vf{};
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

  // Scores of [low, high) become weights, in pairs of bf16, zeros beside them up to multiples of
  // PAIR_TOKENS.
  template <int ROWS>
  static void weigh(const Call& call, const Seen seen[ROWS], float* scores, const Partial& part,
                    int64_t row, uint32_t* weights) {
    const float factor = exponent_factor(call);
    const vu ones = splat(0x3f803f80u);
    for (int r = 0; r < ROWS; ++r) {
      float* of_row = scores + r * SPLIT;
      const int64_t low = seen[r].low, high = seen[r].high;
      const int64_t first = low / PAIR_TOKENS * PAIR_TOKENS;
      const int64_t last = (high + PAIR_TOKENS - 1) / PAIR_TOKENS * PAIR_TOKENS;
      if (call.softcap != 0.0f) {
        // tanh(x) = 1 - 2 / (e^(2x) + 1)
        const float doubled = 2.0f * call.scale / call.softcap;
        for (int64_t t = first; t < last; t += W) {
          const vf e = exp(load(of_row + t) * doubled);
          store(of_row + t, call.softcap - 2.0f * call.softcap / (e + 1.0f));
        }
      }
      if (low != first) hide(of_row + first, 0, low - first);
      if (high != last) hide(of_row + last - PAIR_TOKENS, high - last + PAIR_TOKENS, PAIR_TOKENS);
      vf best[2] = {splat(-INF), splat(-INF)};
      for (int64_t t = first; t < last; t += 2 * W)
        for (int i = 0; i < 2; ++i) best[i] = max(load(of_row + t + i * W), best[i]);
      part.maximum[row + r] = largest(max(best[0], best[1]));
    }
    for (int r = 0; r < ROWS; ++r) {
      const float* of_row = scores + r * SPLIT;
      const int64_t low = seen[r].low, high = seen[r].high;
      const vf maximum = splat(part.maximum[row + r]);
      vf total = {};
      for (int64_t t = low / PAIR_TOKENS * PAIR_TOKENS; t < high; t += PAIR_TOKENS) {
        const vf even = power_of_two((load(of_row + t) - maximum) * factor);
        const vf odd = power_of_two((load(of_row + t + W) - maximum) * factor);
        const vu pairs = (vu)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        store_as(weights + (r * SPLIT + t) / 2, pairs);
        total = multiply(pairs, ones, total);
      }
      part.total[row + r] = sum(total);
    }
  }

  // Scores [begin, end) of PAIR_TOKENS ones say nothing.
  static void hide(float* scores, int64_t begin, int64_t end) {
    const uint32_t hidden = static_cast<uint32_t>((1ull << end) - (1ull << begin));
    for (int i = 0; i < 2; ++i)
      store(scores + i * W,
            (vf)_mm512_mask_mov_ps((__m512)load(scores + i * W),
                                   static_cast<__mmask16>(hidden >> (i * W)), (__m512)splat(-INF)));
  }

  // weighted += weights @ values for ROWS rows, 16 * VECTORS elements and pairs [first, last) that
  // get(pair, values) brings.
  template <int ROWS, int VECTORS, class Get>
  static void accumulate(const uint32_t* weights, int64_t first, int64_t last, int64_t dim,
                         float* weighted, Get get) {
    vf acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < VECTORS; ++i) acc[r][i] = load(weighted + r * dim + i * W);
    for (int64_t pair = first; pair < last; ++pair) {
      vu values[VECTORS];
      get(pair, values);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const vu weight = splat(weights[r * (SPLIT / 2) + pair]);
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) acc[r][i] = multiply(values[i], weight, acc[r][i]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < VECTORS; ++i) store(weighted + r * dim + i * W, acc[r][i]);
  }

  // Many rows: the split is laid out first.

  static void load_tile(const Call& call, const int64_t* offsets, int64_t begin, int64_t end,
                        const Tile& tile) {
    const int64_t width = dim(call), size = call.head_dim;
    const auto* values = static_cast<const bf16*>(call.value_pages);
    for (int64_t t = begin / W * W; t < end; t += W) {
      prefetch(call.value_pages, offsets + t, end - t, size);
      prefetch(call.key_pages, offsets + t + AHEAD, end - t - AHEAD, size);
      for (int64_t d = 0; d < size; d += 2 * W) {
        vf pairs[W];
        load_keys(call, offsets + t, end - t, d, pairs);
        uint32_t* to = tile.keys + t / TILE * TILE * width / 2 + d / 2 * TILE + t % TILE;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store_as(to + i * TILE, pairs[i]);
      }
    }
    for (int64_t t = begin / 2 * 2; t < end; t += 2)
      for (int64_t d = 0; d < size; d += 2 * W) {
        vu pair[2];
        load_values(values + offsets[t] + d, t + 1 < end ? values + offsets[t + 1] + d : nullptr,
                    size - d, pair);
        store_as(tile.values + t / 2 * width + d, pair[0]);
        store_as(tile.values + t / 2 * width + d + W, pair[1]);
      }
  }

  // Scores of 16 * VECTORS tokens of a tile.
  template <int ROWS, int VECTORS>
  static void score(const uint32_t* query, int64_t pairs, const uint32_t* keys, float* scores) {
    vf acc[ROWS][VECTORS] = {};
    for (int64_t d = 0; d < pairs; ++d) {
      vu k[VECTORS];
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) k[i] = load_as<vu>(keys + d * TILE + i * W);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const vu pair = splat(query[r * pairs + d]);
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) acc[r][i] = multiply(k[i], pair, acc[r][i]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < VECTORS; ++i) store(scores + r * SPLIT + i * W, acc[r][i]);
  }

  // Pairs [first, last) of one row that sees some of their tokens. What it does not see may be
  // NaN, and NaN times 0 is not 0.
  template <int VECTORS>
  static void accumulate_edge(const uint32_t* weights, Seen seen, int64_t first, int64_t last,
                              const uint32_t* values, int64_t dim, float* weighted) {
    accumulate<1, VECTORS>(weights, first, last, dim, weighted, [&](int64_t pair, vu* out) {
      uint32_t mask = 0xffffffff;
      if (2 * pair < seen.low) mask &= 0xffff0000;
      if (2 * pair + 1 >= seen.high) mask &= 0x0000ffff;
      for (int i = 0; i < VECTORS; ++i) out[i] = load_as<vu>(values + pair * dim + i * W) & mask;
    });
  }

  // 16 * VECTORS elements of ROWS rows; what all of them see is multiplied at once.
  template <int ROWS, int VECTORS>
  static void accumulate_tile(const uint32_t* weights, const Seen seen[ROWS],
                              const uint32_t* values, int64_t dim, float* weighted) {
    int64_t begin = 0, end = SPLIT / 2;  // pairs that all rows see
    for (int r = 0; r < ROWS; ++r) {
      begin = std::max(begin, (seen[r].low + 1) / 2);
      end = std::min(end, seen[r].high / 2);
    }
    end = std::max(begin, end);
    const auto edge = [&](int r, int64_t first, int64_t last) {
      if (first < last)
        accumulate_edge<VECTORS>(weights + r * (SPLIT / 2), seen[r], first, last, values, dim,
                                 weighted + r * dim);
    };
    const auto last_pair = [&](int r) { return (seen[r].high + 1) / 2; };
    for (int r = 0; r < ROWS; ++r) edge(r, seen[r].low / 2, std::min(begin, last_pair(r)));
    accumulate<ROWS, VECTORS>(weights, begin, end, dim, weighted, [&](int64_t pair, vu* out) {
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) out[i] = load_as<vu>(values + pair * dim + i * W);
    });
    for (int r = 0; r < ROWS; ++r) edge(r, std::max(end, seen[r].low / 2), last_pair(r));
  }

  // see(row): what a row sees.
  template <int ROWS, class See>
  static void attend_rows(const Call& call, const uint32_t* query, See see, const Tile& tile,
                          const Partial& part, int64_t row) {
    const int64_t width = dim(call), pairs = row_size(call);
    alignas(64) float scores[ROWS * SPLIT];
    alignas(64) uint32_t weights[ROWS * SPLIT / 2];
    Seen seen[ROWS];
    int64_t low = SPLIT, high = 0;
    for (int r = 0; r < ROWS; ++r) {
      seen[r] = see(row + r);
      low = std::min(low, seen[r].low);
      high = std::max(high, seen[r].high);
    }
    query += row * pairs;
    static_assert(TILE == 4 * W, "as many cases as vectors");
    for (int64_t t = low / TILE * TILE; t < high; t += TILE) {
      const uint32_t* keys = tile.keys + t * pairs;
      switch (std::min<int64_t>(TILE, high - t + W - 1) / W) {
        case 1: score<ROWS, 1>(query, pairs, keys, scores + t); break;
        case 2: score<ROWS, 2>(query, pairs, keys, scores + t); break;
        case 3: score<ROWS, 3>(query, pairs, keys, scores + t); break;
        default: score<ROWS, 4>(query, pairs, keys, scores + t);
      }
    }
    weigh<ROWS>(call, seen, scores, part, row, weights);
    float* weighted = part.weighted + row * width;
    int64_t d = 0;
    for (; d + 4 * W <= width; d += 4 * W)
      accumulate_tile<ROWS, 4>(weights, seen, tile.values + d, width, weighted + d);
    for (; d < width; d += 2 * W)
      accumulate_tile<ROWS, 2>(weights, seen, tile.values + d, width, weighted + d);
  }

  // One token of a few heads, straight from the pages.

  // Scores of 32 tokens from t on, of which `end - t` exist.
  template <int ROWS>
  static void score_pages(const Call& call, const uint32_t* query, const int64_t* offsets,
                          int64_t t, int64_t end, float* scores) {
    vf acc[2][ROWS] = {};
    for (int64_t d = 0; d < call.head_dim; d += 2 * W)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        if (t + half * W >= end) break;
        vf keys[W];
        load_keys(call, offsets + t + half * W, end - t - half * W, d, keys);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r)
            acc[half][r] = multiply((vu)keys[i], splat(query[r * row_size(call) + d / 2 + i]),
                                    acc[half][r]);
      }
    for (int r = 0; r < ROWS; ++r)
      for (int half = 0; half < 2; ++half)
        store(scores + r * SPLIT + t + half * W, acc[half][r]);
  }

  template <int ROWS, int VECTORS>
  static void accumulate_pages(const Call& call, const int64_t* offsets, int64_t d, Seen seen,
                               const Upcoming& upcoming, const uint32_t* weights, float* weighted) {
    const auto* pages = static_cast<const bf16*>(call.value_pages) + d;
    const int64_t size = call.head_dim;
    const auto get = [&](int64_t pair, vu out[VECTORS]) {
      const int64_t t = 2 * pair;
      if (d == 0 && t + 1 < upcoming.count) {
        const auto* keys = static_cast<const bf16*>(call.key_pages);
        prefetch(keys + upcoming.offsets[t], size);
        prefetch(keys + upcoming.offsets[t + 1], size);
      }
      const bf16* even = t >= seen.low ? pages + offsets[t] : nullptr;
      const bf16* odd = t + 1 < seen.high ? pages + offsets[t + 1] : nullptr;
#pragma GCC unroll 2
      for (int i = 0; i < VECTORS; i += 2)
        load_values(even ? even + i * W : nullptr, odd ? odd + i * W : nullptr, size - d - i * W,
                    out + i);
    };
    accumulate<ROWS, VECTORS>(weights, seen.low / 2, (seen.high + 1) / 2, dim(call), weighted,
                              get);
  }

  template <int ROWS>
  static void attend_pages(const Call& call, const uint32_t* query, const int64_t* offsets,
                           Seen seen, const Upcoming& upcoming, const Partial& part) {
    const int64_t width = dim(call);
    alignas(64) float scores[ROWS * SPLIT];
    alignas(64) uint32_t weights[ROWS * SPLIT / 2];
    for (int64_t t = seen.low / (2 * W) * (2 * W); t < seen.high; t += 2 * W) {
      for (int64_t i = t; i < t + 2 * W; i += W) {
        prefetch(call.key_pages, offsets + i + AHEAD, seen.high - i - AHEAD, call.head_dim);
        prefetch(call.value_pages, offsets + i, seen.high - i, call.head_dim);
      }
      score_pages<ROWS>(call, query, offsets, t, seen.high, scores);
    }
    Seen all[ROWS];
    std::fill_n(all, ROWS, seen);
    weigh<ROWS>(call, all, scores, part, 0, weights);
    int64_t d = 0;
    for (; d + 4 * W <= width; d += 4 * W)
      accumulate_pages<ROWS, 4>(call, offsets, d, seen, upcoming, weights, part.weighted + d);
    for (; d < width; d += 2 * W)
      accumulate_pages<ROWS, 2>(call, offsets, d, seen, upcoming, weights, part.weighted + d);
  }

  static void attend_split(const Call& call, const Task& task, const uint32_t* query,
                           int64_t start, int64_t stop, const Place& next, const Tile& tile,
                           const Partial& part) {
    const int64_t group = call.group(), rows = task.count * group;
    const int64_t begin = std::max<int64_t>(0, task.begin(call) - start);
    int64_t offsets[SPLIT];
    find_vectors(call, task, start, stop - start, call.head_dim, offsets);
    part.clear(rows, dim(call));
    if (task.count == 1 && group <= 4) {
      int64_t next_offsets[SPLIT];
      Upcoming upcoming{next_offsets, 0};
      if (next.task) {
        upcoming.count = std::min<int64_t>(SPLIT, next.task->end() - next.start);
        find_vectors(call, *next.task, next.start, upcoming.count, call.head_dim, next_offsets);
      }
      const Seen seen(call, task.position, start, SPLIT);
      switch (group) {
        case 1: return attend_pages<1>(call, query, offsets, seen, upcoming, part);
        case 2: return attend_pages<2>(call, query, offsets, seen, upcoming, part);
        case 3: return attend_pages<3>(call, query, offsets, seen, upcoming, part);
        case 4: return attend_pages<4>(call, query, offsets, seen, upcoming, part);
      }
    }
    load_tile(call, offsets, begin, stop - start, tile);
    // Rows that see none of the split are the first ones, or with a window the last ones.
    const auto seen = [&](int64_t r) {
      return Seen(call, task.position + r / group, start, SPLIT);
    };
    int64_t row = 0, end = rows;
    while (row < end && seen(row).is_empty()) ++row;
    while (row < end && seen(end - 1).is_empty()) --end;
    for (; row + 6 <= end; row += 6) attend_rows<6>(call, query, seen, tile, part, row);
    for (; row + 3 <= end; row += 3) attend_rows<3>(call, query, seen, tile, part, row);
    for (; row < end; ++row) attend_rows<1>(call, query, seen, tile, part, row);
  }
};

}  // namespace
}  // namespace stepwire

#endif
