// Causal attention over KV pages, as every thread of a team computes it together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace stepwire {

// Strides are in elements.
struct AttentionCall {
  const void* query;
  int64_t query_strides[2];  // token, head
  int64_t dtype;             // of query and out
  const void* key_pages;
  const void* value_pages;
  const bf16* key_scales;  // null unless pages are e4m3 with a scale a token
  const bf16* value_scales;
  int64_t page_dtype, num_blocks;
  const int32_t* cu_seqlens_q;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t block_table_stride;
  void* out;  // contiguous
  int64_t num_seqs, num_heads, num_kv_heads, head_dim, block_size;
  float scale;
  int64_t window;      // 0: unlimited
  float softcap;       // 0: none
  float value_factor;  // multiplies the result

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t padded_dim() const { return (head_dim + W - 1) / W * W; }
  int64_t largest_dim() const { return (head_dim + 2 * W - 1) / (2 * W) * (2 * W); }
};

// Query tokens [first, first + count) of a sequence, for one KV head.
struct AttentionTask {
  int64_t seq, kv_head, first, count;
  int64_t position;  // of the first token

  int64_t end() const { return position + count; }
  int64_t begin(const AttentionCall& call) const {
    return call.window && position >= call.window ? position - call.window + 1 : 0;
  }
};

// How threads share a call: the same for all layers of a step that have the same window.
struct AttentionPlan {
  // Part of a task's context.
  struct Item {
    int64_t task, start;
  };
  std::vector<AttentionTask> tasks;
  int64_t rows;  // most query rows of a task
  // Where few tasks have long contexts, threads share items rather than tasks.
  std::vector<Item> items;
  std::vector<int64_t> first_item;  // of each task, then the number of items; empty: no sharing
  size_t num_floats;                // memory that attend wants

  AttentionPlan(const AttentionCall& call, int64_t num_threads);
};

// Whether every block that will be read exists.
bool has_blocks(const AttentionCall& call);

// All threads of a team call it (one alone outside a parallel region) and return when it is done.
// memory: plan.num_floats, aligned to a cache line, shared by the team.
void attend(const AttentionCall& call, const AttentionPlan& plan, float* memory);

}  // namespace stepwire
