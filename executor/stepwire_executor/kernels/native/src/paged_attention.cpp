// Causal attention over KV pages with an online softmax.
//
// The context is walked in splits of 256 tokens, and tiles of 64, at absolute positions, and a
// row's arithmetic inside a split depends on the row's position only. So its bits do not depend
// on how its sequence was cut into chunks, on other rows, on where blocks lie, or on threads.

#include "paged_attention.h"

#include <algorithm>

#include "attention_dot.h"
#include "attention_tile.h"
#include "parallel.h"

namespace stepwire {
namespace {

constexpr int QUERY_ROWS = 96;  // rows that share a tile: query tokens times heads of a group

template <class Kind>
void load_query(const Call& call, const Task& task, typename Kind::Row* query) {
  const int64_t group = call.group(), size = Kind::row_size(call);
  const int64_t first = call.cu_seqlens_q[task.seq] + task.first;
  for (int64_t token = 0; token < task.count; ++token)
    for (int64_t head = 0; head < group; ++head)
      Kind::load_query(call,
                       static_cast<const typename Kind::Query*>(call.query) +
                           (first + token) * call.query_strides[0] +
                           (task.kv_head * group + head) * call.query_strides[1],
                       query + (token * group + head) * size);
}

template <class Kind>
void store_out(const Call& call, const Task& task, const Partial& whole) {
  const int64_t group = call.group(), dim = Kind::dim(call);
  const int64_t first = call.cu_seqlens_q[task.seq] + task.first;
  for (int64_t token = 0; token < task.count; ++token)
    for (int64_t head = 0; head < group; ++head) {
      const int64_t row = token * group + head;
      const float* from = whole.weighted + row * dim;
      auto* to = static_cast<typename Kind::Query*>(call.out) +
                 ((first + token) * call.num_heads + task.kv_head * group + head) * call.head_dim;
      const float factor = call.value_factor / whole.total[row];
      for_vectors(call.head_dim, [&](int64_t, auto get, auto put) {
        put(to, get(from) * factor);
      });
    }
}

// A thread's memory for one task.
template <class Kind>
struct Workspace {
  typename Kind::Tile tile;
  typename Kind::Row* query;
  Partial part, whole;

  static Workspace get(Scratch& scratch, int64_t rows, int64_t dim) {
    const int64_t part = (Partial::size(rows, dim) + W - 1) / W * W;
    float* memory = scratch.get<float>(Kind::tile_floats(dim) + rows * dim + 2 * part);
    float* query = memory + Kind::tile_floats(dim);
    float* first = query + rows * dim;
    return {Kind::tile(memory, dim), reinterpret_cast<typename Kind::Row*>(query),
            Partial::at(first, rows, dim), Partial::at(first + part, rows, dim)};
  }
};

int64_t part_size(int64_t rows, int64_t dim) {
  return (Partial::size(rows, dim) + W - 1) / W * W;
}

// Where a task begins, if there is one.
Place first_place(const Call& call, const AttentionPlan& plan, size_t index) {
  if (index >= plan.tasks.size()) return {nullptr, 0};
  return {&plan.tasks[index], plan.tasks[index].begin(call) / SPLIT * SPLIT};
}

// One thread takes a task through all its splits. What comes next is a guess: as if threads took
// turns.
template <class Kind>
void attend_tasks(const Call& call, const AttentionPlan& plan, const Workspace<Kind>& work) {
  const int64_t num_tasks = plan.tasks.size();
#pragma omp for schedule(dynamic, 1)
  for (int64_t index = 0; index < num_tasks; ++index) {
    const Task& task = plan.tasks[index];
    const int64_t rows = task.count * call.group();
    load_query<Kind>(call, task, work.query);
    const int64_t first = task.begin(call) / SPLIT * SPLIT;
    for (int64_t start = first; start < task.end(); start += SPLIT) {
      const Partial& part = start == first ? work.whole : work.part;
      const int64_t stop = std::min(start + SPLIT, task.end());
      Place next{&task, stop};
      if (stop == task.end()) next = first_place(call, plan, index + omp_get_num_threads());
      Kind::attend_split(call, task, work.query, start, stop, next, work.tile, part);
      if (start != first) merge<Kind>(call, work.whole, part, rows);
    }
    store_out<Kind>(call, task, work.whole);
  }
}

// Threads share the splits of few tasks; merged in the same order as above.
template <class Kind>
void attend_splits(const Call& call, const AttentionPlan& plan, const Workspace<Kind>& work,
                   float* parts) {
  const int64_t dim = Kind::dim(call), size = part_size(plan.rows, dim);
  const int64_t num_tasks = plan.tasks.size(), num_items = plan.items.size();
#pragma omp for schedule(dynamic, 1)
  for (int64_t index = 0; index < num_items; ++index) {
    const Task& task = plan.tasks[plan.items[index].task];
    const int64_t start = plan.items[index].start, rows = task.count * call.group();
    const Partial part = Partial::at(parts + index * size, rows, dim);
    load_query<Kind>(call, task, work.query);
    const int64_t later = index + omp_get_num_threads();
    Place next{nullptr, 0};
    if (later < num_items) next = {&plan.tasks[plan.items[later].task], plan.items[later].start};
    Kind::attend_split(call, task, work.query, start, std::min(start + SPLIT, task.end()), next,
                       work.tile, part);
  }
#pragma omp for schedule(static)
  for (int64_t index = 0; index < num_tasks; ++index) {
    const int64_t rows = plan.tasks[index].count * call.group();
    const int64_t first = plan.first_item[index];
    const Partial whole = Partial::at(parts + first * size, rows, dim);
    for (int64_t item = first + 1; item < plan.first_item[index + 1]; ++item)
      merge<Kind>(call, whole, Partial::at(parts + item * size, rows, dim), rows);
    store_out<Kind>(call, plan.tasks[index], whole);
  }
}

template <class Kind>
void attend_as(const Call& call, const AttentionPlan& plan, float* memory) {
  static thread_local Scratch scratch;
  const auto work = Workspace<Kind>::get(scratch, plan.rows, Kind::dim(call));
  if (plan.first_item.empty())
    attend_tasks<Kind>(call, plan, work);
  else
    attend_splits<Kind>(call, plan, work, memory);
}

template <class T>
void dispatch_pages(const Call& call, const AttentionPlan& plan, float* memory) {
  switch (call.page_dtype) {
    case F32: return attend_as<Wide<T, float>>(call, plan, memory);
    case BF16:
#ifdef STEPWIRE_ATTENTION_DOT
      if constexpr (std::is_same_v<T, bf16>) return attend_as<Dot>(call, plan, memory);
#endif
      return attend_as<Wide<T, bf16>>(call, plan, memory);
    case F16: return attend_as<Wide<T, f16>>(call, plan, memory);
    case E4M3: return attend_as<Wide<T, e4m3>>(call, plan, memory);
  }
}

}  // namespace

AttentionPlan::AttentionPlan(const AttentionCall& call, int64_t num_threads)
    : rows(0), num_floats(0) {
  const int64_t group = call.group(), tokens = std::max<int64_t>(1, QUERY_ROWS / group);
  for (int64_t seq = 0; seq < call.num_seqs; ++seq) {
    const int64_t count = call.cu_seqlens_q[seq + 1] - call.cu_seqlens_q[seq];
    for (int64_t first = 0; first < count; first += tokens)
      for (int64_t kv_head = 0; kv_head < call.num_kv_heads; ++kv_head) {
        const int64_t taken = std::min(tokens, count - first);
        tasks.push_back({seq, kv_head, first, taken, call.seq_lens[seq] - count + first});
        rows = std::max(rows, taken * group);
      }
  }
  // Longest first, since tasks late in a sequence see more context.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.end() > b.end(); });
  const int64_t num_tasks = tasks.size();
  if (!num_tasks || num_threads == 1 || num_tasks >= 4 * num_threads ||
      tasks.front().end() - tasks.front().begin(call) <= SPLIT)
    return;
  for (int64_t index = 0; index < num_tasks; ++index) {
    first_item.push_back(items.size());
    for (int64_t start = tasks[index].begin(call) / SPLIT * SPLIT; start < tasks[index].end();
         start += SPLIT)
      items.push_back({index, start});
  }
  first_item.push_back(items.size());
  num_floats = items.size() * part_size(rows, call.largest_dim());
}

bool has_blocks(const AttentionCall& call) {
  for (int64_t seq = 0; seq < call.num_seqs; ++seq) {
    const int64_t count = call.cu_seqlens_q[seq + 1] - call.cu_seqlens_q[seq];
    if (count == 0) continue;
    const int64_t end = call.seq_lens[seq];
    const int64_t needed = (end + call.block_size - 1) / call.block_size;
    if (count < 0 || count > end || needed > call.block_table_stride) return false;
    const Task whole{seq, 0, 0, count, end - count};
    for (int64_t i = whole.begin(call) / call.block_size; i < needed; ++i) {
      const int64_t block = call.block_table[seq * call.block_table_stride + i];
      if (block < 0 || block >= call.num_blocks) return false;
    }
  }
  return true;
}

void attend(const AttentionCall& call, const AttentionPlan& plan, float* memory) {
  switch (call.dtype) {
    case F32: return dispatch_pages<float>(call, plan, memory);
    case BF16: return dispatch_pages<bf16>(call, plan, memory);
    case F16: return dispatch_pages<f16>(call, plan, memory);
  }
}

}  // namespace stepwire

// block_table rows are block_table_stride entries long. Returns 0, or 1 if a sequence needs a block
// that its row of the table lacks; nothing is written then.
extern "C" int64_t stepwire_paged_attention(
    const void* query, int64_t query_token_stride, int64_t query_head_stride, int64_t dtype,
    const void* key_pages, const void* value_pages, const void* key_scales,
    const void* value_scales, int64_t page_dtype, int64_t num_blocks,
    const int32_t* cu_seqlens_q, const int32_t* seq_lens, const int32_t* block_table,
    int64_t block_table_stride, void* out, int64_t num_seqs, int64_t num_heads,
    int64_t num_kv_heads, int64_t head_dim, int64_t block_size, float scale, int64_t window,
    float softcap, float value_factor, int64_t num_threads) {
  using namespace stepwire;
  const AttentionCall call{query,
                           {query_token_stride, query_head_stride},
                           dtype,
                           key_pages,
                           value_pages,
                           static_cast<const bf16*>(key_scales),
                           static_cast<const bf16*>(value_scales),
                           page_dtype,
                           num_blocks,
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
                           value_factor};
  if (!has_blocks(call)) return 1;
  const AttentionPlan plan(call, num_threads);
  if (plan.tasks.empty()) return 0;
  static thread_local Scratch scratch;
  float* memory = scratch.get<float>(plan.num_floats);
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  attend(call, plan, memory);
  return 0;
}
