// One tile of 64 context tokens, what query rows make of it, and how parts of a context add up.
//
// Tiles are widened to float32 once for all rows that read them, keys transposed, so that a lane
// is a token and scores need no sums across lanes.
#pragma once

#include <algorithm>

#include "paged_attention.h"
#include "transpose.h"
#include "vec.h"

namespace stepwire {
namespace {

constexpr int TILE = 64;
constexpr int SPLIT = 256;  // whole tiles
constexpr int SCORE_VECTORS = 4;

using Call = AttentionCall;
using Task = AttentionTask;

// The softmax of part of a row's context: value = weighted / total, relative to maximum.
struct Partial {
  float* maximum;   // [rows]
  float* total;     // [rows]
  float* weighted;  // [rows][padded_dim]

  static int64_t size(int64_t rows, int64_t dim) { return rows * (dim + 2) + W; }
  // memory: size() floats, aligned to a vector.
  static Partial at(float* memory, int64_t rows, int64_t dim) {
    return {memory + rows * dim, memory + rows * (dim + 1), memory};
  }
  void clear(int64_t rows, int64_t dim) const {
    std::fill_n(maximum, rows, -INF);
    std::fill_n(total, rows, 0.0f);
    std::fill_n(weighted, rows * dim, 0.0f);
  }
};

// Tokens [low, high) of the `size` at `first` that the query token at a position sees.
struct Seen {
  int64_t low, high;

  Seen() = default;
  Seen(const Call& call, int64_t position, int64_t first, int64_t size)
      : low(call.window ? std::max<int64_t>(0, position - call.window + 1 - first) : 0),
        high(std::min<int64_t>(size, position + 1 - first)) {}
  bool is_empty() const { return low >= high; }
};

// Where a split begins.
struct Place {
  const Task* task;  // or null
  int64_t start;
};

// Adds what a later part of the context says.
template <class Kind>
void merge(const Call& call, const Partial& into, const Partial& part, int64_t rows) {
  const int64_t dim = Kind::dim(call);
  for (int64_t row = 0; row < rows; ++row) {
    if (part.total[row] == 0.0f) continue;
    const float maximum = std::max(into.maximum[row], part.maximum[row]);
    const float keep = Kind::decay(call, into.maximum[row] - maximum);
    const float add = Kind::decay(call, part.maximum[row] - maximum);
    into.maximum[row] = maximum;
    into.total[row] = into.total[row] * keep + part.total[row] * add;
    for (int64_t i = row * dim; i < (row + 1) * dim; i += W)
      store(into.weighted + i,
            fma(load(part.weighted + i), splat(add), load(into.weighted + i) * keep));
  }
}

// One tile as float32; tokens past the context's end read as zeros.
struct Tile {
  float* keys;    // [padded_dim][TILE]
  float* values;  // [TILE][padded_dim]
};

// W tokens by W elements of keys and values, of which `count` tokens and `width` elements exist.
// IS_WHOLE: all of them, known when compiled.
template <class Page, bool IS_WHOLE>
inline void load_square(const Call& call, const int64_t* vectors, int64_t count, int64_t d,
                        int64_t width, float* keys, float* values, int64_t dim) {
  const auto* key_pages = static_cast<const Page*>(call.key_pages);
  const auto* value_pages = static_cast<const Page*>(call.value_pages);
  vf rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    vf value = {};
    rows[i] = vf{};
    if (IS_WHOLE || i < count) {
      const int64_t offset = vectors[i] * call.head_dim + d;
      if (IS_WHOLE || width == W) {
        rows[i] = load(key_pages + offset);
        value = load(value_pages + offset);
      } else {
        rows[i] = load_first(key_pages + offset, width);
        value = load_first(value_pages + offset, width);
      }
      if constexpr (std::is_same_v<Page, e4m3>) {
        if (call.key_scales) {
          rows[i] *= widen(call.key_scales[vectors[i]]);
          value *= widen(call.value_scales[vectors[i]]);
        }
      }
    }
    store(values + i * dim + d, value);
  }
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(keys + (d + i) * TILE, rows[i]);
}

// Where the keys and values of tokens [start, start + count) lie, in units of 1 / size vectors.
inline void find_vectors(const Call& call, const Task& task, int64_t start, int64_t count,
                         int64_t size, int64_t* offsets) {
  const int32_t* blocks = call.block_table + task.seq * call.block_table_stride;
  int64_t block = start / call.block_size, slot = start % call.block_size;
  for (int64_t t = 0; t < count; ++block, slot = 0) {
    // Tables need no blocks before a window: what is read there is masked, and must be readable.
    const int64_t id = std::clamp<int64_t>(blocks[block], 0, call.num_blocks - 1);
    const int64_t first = (id * call.num_kv_heads + task.kv_head) * call.block_size;
    const int64_t stop = std::min(count, t + call.block_size - slot);
    for (; t < stop; ++t, ++slot) offsets[t] = (first + slot) * size;
  }
}

template <class Page>
void load_tile(const Call& call, const Task& task, int64_t start, const Tile& tile) {
  const int64_t dim = call.padded_dim(), count = std::min<int64_t>(TILE, task.end() - start);
  int64_t vectors[TILE];
  find_vectors(call, task, start, count, 1, vectors);
  for (int64_t t = 0; t < count; t += W) {
    for (int64_t d = 0; d < dim; d += W) {
      const int64_t width = std::min<int64_t>(W, call.head_dim - d);
      float* values = tile.values + t * dim;
      if (t + W <= count && width == W)
        load_square<Page, true>(call, vectors + t, W, d, W, tile.keys + t, values, dim);
      else
        load_square<Page, false>(call, vectors + t, count - t, d, width, tile.keys + t, values,
                                 dim);
    }
  }
}

// Scores of ROWS heads that share their mask, then their weights: scores [ROWS][TILE].
template <int ROWS>
void score(const Call& call, const float* query, int64_t query_stride, const Tile& tile,
           int64_t count, float* scores) {
  constexpr int TOKENS = SCORE_VECTORS * W;
  for (int64_t t = 0; t < count; t += TOKENS) {
    vf acc[ROWS][SCORE_VECTORS] = {};
    for (int64_t d = 0; d < call.head_dim; ++d) {
      vf keys[SCORE_VECTORS];
#pragma GCC unroll 4
      for (int i = 0; i < SCORE_VECTORS; ++i) keys[i] = load(tile.keys + d * TILE + t + i * W);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < SCORE_VECTORS; ++i)
          acc[r][i] = fma(splat(query[r * query_stride + d]), keys[i], acc[r][i]);
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < SCORE_VECTORS; ++i) store(scores + r * TILE + t + i * W, acc[r][i]);
  }
}

// Turns scores of tokens [low, high) of a tile, times factor, into softmax weights; 0 beside them,
// up to the next multiples of W. Returns how much what was accumulated before must shrink.
float softmax_tile(const Call& call, int64_t low, int64_t high, float* scores, float& maximum,
                   float& total) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  const int64_t first = low / W * W, last = (high + W - 1) / W * W;
  vf best = splat(-INF);
  for (int64_t t = first; t < last; t += W) {
    vf s = load(scores + t);
    if (call.softcap != 0.0f) {
      // tanh(x) = 1 - 2 / (e^(2x) + 1)
      const vf doubled = s * (2.0f / call.softcap);
      s = call.softcap - 2.0f * call.softcap / (exp(doubled) + 1.0f);
    }
    const vi token = lane + static_cast<int>(t);
    s = (token >= static_cast<int>(low)) & (token < static_cast<int>(high)) ? s : splat(-INF);
    store(scores + t, s);
    best = max(best, s);
  }
  const float new_maximum = std::max(maximum, largest(best));
  const float shrink = exp(maximum - new_maximum);
  vf sums = {};
  for (int64_t t = first; t < last; t += W) {
    const vf weight = exp(load(scores + t) - new_maximum);
    store(scores + t, weight);
    sums += weight;
  }
  maximum = new_maximum;
  total = total * shrink + sum(sums);
  return shrink;
}

// weighted = weighted * shrink + weights @ values, for ROWS heads and VECTORS of the dimension.
template <int ROWS, int VECTORS>
void accumulate(const float* weights, const float* shrink, int64_t low, int64_t high,
                const float* values, int64_t dim, float* weighted) {
  vf acc[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < VECTORS; ++i)
      acc[r][i] = load(weighted + r * dim + i * W) * shrink[r];
  for (int64_t t = low; t < high; ++t) {
    vf v[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) v[i] = load(values + t * dim + i * W);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i)
        acc[r][i] = fma(splat(weights[r * TILE + t]), v[i], acc[r][i]);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < VECTORS; ++i) store(weighted + r * dim + i * W, acc[r][i]);
}

// ROWS heads of one query token meet one tile, of which they see tokens [low, high).
template <int ROWS>
void attend_tile(const Call& call, const float* query, const Tile& tile, int64_t low,
                 int64_t high, const Partial& part, int64_t row) {
  const int64_t dim = call.padded_dim();
  alignas(64) float scores[ROWS * TILE];
  float shrink[ROWS];
  score<ROWS>(call, query + row * dim, dim, tile, high, scores);
  for (int r = 0; r < ROWS; ++r)
    shrink[r] = softmax_tile(call, low, high, scores + r * TILE, part.maximum[row + r],
                             part.total[row + r]);
  float* weighted = part.weighted + row * dim;
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W)
    accumulate<ROWS, 4>(scores, shrink, low, high, tile.values + d, dim, weighted + d);
  for (; d < dim; d += W)
    accumulate<ROWS, 1>(scores, shrink, low, high, tile.values + d, dim, weighted + d);
}

// How pages of any dtype are met: everything is widened to float32 first.
template <class T, class Page>
struct Wide {
  using Row = float;
  using Query = T;
  using Tile = stepwire::Tile;

  static int64_t dim(const Call& call) { return call.padded_dim(); }
  static int64_t row_size(const Call& call) { return dim(call); }
  static int64_t tile_floats(int64_t dim) { return 2 * TILE * dim; }
  static Tile tile(float* memory, int64_t dim) { return {memory, memory + TILE * dim}; }

  static void load_query(const Call& call, const T* from, float* to) {
    for_vectors(call.head_dim, [&](int64_t, auto get, auto put) {
      put(to, get(from) * call.scale);
    });
  }
  static float decay(const Call&, float distance) { return exp(distance); }

  // All rows of a task meet the tiles of context [start, stop).
  static void attend_split(const Call& call, const Task& task, const float* query, int64_t start,
                           int64_t stop, const Place&, const Tile& tile, const Partial& part) {
    const int64_t group = call.group();
    part.clear(task.count * group, dim(call));
    for (int64_t first = start; first < stop; first += TILE) {
      if (first + TILE <= task.begin(call)) continue;
      load_tile<Page>(call, task, first, tile);
      for (int64_t token = 0; token < task.count; ++token) {
        const Seen seen(call, task.position + token, first, TILE);
        if (seen.is_empty()) continue;
        int64_t head = 0;
        for (; head + 3 <= group; head += 3)
          attend_tile<3>(call, query, tile, seen.low, seen.high, part, token * group + head);
        for (; head < group; ++head)
          attend_tile<1>(call, query, tile, seen.low, seen.high, part, token * group + head);
      }
    }
  }
};

}  // namespace
}  // namespace stepwire
