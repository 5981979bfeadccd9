// Causal attention over KV pages with an online softmax.
//
// The context is walked in tiles of 64 tokens and splits of 512, both at absolute positions, and
// a row's arithmetic inside a tile depends on the row's position only. So its bits do not depend
// on how its sequence was cut into chunks, on other rows, on where blocks lie, or on threads.
// Tiles are widened to float32 once for all rows that read them, keys transposed, so that a lane
// is a token and scores need no sums across lanes.

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "transpose.h"
#include "vec.h"

namespace stepwire {
namespace {

constexpr int TILE = 64;
constexpr int SPLIT = 512;
constexpr int QUERY_ROWS = 48;  // rows that share a tile: query tokens times heads of a group
constexpr int SCORE_VECTORS = 4;

struct Call {
  const void* query;
  int64_t query_strides[2];  // token, head
  const void* key_pages;
  const void* value_pages;
  const float* key_scales;
  const float* value_scales;
  const int32_t* cu_seqlens_q;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t block_table_stride;
  void* out;
  int64_t num_seqs, num_heads, num_kv_heads, head_dim, block_size;
  float scale;
  int64_t window;   // 0: unlimited
  float softcap;    // 0: none
  int num_threads;

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t padded_dim() const { return (head_dim + W - 1) / W * W; }
};

// Query tokens [first, first + count) of a sequence, for one KV head.
struct Task {
  int64_t seq, kv_head, first, count;
  int64_t position;  // of the first token

  int64_t end() const { return position + count; }
  int64_t begin(const Call& call) const {
    return call.window ? std::max<int64_t>(0, position - call.window + 1) : 0;
  }
};

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

// Adds what a later part of the context says. Always called, with one split too.
__attribute__((noinline)) void merge(const Partial& into, const Partial& part, int64_t rows,
                                     int64_t dim) {
  for (int64_t row = 0; row < rows; ++row) {
    if (part.total[row] == 0.0f) continue;
    const float maximum = std::max(into.maximum[row], part.maximum[row]);
    const float keep = exp(into.maximum[row] - maximum);
    const float add = exp(part.maximum[row] - maximum);
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
        rows[i] *= call.key_scales[vectors[i]];
        value *= call.value_scales[vectors[i]];
      }
    }
    store(values + i * dim + d, value);
  }
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(keys + (d + i) * TILE, rows[i]);
}

template <class Page>
void load_tile(const Call& call, const Task& task, int64_t start, const Tile& tile) {
  const int64_t dim = call.padded_dim();
  const int64_t count = std::min<int64_t>(TILE, task.end() - start);
  const int32_t* blocks = call.block_table + task.seq * call.block_table_stride;
  int64_t vectors[TILE];  // where each token's key and value lie, in units of head_dim
  int64_t block = start / call.block_size, offset = start % call.block_size;
  for (int64_t t = 0; t < count; ++t) {
    vectors[t] = (blocks[block] * call.num_kv_heads + task.kv_head) * call.block_size + offset;
    if (++offset == call.block_size) {
      offset = 0;
      ++block;
    }
  }
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

// Turns scores of tokens [low, high) of a tile into softmax weights, 0 elsewhere; returns how
// much what was accumulated before must shrink.
float softmax_tile(const Call& call, int64_t low, int64_t high, float* scores, float& maximum,
                   float& total) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  vf best = splat(-INF);
  for (int t = 0; t < TILE; t += W) {
    vf s = load(scores + t);
    if (call.softcap != 0.0f) {
      // tanh(x) = 1 - 2 / (e^(2x) + 1)
      const vf doubled = s * (2.0f / call.softcap);
      s = call.softcap - 2.0f * call.softcap / (exp(doubled) + 1.0f);
    }
    const vi token = lane + t;
    s = (token >= static_cast<int>(low)) & (token < static_cast<int>(high)) ? s : splat(-INF);
    store(scores + t, s);
    best = max(best, s);
  }
  const float new_maximum = std::max(maximum, largest(best));
  const float shrink = exp(maximum - new_maximum);
  vf sums = {};
  for (int t = 0; t < TILE; t += W) {
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

// All rows of a task meet the tiles of context [start, stop).
template <class Page>
void attend_split(const Call& call, const Task& task, const float* query, int64_t start,
                  int64_t stop, const Tile& tile, const Partial& part) {
  const int64_t group = call.group();
  for (int64_t first = start; first < stop; first += TILE) {
    if (first + TILE <= task.begin(call)) continue;
    load_tile<Page>(call, task, first, tile);
    for (int64_t token = 0; token < task.count; ++token) {
      const int64_t position = task.position + token;
      const int64_t high = std::min<int64_t>(TILE, position + 1 - first);
      const int64_t low =
          call.window ? std::max<int64_t>(0, position - call.window + 1 - first) : 0;
      if (low >= high) continue;
      int64_t head = 0;
      for (; head + 3 <= group; head += 3)
        attend_tile<3>(call, query, tile, low, high, part, token * group + head);
      for (; head < group; ++head)
        attend_tile<1>(call, query, tile, low, high, part, token * group + head);
    }
  }
}

template <class T>
void load_query(const Call& call, const Task& task, float* query) {
  const int64_t group = call.group(), dim = call.padded_dim();
  const int64_t first = call.cu_seqlens_q[task.seq] + task.first;
  for (int64_t token = 0; token < task.count; ++token)
    for (int64_t head = 0; head < group; ++head) {
      const T* from = static_cast<const T*>(call.query) +
                      (first + token) * call.query_strides[0] +
                      (task.kv_head * group + head) * call.query_strides[1];
      float* to = query + (token * group + head) * dim;
      for_vectors(call.head_dim, [&](int64_t, auto get, auto put) {
        put(to, get(from) * call.scale);
      });
    }
}

template <class T>
void store_out(const Call& call, const Task& task, const Partial& whole) {
  const int64_t group = call.group(), dim = call.padded_dim();
  const int64_t first = call.cu_seqlens_q[task.seq] + task.first;
  for (int64_t token = 0; token < task.count; ++token)
    for (int64_t head = 0; head < group; ++head) {
      const int64_t row = token * group + head;
      const float* from = whole.weighted + row * dim;
      T* to = static_cast<T*>(call.out) +
              ((first + token) * call.num_heads + task.kv_head * group + head) * call.head_dim;
      for_vectors(call.head_dim, [&](int64_t, auto get, auto put) {
        put(to, get(from) / whole.total[row]);
      });
    }
}

// A thread's memory for one task.
struct Workspace {
  Tile tile;
  float* query;
  Partial part, whole;

  static Workspace get(Scratch& scratch, int64_t rows, int64_t dim) {
    const int64_t part = (Partial::size(rows, dim) + W - 1) / W * W;
    float* memory = scratch.get<float>(2 * TILE * dim + rows * dim + 2 * part);
    float* query = memory + 2 * TILE * dim;
    float* first = query + rows * dim;
    return {{memory, memory + TILE * dim},
            query,
            Partial::at(first, rows, dim),
            Partial::at(first + part, rows, dim)};
  }
};

// Longest first, since tasks late in a sequence see more context.
std::vector<Task> list_tasks(const Call& call) {
  const int64_t tokens = std::max<int64_t>(1, QUERY_ROWS / call.group());
  std::vector<Task> tasks;
  for (int64_t seq = 0; seq < call.num_seqs; ++seq) {
    const int64_t count = call.cu_seqlens_q[seq + 1] - call.cu_seqlens_q[seq];
    for (int64_t first = 0; first < count; first += tokens)
      for (int64_t kv_head = 0; kv_head < call.num_kv_heads; ++kv_head)
        tasks.push_back({seq, kv_head, first, std::min(tokens, count - first),
                         call.seq_lens[seq] - count + first});
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.end() > b.end(); });
  return tasks;
}

int64_t max_rows(const std::vector<Task>& tasks, int64_t group) {
  int64_t rows = 0;
  for (const Task& task : tasks) rows = std::max(rows, task.count * group);
  return rows;
}

// One thread takes a task through all its splits.
template <class T, class Page>
void attend_tasks(const Call& call, const std::vector<Task>& tasks) {
  const int64_t dim = call.padded_dim(), num_tasks = tasks.size();
  const int64_t rows = max_rows(tasks, call.group());
#pragma omp parallel num_threads(call.num_threads)
  {
    static thread_local Scratch scratch;
    const Workspace work = Workspace::get(scratch, rows, dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < num_tasks; ++index) {
      const Task& task = tasks[index];
      const int64_t task_rows = task.count * call.group();
      load_query<T>(call, task, work.query);
      work.whole.clear(task_rows, dim);
      for (int64_t start = task.begin(call) / SPLIT * SPLIT; start < task.end();
           start += SPLIT) {
        work.part.clear(task_rows, dim);
        attend_split<Page>(call, task, work.query, start, std::min(start + SPLIT, task.end()),
                           work.tile, work.part);
        merge(work.whole, work.part, task_rows, dim);
      }
      store_out<T>(call, task, work.whole);
    }
  }
}

// Threads share the splits of few tasks; merged in the same order as above.
template <class T, class Page>
void attend_splits(const Call& call, const std::vector<Task>& tasks) {
  const int64_t dim = call.padded_dim(), num_tasks = tasks.size();
  const int64_t rows = max_rows(tasks, call.group());
  const int64_t part_size = (Partial::size(rows, dim) + W - 1) / W * W;
  struct Item {
    int64_t task, start;
  };
  std::vector<Item> items;
  std::vector<int64_t> first_item;
  for (int64_t index = 0; index < num_tasks; ++index) {
    first_item.push_back(items.size());
    for (int64_t start = tasks[index].begin(call) / SPLIT * SPLIT; start < tasks[index].end();
         start += SPLIT)
      items.push_back({index, start});
  }
  first_item.push_back(items.size());
  const int64_t num_items = items.size();
  static thread_local Scratch shared;
  float* parts = shared.get<float>(num_items * part_size);
#pragma omp parallel num_threads(call.num_threads)
  {
    static thread_local Scratch scratch;
    const Workspace work = Workspace::get(scratch, rows, dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < num_items; ++index) {
      const Task& task = tasks[items[index].task];
      const int64_t start = items[index].start, task_rows = task.count * call.group();
      const Partial part = Partial::at(parts + index * part_size, task_rows, dim);
      load_query<T>(call, task, work.query);
      part.clear(task_rows, dim);
      attend_split<Page>(call, task, work.query, start, std::min(start + SPLIT, task.end()),
                         work.tile, part);
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < num_tasks; ++index) {
      const int64_t task_rows = tasks[index].count * call.group();
      work.whole.clear(task_rows, dim);
      for (int64_t item = first_item[index]; item < first_item[index + 1]; ++item)
        merge(work.whole, Partial::at(parts + item * part_size, task_rows, dim), task_rows, dim);
      store_out<T>(call, tasks[index], work.whole);
    }
  }
}

template <class T, class Page>
void attend(const Call& call) {
  const std::vector<Task> tasks = list_tasks(call);
  if (tasks.empty()) return;
  const bool is_long = tasks.front().end() - tasks.front().begin(call) > SPLIT;
  if (is_long && call.num_threads > 1 &&
      static_cast<int64_t>(tasks.size()) < 4 * call.num_threads)
    attend_splits<T, Page>(call, tasks);
  else
    attend_tasks<T, Page>(call, tasks);
}

template <class T>
void dispatch_pages(const Call& call, int64_t page_dtype) {
  switch (page_dtype) {
    case F32: return attend<T, float>(call);
    case BF16: return attend<T, bf16>(call);
    case F16: return attend<T, f16>(call);
    case E4M3: return attend<T, e4m3>(call);
  }
}

// Whether every block that will be read exists.
bool has_blocks(const Call& call, int64_t num_blocks) {
  for (int64_t seq = 0; seq < call.num_seqs; ++seq) {
    const int64_t count = call.cu_seqlens_q[seq + 1] - call.cu_seqlens_q[seq];
    if (count == 0) continue;
    const int64_t end = call.seq_lens[seq];
    const int64_t needed = (end + call.block_size - 1) / call.block_size;
    if (count < 0 || count > end || needed > call.block_table_stride) return false;
    const Task whole{seq, 0, 0, count, end - count};
    for (int64_t i = whole.begin(call) / call.block_size; i < needed; ++i) {
      const int64_t block = call.block_table[seq * call.block_table_stride + i];
      if (block < 0 || block >= num_blocks) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace stepwire

// Strides are in elements; block_table rows are block_table_stride entries long; scales are null
// unless pages are e4m3; window and softcap of 0 are off. Returns 0, or 1 if a sequence needs a
// block that its row of the table lacks; nothing is written then.
extern "C" int64_t stepwire_paged_attention(
    const void* query, int64_t query_token_stride, int64_t query_head_stride, int64_t dtype,
    const void* key_pages, const void* value_pages, const float* key_scales,
    const float* value_scales, int64_t page_dtype, int64_t num_blocks,
    const int32_t* cu_seqlens_q, const int32_t* seq_lens, const int32_t* block_table,
    int64_t block_table_stride, void* out, int64_t num_seqs, int64_t num_heads,
    int64_t num_kv_heads, int64_t head_dim, int64_t block_size, float scale, int64_t window,
    float softcap, int64_t num_threads) {
  using namespace stepwire;
  const Call call{query,
                  {query_token_stride, query_head_stride},
                  key_pages,
                  value_pages,
                  key_scales,
                  value_scales,
                  cu_seqlens_q,
                  seq_lens,
                  block_table,
                  block_table_stride,
                  out,
                  num_seqs,
                  num_heads,
                  num_kv_heads,
                  head_dim,
                  block_size,
                  scale,
                  window,
                  softcap,
                  static_cast<int>(num_threads)};
  if (!has_blocks(call, num_blocks)) return 1;
  switch (dtype) {
    case F32: dispatch_pages<float>(call, page_dtype); break;
    case BF16: dispatch_pages<bf16>(call, page_dtype); break;
    case F16: dispatch_pages<f16>(call, page_dtype); break;
  }
  return 0;
}
