// What one call over all layers gets; kernels/layer_program/structures.py fills it in, field by
// field. Pointers are owned by the caller.
#pragma once

#include <cstdint>

#include "linear.h"
#include "quantized_linear.h"

namespace stepwire {

// A weight of either kind; the other pointer is null.
struct ProjectionPart {
  const DenseWeight* dense;
  const QuantizedWeight* quantized;
};

// Weights that share their input and write side by side.
struct Projection {
  const ProjectionPart* parts;
  int64_t num_parts;
  const void* bias;  // of all parts, or null
  int64_t bias_dtype;
  int64_t in_features, out_features;
};

struct LayerWeights {
  const void* input_norm;
  const void* query_norm;  // null: none
  const void* key_norm;
  const void* mlp_norm;
  Projection qkv, attention_output, gate_up, down;
  int64_t window;  // 0: unlimited
};

// The same for every step.
struct LayerProgram {
  const LayerWeights* layers;
  const void* final_norm;
  const float* cos_sin;
  int64_t num_layers, dtype, norm_dtype;
  int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
  int64_t max_positions, rotary_dim;
  int64_t mixing_size;  // of keys with scales of their own
  double attention_scale;
  float eps, min_amax;
};

struct LayerPages {
  void* key;
  void* value;
  void* key_scales;  // null: none
  void* value_scales;
  const float* key_offset;
  double static_key_scale, static_value_scale;  // 0: none
};

// The same for every step of a cache.
struct CachePages {
  const LayerPages* layers;
  int64_t dtype, num_blocks, block_size;
};

struct StepArguments {
  void* residual;  // [num_tokens, hidden_size], the tokens' embeddings; overwritten
  void* out;       // [num_logit_rows, hidden_size], normalised states
  const int64_t* positions;
  const int64_t* slots;
  const int32_t* cu_seqlens_q;
  const int32_t* seq_lens;
  const int32_t* block_table;
  const int64_t* logit_rows;
  int64_t num_tokens, num_seqs, num_logit_rows, block_table_stride, num_threads;
};

// The first two are RopeProblem's.
enum StepProblem : int64_t {
  NO_STEP_PROBLEM = 0,
  BLOCK_MISSING = 3,
  LOGIT_ROW_OUTSIDE = 4,
  SEQUENCE_OUTSIDE = 5,
};

}  // namespace stepwire
