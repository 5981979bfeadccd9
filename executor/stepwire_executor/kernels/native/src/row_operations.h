// Operations on rows: normalisation, gated activation, rotary embedding with the cache write.
//
// All threads of a team call them (one alone outside a parallel region) and return when they are
// done. Strides are in elements.
#pragma once

#include <cstdint>

#include "vec.h"

namespace stepwire {

// Below this many elements waking other threads costs more than it saves.
constexpr int64_t PARALLEL_ELEMENTS = 32768;

inline int threads_for(int64_t num_elements, int64_t num_threads) {
  return num_elements < PARALLEL_ELEMENTS ? 1 : static_cast<int>(num_threads);
}

struct NormCall {
  const void* x;  // [num_outer, num_inner, size]
  int64_t outer_stride, inner_stride;
  int64_t dtype;
  const void* weight;
  int64_t weight_dtype;  // dtype or float32
  void* residual;        // contiguous, or null; the sum is stored here
  void* out;             // contiguous
  float eps;
  int64_t num_outer, num_inner, size;
};

void rms_norm(const NormCall& call);

// out[row][i] = silu(x[row][i]) * x[row][size + i]; out is contiguous.
void silu_and_mul(const void* x, int64_t stride, int64_t dtype, void* out, int64_t num_rows,
                  int64_t size);

struct RopeCall {
  void* query;
  const void* key;
  const void* value;
  int64_t query_strides[2], key_strides[2], value_strides[2];  // token, head
  int64_t dtype;
  const float* cos_sin;
  int64_t max_positions, rotary_dim;
  const int64_t* positions;
  const int64_t* slots;
  void* key_pages;
  void* value_pages;
  // Null unless pages are e4m3 with a scale a token. Without them e4m3 pages hold multiples of the
  // static scales.
  bf16* key_scales;
  bf16* value_scales;
  const float* key_offset;  // [num_kv_heads, head_dim], of keys with scales, or null
  int64_t page_dtype;
  int64_t num_slots, block_size;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim;
  int64_t mixing_size;  // elements that are mixed, a power of two; 1: none
  float min_amax;
  float static_key_scale, static_value_scale;
};

enum RopeProblem : int64_t { NO_ROPE_PROBLEM = 0, POSITION_OUTSIDE = 1, SLOT_OUTSIDE = 2 };

// Whether every position has its cosines and every slot its place.
RopeProblem find_problem(const RopeCall& call);

// Rotates queries in place, and keys on their way to the pages; find_problem must have found none.
void rope_and_write_kv(const RopeCall& call);

}  // namespace stepwire
